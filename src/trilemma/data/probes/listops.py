"""ListOps: nested operations on lists of digits. `[MAX 4 3 [MIN 2 3 ] 1 0 ]` is 4.

Nangia and Bowman 2018, arXiv 1804.06028; drawn as in Long Range Arena (Tay et al. 2020, arXiv 2011.04006, section 2.2).
"""

from __future__ import annotations

import statistics

from pydantic import Field

from trilemma.data.order import Draws
from trilemma.data.probes.base import Example, Lengths, answered, numbers

_OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
_BRANCHING = 0.25  # probability that an argument is a list
_CLOSE = 14


class ListOps(Lengths):
    """The value, a digit, is to be said at the last bracket. The median is rounded down, the sum taken modulo 10.

    A node is a list with probability 1/4, until `max_depth`; trees are drawn until one has a fitting number of tokens.
    Long Range Arena has lengths from 500 to 2,000.

    Args:
        min_length, max_length: tokens of the row.
        max_depth: of the tree.
        max_arguments: of a list; two at least.
    """

    name = "listops"

    min_length: int = Field(500, ge=4)
    max_length: int = Field(2000, ge=4)
    max_depth: int = Field(10, ge=2, le=100)
    max_arguments: int = Field(10, ge=2)

    def symbols(self) -> list[str]:
        return [*numbers(10), *_OPERATORS, "]"]

    def chance(self) -> float:
        return 0.1

    def draw(self, draws: Draws) -> Example:
        while True:
            tokens: list[int] = []
            value = self._tree(1, draws, tokens)
            if self.min_length <= len(tokens) <= self.max_length:
                return answered(tokens, value)

    def _tree(self, depth: int, draws: Draws, tokens: list[int]) -> int:
        """Writes a random tree to `tokens`, giving up beyond `max_length`; its value."""
        if len(tokens) > self.max_length:
            return 0
        if depth == self.max_depth or draws.number() > _BRANCHING:
            tokens.append(draws.integer(0, 9))
            return tokens[-1]
        operator = draws.integer(0, len(_OPERATORS) - 1)
        tokens.append(10 + operator)
        count = draws.integer(2, self.max_arguments)
        values = [self._tree(depth + 1, draws, tokens) for _ in range(count)]
        tokens.append(_CLOSE)
        return (min(values), max(values), int(statistics.median(values)), sum(values) % 10)[operator]
