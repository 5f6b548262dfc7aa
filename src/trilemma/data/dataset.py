"""A dataset: one task, layout and tokenizer over token stores, giving micro-batches by number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trilemma.config import RunConfig
from trilemma.data.batch import (
    Batch,
    Row,
    classification_batch,
    concatenated_batch,
    encoder_decoder_batch,
    labelled_batch,
    mask_batch,
    question_batch,
    stream_batch,
)
from trilemma.data.cache import TokenStore, hash_values_of
from trilemma.data.order import Indices
from trilemma.data.plan import PairPlan, Part, Piece, StreamPlan
from trilemma.data.readers import FIELDS, is_streamed
from trilemma.data.tokenizer import Tokenizer
from trilemma.errors import CapabilityError, ConfigError, DataError, LengthError

Split = Literal["train", "valid", "test"]
EvalSplit = Literal["valid", "test"]

_ROUNDING = 1024  # a vocabulary may be rounded up by this much, for the sake of fast products
_LAYOUTS = {
    "seq2seq": ("encoder-decoder", "decoder-only"),
    "language-model": ("decoder-only",),
    "classification": ("encoder-only",),
    "masked-language-model": ("encoder-only",),
    "question-answering": ("encoder-only",),
    "probe": ("decoder-only",),
}


class Dataset:
    """Training batches by number and evaluation batches in a fixed order.

    Attributes:
        sizes: examples of each split (documents, for language models), before any are dropped.
        dropped: training examples that are over the limits of `data.max_source_length` and its like.
        label_names: classification: names of the classes, in the order of their ids.
        places: of each train source, where the example of an index stands: "FILE:LINE".
        notes: what was decided or found while preparing, for the run's `notes`.
        data_hash: SHA-256 of the tokens and settings of all splits, independent of paths and of the machine.
        copies: other segmentations of the train stores; where there are any, epoch e is read from copy e mod their
            number. Order, batches and limits are those of the train stores.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        stores: dict[str, list[TokenStore]],
        weights: list[float],
        label_names: list[str] | None = None,
        places: Sequence[Callable[[int], str]] | None = None,
        copies: Sequence[list[TokenStore]] = (),
    ) -> None:
        check_layout(config)
        self.config, self.tokenizer, self.stores = config, tokenizer, stores
        self.task, self.label_names, self.copies = config.data.task, label_names, copies
        self.notes: dict[str, str] = {}
        self.dropped = 0
        self.sizes = {split: sum(store.size for store in parts) for split, parts in stores.items()}
        self._places = places or [partial(_example_of, f"source {rank}") for rank in range(1, len(weights) + 1)]
        self._weights = weights
        self._eval_plans: dict[str, PairPlan | StreamPlan] = {}
        self._train_plan = self._stream_plan("train") if is_streamed(self.task) else self._pair_plan("train")
        contents = {split: [store.content_hash for store in parts] for split, parts in sorted(stores.items())}
        contents |= {f"train {place}": [store.content_hash for store in parts] for place, parts in enumerate(copies)}
        self.data_hash = hash_values_of("data", 1, self.task, contents, weights)
        if copies:
            self.notes["data.copies"] = self._note_of_copies()
        if config.data.lowercase:
            self.notes["data.lowercase"] = "all text, references included, is lower-cased"
        self._note_empty()
        self._note_unknown()

    # Training

    def micro_batch(self, k: int) -> Batch:
        """Micro-batch k >= 0: a pure function of (seed, k), for every k, in any order; epochs follow one another.

        Its padded tokens, both sides together, are at most `training.batch_tokens`; those of another segmentation of
        the same examples are more.
        """
        assert k >= 0
        return self._batch("train", self._train_plan, k)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of the first epoch (of every one, unless a mixture has fractional weights)."""
        return self._train_plan.batches()

    def order_hash(self, batches: int) -> str:
        """SHA-256 over which examples, in which order, make micro-batches 0 to `batches` - 1."""
        digest = hashlib.sha256()
        for k in range(batches):
            if isinstance(self._train_plan, PairPlan):
                ids = np.asarray(self._train_plan.examples(k), dtype=np.int64)
            else:
                rows = self._train_plan.pieces(k)
                ids = np.array([(p.document, p.start, p.stop) for row in rows for p in row], dtype=np.int64)
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return digest.hexdigest()

    def padding(self) -> float:
        """Share of padding in an epoch's tokens (0 for streams)."""
        return self._train_plan.padding() if isinstance(self._train_plan, PairPlan) else 0.0

    # Evaluation

    def eval_batches(self, split: EvalSplit, most: int | None = None) -> Iterator[Batch]:
        """Every example of a split once, similar lengths together, in a fixed order; none is dropped or cut.

        With `most`, only as many of these batches as hold that many tokens (one at least), evenly spread over them: the
        same ones every time.
        """
        self._require(split)
        if split not in self._eval_plans:
            streamed = is_streamed(self.task)
            self._eval_plans[split] = self._stream_plan(split) if streamed else self._pair_plan(split)
        plan = self._eval_plans[split]
        batches = plan.batches()
        wanted = batches if most is None else min(batches, max(1, most // self.config.training.batch_tokens))
        for place in range(wanted):
            yield self._batch(split, plan, place * batches // wanted)

    def eval_texts(self, split: EvalSplit) -> tuple[list[str], list[str]]:
        """The raw texts of a split in file order: (sources, targets), (texts, labels), or (documents, []).

        Lower-cased where `data.lowercase` is set.
        """
        self._require(split)
        fields = FIELDS[self.task]
        columns = [[text for store in self.stores[split] for text in store.texts(field)] for field in fields]
        return columns[0], columns[1] if len(columns) > 1 else []

    def bytes_of(self, split: Split) -> int:
        """UTF-8 bytes of the raw text that is scored: targets, or documents with the line ends that eos stands for."""
        self._require(split)
        field = FIELDS[self.task][-1] if self.task == "seq2seq" else FIELDS[self.task][0]
        return sum(store.bytes[field] + int(store.meta.get("line_ends", 0)) for store in self.stores[split])

    def resolved(self, config: RunConfig) -> RunConfig:
        """`config` with what the data decides: vocab_size, num_labels, label names, notes.

        Raises:
            ConfigError: the config sets a vocabulary or number of labels that the data do not fit in.
        """
        known = self.tokenizer.vocab_size
        model = {"vocab_size": _at_least("vocab_size", config.model.vocab_size, known)}
        data: dict[str, list[str]] = {}
        decoding: dict[str, list[int]] = {}
        notes = dict(self.notes)
        if model["vocab_size"] > known:
            decoding["banned"] = sorted({*config.decoding.banned, *_without_text(known, model["vocab_size"])})
            notes["decoding.banned"] = f"the tokens from {known} on, which the tokenizer has no text for"
        if self.task == "question-answering":
            model["num_labels"] = 2  # scores of a first and a last place
        if self.label_names is not None:
            model["num_labels"] = _at_least("num_labels", config.model.num_labels, len(self.label_names))
            data["labels"] = self.label_names
        return config.model_copy(
            update={
                "model": config.model.model_copy(update=model),
                "data": config.data.model_copy(update=data),
                "decoding": config.decoding.model_copy(update=decoding),
                "notes": {**config.notes, **notes},
            }
        )

    def check_positions(self) -> None:
        """Refuses, before any training, what is longer than the model's positions.

        Raises:
            LengthError: an example of any split is; the first one is named. ConfigError: rows of a stream are.
        """
        positions, length = self.config.model.max_length, self.config.data.context_length
        if positions is None:
            return
        if is_streamed(self.task):
            if length > positions:
                raise ConfigError(f"data.context_length: {length} is more than model.max_length {positions}")
            return
        for split, stores in [*self.stores.items(), *(("train", copy) for copy in self.copies)]:
            rows = self._rows(stores)
            if split == "train":
                used = np.concatenate([part.examples for part in self._train_plan.parts])
                rows[np.setdiff1d(np.arange(len(rows)), used)] = 0  # left out
            over = np.flatnonzero(rows > positions)
            if len(over):
                index = int(over[0])
                place = self._place(index) if split == "train" else f"data.{split}, example {index + 1}"
                raise LengthError(
                    f"{place}: {rows[index]} tokens, special ones counted, are more than model.max_length = "
                    f"{positions}, as are {len(over) - 1:,} more of {len(rows):,}: raise model.max_length, shorten "
                    "them, or leave out training examples with data.max_source_length and data.over_length=drop"
                )

    def targets_of(self, split: Split) -> int:
        """Tokens of a language model's split that are scored: all of each document, and its end."""
        self._require(split)
        return int(_lengths(self.stores[split], "text", 1).sum())

    # Inside

    def _rows(self, stores: Sequence[TokenStore]) -> Indices:
        """Tokens of each example as the model reads it."""
        first, second = self._sides(stores)
        return np.maximum(first, second) if self.config.model.layout == "encoder-decoder" else first + second

    def _sides(self, stores: Sequence[TokenStore]) -> tuple[Indices, Indices]:
        """Lengths of both sides as the model sees them; the second is 0 where there is one side."""
        first, second = FIELDS[self.task]
        added = {"classification": 2, "question-answering": 2, "probe": 0}
        two = 1 if self.task == "seq2seq" else 0
        return _lengths(stores, first, added.get(self.task, 1)), _lengths(stores, second, 1) * two

    def _require(self, split: str) -> None:
        if not self.stores.get(split):
            raise DataError(f"there is no {split} data: set data.{split} in the config")

    def _note_empty(self) -> None:
        for split, parts in self.stores.items():
            for field in FIELDS[self.task]:
                empty = sum(int((store.lengths(field) == 0).sum()) for store in parts)
                if empty:
                    self.notes[f"data.empty.{split}.{field}"] = f"{empty:,} empty line(s), kept as empty sequences"

    def _note_unknown(self) -> None:
        for split, parts in self.stores.items():
            for field in FIELDS[self.task]:
                unknown = sum(store.meta.get("unknown", {}).get(field, 0) for store in parts)
                if unknown:
                    self.notes[f"data.unknown.{split}.{field}"] = (
                        f"{unknown:,} token(s) that the tokenizer does not know, read as its unknown token"
                    )

    def _note_of_copies(self) -> str:
        fields = [field for field in FIELDS[self.task] if field != "label"]

        def tokens(stores: Iterable[TokenStore]) -> int:
            return sum(len(store.tokens[field]) for store in stores for field in fields)

        growth = tokens(store for copy in self.copies for store in copy) / len(self.copies)
        growth /= max(1, tokens(self.stores["train"]))
        return (
            f"epochs take turns at {len(self.copies)} segmentations of the training text (training.subword_dropout), "
            f"with {growth:.3g} times the tokens of the plain one, by which batches are made"
        )

    def _pair_plan(self, split: str) -> PairPlan:
        first, second = self._sides(self.stores[split])
        budget = self.config.training.batch_tokens
        if split != "train":
            everything = [Part(np.arange(len(first), dtype=np.int64), 1.0)]
            return PairPlan(first, second, everything, self.config.seed, budget, shuffle=False)
        parts = self._usable_parts(second)
        used = np.concatenate([part.examples for part in parts])
        longest = int((first + second)[used].max())
        if longest > budget:
            raise ConfigError(
                f"training.batch_tokens: {budget} is too small: the longest training example has {longest} tokens"
            )
        return PairPlan(first, second, parts, self.config.seed, budget)

    def _usable_parts(self, second: Indices) -> list[Part]:
        """Training examples within the limits; the others are an error, or are dropped and counted, as the config
        says."""
        data = self.config.data
        # The limits count the tokens of the text alone, as they do where text is generated.
        source = _lengths(self.stores["train"], FIELDS[self.task][0], 0)
        target = second - 1
        over = (source > data.max_source_length) | (target > data.max_target_length)
        if self.task == "question-answering":  # windows are cut to data.context_length
            over = np.zeros_like(over)
        if over.any() and data.over_length == "error":
            index = int(np.argmax(over))
            sides = f"{source[index]} source tokens" + (
                f", {target[index]} target tokens" if target[index] >= 0 else ""
            )
            raise DataError(
                f"{self._place(index)} is over the limits ({sides}; data.max_source_length "
                f"{data.max_source_length}, data.max_target_length {data.max_target_length}), as are "
                f"{int(over.sum()) - 1:,} more of {len(over):,}: raise the limits, or set data.over_length=drop"
            )
        self.dropped = int(over.sum())
        if self.dropped:
            self.notes["data.dropped"] = f"{self.dropped:,} of {len(over):,} training examples are over the limits"
        if self.dropped == len(over):
            raise DataError(f"all {len(over):,} training examples are over the limits of data.max_source_length")
        parts, start = [], 0
        for store, weight in zip(self.stores["train"], self._weights, strict=True):
            usable = start + np.flatnonzero(~over[start : start + store.size])
            start += store.size
            if len(usable):
                parts.append(Part(usable.astype(np.int64), weight))
        return parts

    def _place(self, index: int) -> str:
        """Where a training example stands in its file."""
        for place, store in zip(self._places, self.stores["train"], strict=True):
            if index < store.size:
                return place(index)
            index -= store.size
        raise AssertionError("index outside the dataset")

    def _stream_plan(self, split: str) -> StreamPlan:
        config = self.config
        length, budget = config.data.context_length, config.training.batch_tokens
        if length > budget:
            raise ConfigError(f"training.batch_tokens: {budget} is below data.context_length {length}")
        added = 2 if self.task == "masked-language-model" else 1
        units = _lengths(self.stores[split], "text", added)
        train = split == "train"
        parts, start = [], 0
        for store, weight in zip(self.stores[split], self._weights if train else [1.0], strict=True):
            parts.append(Part(np.arange(start, start + store.size, dtype=np.int64), weight))
            start += store.size
        return StreamPlan(units, parts, config.seed, length, budget // length, shuffle=train)

    def _batch(self, split: str, plan: PairPlan | StreamPlan, k: int) -> Batch:
        if isinstance(plan, StreamPlan):
            return self._stream_batch(split, plan, k)
        first, second = FIELDS[self.task]
        examples = plan.examples(k)
        stores = self.stores[split]
        if split == "train" and self.copies:
            stores = self.copies[plan.locate(k)[0] % len(self.copies)]
        pairs = [(_ids(stores, first, int(i)), _ids(stores, second, int(i))) for i in examples]
        collate: Callable[[Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]], Tokenizer, int, Sequence[int]], Batch]
        if self.task == "classification":
            collate = classification_batch
        elif self.task == "probe":
            collate = labelled_batch
        elif self.task == "question-answering":
            collate = question_batch
        elif self.config.model.layout == "encoder-decoder":
            collate = encoder_decoder_batch
        else:
            collate = concatenated_batch
        return collate(pairs, self.tokenizer, k, examples.tolist())

    def _stream_batch(self, split: str, plan: StreamPlan, k: int) -> Batch:
        rows = [[self._piece(split, piece) for piece in row] for row in plan.pieces(k)]
        batch = stream_batch(rows, self.tokenizer, self.config.data.packing, k)
        if self.task == "language-model":
            return batch
        training, seed = self.config.training, self.config.seed if split == "train" else 0
        return mask_batch(batch, self.tokenizer, training.mask_fraction, training.masking, seed)

    def _piece(self, split: str, piece: Piece) -> tuple[Row, Row]:
        """(inputs, labels) of a part of [bos] text [eos]: for language models, labels are one token further."""
        ids = _ids(self.stores[split], "text", piece.document)
        ahead = 0 if self.task == "masked-language-model" else 1
        low, high = piece.start, piece.stop + ahead
        unit = np.empty(high - low, dtype=np.int64)
        unit[max(0, 1 - low) : len(ids) + 1 - low] = ids[max(0, low - 1) : high - 1]
        if low == 0:
            unit[0] = self.tokenizer.bos
        if high == len(ids) + 2:
            unit[-1] = self.tokenizer.eos
        return unit[: len(unit) - ahead], unit[ahead:]


def _lengths(stores: Sequence[TokenStore], field: str, added: int) -> Indices:
    """Tokens of one field of each example, and `added` special ones."""
    lengths = np.concatenate([store.lengths(field) for store in stores])
    lengths += added
    return lengths


def _ids(stores: list[TokenStore], field: str, index: int) -> NDArray[np.int32]:
    """Token ids of one field of an example of all stores together."""
    for store in stores:
        if index < store.size:
            return store.ids(field, index)
        index -= store.size
    raise AssertionError("index outside the dataset")


def _example_of(name: str, index: int) -> str:
    return f"{name}, example {index + 1}"


def check_layout(config: RunConfig) -> None:
    """`CapabilityError` when the model's layout cannot learn the task, `ConfigError` when its head is another's."""
    allowed = _LAYOUTS[config.data.task]
    if config.model.layout not in allowed:
        raise CapabilityError(
            f"data.task {config.data.task} needs model.layout {' or '.join(allowed)}, not {config.model.layout}"
        )
    of_tokens = config.data.task == "question-answering"
    if (of_tokens or config.data.task == "classification") and (config.model.pooling == "none") != of_tokens:
        wanted = "none" if of_tokens else "mean or first"
        raise ConfigError(f"data.task {config.data.task} needs model.pooling={wanted}, not {config.model.pooling}")
    positions = config.model.max_length
    if of_tokens and positions is not None and config.data.context_length > positions:
        length = config.data.context_length
        raise ConfigError(f"data.context_length: {length} is more than model.max_length {positions}")
    if of_tokens and config.model.num_labels not in (None, 2):
        raise ConfigError(f"model.num_labels: {config.model.num_labels}; question answering has 2: leave it out")


def _without_text(known: int, size: int) -> range:
    """Ids that a vocabulary which was rounded up has beyond the tokenizer's."""
    if size - known > _ROUNDING:
        raise ConfigError(
            f"model.vocab_size: {size} is more than {_ROUNDING:,} above the tokenizer's {known}; leave it out"
        )
    return range(known, size)


def _at_least(name: str, chosen: int | None, needed: int) -> int:
    if chosen is not None and chosen < needed:
        raise ConfigError(f"model.{name}: {chosen} is too small: the data have {needed}; leave it out to use that")
    return needed if chosen is None else chosen
