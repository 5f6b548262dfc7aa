"""State tracking: an automaton must be followed, however long the row.

"parity", "modular-arithmetic", "modular-arithmetic-brackets": Delétang et al. 2022, "Neural Networks and the Chomsky
Hierarchy", arXiv 2207.02098, in the form of Beck et al. 2024, "xLSTM", arXiv 2405.04517, and Grazzi et al. 2024,
"Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", arXiv 2411.12537: trained on lengths from 3 to
40, tested from 40 to 256.
"word-problem": products in a group (Merrill et al. 2024, "The Illusion of State in State-Space Models", arXiv
2404.08819).
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from trilemma.data.order import Draws, Indices
from trilemma.data.probes.base import Example, Lengths, answered, numbers

_LARGEST_SET = 6  # permutations of so many things: 720


class Parity(Lengths):
    """Bits; whether their sum is odd is to be said at the last one (`labels: last`), or at each of what came so far."""

    name = "parity"

    labels: Literal["last", "all"] = "last"

    def symbols(self) -> list[str]:
        return ["0", "1"]

    def chance(self) -> float:
        return 0.5

    def draw(self, draws: Draws) -> Example:
        bits = draws.integers(self.length(draws), 2)
        parities = np.cumsum(bits) % 2
        return answered(bits, int(parities[-1])) if self.labels == "last" else Example(bits, parities)


class ModularArithmetic(Lengths):
    """`n op n op n =`: the value modulo `modulus` is to be said at the equals sign; multiplication binds closer.

    Args:
        min_length, max_length: tokens of the row, the equals sign included; rows have an even number.
        modulus: numbers are 0 to modulus - 1.
        operators: some of + - *.
    """

    name = "modular-arithmetic"

    modulus: int = Field(5, ge=2, le=100)
    operators: str = Field("+-*", pattern=r"^[+*-]+$")

    @model_validator(mode="after")
    def _holds_one(self) -> ModularArithmetic:
        if self.max_length // 2 < (self.min_length + 1) // 2:
            raise ValueError(f"no even length from {self.min_length} to {self.max_length}")
        return self

    def symbols(self) -> list[str]:
        return [*numbers(self.modulus), "+", "-", "*", "="]

    def chance(self) -> float:
        return 1 / self.modulus

    def draw(self, draws: Draws) -> Example:
        count = draws.integer((self.min_length + 1) // 2, self.max_length // 2)
        values = draws.integers(count, self.modulus)
        used = sorted("+-*".index(operator) for operator in set(self.operators))
        chosen = np.array(used)[draws.integers(count - 1, len(used))]
        row = np.full(2 * count, self.modulus + 3, dtype=np.int64)
        row[0::2], row[1:-1:2] = values, self.modulus + chosen
        return answered(row, self._value(values.tolist(), chosen.tolist()))

    def _value(self, values: list[int], operators: list[int]) -> int:
        total, term = 0, values[0]
        for operator, value in zip(operators, values[1:], strict=True):
            if operator == 2:
                term = term * value % self.modulus
            else:
                total, term = total + term, value if operator == 0 else -value
        return (total + term) % self.modulus


class ModularArithmeticBrackets(Lengths):
    """As above, with brackets around every operation and minus signs before numbers: `( ( 1 + 2 ) - ( - 3 ) ) =`.

    An expression of five tokens or more is split at random into a left and a right one.

    Args:
        min_length, max_length: tokens of the row, the equals sign included.
        modulus: numbers are 0 to modulus - 1.
        multiply: whether there is multiplication.
    """

    name = "modular-arithmetic-brackets"

    min_length: int = Field(3, ge=2)
    modulus: int = Field(5, ge=2, le=100)
    multiply: bool = False

    def symbols(self) -> list[str]:
        return [*numbers(self.modulus), "+", "-", "*", "(", ")", "="]

    def chance(self) -> float:
        return 1 / self.modulus

    def draw(self, draws: Draws) -> Example:
        text, value = self._expression(self.length(draws) - 1, draws)
        return answered([*text, self.modulus + 5], value)

    def _expression(self, length: int, draws: Draws) -> tuple[list[int], int]:
        """Tokens and value of a random expression."""
        m = self.modulus
        plus, minus, opening, closing = m, m + 1, m + 3, m + 4
        if length < 5:
            number = draws.integer(0, m - 1)
            signed = [number] if length in (1, 3) else [minus, number]
            value = number if length in (1, 3) else -number % m
            return signed if length < 3 else [opening, *signed, closing], value
        left_length = draws.integer(1, length - 4)
        left, first = self._expression(left_length, draws)
        right, second = self._expression(length - left_length - 3, draws)
        operator = draws.integer(0, 2 if self.multiply else 1)
        value = (first + second, first - second, first * second)[operator] % m
        return [opening, *left, plus + operator, *right, closing], value


class WordProblem(Lengths):
    """Elements of a finite group; at each the product of all so far, from the left, is to be said.

    Element 0 is the identity. Permutations stand in lexicographic order, and `a b` means: first a, then b.

    Args:
        group: S, A or Z with a number (permutations, even permutations, addition modulo), or a product such as A4xZ5.
        moved: only permutations that move at most so many things are multiplied: 2 are swaps, 3 three-cycles besides
            (Grazzi et al., section 5.3). None: every element. The labels are elements of the whole group.
    """

    name = "word-problem"

    min_length: int = Field(10, ge=1)
    max_length: int = Field(10, ge=1)
    group: str = "S5"
    moved: int | None = Field(None, ge=2)

    @field_validator("group")
    @classmethod
    def _known(cls, value: str) -> str:
        for part in value.split("x"):
            found = re.fullmatch(r"([SAZ])([1-9]\d*)", part)
            if not found or int(found[2]) > (1000 if found[1] == "Z" else _LARGEST_SET):
                raise ValueError(f'"{part}" is no group: S2 to S{_LARGEST_SET}, A3 to A{_LARGEST_SET}, Z2 to Z1000')
        return value

    @model_validator(mode="after")
    def _permutes(self) -> WordProblem:
        if self.moved is not None and not re.fullmatch(r"[SA]\d+", self.group):
            raise ValueError(f"moved is for permutations; the group is {self.group}")
        if len(self._factors()) < 2:
            raise ValueError(f"no element of {self.group} but the identity moves at most {self.moved}")
        return self

    def _factors(self) -> Indices:
        """The elements that are multiplied."""
        if self.moved is None:
            return np.arange(len(group_table(self.group)))
        elements = _permutations(self.group[0], int(self.group[1:]))
        return np.flatnonzero((elements != np.arange(elements.shape[1])).sum(1) <= self.moved)

    def symbols(self) -> list[str]:
        return numbers(len(group_table(self.group)))

    def chance(self) -> float:
        return 1 / len(group_table(self.group))

    def draw(self, draws: Draws) -> Example:
        table = group_table(self.group)
        factors = self._factors()
        elements = factors[draws.integers(self.length(draws), len(factors))]
        products = itertools.accumulate(elements.tolist(), lambda product, element: int(table[product, element]))
        return Example(elements, np.fromiter(products, dtype=np.int64, count=len(elements)))


@functools.lru_cache(maxsize=8)
def group_table(name: str) -> Indices:
    """The multiplication table [elements, elements] of a group; element 0 is the identity."""
    table = np.zeros((1, 1), dtype=np.int64)
    for part in name.split("x"):
        factor = _simple_table(part[0], int(part[1:]))
        size = len(factor)
        pairs = table[:, None, :, None] * size + factor[None, :, None, :]
        table = pairs.reshape(len(table) * size, -1)
    return table


def _simple_table(kind: str, size: int) -> Indices:
    if kind == "Z":
        return (np.arange(size)[:, None] + np.arange(size)) % size
    elements = _permutations(kind, size)
    digits = size ** np.arange(size)[::-1]
    index = {int(code): at for at, code in enumerate(elements @ digits)}
    # first a, then b: position i goes to b[a[i]]
    products = elements[:, elements].transpose(1, 0, 2) @ digits
    return np.asarray(np.vectorize(index.__getitem__)(products), dtype=np.int64)


@functools.lru_cache(maxsize=8)
def _permutations(kind: str, size: int) -> Indices:
    """[elements, size] all ("S") or the even ("A") permutations, in lexicographic order."""
    elements = np.array(list(itertools.permutations(range(size))), dtype=np.int64)
    if kind == "A":
        later = np.triu(np.ones((size, size), dtype=bool), 1)
        inversions = ((elements[:, :, None] > elements[:, None, :]) & later).sum((1, 2))
        elements = elements[inversions % 2 == 0]
    return elements
