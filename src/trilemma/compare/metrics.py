"""Quality metrics as functions of summed per-document statistics.

A corpus metric such as BLEU is no mean of sentence scores, but it is a function of sums over sentences. Storing these
*sufficient statistics* for each document lets the bootstrap resample documents and recompute the corpus metric exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilemma.errors import ConfigError, nearest

Array = NDArray[np.float64]

BLEU_ORDER = 4
BLEU_WIDTH = 2 + 2 * BLEU_ORDER  # hypothesis length, reference length, matches of order 1-4, n-grams of order 1-4


@dataclass(frozen=True)
class Metric:
    """How a metric is read, computed and printed."""

    name: str
    label: str
    unit: str
    higher_is_better: bool
    low: float  # the values that it can take
    high: float
    decimals: int
    width: int  # statistics of one document
    from_sums: Callable[[Array], Array]  # sums [..., width] -> metric [...]

    @property
    def is_proportion(self) -> bool:
        """Whether it is the percentage of documents that are right."""
        return self.unit == "%"

    @property
    def title(self) -> str:
        """Name and unit, for table heads and axes."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def format(self, value: float) -> str:
        """The value as it is printed in tables."""
        return f"{value:.{self.decimals}f}"

    def sentence(self, value: float) -> str:
        """The value as it is written in a sentence: with a percent sign where it is a percentage."""
        return f"{self.format(value)} %" if self.unit == "%" else self.format(value)


def bleu_from_sums(sums: Array) -> Array:
    """Corpus BLEU (Papineni et al. 2002) from summed statistics, 0 to 100, smoothed as sacrebleu's default ("exp").

    Args:
        sums: [..., 10]: hypothesis length, reference length, matches of order 1-4, n-grams of order 1-4.
    """
    length, reference = sums[..., 0], sums[..., 1]
    matches, total = sums[..., 2 : 2 + BLEU_ORDER], sums[..., 2 + BLEU_ORDER : BLEU_WIDTH]
    # "exp": the k-th order without a match counts as 1 / 2**k matches.
    empty = (matches == 0) & (total > 0)
    halvings = np.cumsum(empty, axis=-1)
    smoothed = np.where(empty, 1.0 / 2.0**halvings, matches)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(total > 0, smoothed / total, 0.0)
        penalty = np.where(length < reference, np.exp(1.0 - reference / length), 1.0)
        score = 100.0 * penalty * np.exp(np.log(precision).mean(axis=-1))
    # sacrebleu gives 0 where nothing at all matches, smoothing or not.
    return np.where((length > 0) & matches.any(axis=-1) & (total > 0).all(axis=-1), score, 0.0)


def ratio_from_sums(sums: Array) -> Array:
    """A weighted mean: `sums` [..., 2] holds numerator and denominator."""
    return np.asarray(sums[..., 0] / sums[..., 1], dtype=np.float64)


def percent_from_sums(sums: Array) -> Array:
    """A share in percent: `sums` [..., 2] holds hits and trials."""
    return 100.0 * ratio_from_sums(sums)


def perplexity_from_sums(sums: Array) -> Array:
    """exp of the mean negative log-likelihood: `sums` [..., 2] holds nats and tokens."""
    return np.exp(ratio_from_sums(sums))


_METRICS = (
    Metric("bleu", "BLEU", "", True, 0.0, 100.0, 2, BLEU_WIDTH, bleu_from_sums),
    Metric("exact_match", "exact match", "%", True, 0.0, 100.0, 2, 2, percent_from_sums),
    Metric("accuracy", "accuracy", "%", True, 0.0, 100.0, 2, 2, percent_from_sums),
    Metric("f1", "F1", "%", True, 0.0, 100.0, 2, 2, percent_from_sums),
    Metric("bits_per_byte", "bits per byte", "", False, 0.0, np.inf, 4, 2, ratio_from_sums),
    Metric("loss", "loss", "nats per token", False, 0.0, np.inf, 4, 2, ratio_from_sums),
    Metric("perplexity", "perplexity", "per token", False, 1.0, np.inf, 3, 2, perplexity_from_sums),
)
METRICS = {metric.name: metric for metric in _METRICS}


def metric_named(name: str) -> Metric:
    """The metric called `name`; `ConfigError` names the nearest."""
    if name not in METRICS:
        raise ConfigError(f'unknown metric "{name}"{nearest(name, METRICS)}')
    return METRICS[name]
