"""Learning rates as pure functions of the step.

Steps count from 1. `total` is the length of the run in steps; where tokens or seconds end the run it is the estimate at
that step, and infinity while nothing is known. Only cosine and warmup-stable-decay look at it.

`learning_rate` of the configuration is the peak for every schedule but noam, where it is the factor (1.0 in the paper).
"""

from __future__ import annotations

import math

from trilemma.config import TrainingConfig


def learning_rate(config: TrainingConfig, d_model: int, step: int, total: float = math.inf) -> float:
    """The rate of optimizer step `step` (from 1) of a run of `total` steps."""
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "noam":
        return noam(step, warmup, d_model, rate)
    if config.schedule == "inverse-sqrt":
        return inverse_sqrt(step, warmup, rate)
    if config.schedule == "cosine":
        return cosine(step, warmup, total, rate, config.final_ratio)
    if config.schedule == "warmup-stable-decay":
        return warmup_stable_decay(step, warmup, total, config.decay_fraction, rate, config.final_ratio)
    return rate * _warmup(step, warmup)


def noam(step: int, warmup: int, d_model: int, factor: float = 1.0) -> float:
    """factor * d_model^-0.5 * min(step^-0.5, step * warmup^-1.5): Attention Is All You Need, equation 3."""
    rise = step * warmup**-1.5 if warmup else math.inf
    return float(factor * d_model**-0.5 * min(step**-0.5, rise))


def inverse_sqrt(step: int, warmup: int, peak: float) -> float:
    """Linear to `peak` at step `warmup`, then peak * sqrt(warmup / step)."""
    start = max(warmup, 1)
    return peak * min(step / start, math.sqrt(start / step))


def cosine(step: int, warmup: int, total: float, peak: float, final_ratio: float) -> float:
    """Linear to `peak` at step `warmup`, then half a cosine to `final_ratio * peak` at step `total`."""
    done = _part(step - warmup, total - warmup)
    return peak * _warmup(step, warmup) * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def warmup_stable_decay(
    step: int, warmup: int, total: float, decay_fraction: float, peak: float, final_ratio: float
) -> float:
    """Linear to `peak`, constant, then linear over the last `decay_fraction` of the steps to `final_ratio * peak`."""
    if math.isinf(total):
        return peak * _warmup(step, warmup)
    decay = decay_fraction * total
    done = _part(step - (total - decay), decay)
    return peak * _warmup(step, warmup) * (1 - (1 - final_ratio) * done)


def _warmup(step: int, warmup: int) -> float:
    return min(1.0, step / warmup) if warmup else 1.0


def _part(done: float, whole: float) -> float:
    """done / whole, kept in [0, 1]; a run shorter than its warm-up never gets past 0."""
    return min(1.0, max(0.0, done / whole)) if whole > 0 else 0.0
