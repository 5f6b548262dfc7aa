"""Which examples make micro-batch k: a pure function of (seed, k), without a running state.

`PairPlan` groups whole examples of similar length under a token budget; `StreamPlan` cuts documents, laid end to end,
into rows of `context_length`. Both draw an epoch from weighted parts: a part of N examples and weight w gives about w
* N examples an epoch, and every example once before any example again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from trilemma.data.order import Indices, integers, permutation

_EPOCHS_KEPT = 2
_SEARCHED = 300_000
_EXACT = 24  # tokens; longer rows are padded to an even length
_GROUPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # tried; which pads least depends on the lengths
EpochType = TypeVar("EpochType")


@dataclass(frozen=True)
class Part:
    """One source of a mixture: the usable examples (global indices) and how often an epoch sees each."""

    examples: Indices
    weight: float


def draw_epoch(parts: list[Part], seed: int, epoch: int) -> Indices:
    """Examples of one epoch, shuffled within each part."""
    drawn = []
    for rank, part in enumerate(parts):
        size = len(part.examples)
        start, stop = (math.floor(part.weight * size * turn) for turn in (epoch, epoch + 1))
        while start < stop:
            turn, first = divmod(start, size)
            last = min(size, first + stop - start)
            order = permutation(seed, f"order.{rank}", turn, size)
            drawn.append(part.examples[order[first:last]])
            start += last - first
    return np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)


def length_order(first: Indices, second: Indices, groups: int) -> Indices:
    """An order in which neighbours have similar lengths on both sides.

    Groups of similar `first`; inside a group by `second`, upwards and downwards in turn so that group borders are
    smooth.
    Lengths count `as_padded`; equal ones keep their (shuffled) order, so that the sequence of lengths is the same in
    every epoch while the examples change places.
    """
    first, second = as_padded(first), as_padded(second)
    borders = np.quantile(first, np.arange(1, groups) / groups, method="lower") if groups > 1 else np.zeros(0)
    group = np.searchsorted(np.unique(borders), first, side="left")
    sign = np.where(group % 2 == 0, 1, -1)
    return np.lexsort((first * sign, second * sign, group))


def as_padded(lengths: Any) -> Indices:
    """Lengths as batches are padded: short ones as they are, longer ones even, so that there are few of them.

    Evenness costs half a token a row and side: 5 % of sentences of ten tokens, under 2 % above 24.
    """
    return np.asarray(lengths + lengths % 2 * (lengths > _EXACT), dtype=np.int64)


def whole_rows(rows: int) -> int:
    """A round number of rows, at most `rows`: a multiple of 8 or 16, from 128 on of a quarter of a power of two.

    A kernel library prepares each matrix product for its exact size and keeps about a thousand of them: on a CPU in
    bfloat16, products of ever new sizes took twice the time and a megabyte each. Round numbers of rows leave a few
    dozen sizes.
    """
    if rows < 8:
        return rows
    step = 8 if rows < 32 else 16 if rows < 128 else 1 << rows.bit_length() - 3
    return rows // step * step


def cut(first: Indices, second: Indices, budget: int) -> Indices:
    """Borders of consecutive batches: rows * (longest first + longest second) <= budget, lengths and their sum
    `as_padded`; a round number of rows; a single row always fits.

    Returns:
        int64 [batches + 1], from 0 to len(first).
    """
    first, second = as_padded(first), as_padded(second)
    borders = [0]
    start, size = 0, len(first)
    window = 64
    while start < size:
        stop = min(size, start + window)
        longest = np.maximum.accumulate(first[start:stop]) + np.maximum.accumulate(second[start:stop])
        longest = as_padded(longest)  # where both sides make one row
        fits = int(np.searchsorted(longest * np.arange(1, stop - start + 1), budget, side="right"))
        if fits == stop - start and stop < size:
            window *= 2
            continue
        window = max(64, 2 * fits)
        start += fits if start + fits == size else max(1, whole_rows(fits))
        borders.append(start)
    return np.array(borders, dtype=np.int64)


def padded_tokens(first: Indices, second: Indices, borders: Indices) -> int:
    """Tokens of all batches with padding, both sides."""
    if len(first) == 0:
        return 0
    rows = np.diff(borders)
    longest = as_padded(np.maximum.reduceat(first, borders[:-1])) + as_padded(np.maximum.reduceat(second, borders[:-1]))
    return int((rows * longest).sum())


class Plan(ABC, Generic[EpochType]):
    """Finds the epoch of a micro-batch and keeps the plans of the last epochs.

    Args:
        parts: the mixture. seed: of the order.
        shuffle: False: one fixed pass over the first part (evaluation).
    """

    def __init__(self, parts: list[Part], seed: int, shuffle: bool) -> None:
        self.parts, self.seed, self.shuffle = parts, seed, shuffle
        # With whole weights every epoch holds the same examples, so all have the same number of micro-batches.
        self._constant = all(float(part.weight).is_integer() for part in parts)
        self._starts = [0]
        self._epochs: OrderedDict[int, EpochType] = OrderedDict()

    @abstractmethod
    def _make(self, epoch: int) -> EpochType:
        """The plan of one epoch."""

    @abstractmethod
    def batches(self, epoch: int = 0) -> int:
        """Micro-batches of an epoch; the same in every epoch when all weights are whole numbers."""

    def _plan(self, epoch: int) -> EpochType:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._make(epoch)
            if len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]

    def _draw(self, epoch: int) -> Indices:
        return draw_epoch(self.parts, self.seed, epoch) if self.shuffle else self.parts[0].examples

    def _turn(self, purpose: str, epoch: int, count: int) -> Indices:
        return permutation(self.seed, purpose, epoch, count) if self.shuffle else np.arange(count, dtype=np.int64)

    def locate(self, k: int) -> tuple[int, int]:
        """(epoch, micro-batch within it) of micro-batch k."""
        if self._constant:
            return divmod(k, self.batches())
        while self._starts[-1] <= k:
            self._starts.append(self._starts[-1] + self.batches(len(self._starts) - 1))
        epoch = int(np.searchsorted(self._starts, k, side="right")) - 1
        return epoch, k - self._starts[epoch]


@dataclass(frozen=True)
class PairEpoch:
    """Examples in the order of length, the borders of the micro-batches among them, and the micro-batches' turns."""

    examples: Indices
    borders: Indices
    turn: Indices


class PairPlan(Plan[PairEpoch]):
    """Micro-batches of whole examples under a token budget.

    Args:
        first, second: lengths of each example's two sides as the model sees them (second: 0 where there is one side).
        budget: padded tokens of a micro-batch, both sides. The others as in `Plan`.
    """

    def __init__(
        self, first: Indices, second: Indices, parts: list[Part], seed: int, budget: int, shuffle: bool = True
    ) -> None:
        super().__init__(parts, seed, shuffle)
        self.first, self.second, self.budget = first, second, budget
        self.groups = self._best_groups()

    def _best_groups(self) -> int:
        """The number of groups that pads least; a property of the lengths, the same in every epoch."""
        # Where examples are many, many groups pad next to nothing and the search would take long.
        if sum(len(part.examples) for part in self.parts) > _SEARCHED:
            return _GROUPS[-1]
        examples = np.sort(np.concatenate([part.examples for part in self.parts]))
        first, second = self.first[examples], self.second[examples]
        best, least = 1, -1
        for groups in _GROUPS:
            order = length_order(first, second, groups)
            padded = padded_tokens(first[order], second[order], cut(first[order], second[order], self.budget))
            if least < 0 or padded < least:
                best, least = groups, padded
        return best

    def _make(self, epoch: int) -> PairEpoch:
        drawn = self._draw(epoch)
        examples = drawn[length_order(self.first[drawn], self.second[drawn], self.groups)]
        borders = cut(self.first[examples], self.second[examples], self.budget)
        return PairEpoch(examples, borders, self._turn("batches", epoch, len(borders) - 1))

    def batches(self, epoch: int = 0) -> int:
        return len(self._plan(epoch).turn)

    def examples(self, k: int) -> Indices:
        """Indices of the examples of micro-batch k."""
        epoch, batch = self.locate(k)
        plan = self._plan(epoch)
        place = plan.turn[batch]
        return plan.examples[plan.borders[place] : plan.borders[place + 1]]

    def padding(self) -> float:
        """Share of padding in the tokens of the first epoch."""
        plan = self._plan(0)
        first, second = self.first[plan.examples], self.second[plan.examples]
        return 1 - float(first.sum() + second.sum()) / max(1, padded_tokens(first, second, plan.borders))


@dataclass(frozen=True)
class Piece:
    """Positions [start, stop) of a document's unit (the document with its added special ids)."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class StreamEpoch:
    """Documents in their order, where each starts (and the last ends), where the first row starts, the rows' turns."""

    documents: Indices
    starts: Indices
    offset: int
    turn: Indices


class StreamPlan(Plan[StreamEpoch]):
    """Rows of `length` tokens cut from documents laid end to end in a ring, which each epoch cuts at another place.

    Args:
        units: length of each document with what is added to it.
        length: tokens of a row; rows: of a micro-batch. The others as in `Plan`.
    """

    def __init__(
        self, units: Indices, parts: list[Part], seed: int, length: int, rows: int, shuffle: bool = True
    ) -> None:
        super().__init__(parts, seed, shuffle)
        self.units, self.length, self.rows = units, length, rows

    def _make(self, epoch: int) -> StreamEpoch:
        documents = self._draw(epoch)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.units[documents])])
        total = int(starts[-1])
        offset = int(integers(self.seed, "offset", epoch, 1, total)[0]) if self.shuffle else 0
        return StreamEpoch(documents, starts, offset, self._turn("rows", epoch, -(-total // self.length)))

    def batches(self, epoch: int = 0) -> int:
        return -(-len(self._plan(epoch).turn) // self.rows)

    def pieces(self, k: int) -> list[list[Piece]]:
        """For each row of micro-batch k, the pieces of documents that fill it."""
        epoch, batch = self.locate(k)
        plan = self._plan(epoch)
        total = int(plan.starts[-1])
        result = []
        for row in plan.turn[batch * self.rows : (batch + 1) * self.rows]:
            begin = plan.offset + int(row) * self.length
            end = min(begin + self.length, plan.offset + total)
            spans = [(begin, min(end, total)), (max(begin, total) - total, end - total)]
            filled = [_cut_span(plan, low, high) for low, high in spans if low < high]
            result.append([piece for part in filled for piece in part])
        return result


def _cut_span(plan: StreamEpoch, low: int, high: int) -> list[Piece]:
    """The documents' parts between two places of the ring."""
    pieces = []
    place = int(np.searchsorted(plan.starts, low, side="right")) - 1
    while low < high:
        start, stop = int(plan.starts[place]), int(plan.starts[place + 1])
        last = min(high, stop)
        pieces.append(Piece(int(plan.documents[place]), low - start, last - start))
        low, place = last, place + 1
    return pieces
