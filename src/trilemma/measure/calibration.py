"""Whether a probability of 0.8 is right in 80 of 100 cases, and the temperature that makes it so.

(Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, sections 2 and 4.2.) One temperature
divides all logits: the likeliest class stays the likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BINS = 15
# Beyond these a temperature says only that the split was too small or too easy to fit one.
LOWEST, HIGHEST = 0.05, 20.0


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature.

    Attributes:
        temperature: logits are divided by it. examples: of the validation data that it was fitted on.
        error_before, error_after: expected calibration error on these, in per cent.
        loss_before, loss_after: cross-entropy on these, in nats.
    """

    temperature: float
    examples: int
    error_before: float
    error_after: float
    loss_before: float
    loss_after: float

    @property
    def at_bound(self) -> bool:
        """Whether the data asked for a temperature beyond `LOWEST` or `HIGHEST`: too few, or all right or wrong."""
        return not 1.001 * LOWEST < self.temperature < HIGHEST / 1.001

    def to_json(self) -> dict[str, Any]:
        """The content of calibration.json."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"temperature {self.temperature:.3f} from {self.examples:,} validation examples: expected calibration "
            f"error {self.error_before:.2f} % before, {self.error_after:.2f} % after"
        )


def at_temperature(log_probabilities: Array, temperature: float) -> Array:
    """Log-probabilities [examples, classes] as they are with all logits divided by `temperature`."""
    scaled = log_probabilities / temperature
    return np.asarray(scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True))


def calibration_error(log_probabilities: Array, labels: Sequence[int] | NDArray[np.int64]) -> float:
    """Expected calibration error in per cent: |accuracy - confidence| averaged over `BINS` equal bins of confidence.

    Args:
        log_probabilities: [examples, classes]. labels: [examples] class ids.
    """
    confidence = np.exp(log_probabilities.max(1))
    right = log_probabilities.argmax(1) == np.asarray(labels)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(float((right[bins == b] - confidence[bins == b]).sum())) for b in range(BINS)]
    return 100 * math.fsum(gaps) / len(confidence)


def fit_temperature(log_probabilities: Array, labels: Sequence[int] | NDArray[np.int64]) -> Calibration:
    """The temperature of the lowest cross-entropy, between `LOWEST` and `HIGHEST`.

    Cross-entropy is convex in the inverse temperature; its derivative is bisected to a relative 1e-9.

    Args:
        log_probabilities: [examples, classes], as the model gives them. labels: [examples] class ids.
    """
    wanted = np.asarray(labels)
    rows = np.arange(len(wanted))

    def slope(inverse: float) -> float:
        weights = np.exp(at_temperature(log_probabilities, 1 / inverse))
        finite = np.where(weights > 0, log_probabilities, 0.0)  # 0 * -inf counts nothing
        return float(((weights * finite).sum(1) - log_probabilities[rows, wanted]).sum())

    low, high = 1 / HIGHEST, 1 / LOWEST
    if (log_probabilities[rows, wanted] == log_probabilities.max(1)).all():
        low = high  # always right: the surer the better, until the slope is below rounding
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    temperature = 1 / high
    after = at_temperature(log_probabilities, temperature)
    return Calibration(
        temperature=temperature,
        examples=len(wanted),
        error_before=calibration_error(log_probabilities, wanted),
        error_after=calibration_error(after, wanted),
        loss_before=float(-log_probabilities[rows, wanted].mean()),
        loss_after=float(-after[rows, wanted].mean()),
    )
