"""What the differences between candidates are worth: intervals, pairwise tests, Holm's correction.

Two things would come out differently if the study were run again: the seeds (initialisation and data order) and the
documents of the test set. Both are resampled in one hierarchical bootstrap:

- *documents* with replacement, the same ones for all candidates (the test set is shared, so differences are paired);
- *seeds* around the candidate's mean with the spread observed between seeds. Drawing n = 3 values with replacement
  would cover the truth about 75 % of the time when it claims 95 %, so the seed part is drawn from Student's t with the
  degrees of freedom that the seeds leave: n - 1 for one candidate, n_a + n_b - 2 (pooled spread) for a pair.

A p-value is never below 2 / (replicates + 1), and Holm's correction multiplies the smallest by the number of pairs. So
the replicates grow with the pairs (`replicates_for`): else a study of many candidates could tell nothing apart.

With one seed the spread between seeds is unknown; the interval then speaks about documents alone, and says so.
No verdict is ever drawn from fewer than `MIN_SEEDS` seeds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trilemma.compare.metrics import Array, Metric

MIN_SEEDS = 3
LEVEL = 0.95
REPLICATES = 10_000  # the least
_CHUNK = 256  # replicates drawn at once: bounds memory at _CHUNK * (documents + runs * width) numbers
_WANTED, _LEAST = 400, 100  # replicates for each pair: the least p is 0.005, or 0.02, after Holm's correction
_AFFORDABLE = 4e8  # replicates * documents beyond which `_LEAST` must do; about half a minute


@dataclass(frozen=True)
class Sample:
    """One candidate's measurements: `values` [seeds]; `replicates` [replicates], means over seeds, each over the
    `documents` of one draw."""

    values: Array
    replicates: Array
    documents: int


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval. `seeds_counted` is False where one seed leaves only documents to resample."""

    mean: float
    low: float
    high: float
    seeds: int
    seeds_counted: bool


@dataclass(frozen=True)
class PairTest:
    """The difference first - second of two candidates.

    `p` is two-sided; `adjusted` is Holm's over the family, None outside one. Fewer than three seeds on a side: both are
    None and there is no verdict.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    seeds: int  # of the candidate that has fewer
    p: float | None
    adjusted: float | None

    @property
    def separated(self) -> bool:
        """Whether the pair is told apart at the study's level, after correction where there is one."""
        p = self.p if self.adjusted is None else self.adjusted
        return p is not None and p < 1.0 - LEVEL


def replicates_for(seeds: Sequence[int], documents: int) -> int:
    """How many bootstrap draws a study needs, so that Holm's correction over its pairs leaves a p-value to find.

    Args:
        seeds: the number of seeds of each candidate; those with fewer than `MIN_SEEDS` are in no tested pair.
        documents: of the test set.
    """
    tested = sum(count >= MIN_SEEDS for count in seeds)
    pairs = tested * (tested - 1) // 2
    affordable = int(_AFFORDABLE / max(1, documents))
    return max(REPLICATES, min(_WANTED * pairs, max(affordable, _LEAST * pairs)))


def resample(
    documents: Mapping[str, Sequence[Array]], metric: Metric, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Sample]:
    """Draws documents with replacement, jointly for all candidates.

    Args:
        documents: candidate -> one array [documents, metric.width] for each seed. All have the same documents in the
            same order.
        replicates: bootstrap draws.
        seed: of the draws; the same seed gives the same intervals.

    Raises:
        ValueError: candidates or seeds with different numbers of documents.
    """
    arrays = [array for candidate in documents.values() for array in candidate]
    sizes = {len(array) for array in arrays}
    if len(sizes) != 1:
        raise ValueError(f"all runs must be scored on the same documents; found sizes {sorted(sizes)}")
    size = sizes.pop()
    stacked = np.concatenate(arrays, axis=1)  # [documents, runs * width]
    ends = np.cumsum([len(candidate) for candidate in documents.values()]).tolist()
    places = {name: slice(end - len(documents[name]), end) for name, end in zip(documents, ends, strict=True)}
    generator = np.random.default_rng(seed)
    draws = {name: np.empty(replicates) for name in documents}
    for start in range(0, replicates, _CHUNK):
        rows = min(_CHUNK, replicates - start)
        counts = generator.multinomial(size, np.full(size, 1.0 / size), size=rows).astype(np.float64)
        # The metric is computed of each chunk: the sums of all replicates would not fit for many runs.
        drawn = metric.from_sums((counts @ stacked).reshape(rows, len(arrays), metric.width))  # [rows, runs]
        for name, own in places.items():
            draws[name][start : start + rows] = drawn[:, own].mean(axis=1)
    whole = metric.from_sums(stacked.sum(axis=0).reshape(len(arrays), metric.width))
    return {name: Sample(whole[own], draws[name], size) for name, own in places.items()}


@functools.lru_cache(maxsize=4)
def _student(freedom: int, size: int, seed: int) -> Array:
    """Draws from Student's t; the same for all pairs that leave as many degrees of freedom. Not to be written to."""
    return np.random.default_rng(seed).standard_t(freedom, size=size)


def interval(sample: Sample, metric: Metric, seed: int = 0) -> Interval:
    """The candidate's mean over seeds with its 95 % interval over documents and seeds."""
    seeds = len(sample.values)
    draws = sample.replicates
    if seeds > 1:
        spread = float(sample.values.std(ddof=1)) / np.sqrt(seeds)
        draws = draws + spread * _student(seeds - 1, len(draws), seed)
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    mean = float(sample.values.mean())
    if metric.is_proportion:
        # Near 0 and 100 % resampling sees no variation at all; Wilson's interval is the least that can be claimed.
        wilson = wilson_interval(mean, sample.documents)
        low, high = min(low, wilson[0]), max(high, wilson[1])
    clipped = np.clip([low, high], metric.low, metric.high)
    return Interval(mean, float(clipped[0]), float(clipped[1]), seeds, seeds > 1)


def wilson_interval(percent: float, documents: int) -> tuple[float, float]:
    """95 % interval, in percent, of a share found on so many documents (Wilson 1927)."""
    share, spread = percent / 100.0, 1.959964**2 / documents
    half = np.sqrt(spread * share * (1.0 - share) + spread**2 / 4.0)
    low, high = (100.0 * (share + spread / 2.0 + side * half) / (1.0 + spread) for side in (-1.0, 1.0))
    return float(low), float(high)


def compare_pair(samples: Mapping[str, Sample], first: str, second: str, seed: int = 0) -> PairTest:
    """The paired difference of two candidates' means; without `MIN_SEEDS` seeds on both sides there is no p-value."""
    a, b = samples[first], samples[second]
    counts = (len(a.values), len(b.values))
    draws = a.replicates - b.replicates
    freedom = sum(counts) - 2
    if min(counts) > 1:
        squares = sum(float(((s.values - s.values.mean()) ** 2).sum()) for s in (a, b))
        spread = np.sqrt(squares / freedom * (1.0 / counts[0] + 1.0 / counts[1]))
        draws = draws + spread * _student(freedom, len(draws), seed)
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    p = None
    if min(counts) >= MIN_SEEDS:
        # The observed sample counts as one draw, so that p is never zero.
        sides = (int((draws <= 0).sum()), int((draws >= 0).sum()))
        p = min(1.0, 2.0 * (min(sides) + 1) / (len(draws) + 1))
    difference = float(a.values.mean() - b.values.mean())
    return PairTest(first, second, difference, float(low), float(high), min(counts), p, None)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given.

    The i-th smallest of m is multiplied by m - i + 1; adjusted values keep the raw ones' order and never pass 1.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = highest
    return adjusted


def compare_all(samples: Mapping[str, Sample], names: Sequence[str], seed: int = 0) -> list[PairTest]:
    """Every pair of `names`, Holm-adjusted over the pairs that have seeds enough to be tested."""
    tests = [compare_pair(samples, first, second, seed) for at, first in enumerate(names) for second in names[at + 1 :]]
    raw = [test.p for test in tests if test.p is not None]
    adjusted = iter(holm(raw))
    return [test if test.p is None else dataclasses.replace(test, adjusted=next(adjusted)) for test in tests]
