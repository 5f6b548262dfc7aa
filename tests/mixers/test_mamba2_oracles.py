"""Mamba-2 against transformers' Mamba2Mixer (its torch path), whole layer: full sequences, cached steps, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from trilemma.mixers.build import build_mixer
from trilemma.mixers.mamba2 import Mamba2

WIDTH, BATCH, LENGTH = 32, 2, 45
THEIRS = "transformers Mamba2Mixer"


def pair(groups: int = 1, chunk_size: int = 16) -> tuple[Mamba2, Mamba2Mixer, Mamba2Config]:
    """Our mixer and theirs with the same random weights."""
    config = Mamba2Config(
        hidden_size=WIDTH, expand=2, head_dim=8, num_heads=8, state_size=12, n_groups=groups, chunk_size=8,
        num_hidden_layers=1,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0)
    ours = build_mixer("mamba2", WIDTH, d_state=12, head_dim=8, num_groups=groups, chunk_size=chunk_size)
    assert isinstance(ours, Mamba2)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for own, other in (
            (ours.project.weight, theirs.in_proj.weight), (ours.conv.weight.t()[:, None], theirs.conv1d.weight),
            (ours.conv.bias, theirs.conv1d.bias), (ours.dt_bias, theirs.dt_bias), (ours.A_log, theirs.A_log),
            (ours.D, theirs.D), (ours.norm_weight, theirs.norm.weight), (ours.out.weight, theirs.out_proj.weight),
        ):  # fmt: skip
            assert isinstance(own, Tensor)
            other.copy_(own)
    return ours, theirs, config


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 7, LENGTH])
def test_whole_sequences(length: int, groups: int, agrees: Callable[..., None]) -> None:
    ours, theirs, _ = pair(groups)
    x = torch.randn(BATCH, length, WIDTH)
    agrees("mamba2", "layer", ours(x)[0], theirs(x), oracle=THEIRS)


def test_gradients(agrees: Callable[..., None]) -> None:
    ours, theirs, _ = pair(2)
    x, weights = torch.randn(BATCH, LENGTH, WIDTH), torch.randn(BATCH, LENGTH, WIDTH)
    (ours(x)[0] * weights).sum().backward()
    (theirs(x) * weights).sum().backward()
    for own, other in (
        ("project.weight", "in_proj.weight"), ("A_log", "A_log"), ("dt_bias", "dt_bias"), ("D", "D"),
        ("norm_weight", "norm.weight"), ("out.weight", "out_proj.weight"), ("conv.bias", "conv1d.bias"),
    ):  # fmt: skip
        got, want = (net.get_parameter(name).grad for net, name in ((ours, own), (theirs, other)))
        assert got is not None
        assert want is not None
        agrees("mamba2", "gradients of the layer", got, want, oracle=THEIRS)


@pytest.mark.parametrize("groups", [1, 2])
def test_our_steps_against_their_cached_steps(groups: int, agrees: Callable[..., None]) -> None:
    ours, theirs, config = pair(groups)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    cache, state = DynamicCache(config=config), ours.init_state(BATCH)
    with torch.no_grad():
        for part in x.split([20, *[1] * (LENGTH - 20)], dim=1):
            y, state = ours(part, state)
            want = theirs(part, cache_params=cache)
            agrees("mamba2", "layer in cached steps", y, want, oracle=THEIRS)


def test_the_comparison_can_fail() -> None:
    """The norm before the gate is another model."""
    ours, theirs, _ = pair()
    x = torch.randn(BATCH, LENGTH, WIDTH)
    ours.epsilon = 1e-2
    assert (ours(x)[0] - theirs(x)).abs().max() > 1e-4


def test_initial_values_are_the_authors_ranges() -> None:
    ours = build_mixer("mamba2", 512)
    assert isinstance(ours, Mamba2)
    assert (ours.num_heads, ours.head_dim, ours.d_state) == (16, 64, 128)
    assert ours.A_log.exp().min() >= 1
    assert ours.A_log.exp().max() <= 16
    steps = nn.functional.softplus(ours.dt_bias)
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 1.01e-1


@pytest.mark.parametrize("bias", [-200.0, 200.0])
def test_extreme_step_sizes_stay_finite(bias: float) -> None:
    ours = build_mixer("mamba2", WIDTH, d_state=4, head_dim=8)
    assert isinstance(ours, Mamba2)
    with torch.no_grad():
        ours.dt_bias.fill_(bias)
    x = torch.randn(1, 300, WIDTH, requires_grad=True)
    y, _ = ours(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *ours.parameters()])
