"""What a probe is: a generator of token rows with labels at some positions, from a seed.

A probe is scored where its labels stand and nowhere else. It has a vocabulary of its own; a row is given to a
decoder-only model as it is, without special ids, and the label of a position is what the model must say *there*.

No row of one split occurs in another: a hash of the row, not the seed, decides its split (90 % train, 5 % valid, 5 %
test).
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from trilemma.data.batch import IGNORE
from trilemma.data.order import Draws, Indices
from trilemma.errors import DataError
from trilemma.sections import Section

UNSCORED = "_"  # the symbol of a position without a label, where labels are written as text
_PATIENCE = 50_000  # draws without a new row before a split is said to hold no more


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        tokens: [length] entries of the probe's vocabulary.
        labels: [length] what is to be said at each position, IGNORE where nothing is scored.
    """

    tokens: Indices
    labels: Indices


class Probe(Section):
    """Base of the probes: the fields are the options that a config may set.

    `name` is what configs call it, and a part of its randomness. `seed` decides which rows are drawn and their order,
    never their split.
    """

    name: ClassVar[str]

    seed: int = Field(0, ge=0, lt=2**63)

    @abstractmethod
    def symbols(self) -> list[str]:
        """The vocabulary: entry i is token i. Symbols hold no space."""

    @abstractmethod
    def chance(self) -> float:
        """Accuracy, from 0 to 1, of guessing among the answers that a row leaves open to one who looks nothing up."""

    @abstractmethod
    def draw(self, draws: Draws) -> Example:
        """One row."""

    def examples(self, split: str, size: int) -> Iterator[Example]:
        """`size` rows of a split; those of valid and test all differ.

        Raises:
            DataError: valid or test hold fewer different rows.
        """
        seen: set[bytes] = set()
        counter = found = missed = 0
        while found < size:
            example = self.draw(Draws(self.seed, f"probe.{self.name}", counter))
            counter += 1
            digest = _digest(example)
            if _split_of(digest) != split or digest in seen:
                missed += 1
                if missed > _PATIENCE:
                    raise DataError(f'probe "{self.name}": {split} has only {found} different rows, not {size}')
                continue
            if split != "train":
                seen.add(digest)
            found, missed = found + 1, 0
            yield example


class Lengths(Probe):
    """A probe whose rows have lengths drawn uniformly from `min_length` to `max_length`."""

    min_length: int = Field(3, ge=1)
    max_length: int = Field(40, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Lengths:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} is above max_length {self.max_length}")
        return self

    def length(self, draws: Draws) -> int:
        """A length."""
        return draws.integer(self.min_length, self.max_length)


def answered(tokens: Sequence[int] | Indices, answer: int) -> Example:
    """A row with one label, at its last position."""
    row = np.asarray(tokens, dtype=np.int64)
    labels = np.full(len(row), IGNORE, dtype=np.int64)
    labels[-1] = answer
    return Example(row, labels)


def continued(tokens: Sequence[int] | Indices, scored: Sequence[bool] | NDArray[np.bool_]) -> Example:
    """A text of which each token is to be said one position before it stands, where `scored` says so.

    The row is the text without its last token.
    """
    text = np.asarray(tokens, dtype=np.int64)
    return Example(text[:-1], np.where(np.asarray(scored, dtype=bool)[1:], text[1:], IGNORE))


def numbers(count: int) -> list[str]:
    """Symbols "0", "1", ..."""
    return [str(number) for number in range(count)]


def _digest(example: Example) -> bytes:
    return hashlib.blake2b(example.tokens.tobytes(), digest_size=16).digest()


def _split_of(digest: bytes) -> str:
    bucket = digest[0] % 20
    return "test" if bucket == 0 else "valid" if bucket == 1 else "train"
