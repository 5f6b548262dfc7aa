"""Reliability row 30: the first losses of every architecture in float64, against small text files.

`TRILEMMA_GOLDEN=write pytest tests/train/test_golden_losses.py` writes the files anew; do so only when a change of the
arithmetic is meant, and say so in the commit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trilemma.mixers.base import Mixer
from trilemma.registry import available_mixers, mixer_class
from trilemma.runs import RunDirectory
from trilemma.train import train

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 10
TOLERANCE = 1e-9
Tiny = Callable[..., dict[str, Any]]


def architectures() -> list[str]:
    """Every mixer that can stand in a stack, in every layout that it can serve."""
    names = [name for name in available_mixers() if stands_alone(mixer_class(name))]
    return [f"{layout}.{name}" for layout in ("encoder-decoder", "decoder-only", "encoder-only") for name in names]


def stands_alone(mixer: type[Mixer]) -> bool:
    return mixer.capabilities.causal and not mixer.capabilities.reads_memory


def losses(tiny: Tiny, architecture: str, out: Path) -> list[float]:
    layout, mixer = architecture.split(".")
    config = tiny(layout, steps=STEPS, precision="float64", checkpoint_every=STEPS)
    config["model"]["mixer"] = mixer
    config["model"]["dropout"] = 0.0  # the bits of dropout belong to torch's generator
    train(config, out=out, quiet=True)
    return [record["loss"] for record in RunDirectory(out).read_metrics() if "loss" in record]


def differs(got: list[float], expected: list[float]) -> bool:
    return got != pytest.approx(expected, rel=TOLERANCE, abs=0)


@pytest.mark.parametrize("architecture", architectures())
def test_the_first_losses_are_as_recorded(architecture: str, tiny_config: Tiny, tmp_path: Path) -> None:
    got = losses(tiny_config, architecture, tmp_path / "run")
    file = GOLDEN / f"{architecture}.txt"
    if os.environ.get("TRILEMMA_GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        file.write_text("".join(f"{loss.hex()}  {loss!r}\n" for loss in got))
    assert file.is_file(), f"no recorded losses for {architecture}: write them with TRILEMMA_GOLDEN=write"
    expected = [float.fromhex(line.split()[0]) for line in file.read_text().splitlines()]
    assert len(expected) == STEPS
    assert not differs(got, expected), f"{architecture}: {got} != {expected}"


def test_no_recorded_losses_are_orphans() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == sorted(architectures())


def test_planted_defect_a_slightly_other_epsilon_is_found(tiny_config: Tiny, tmp_path: Path) -> None:
    """A change of one part in a million of Adam's arithmetic shows within ten steps."""

    def shifted(layout: str, **training: Any) -> dict[str, Any]:
        return tiny_config(layout, **training, learning_rate=0.01 * (1 + 1e-6))

    expected = losses(tiny_config, "decoder-only.attention", tmp_path / "right")
    assert differs(losses(shifted, "decoder-only.attention", tmp_path / "wrong"), expected)
