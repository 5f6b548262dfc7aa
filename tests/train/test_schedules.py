"""Learning rates: the published numbers, the shapes, the ends."""

from __future__ import annotations

import math

import pytest

from trilemma.config import TrainingConfig
from trilemma.train.schedules import learning_rate, noam


def test_the_papers_base_model_peaks_at_six_point_nine_nine() -> None:
    """Attention Is All You Need, equation 3: d_model 512, warmup 4000."""
    rates = [noam(step, 4000, 512) for step in range(1, 20_001)]
    peak = max(range(len(rates)), key=rates.__getitem__)
    assert peak + 1 == 4000
    assert rates[peak] == pytest.approx(6.99e-4, rel=1e-3)
    assert rates[peak] == pytest.approx(512**-0.5 * 4000**-0.5, rel=1e-15)
    assert rates[0] == pytest.approx(512**-0.5 * 4000**-1.5)
    assert noam(16_000, 4000, 512) == pytest.approx(rates[peak] / 2)


def test_noam_takes_the_rate_as_a_factor() -> None:
    config = TrainingConfig(schedule="noam", learning_rate=2.0, warmup_steps=8000)
    assert learning_rate(config, 512, 500) == 2 * noam(500, 8000, 512)


@pytest.mark.parametrize("schedule", ["inverse-sqrt", "cosine", "warmup-stable-decay", "constant"])
def test_warmup_is_linear_to_the_peak(schedule: str) -> None:
    config = TrainingConfig(schedule=schedule, learning_rate=0.5, warmup_steps=10)  # type: ignore[arg-type]
    assert [learning_rate(config, 64, step, 1000) for step in (1, 5, 10)] == pytest.approx([0.05, 0.25, 0.5])


@pytest.mark.parametrize("schedule", ["noam", "inverse-sqrt", "cosine", "warmup-stable-decay", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 500])
@pytest.mark.parametrize("total", [1.0, 40.0, 40.5, math.inf])
def test_every_rate_is_finite_and_not_negative(schedule: str, warmup: int, total: float) -> None:
    config = TrainingConfig(schedule=schedule, learning_rate=1.0, warmup_steps=warmup)  # type: ignore[arg-type]
    for step in range(1, 60):
        rate = learning_rate(config, 64, step, total)
        assert math.isfinite(rate)
        assert 0 < rate <= 1.0


def test_known_points() -> None:
    cosine = TrainingConfig(schedule="cosine", learning_rate=1.0, warmup_steps=20, final_ratio=0.1)
    assert learning_rate(cosine, 1, 60, 100) == pytest.approx(0.1 + 0.9 / 2)
    assert learning_rate(cosine, 1, 100, 100) == pytest.approx(0.1)
    stable = TrainingConfig(
        schedule="warmup-stable-decay", learning_rate=1.0, warmup_steps=20, decay_fraction=0.2, final_ratio=0.0
    )
    assert [learning_rate(stable, 1, step, 100) for step in (21, 80, 90, 100)] == pytest.approx([1, 1, 0.5, 0])
    root = TrainingConfig(schedule="inverse-sqrt", learning_rate=1.0, warmup_steps=25)
    assert learning_rate(root, 1, 100) == pytest.approx(0.5)
