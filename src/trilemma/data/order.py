"""Counter-based randomness: every order, mask and sample is a function of (seed, purpose, counter), with no state.

Only the raw output of the Philox counter generator is used (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"): numpy promises that it never changes, which it does not for `Generator.permutation` and its kind.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
_MASK64 = (1 << 64) - 1


def _generator(seed: int, purpose: str, counter: int) -> np.random.Philox:
    word = (zlib.crc32(purpose.encode("utf-8")) << 32) | (counter & 0xFFFFFFFF)
    key = np.array([seed & _MASK64, word], dtype=np.uint64)
    start = np.array([0, counter >> 32, 0, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=start)


def raw_bits(seed: int, purpose: str, counter: int, count: int) -> NDArray[np.uint64]:
    """`count` random 64-bit words that depend on (seed, purpose, counter) alone."""
    return np.asarray(_generator(seed, purpose, counter).random_raw(count), dtype=np.uint64)


def uniform(seed: int, purpose: str, counter: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1)."""
    return (raw_bits(seed, purpose, counter, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(seed: int, purpose: str, counter: int, count: int, bound: int) -> Indices:
    """`count` integers in [0, bound); the bias is below bound / 2**53."""
    return np.asarray((uniform(seed, purpose, counter, count) * bound).astype(np.int64))


def permutation(seed: int, purpose: str, counter: int, count: int) -> Indices:
    """A permutation of range(count)."""
    return np.argsort(raw_bits(seed, purpose, counter, count), kind="stable")


def hash_values(values: Indices, salt: str) -> NDArray[np.uint64]:
    """A 64-bit hash of each integer (the finaliser of SplitMix64), to split values for good, whatever the seed."""
    offset = zlib.crc32(salt.encode("utf-8")) * 0x9E3779B97F4A7C15 & _MASK64
    mixed = values.astype(np.uint64) + np.uint64(offset)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)


class Draws:
    """Random numbers of one example, drawn one after another; all depend on (seed, purpose, counter) alone."""

    def __init__(self, seed: int, purpose: str, counter: int) -> None:
        self._bits = _generator(seed, purpose, counter)
        self._ahead: list[float] = []  # single numbers are drawn a few at a time

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` numbers in [0, 1)."""
        words = np.asarray(self._bits.random_raw(count), dtype=np.uint64)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, count: int, bound: int) -> Indices:
        """`count` integers in [0, bound)."""
        return np.asarray((self.uniform(count) * bound).astype(np.int64))

    def integer(self, low: int, high: int) -> int:
        """One integer from `low` to `high`, both included."""
        return low + int(self.number() * (high - low + 1))

    def number(self) -> float:
        """One number in [0, 1)."""
        if not self._ahead:
            self._ahead = self.uniform(16).tolist()
        return self._ahead.pop()

    def sample(self, count: int, bound: int) -> Indices:
        """`count` different integers in [0, bound), in random order."""
        return self.weighted_sample(count, np.ones(bound))

    def weighted_sample(self, count: int, weights: NDArray[np.float64]) -> Indices:
        """`count` different indices, taken one by one, each with a probability in proportion to its weight among those
        that are left (by exponential races: Efraimidis and Spirakis 2006)."""
        assert 0 < count <= len(weights)
        times = -np.log1p(-self.uniform(len(weights))) / weights
        first = np.argpartition(times, count - 1)[:count]
        return np.asarray(first[np.argsort(times[first], kind="stable")], dtype=np.int64)
