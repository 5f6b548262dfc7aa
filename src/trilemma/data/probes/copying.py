"""Copying: a text must be repeated, in part or in whole.

"copying", "prefix-ngram", "suffix-ngram": Jelassi et al. 2024, "Repeat After Me", arXiv 2402.01032, sections 3 and 4.
"selective-copying": Gu and Dao 2023, "Mamba", arXiv 2312.00752, section 4.1.1, and Poli et al. 2024, "MAD", arXiv
2403.17844, section 3. "compression": after MAD.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from trilemma.data.batch import IGNORE
from trilemma.data.order import Draws
from trilemma.data.probes.base import Example, Lengths, Probe, continued, numbers

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
Text = tuple[list[int], int]  # tokens, and how many of them, at the end, are scored


class _Strings(Lengths):
    """Strings of letters between `$` and `.`, parts divided by `|`.

    Args:
        min_length, max_length: letters of a string.
        letters: size of the alphabet.
        context: fills rows of so many tokens with one text after another, as the paper trains; the last one is cut and
            not scored. None: one text a row, as it tests.
    """

    min_length: int = Field(5, ge=1)
    max_length: int = Field(20, ge=1)
    letters: int = Field(26, ge=2, le=26)
    context: int | None = Field(None, ge=8)

    def symbols(self) -> list[str]:
        return [*_LETTERS[: self.letters], "$", "|", "."]

    def chance(self) -> float:
        return 1 / self.letters

    @abstractmethod
    def text(self, draws: Draws) -> Text:
        """One text, from `$` to the full stop."""

    def draw(self, draws: Draws) -> Example:
        tokens, count = self.text(draws)
        scored = [False] * (len(tokens) - count) + [True] * count
        if self.context is None:
            return continued(tokens, scored)
        while len(tokens) < self.context:
            more, count = self.text(draws)
            whole = len(tokens) + len(more) <= self.context
            tokens = tokens + more
            scored += [False] * (len(more) - count) + [whole] * count
        return continued(tokens[: self.context], scored[: self.context])

    def string(self, draws: Draws) -> list[int]:
        """Random letters."""
        letters: list[int] = draws.integers(self.length(draws), self.letters).tolist()
        return letters

    def framed(self, *parts: list[int]) -> list[int]:
        """`$ part | part | part .`"""
        begin, divide, end = self.letters, self.letters + 1, self.letters + 2
        text = [begin]
        for number, part in enumerate(parts):
            text += [divide, *part] if number else part
        return [*text, end]

    @model_validator(mode="after")
    def _fits(self) -> _Strings:
        if self.context is not None and self.context <= 2 * self.max_length + 3:
            raise ValueError(f"context {self.context} does not hold a string of {self.max_length} letters twice")
        return self


class Copying(_Strings):
    """`$ s | s .`: the string again, and the full stop."""

    name = "copying"

    def text(self, draws: Draws) -> Text:
        string = self.string(draws)
        return self.framed(string, string), len(string) + 1


class _NGram(_Strings):
    """Look-up of an n-gram that occurs once in a string: what follows it is to be said.

    Args:
        size: n.
        answer: letters that are asked for; None: all that follow.
    """

    size: int = Field(3, ge=1)
    answer: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _long_enough(self) -> _NGram:
        if self.min_length <= self.size + (self.answer or 0):
            raise ValueError(f"min_length {self.min_length} must be above size + answer")
        return self

    def lookup(self, draws: Draws) -> tuple[list[int], list[int], list[int]]:
        """A string, an n-gram of it, and what follows."""
        while True:
            string = self.string(draws)
            last = len(string) - self.size - (self.answer or 1)
            grams = [tuple(string[at : at + self.size]) for at in range(len(string) - self.size + 1)]
            once = [at for at in range(last + 1) if grams.count(grams[at]) == 1]
            if once:
                at = once[draws.integer(0, len(once) - 1)]
                after = string[at + self.size :]
                return string, list(grams[at]), after if self.answer is None else after[: self.answer]


class PrefixNGram(_NGram):
    """`$ g | s | answer .`: the n-gram g comes before the string."""

    name = "prefix-ngram"

    def text(self, draws: Draws) -> Text:
        string, gram, answer = self.lookup(draws)
        return self.framed(gram, string, answer), len(answer) + 1


class SuffixNGram(_NGram):
    """`$ s | g answer .`: the n-gram g comes after the string."""

    name = "suffix-ngram"

    def text(self, draws: Draws) -> Text:
        string, gram, answer = self.lookup(draws)
        return self.framed(string, [*gram, *answer]), len(answer) + 1


class SelectiveCopying(Probe):
    """Data tokens scattered among blanks; at the end they are to be said in their order.

    MAD's form: blanks stand before data tokens, one token says "copy", and blanks hold the place of the answer.

        . . c . a . . b [copy] . . .   ->   c a b at the last three

    Mamba's form: data tokens stand at random places, and markers hold the place of the answer.

    Args:
        length: of the row, answer included.
        tokens: data tokens.
        vocab_size: blank and "copy" (or the marker) included.
        form: "mad" or "mamba".
    """

    name = "selective-copying"

    length: int = Field(256, ge=4)
    tokens: int = Field(16, ge=1)
    vocab_size: int = Field(16, ge=4)
    form: Literal["mad", "mamba"] = "mad"

    @model_validator(mode="after")
    def _fits(self) -> SelectiveCopying:
        if self.length < 2 * self.tokens + 1:
            raise ValueError(f"{self.tokens} tokens, shown and answered, need a length of {2 * self.tokens + 1}")
        return self

    def symbols(self) -> list[str]:
        return [*numbers(self.vocab_size - 2), ".", "[copy]"]

    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def draw(self, draws: Draws) -> Example:
        blank, copy = self.vocab_size - 2, self.vocab_size - 1
        data = draws.integers(self.tokens, blank)
        tokens = np.full(self.length, blank, dtype=np.int64)
        if self.form == "mad":
            before = np.sort(draws.integers(self.length - 2 * self.tokens - 1, self.tokens))
            order = np.arange(self.tokens)
            tokens[order + np.searchsorted(before, order, side="right")] = data
            tokens[-self.tokens - 1] = copy
        else:
            tokens[np.sort(draws.sample(self.tokens, self.length - self.tokens))] = data
            tokens[-self.tokens :] = copy
        labels = np.full(self.length, IGNORE, dtype=np.int64)
        labels[-self.tokens :] = data
        return Example(tokens, labels)


class Compression(Probe):
    """Random tokens, then a compression token for each of them, where they are to be said in order.

    MAD decodes the row from the vector of one compression token with a separate network. A decoder-only model has
    none: here it writes the row out itself. For a mixer with a state of constant size this asks what the state holds;
    attention looks back and need not compress, so that its accuracy is not MAD's.

    Args:
        length: tokens to hold.
        vocab_size: the compression token included.
    """

    name = "compression"

    length: int = Field(31, ge=1)
    vocab_size: int = Field(16, ge=3)

    def symbols(self) -> list[str]:
        return [*numbers(self.vocab_size - 1), "[c]"]

    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def draw(self, draws: Draws) -> Example:
        data = draws.integers(self.length, self.vocab_size - 1)
        asked = np.full(self.length, self.vocab_size - 1, dtype=np.int64)
        return Example(np.concatenate([data, asked]), np.concatenate([np.full(self.length, IGNORE), data]))
