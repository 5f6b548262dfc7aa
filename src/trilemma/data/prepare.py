"""From a configuration to a dataset: finds the sources, trains the tokenizer, fills the token cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from trilemma.config import DataConfig, RunConfig, Source
from trilemma.data.cache import (
    Progress,
    StoreBuilder,
    TokenStore,
    content_hash,
    default_cache_dir,
    hash_file,
    hash_values_of,
    locked,
    open_or_build,
)
from trilemma.data.dataset import Dataset, check_layout
from trilemma.data.generated import GENERATOR_VERSION, generate
from trilemma.data.probes.prepare import prepare_probe
from trilemma.data.questions import read_questions, rows_of
from trilemma.data.readers import (
    FIELDS,
    Example,
    check_file,
    example_of,
    file_format,
    is_streamed,
    read_documents,
    read_records,
    source_files,
)
from trilemma.data.splits import Partition
from trilemma.data.subwords import COPY_VERSION, SubwordDropout
from trilemma.data.tokenizer import Tokenizer, bring_tokenizer, train_tokenizer
from trilemma.errors import ConfigError, DataError, nearest
from trilemma.machine import return_freed_memory

_PREPARE_VERSION = 2
_BATCH = 1000
_CHARACTERS = 1 << 20
_DOCUMENT_NOTES = {
    "line": "each line or record is one document; option documents of a source: line, blank, file",
    "blank": "documents of plain text end at empty lines; option documents of a source: line, blank, file",
    "file": "each text file is one document, line ends kept; option documents of a source: line, blank, file",
}
Encoder = Callable[[list[str]], list[list[int]]]
Item = tuple[Example, bool]  # an example, or a piece of one, and whether the example ends with it


def prepare(
    config: RunConfig,
    tokenizer: Tokenizer | None = None,
    cache_dir: str | Path | None = None,
    data: Iterable[object] | Mapping[str, Iterable[object]] | None = None,
) -> tuple[Dataset, Tokenizer]:
    """Reads, tokenises and caches the data of a run.

    Args:
        config: `data`, `tokenizer`, `training.batch_tokens`, `seed` and `model.layout` are used.
        tokenizer: one to use instead of `config.tokenizer`'s (resuming, evaluating).
        cache_dir: of token stores; None: `default_cache_dir()`.
        data: training examples instead of `config.data.train`: str, (source, target) or dict; or a mapping from split
            names to such iterables. It is read once and kept in the cache.

    Returns:
        The dataset and its tokenizer.

    Raises:
        DataError: a source is missing, empty, misaligned or malformed, or training examples are over the limits.
        ConfigError, CapabilityError: the settings do not fit each other.
    """
    check_layout(config)
    check_subwords(config)
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    task = config.data.task
    if task in ("probe", "question-answering") and data is not None:
        where = "is generated" if task == "probe" else "reads .json files"
        raise ConfigError(f"data.task {task} {where}: no data can be given")
    sources = _sources(config, root, data)
    if task == "probe":
        return prepare_probe(config, sources, tokenizer, root)
    partition = Partition.of(config.data, sources)
    kind = _Questions if task == "question-answering" else _Input
    inputs = {
        split: [kind(source, split, config, root, partition) for source in found] for split, found in sources.items()
    }
    if tokenizer is None:
        tokenizer = _tokenizer(config, inputs["train"], root)
    labels = _labels(config.data, inputs["train"]) if task == "classification" else None
    stores = {
        split: [item.store(tokenizer, labels, keep_text=split != "train") for item in items]
        for split, items in inputs.items()
    }
    weights = [source.weight for source in sources["train"]]
    places = [item.place for item in inputs["train"]]
    copies = _copies(config, inputs["train"], tokenizer, labels)
    dataset = Dataset(config, tokenizer, stores, weights, labels, places, copies)
    if partition is not None:
        for split, size in dataset.sizes.items():
            if size == 0:
                raise DataError(f"data.split: no example is left for {split}; give it a larger share")
        dataset.notes |= partition.notes(dataset.sizes)
    if is_streamed(task):
        dataset.notes["data.documents"] = _DOCUMENT_NOTES[inputs["train"][0].documents]
    return dataset, tokenizer


def _sources(
    config: RunConfig, root: Path, data: Iterable[object] | Mapping[str, Iterable[object]] | None
) -> dict[str, list[Source]]:
    """The sources of each split; a generated task brings its own valid and test."""
    given: Mapping[str, Iterable[object]] = {}
    if data is not None:
        given = data if isinstance(data, Mapping) else {"train": data}
    for split in given:
        if split not in ("train", "valid", "test"):
            raise ConfigError(f'data: unknown split "{split}"{nearest(str(split), ("train", "valid", "test"))}')
    train = config.data.train if isinstance(config.data.train, list) else [config.data.train]
    if not train:
        raise ConfigError("data.train: at least one source is needed")
    found = {"train": train}
    if "train" in given:
        found["train"] = [_spool(given["train"], config.data.task, "train", root)]
    for split, source in (("valid", config.data.valid), ("test", config.data.test)):
        if split in given:
            found[split] = [_spool(given[split], config.data.task, split, root)]
        elif source is not None:
            found[split] = [source]
        elif "train" not in given and train[0].generated is not None:
            found[split] = [train[0].model_copy(update={"size": None, "weight": 1.0})]
        elif getattr(config.data.split, split, 0.0):
            found[split] = found["train"]
    return found


def _spool(items: Iterable[object], task: str, split: str, root: Path) -> Source:
    """Writes the items of an iterable to a .jsonl file in the cache, so that it can be read more than once."""
    fields = FIELDS[task]
    folder = root / "iterables"
    with locked(folder, "writing"):
        temporary = folder / "writing.jsonl"
        count = 0
        with temporary.open("w", encoding="ascii") as stream:
            for count, item in enumerate(items, start=1):
                example = example_of(item, task, f"data[{split}] item {count}")
                stream.write(json.dumps(dict(zip(fields, example, strict=True))) + "\n")
        if count == 0:
            raise DataError(f"data: the {split} iterable is empty")
        target = folder / f"{hash_file(temporary)}.jsonl"
        temporary.replace(target)
    return Source.model_validate({"path": str(target)})


class _Input:
    """One source of one split: where its examples come from, and the key of what is made from them."""

    def __init__(
        self, source: Source, split: str, config: RunConfig, root: Path, partition: Partition | None = None
    ) -> None:
        self.source, self.split, self.root, self.task = source, split, root, config.data.task
        self.partition = partition
        self.lowercase = config.data.lowercase
        self.files = source_files(source)
        for path in self.files:
            check_file(path)
        default = "line" if config.data.packing else "file"
        self.documents = str(source.options.get("documents", default)) if source.generated is None else "line"
        self.name = str(self.files[0]) if self.files else f"generated {source.generated}"
        self.key = hash_values_of(
            _PREPARE_VERSION,
            [(content_hash(path, root), file_format(path), path.suffix) for path in self.files],
            [source.generated, source.size, source.options, split if source.generated else "", GENERATOR_VERSION],
            [self.task, self.lowercase, self.documents if is_streamed(self.task) else ""],
        )
        if partition is not None:
            self.name = f"{self.name} ({split})"
            self.key = hash_values_of(self.key, split, partition.fingerprint)

    def place(self, index: int) -> str:
        """Where the example of an index, from 0, stands: its line where an example is a line."""
        if not self.files or self.partition is not None or file_format(self.files[0]) == ".parquet":
            return f"{self.name}, example {index + 1}"
        return f"{self.name}:{index + 1 + bool(self.source.options.get('header', False))}"

    def examples(self) -> Iterator[Item]:
        """The examples, lower-cased where asked for."""
        for example, ends in self._raw_items():
            if self.partition is not None and not self.partition.holds(self.split, example):
                continue
            yield (tuple(text.lower() for text in example) if self.lowercase else example), ends

    def _raw_items(self) -> Iterator[Item]:
        if self.source.generated is not None:
            # The run's seed has no part in this: runs that differ in their seed share data, tokenizer and test set.
            pairs = generate(self.source.generated, self.split, self.source.size, self.source.options)
            for source, target in pairs:
                yield ((f"{source} = {target}",) if is_streamed(self.task) else (source, target)), True
        elif is_streamed(self.task):
            for text, ends in read_documents(self.source, self.task, self.documents):
                yield (text,), ends
        else:
            for example in read_records(self.source, self.task):
                yield example, True

    def texts(self) -> Iterator[str]:
        """What a tokenizer learns from: every text, without class labels."""
        fields = [index for index, field in enumerate(FIELDS[self.task]) if field != "label"]
        for example, _ in self.examples():
            for index in fields:
                yield example[index]

    def store(self, tokenizer: Tokenizer, labels: list[str] | None, keep_text: bool) -> TokenStore:
        """The token store of this input, from the cache or built now."""
        key = hash_values_of("store", self.key, tokenizer.fingerprint, labels, keep_text)
        root = self.root / "tokens"

        def build() -> TokenStore:
            with StoreBuilder(root, key, FIELDS[self.task], keep_text) as builder:
                encoders = [_encoder(field, tokenizer, labels, self.name) for field in FIELDS[self.task]]
                unknown = self._fill(builder, encoders, tokenizer)
                lines = self.files and self.documents == "line" and file_format(self.files[0]) == ".txt"
                line_ends = builder.size if lines and is_streamed(self.task) else 0
                about = {"name": self.name, "input": self.key, "line_ends": line_ends, "unknown": unknown}
                return builder.publish(about)

        return open_or_build(root, key, build)

    def copy(self, number: int, tokenizer: Tokenizer, subwords: SubwordDropout, labels: list[str] | None) -> TokenStore:
        """The token store of one segmentation with subword dropout, from the cache or built now.

        As with generated data, the run's seed has no part in the draws: runs that differ in their seed share the data.
        """
        key = hash_values_of("copy", COPY_VERSION, self.key, tokenizer.fingerprint, labels, subwords.rate, number)
        root = self.root / "tokens"

        def encoder(field: str) -> Encoder:
            if field == "label":
                return _encoder(field, tokenizer, labels, self.name)
            return subwords.encoder(f"subwords.{number}.{field}")

        def build() -> TokenStore:
            with StoreBuilder(root, key, FIELDS[self.task], keep_text=False) as builder:
                self._fill(builder, [encoder(field) for field in FIELDS[self.task]], tokenizer)
                return builder.publish({"name": self.name, "input": self.key, "copy": number})

        return open_or_build(root, key, build)

    def _fill(self, builder: StoreBuilder, encoders: list[Encoder], tokenizer: Tokenizer) -> dict[str, int]:
        """Tokenises all examples; returns how many tokens of each field of text are unknown."""
        unknown = {field: 0 for field in builder.fields if field != "label"}
        progress = Progress(f"tokenising {self.name}")
        for chunk in _chunks(self.examples()):
            columns = [encode([example[i] for example, _ in chunk]) for i, encode in enumerate(encoders)]
            for field, column in zip(builder.fields, columns, strict=True):
                if field in unknown:
                    unknown[field] += sum(tokenizer.count_unknown(ids) for ids in column)
            for row, (example, ends) in enumerate(chunk):
                for index, field in enumerate(builder.fields):
                    builder.append(field, columns[index][row], example[index])
                if ends:
                    builder.finish_example()
            progress.add(len(chunk))
        return unknown


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Items to tokenise at once: a thousand, or fewer that are long, so that memory depends on neither."""
    chunk: list[Item] = []
    characters = 0
    for item in items:
        chunk.append(item)
        characters += sum(map(len, item[0]))
        if len(chunk) == _BATCH or characters >= _CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class _Questions(_Input):
    """Questions about passages: each window of a passage is an example."""

    def __init__(
        self, source: Source, split: str, config: RunConfig, root: Path, partition: Partition | None = None
    ) -> None:
        super().__init__(source, split, config, root, partition)
        self.data = config.data

    def texts(self) -> Iterator[str]:
        """Questions, and each passage once."""
        passage = None
        for item in read_questions(self.source):
            if item.passage != passage:
                passage = item.passage
                yield passage
            yield item.question

    def store(self, tokenizer: Tokenizer, labels: list[str] | None, keep_text: bool) -> TokenStore:
        """The token store of the windows; the text stays in its file."""
        sizes = [self.data.context_length, self.data.window_overlap]
        key = hash_values_of("questions", self.key, tokenizer.fingerprint, sizes)
        root = self.root / "tokens"

        def build() -> TokenStore:
            progress = Progress(f"tokenising {self.name}")
            encode = lru_cache(maxsize=1)(tokenizer.encode_with_offsets)  # questions about one passage stand together
            with StoreBuilder(root, key, FIELDS[self.task], keep_text=False) as builder:
                for item in read_questions(self.source):
                    for tokens, span in rows_of(item, encode(item.passage), tokenizer, self.data):
                        builder.append("tokens", tokens, "")
                        builder.append("labels", span, "")
                        builder.finish_example()
                    progress.add(1)
                return builder.publish({"name": self.name, "input": self.key})

        return open_or_build(root, key, build)


def check_subwords(config: RunConfig) -> None:
    """`ConfigError` where subword dropout is asked for and the task has no use for it."""
    task = config.data.task
    if config.training.subword_dropout is not None and task not in ("seq2seq", "classification"):
        raise ConfigError(
            f"training.subword_dropout is for data.task seq2seq and classification, not {task}: leave it out"
        )


def _copies(
    config: RunConfig, inputs: list[_Input], tokenizer: Tokenizer, labels: list[str] | None
) -> list[list[TokenStore]]:
    """Other segmentations of the training text, where the config asks for them."""
    rate = config.training.subword_dropout
    if rate is None:
        return []
    subwords = SubwordDropout(tokenizer, rate)
    return [
        [item.copy(number, tokenizer, subwords, labels) for item in inputs]
        for number in range(config.training.subword_copies)
    ]


def _encoder(field: str, tokenizer: Tokenizer, labels: list[str] | None, name: str) -> Encoder:
    if field != "label":
        return (tokenizer.of_targets() if field == "target" else tokenizer).encode_batch
    assert labels is not None
    ids = {label: index for index, label in enumerate(labels)}

    def encode_labels(texts: list[str]) -> list[list[int]]:
        for text in texts:
            if text not in ids:
                raise DataError(f'{name}: the label "{text}" does not occur in the training data{nearest(text, ids)}')
        return [[ids[text]] for text in texts]

    return encode_labels


def _labels(data: DataConfig, inputs: list[_Input]) -> list[str]:
    """Names of the classes: the config's, else those of the training data in order (as numbers where all are)."""
    if data.labels is not None:
        return data.labels
    found = {example[1] for item in inputs for example, _ in item.examples()}
    if len(found) < 2:
        raise DataError(f"{inputs[0].name}: classification needs two labels or more, found {sorted(found)}")
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found)


def _tokenizer(config: RunConfig, inputs: list[_Input], root: Path) -> Tokenizer:
    """The tokenizer that the config asks for; one that was trained on the same text before is found again."""
    lowercase = config.data.lowercase
    if config.tokenizer.kind == "file":
        return bring_tokenizer(config.tokenizer, lowercase)
    key = hash_values_of("tokenizer", config.tokenizer.model_dump(), lowercase, [item.key for item in inputs])
    folder = root / "tokenizers"
    with locked(folder, key):
        path = folder / f"{key}.json"
        if path.is_file():
            return Tokenizer.load(path)
        progress = Progress(f"training a {config.tokenizer.kind} tokenizer on {inputs[0].name}")
        trained = train_tokenizer(_counted(inputs, progress), config.tokenizer, lowercase)
        return_freed_memory()  # of the words that were counted, which text and its index would be held on top of
        temporary = path.with_suffix(".tmp")
        trained.save(temporary)
        temporary.replace(path)
        return trained


def _counted(inputs: list[_Input], progress: Progress) -> Iterator[str]:
    for item in inputs:
        for text in item.texts():
            progress.add(1)
            yield text
