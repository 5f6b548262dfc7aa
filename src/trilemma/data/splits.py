"""Valid and test without leaks: no sentence of theirs stands in train, on either side.

`data.split` divides the training sources. An example goes where the hash of its first side says, so that all
translations of a sentence stay together, in every run and whatever else the files hold. A pair of train whose other
side stands in valid or test is left out, and one of valid whose other side stands in test. Sentences are compared
without case and without the number of their spaces. `data.overlap: drop` leaves out the same pairs where valid and test
are files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from trilemma.config import DataConfig, Source
from trilemma.data.readers import FIELDS, Example, is_streamed, read_records
from trilemma.errors import ConfigError, DataError

_STRONGER: dict[str, tuple[str, ...]] = {"train": ("valid", "test"), "valid": ("test",), "test": ()}
_ALL = 1 << 64
_VERSION = 2  # of the rule that divides


@dataclass
class Partition:
    """Which examples belong to a split.

    Attributes:
        data: with `split` or `overlap: drop`.
        sides: for each evaluation split and field, the digests of its sentences.
        sizes: examples that hashing gives each split, before any are left out; empty where files are the splits.
    """

    data: DataConfig
    sides: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, data: DataConfig, sources: dict[str, list[Source]]) -> Partition | None:
        """Reads what has to be known of the evaluation splits; None where the config asks for nothing.

        Args:
            sources: of each split.

        Raises:
            ConfigError: the task, or the form of the sources, has no sentences to compare.
            DataError: a source is missing, empty or malformed.
        """
        if data.split is None and data.overlap == "keep":
            return None
        _check(data, sources)
        found = cls(data)
        if data.split is None:
            for split in _STRONGER["train"]:
                found._learn(split, _read(sources.get(split, []), data.task))
            return found
        for example in _read(sources["train"], data.task):
            split = found._home(example)
            found.sizes[split] = found.sizes.get(split, 0) + 1
            if split != "train":
                found._learn(split, [example])
        for split in ("train", *(name for name in ("valid", "test") if getattr(data.split, name))):
            if not found.sizes.get(split):
                total = sum(found.sizes.values())
                raise DataError(f"data.split: of {total:,} examples none falls to {split}; give it a larger share")
        return found

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides what `holds` answers."""
        shares = None if self.data.split is None else self.data.split.model_dump()
        sides = [[split, place, sorted(digests)] for (split, place), digests in sorted(self.sides.items())]
        return hashlib.sha256(json.dumps([_VERSION, shares, sides]).encode()).hexdigest()

    def notes(self, sizes: Mapping[str, int]) -> dict[str, str]:
        """What became of the examples, for the run's notes; `sizes`: of the splits as they are."""
        if self.data.split is None:
            return {"data.overlap": f"{sizes['train']:,} training examples have no side in valid or test"}
        parts = []
        for split in (name for name in ("train", "valid", "test") if name in sizes):
            lost = self.sizes[split] - sizes[split]
            parts.append(
                f"{split} {sizes[split]:,}{f' ({lost:,} left out: a side is in another split)' if lost else ''}"
            )
        return {"data.split": "; ".join(parts)}

    def holds(self, split: str, example: Example) -> bool:
        """Whether `example`, read from a source of `split`, belongs to it."""
        if self.data.split is not None and self._home(example) != split:
            return False
        if self.data.split is None and split != "train":
            return True
        return not any(
            digest in self.sides.get((stronger, place), ())
            for stronger in _STRONGER[split]
            for place, digest in self._digests(example)
        )

    def _home(self, example: Example) -> str:
        """The split of an example by its first side alone; an empty one, which all have alike, is for training."""
        shares = self.data.split
        assert shares is not None
        sentence = _sentence(example[0])
        if not sentence:
            return "train"
        point = _digest(f"split {sentence}") / _ALL
        if point < shares.test:
            return "test"
        return "valid" if point < shares.test + shares.valid else "train"

    def _learn(self, split: str, examples: Iterable[Example]) -> None:
        for example in examples:
            for place, digest in self._digests(example):
                self.sides.setdefault((split, place), set()).add(digest)

    def _digests(self, example: Example) -> Iterator[tuple[int, int]]:
        """(field, digest) of each side that holds text; a label is no side."""
        for place, name in enumerate(FIELDS[self.data.task]):
            sentence = _sentence(example[place])
            if name != "label" and sentence:
                yield place, _digest(sentence)


def split_examples(data: DataConfig, split: str) -> Iterator[Example]:
    """The examples of a split that `data.split` takes out of the training sources."""
    sources = data.train if isinstance(data.train, list) else [data.train]
    partition = Partition.of(data, {"train": sources})
    assert partition is not None
    return (example for example in _read(sources, data.task) if partition.holds(split, example))


def _check(data: DataConfig, sources: dict[str, list[Source]]) -> None:
    key = "data.split" if data.split is not None else "data.overlap"
    if data.task in ("probe", "question-answering"):
        raise ConfigError(f"{key}: task {data.task} has no lines of text to compare")
    if data.split is not None and (data.valid is not None or data.test is not None):
        raise ConfigError("data.split takes valid and test out of train: leave out data.valid and data.test")
    for source in (source for given in sources.values() for source in given):
        if source.generated is not None:
            raise ConfigError(f"{key}: generated tasks have disjoint splits of their own")
        if is_streamed(data.task) and source.options.get("documents", "line" if data.packing else "file") != "line":
            raise ConfigError(f"{key}: documents must be lines (options: {{documents: line}}) to be compared")


def _read(sources: Sequence[Source], task: str) -> Iterator[Example]:
    for source in sources:
        yield from read_records(source, task)


def _sentence(text: str) -> str:
    return " ".join(text.casefold().split())


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
