"""Where, when and on which path costs were measured, and how many samples a result shows: what is told apart."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import Fake, write_study

from trilemma.compare.analysis import analyse
from trilemma.compare.records import Documents, Inference, InferencePoint, SampleOutput

PLACE = {"cpu": "a CPU", "threads": 2, "torch": "2.13.0", "gpu": None}


def texts(folder: Path, **changes: Any) -> list[str]:
    """Inequalities of a study in which A was measured where it was trained, and B with these changes."""
    directory = write_study(folder, {"A": Fake(), "B": Fake()})
    lawful = {"path": "plain", "environment": PLACE, "measured": "2026-11-30T10:00:00+00:00"}
    for name, values in (("00-seed1", lawful), ("03-seed1", {**lawful, **changes})):
        directory.write_inference(name, dataclasses.replace(directory.read_inference(name), **values))
    return [f"{item.candidate}: {item.text}" for item in analyse(directory.read()).inequalities]


def test_costs_measured_elsewhere_or_at_another_time_are_listed(tmp_path: Path) -> None:
    assert not any("inference cost" in text for text in texts(tmp_path / "same"))
    other = texts(tmp_path / "machine", environment={**PLACE, "cpu": "another CPU"})
    assert "B: inference cost was measured with cpu another CPU, training with a CPU" in other
    assert "all: inference cost: cpu differs between candidates: a CPU / another CPU" in other
    assert "all: inference cost: path differs between candidates: plain / plain+fla" in texts(
        tmp_path / "path", path="plain+fla"
    )
    late = texts(tmp_path / "day", measured="2026-12-02T10:00:00+00:00")
    assert "all: inference cost was measured on different days: 2026-11-30, 2026-12-02" in late


@pytest.mark.parametrize(
    ("contexts", "batch_sizes", "covered"),
    [([8], [1], True), ([8, 16], [1, 2], True), ([8, 32], [1], False), ([8], [4], False), ([], [4], True)],
)
def test_what_was_tried_is_not_measured_again(contexts: list[int], batch_sizes: list[int], covered: bool) -> None:
    kept = Inference([InferencePoint(8, 1, 1.0, 1.0)], {16: "out of memory"}, [1, 2])
    assert kept.covers(contexts, batch_sizes) is covered


@pytest.mark.parametrize(
    ("samples", "asked", "wanted", "enough"),
    [
        (2, 2, 2, True),
        (2, 2, 3, False),
        (2, 2, 0, False),
        (5, 9, 8, True),
        (0, 0, 3, False),
        (0, 3, 8, True),
        (2, None, 2, True),
        (2, None, 4, False),
        (0, None, 4, True),
    ],
)
def test_a_result_is_scored_again_where_it_would_show_other_samples(
    samples: int, asked: int | None, wanted: int, enough: bool
) -> None:
    shown = [SampleOutput(at, "a", "b", "c") for at in range(samples)]
    assert Documents("bleu", "x", "test", np.zeros((5, 2)), shown, asked).shows(wanted) is enough
