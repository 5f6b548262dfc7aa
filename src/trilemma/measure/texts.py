"""The raw text of what is scored: a run's own split, or files; without its training data.

A run can be scored where its training data are not: only the split itself is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trilemma.config import RunConfig, Source
from trilemma.data.generated import generate
from trilemma.data.questions import Question, read_questions
from trilemma.data.readers import file_format, is_streamed, read_documents, read_records, source_files
from trilemma.data.splits import split_examples
from trilemma.errors import ConfigError, DataError


@dataclass(frozen=True)
class Texts:
    """Lines to score.

    Attributes:
        name: the split, or the file.
        sources, targets: as `Dataset.eval_texts` gives them: targets are empty for language models, labels for classes.
        line_ends: bytes of line ends that end-of-sequence stands for, in all.
    """

    name: str
    sources: list[str]
    targets: list[str]
    line_ends: int = 0


def split_texts(config: RunConfig, split: Literal["valid", "test"]) -> Texts:
    """The lines of a run's split, equal to those of `Dataset.eval_texts`.

    Raises:
        DataError: the run has no such split, or its files are gone or malformed.
    """
    if config.data.split is not None:
        return _divided(config, split)
    return _read(config, _split_source(config, split), split, split)


def _divided(config: RunConfig, split: Literal["valid", "test"]) -> Texts:
    """The lines of a split that `data.split` takes out of the training sources."""
    if not getattr(config.data.split, split):
        raise DataError(f"there is no {split} data: set data.split.{split} in the config, or name files to score")
    examples = list(split_examples(config.data, split))
    if not examples:
        raise DataError(f"data.split: no example is left for {split}; give it a larger share")
    columns = [[example[place] for example in examples] for place in range(len(examples[0]))]
    if is_streamed(config.data.task):
        sources = config.data.train if isinstance(config.data.train, list) else [config.data.train]
        lines = all(file_format(source_files(source)[0]) == ".txt" for source in sources)
        return Texts(split, columns[0], [], line_ends=len(examples) if lines else 0)
    return Texts(split, columns[0], columns[1])


def _split_source(config: RunConfig, split: Literal["valid", "test"]) -> Source:
    source: Source | None = getattr(config.data, split)
    if source is None:
        sources = [config.data.train] if isinstance(config.data.train, Source) else config.data.train
        train = sources[0] if sources else None  # an imported run brings no data
        if train is None or train.generated is None:
            raise DataError(f"there is no {split} data: set data.{split} in the config, or name files to score")
        source = train.model_copy(update={"size": None, "weight": 1.0})
    return source


def questions_of(config: RunConfig, split: Literal["valid", "test"], file: Path | None = None) -> list[Question]:
    """The questions of a file given by hand, or of a run's split.

    Raises:
        DataError: the run has no such split, or the file is missing or malformed. ConfigError: no .json file.
    """
    source = _split_source(config, split) if file is None else Source(path=str(file))
    return list(read_questions(source))


def file_texts(config: RunConfig, files: list[Path]) -> Texts:
    """The lines of files given by hand: one file of examples, or a source and a target file.

    What a document of text is (a line, or the whole file) is as in the run's own test data, or else its training data.

    Raises:
        ConfigError: more than two files. DataError: missing, empty, misaligned or malformed.
    """
    if len(files) == 1:
        train = [config.data.train] if isinstance(config.data.train, Source) else config.data.train
        sources = [config.data.test, *train] if config.data.test is not None else train
        own = sources[0].options if sources else {}  # an imported run has no data
        options = {"documents": own["documents"]} if is_streamed(config.data.task) and "documents" in own else {}
        return _read(config, Source(path=str(files[0]), options=options), "test", files[0].name)
    if len(files) != 2 or is_streamed(config.data.task):
        wanted = "one file" if is_streamed(config.data.task) else "one file of examples, or a source and a target file"
        raise ConfigError(f"a {config.data.task} run is scored on {wanted}; {len(files)} files were given")
    source = Source.model_validate({"source": str(files[0]), "target": str(files[1])})
    return _read(config, source, "test", files[1].name)


def _read(config: RunConfig, source: Source, split: str, name: str) -> Texts:
    task = config.data.task
    documents = str(source.options.get("documents", "line" if config.data.packing else "file"))
    if source.generated is not None:
        pairs = list(generate(source.generated, split, source.size, source.options))
        if is_streamed(task):
            return Texts(name, [f"{first} = {second}" for first, second in pairs], [])
        return Texts(name, [first for first, _ in pairs], [second for _, second in pairs])
    if not is_streamed(task):
        examples = list(read_records(source, task))
        return Texts(name, [example[0] for example in examples], [example[1] for example in examples])
    texts, pieces = [], []
    for piece, ends in read_documents(source, task, documents):
        pieces.append(piece)
        if ends:
            texts.append("".join(pieces))
            pieces = []
    lines = documents == "line" and file_format(source_files(source)[0]) == ".txt"
    return Texts(name, texts, [], line_ends=len(texts) if lines else 0)
