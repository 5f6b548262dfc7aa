"""Gated retention against numbers from its authors' code (YOCO), whole layer; how they were made stands in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trilemma.mixers.build import build_mixer
from trilemma.mixers.gated_retention import GatedRetention

STORED = json.loads((Path(__file__).parents[1] / "assets" / "gated-retention-yoco.json").read_text())
WIDTH, HEADS = 8, 2
AUTHORS = "numbers stored from microsoft/unilm@768a3c8, YOCO's gate_retention.py"


def pattern(seed: int, *shape: int) -> Tensor:
    """Numbers that need no generator."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.7 * count**2 + seed).reshape(shape)


def mixer(**options: int) -> GatedRetention:
    ours = build_mixer("gated_retention", WIDTH, num_heads=HEADS, **options).double()
    assert isinstance(ours, GatedRetention)
    parts = [pattern(seed, WIDTH, WIDTH) for seed in range(4)] + [3 * pattern(4, HEADS, WIDTH)]
    with torch.no_grad():
        ours.project.weight.copy_(torch.cat(parts))
        ours.out.weight.copy_(pattern(5, WIDTH, WIDTH))
    return ours


@pytest.mark.parametrize("form", ["chunk", "step"])
@pytest.mark.parametrize("chunk_size", [7, 64, 256])
def test_whole_layer(chunk_size: int, form: str, agrees: Callable[..., None]) -> None:
    """Its decays are float32, ours here float64."""
    y, _ = mixer(chunk_size=chunk_size)(pattern(10, 1, STORED["length"], WIDTH))
    want = torch.tensor(STORED[form], dtype=torch.float64)
    what, got = f"layer against its {form} form", y[0, STORED["positions"]]
    agrees("gated_retention", what, got, want, oracle=AUTHORS, share=1e-5)


def test_the_comparison_can_fail() -> None:
    ours = mixer()
    ours.temperature = 15.0
    y, _ = ours(pattern(10, 1, STORED["length"], WIDTH))
    want = torch.tensor(STORED["chunk"], dtype=torch.float64)
    assert (y[0, STORED["positions"]] - want).abs().max() > 1e-3


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_closed_and_open_gates_stay_finite(logit: float) -> None:
    ours = build_mixer("gated_retention", WIDTH, num_heads=HEADS)
    x = torch.randn(1, 500, WIDTH, requires_grad=True)
    with torch.no_grad():
        ours.project.weight[-HEADS:] = 0
        ours.project.weight[-HEADS:, 0] = logit
    y, _ = ours(torch.cat([torch.ones(1, 500, 1), x[..., 1:]], dim=-1))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
