"""Mamba-3 against numbers from its authors' module and reference steps, and against a naive loop in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilemma.mixers.build import build_mixer
from trilemma.mixers.mamba3 import Mamba3, decay_rate

STORED = json.loads((Path(__file__).parents[1] / "assets" / "mamba3-reference.json").read_text())
WIDTH, LENGTH = 16, 9
AUTHORS = "numbers stored from state-spaces/mamba@e9594ce, mamba3.py"


def pattern(seed: int, *shape: int) -> Tensor:
    """Numbers that need no generator."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.7 * count**2 + seed).reshape(shape)


def build(**options: Any) -> Mamba3:
    ours = build_mixer("mamba3", WIDTH, **{"d_state": 8, "head_dim": 8, "num_groups": 2, **options})
    assert isinstance(ours, Mamba3)
    return ours


def as_stored(rank: int, chunk_size: int) -> Mamba3:
    """Their parameters in the order of their names, each its initial value and a pattern; ranks come first in ours."""
    ours = build(mimo_rank=rank, chunk_size=chunk_size).double()
    heads, inner, state = ours.num_heads, ours.inner, ours.d_state
    ranks = {"mimo_o": 1 / rank, "mimo_x": 1 / rank, "mimo_z": 1.0} if rank > 1 else {}
    theirs: list[tuple[str, tuple[int, ...], float]] = [
        ("B_bias", (heads, rank, state), 1.0), ("B_norm.weight", (state,), 1.0), ("C_bias", (heads, rank, state), 1.0),
        ("C_norm.weight", (state,), 1.0), ("D", (heads,), 1.0), ("dt_bias", (heads,), -1.0),
        ("project.weight", (sum(ours.widths), WIDTH), 0.0),
        *((name, (heads, rank, ours.head_dim), initial) for name, initial in ranks.items()),
        ("out.weight", (WIDTH, inner), 0.0),
    ]  # fmt: skip
    with torch.no_grad():
        for seed, (name, shape, initial) in enumerate(theirs):
            value = initial + 0.5 * pattern(seed, *shape)
            value = value.transpose(0, 1) if len(shape) == 3 else value
            if name[1:] in ("_bias", "_norm.weight"):
                ours.get_parameter("bc" + name[1:6].rstrip("."))["BC".index(name[0])] = value
            else:
                ours.get_parameter(name).copy_(value)
    return ours


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("name", ["siso", "mimo"])
def test_whole_layer(name: str, chunk_size: int, agrees: Callable[..., None]) -> None:
    ours = as_stored(2 if name == "mimo" else 1, chunk_size)
    x = pattern(50, 1, LENGTH, WIDTH).requires_grad_()
    y, _ = ours(x)
    (gradient,) = torch.autograd.grad((y * pattern(60, 1, LENGTH, WIDTH)).sum(), x)
    for what, got, key in (("layer", y, "y"), ("gradients of the layer", gradient, "gradient")):
        want = torch.tensor(STORED[name][key], dtype=torch.float64)
        agrees("mamba3", f"{what} ({name.upper()})", got[0], want, oracle=AUTHORS, share=1e-5)


def naive(ours: Mamba3, x: Tensor) -> Tensor:
    """The equations of the paper, token by token and head by head."""
    rows, heads = len(x), ours.num_heads
    gate, u, bc, step, rate, trapezoid, turn = ours.project(x).split(ours.widths, dim=-1)
    bc = bc.unflatten(-1, (2, ours.mimo_rank, ours.num_groups, -1))
    bc = bc / (bc.square().mean(-1, keepdim=True) + ours.epsilon).sqrt() * ours.bc_norm[:, None, None]
    bc = bc.repeat_interleave(heads // ours.num_groups, dim=4) + ours.bc_bias  # [rows, L, 2, R, H, E]
    weights = ours.mimo_x, ours.mimo_z, ours.mimo_o
    mx, mz, mo = (torch.ones(1, heads, ours.head_dim).to(x) if weight is None else weight for weight in weights)
    outs = []
    state = torch.zeros(rows, heads, ours.d_state, ours.head_dim).to(x)
    theta = torch.zeros(rows, heads, ours.angles).to(x)
    k, v = (torch.zeros(rows, ours.mimo_rank, heads, size).to(x) for size in (ours.d_state, ours.head_dim))
    for t in range(x.shape[1]):
        delta = nn.functional.softplus(step[:, t] + ours.dt_bias)
        mix = trapezoid[:, t].sigmoid()
        alpha = torch.exp(-delta * decay_rate(rate[:, t]))
        theta = theta + delta[..., None] * math.pi * turn[:, t, None].tanh()
        old_k, old_v = k, v
        k, q = turned(bc[:, t, 0], theta), turned(bc[:, t, 1], theta)
        v = u[:, t].unflatten(-1, (1, heads, -1)) * mx
        z = gate[:, t].unflatten(-1, (1, heads, -1)) * mz
        before = torch.einsum("brhe,brhp->bhep", old_k, old_v) * ((1 - mix) * delta * alpha)[..., None, None]
        now = torch.einsum("brhe,brhp->bhep", k, v) * (mix * delta)[..., None, None]
        state = alpha[..., None, None] * state + before + now
        o = torch.einsum("bhep,brhe->brhp", state, q) + ours.D[:, None] * v
        outs.append((o * nn.functional.silu(z) * mo).sum(1).flatten(1))
    return ours.out(torch.stack(outs, dim=1))


def turned(part: Tensor, theta: Tensor) -> Tensor:
    """Each pair of features as a complex number, times e^(i theta)."""
    pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
    angles = nn.functional.pad(theta, (0, pairs.shape[-1] - theta.shape[-1]))[:, None]
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@pytest.mark.parametrize(
    "options", [{}, {"mimo_rank": 3, "rope_fraction": 1.0}, {"num_groups": 1, "mimo_rank": 4, "chunk_size": 5}]
)
def test_naive_loop(options: dict[str, Any]) -> None:
    ours = build(**options).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 40, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], naive(ours, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("value", [-1e3, 1e3])
def test_extreme_steps_and_rates_stay_finite(value: float) -> None:
    ours = build()
    with torch.no_grad():
        ours.project.weight.mul_(abs(value))
        ours.dt_bias.fill_(value / 10)
    x = torch.randn(1, 300, WIDTH, requires_grad=True)
    y, _ = ours(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *ours.parameters()])
