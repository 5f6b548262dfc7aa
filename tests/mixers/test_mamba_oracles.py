"""Mamba against transformers' MambaMixer on its plain torch path: whole sequences, a cached prompt and cached steps.

The oracle computes its decays in float32, whatever it is given.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from trilemma.mixers.build import build_mixer
from trilemma.mixers.mamba import Mamba
from trilemma.ops.selective_scan import selective_scan

WIDTH, LENGTH, BATCH = 24, 19, 2
ORACLE = {"oracle": "transformers MambaMixer"}


def pair(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[Mamba, MambaMixer, MambaConfig]:
    """Our mixer and theirs with the same random weights."""
    ours = build_mixer("mamba", WIDTH, d_state=5, dt_rank=3, bias=bias, segment_size=7)
    assert isinstance(ours, Mamba)
    config = MambaConfig(
        hidden_size=WIDTH, state_size=5, time_step_rank=3, use_bias=bias, num_hidden_layers=1, use_mambapy=False
    )
    theirs = MambaMixer(config, layer_idx=0).eval()
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
        for mine, its in ((ours.project, theirs.in_proj), (ours.out, theirs.out_proj), (ours.select, theirs.x_proj)):
            copy(mine, its)
        theirs.conv1d.weight.copy_(ours.conv.weight.t()[:, None])
        theirs.conv1d.bias.copy_(ours.conv.bias)
        theirs.dt_proj.weight.copy_(ours.dt_project.weight)
        theirs.dt_proj.bias.copy_(ours.dt_bias)
        theirs.A_log.copy_(ours.A_log)
        theirs.D.copy_(ours.D)
    return ours.to(dtype), theirs.to(dtype), config


def copy(mine: nn.Linear, its: nn.Linear) -> None:
    its.weight.copy_(mine.weight)
    if mine.bias is not None:
        its.bias.copy_(mine.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_whole_sequences_and_their_gradients(bias: bool, agrees: Callable[..., None]) -> None:
    ours, theirs, _ = pair(bias)
    results = []
    x, weights = torch.randn(2, BATCH, LENGTH, WIDTH)
    for run in (lambda x: ours(x)[0], theirs):
        leaf = x.clone().requires_grad_()
        y: Tensor = run(leaf)
        (y * weights).sum().backward()
        results.append((y, leaf.grad))
    (y, grad), (want, want_grad) = results
    agrees("mamba", "layer", y, want, **ORACLE)
    grads, wanted = (grad, ours.A_log.grad, ours.dt_bias.grad), (want_grad, theirs.A_log.grad, theirs.dt_proj.bias.grad)
    agrees("mamba", "gradients of the layer", grads, wanted, **ORACLE)


def test_a_prompt_and_steps_against_their_cache(agrees: Callable[..., None]) -> None:
    ours, theirs, config = pair(False)
    x, cache, state = torch.randn(BATCH, LENGTH, WIDTH), DynamicCache(config=config), ours.init_state(BATCH)
    with torch.no_grad():
        for part in x.split([6, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], dim=1):
            y, state = ours(part, state)
            agrees("mamba", "layer in cached steps", y, theirs(part, cache_params=cache), **ORACLE)


def test_the_comparison_can_fail() -> None:
    ours, theirs, _ = pair(False)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        ours.A_log.add_(0.1)
        assert (ours(x)[0] - theirs(x)).abs().max() > 1e-4


def test_steps_of_any_size_stay_finite() -> None:
    """From a standstill (dt = 0) to forgetting everything at once, and with it gradients."""
    for size in (0.0, 1e-30, 1e3, 1e30):
        x, dt = torch.randn(1, 300, 4, requires_grad=True), torch.full((1, 300, 4), size, requires_grad=True)
        a, b = (-torch.rand(3, 4)).requires_grad_(), torch.randn(1, 300, 3)
        y, last = selective_scan(x, dt, a, b, torch.randn(1, 300, 3), None, None, 64)
        for value in (y, *torch.autograd.grad(y.sum() + last.sum(), (x, dt, a))):
            assert value.isfinite().all()


def test_memory_holds_one_segment_s_states() -> None:
    """No tensor as large as the states of all tokens, forwards or backwards."""
    length, channels, width = 2048, 6, 5
    x, dt = torch.randn(1, length, channels, requires_grad=True), torch.rand(1, length, channels, requires_grad=True)
    b = torch.randn(1, length, width, requires_grad=True)
    with _Largest() as seen:
        y, _ = selective_scan(x, dt, -torch.rand(width, channels), b, b, None, None, 64)
        y.sum().backward()
    assert seen.numel <= 2 * length * channels


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result
