"""Which examples make micro-batch k: a pure function of (seed, k), without a running state.

`PairPlan` groups whole examples of similar length under a token budget; `StreamPlan` cuts documents, laid end to end, into rows
of `context_length`. Both draw an epoch from weighted parts: a part of N examples and weight w gives about w * N examples an
epoch, and every example once before any example again.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilemma.data.order import Indices, integers, permutation

_EPOCHS_KEPT = 2


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

    Groups of similar `first`; inside a group by `second`, upwards and downwards in turn so that group borders are smooth.
    Equal lengths keep their (shuffled) order; the sequence of lengths depends on the lengths alone.
    """
    borders = np.quantile(first, np.arange(1, groups) / groups, method="lower") if groups > 1 else np.zeros(0)
    group = np.searchsorted(np.unique(borders), first, side="left")
    sign = np.where(group % 2 == 0, 1, -1)
    return np.lexsort((first * sign, second * sign, group))


def cut(first: Indices, second: Indices, budget: int) -> Indices:
    """Borders of consecutive batches: rows * (longest first + longest second) <= budget, a single row always fits.

    Returns:
        int64 [batches + 1], from 0 to len(first).
    """
    borders = [0]
    start, size = 0, len(first)
    window = 64
    while start < size:
        stop = min(size, start + window)
        longest = np.maximum.accumulate(first[start:stop]) + np.maximum.accumulate(second[start:stop])
        fits = int(np.searchsorted(longest * np.arange(1, stop - start + 1), budget, side="right"))
        if fits == stop - start and stop < size:
            window *= 2
            continue
        window = max(64, 2 * fits)
        start += max(1, fits)
        borders.append(start)
    return np.array(borders, dtype=np.int64)


def padded_tokens(first: Indices, second: Indices, borders: Indices) -> int:
    """Tokens of all batches with padding, both sides."""
    if len(first) == 0:
        return 0
    rows = np.diff(borders)
    longest = np.maximum.reduceat(first, borders[:-1]) + np.maximum.reduceat(second, borders[:-1])
    return int((rows * longest).sum())


class PairPlan:
    """Micro-batches of whole examples under a token budget.

    Args:
        first, second: lengths of each example's two sides as the model sees them (second: 0 where there is one side).
        parts: the mixture. seed: of the order. budget: padded tokens of a micro-batch.
        shuffle: False: one fixed pass in the order of length (evaluation).
    """

    def __init__(
        self, first: Indices, second: Indices, parts: list[Part], seed: int, budget: int, shuffle: bool = True
    ) -> None:
        self.first, self.second, self.parts = first, second, parts
        self.seed, self.budget, self.shuffle = seed, budget, shuffle
        self.groups = self._best_groups()
        self._epochs: OrderedDict[int, tuple[Indices, Indices, Indices]] = OrderedDict()
        self._starts = [0]
        self._constant = all(float(part.weight).is_integer() for part in parts)

    def _best_groups(self) -> int:
        """The number of groups that pads least; a property of the lengths, the same in every epoch."""
        examples = np.sort(np.concatenate([part.examples for part in self.parts]))
        first, second = self.first[examples], self.second[examples]
        best, least = 1, -1
        for groups in (1, 2, 4, 8, 16, 32, 64, 128):
            order = length_order(first, second, groups)
            padded = padded_tokens(first[order], second[order], cut(first[order], second[order], self.budget))
            if least < 0 or padded < least:
                best, least = groups, padded
        return best

    def _plan(self, epoch: int) -> tuple[Indices, Indices, Indices]:
        """(examples in the order of length, borders of batches, order of the batches) of an epoch."""
        if epoch in self._epochs:
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
        drawn = draw_epoch(self.parts, self.seed, epoch) if self.shuffle else self.parts[0].examples
        order = length_order(self.first[drawn], self.second[drawn], self.groups)
        examples = drawn[order]
        borders = cut(self.first[examples], self.second[examples], self.budget)
        batches = len(borders) - 1
        turn = permutation(self.seed, "batches", epoch, batches) if self.shuffle else np.arange(batches)
        self._epochs[epoch] = (examples, borders, turn)
        if len(self._epochs) > _EPOCHS_KEPT:
            self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def batches(self, epoch: int = 0) -> int:
        """Micro-batches of an epoch; the same in every epoch when all weights are whole numbers."""
        return len(self._plan(epoch)[2])

    def locate(self, k: int) -> tuple[int, int]:
        """(epoch, batch within it) of micro-batch k."""
        if self._constant:
            return divmod(k, self.batches())
        while self._starts[-1] <= k:
            self._starts.append(self._starts[-1] + self.batches(len(self._starts) - 1))
        epoch = int(np.searchsorted(self._starts, k, side="right")) - 1
        return epoch, k - self._starts[epoch]

    def examples(self, k: int) -> Indices:
        """Indices of the examples of micro-batch k."""
        epoch, batch = self.locate(k)
        examples, borders, turn = self._plan(epoch)
        place = turn[batch]
        return examples[borders[place] : borders[place + 1]]

    def padding(self) -> float:
        """Share of padding in the tokens of an epoch."""
        examples, borders, _ = self._plan(0)
        first, second = self.first[examples], self.second[examples]
        return 1 - float(first.sum() + second.sum()) / max(1, padded_tokens(first, second, borders))


@dataclass(frozen=True)
class Piece:
    """Positions [start, stop) of a document's unit (document with its added special ids)."""

    document: int
    start: int
    stop: int


class StreamPlan:
    """Rows of `length` tokens cut from documents laid end to end, in rings: the cut of each epoch starts elsewhere.

    Args:
        units: length of each document with what is added to it. rows: rows of a micro-batch.
        shuffle: False: one fixed pass in file order (evaluation).
    """

    def __init__(
        self, units: Indices, parts: list[Part], seed: int, length: int, rows: int, shuffle: bool = True
    ) -> None:
        self.units, self.parts, self.seed = units, parts, seed
        self.length, self.rows, self.shuffle = length, rows, shuffle
        self._epochs: OrderedDict[int, tuple[Indices, NDArray[np.int64], int, Indices]] = OrderedDict()
        self._starts = [0]
        self._constant = all(float(part.weight).is_integer() for part in parts)

    def _plan(self, epoch: int) -> tuple[Indices, Indices, int, Indices]:
        """(documents in order, where each starts in the ring, where the first row starts, order of the rows)."""
        if epoch in self._epochs:
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
        documents = draw_epoch(self.parts, self.seed, epoch) if self.shuffle else self.parts[0].examples
        starts = np.concatenate([[0], np.cumsum(self.units[documents])]).astype(np.int64)
        total = int(starts[-1])
        count = -(-total // self.length)
        offset = int(integers(self.seed, "offset", epoch, 1, total)[0]) if self.shuffle else 0
        turn = permutation(self.seed, "rows", epoch, count) if self.shuffle else np.arange(count)
        self._epochs[epoch] = (documents, starts, offset, turn)
        if len(self._epochs) > _EPOCHS_KEPT:
            self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def batches(self, epoch: int = 0) -> int:
        """Micro-batches of an epoch; the same in every epoch when all weights are whole numbers."""
        return -(-len(self._plan(epoch)[3]) // self.rows)

    def locate(self, k: int) -> tuple[int, int]:
        """(epoch, batch within it) of micro-batch k."""
        if self._constant:
            return divmod(k, self.batches())
        while self._starts[-1] <= k:
            self._starts.append(self._starts[-1] + self.batches(len(self._starts) - 1))
        epoch = int(np.searchsorted(self._starts, k, side="right")) - 1
        return epoch, k - self._starts[epoch]

    def pieces(self, k: int) -> list[list[Piece]]:
        """For each row of micro-batch k, the pieces of documents that fill it."""
        epoch, batch = self.locate(k)
        documents, starts, offset, turn = self._plan(epoch)
        total = int(starts[-1])
        result = []
        for row in turn[batch * self.rows : (batch + 1) * self.rows]:
            begin = offset + int(row) * self.length
            end = min(begin + self.length, offset + total)
            spans = [(begin, min(end, total)), (max(begin, total) - total, end - total)]
            result.append([piece for low, high in spans if low < high for piece in _cut_span(documents, starts, low, high)])
        return result


def _cut_span(documents: Indices, starts: Indices, low: int, high: int) -> list[Piece]:
    """The documents' parts between two places of the ring."""
    pieces = []
    place = int(np.searchsorted(starts, low, side="right")) - 1
    while low < high:
        start, stop = int(starts[place]), int(starts[place + 1])
        if stop > low:
            last = min(high, stop)
            pieces.append(Piece(int(documents[place]), low - start, last - start))
            low = last
        place += 1
    return pieces
