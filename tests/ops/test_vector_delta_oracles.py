"""The delta rule with a decay for each channel against fla-core's naive forms, which compute in float32."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trilemma.ops.vector_delta import vector_delta, vector_delta_step

BATCH, HEADS, LENGTH, WIDTH, WIDE = 2, 3, 23, 8, 5


def naive_form(name: str, *place: str) -> Callable[..., Any]:
    """A function of one file of fla-core's ops: its package needs Triton."""
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]).joinpath("ops", *place, "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    form: Callable[..., Any] = getattr(module, name)
    return form


def drawn(strength: float = 2.0, length: int = LENGTH) -> tuple[Tensor, ...]:
    """q, k of norm 1, v, log_decay and a state."""
    q, k = torch.randn(2, BATCH, HEADS, length, WIDTH)
    k = torch.nn.functional.normalize(k, dim=-1)
    v, log_decay = torch.randn(BATCH, HEADS, length, WIDE), -strength * torch.rand(BATCH, HEADS, length, WIDTH)
    return q, k, v, log_decay, torch.randn(BATCH, HEADS, WIDTH, WIDE)


def flipped(*tensors: Tensor) -> list[Tensor]:
    """fla-core has the length before the heads."""
    return [t.transpose(1, 2) for t in tensors]


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 64])
def test_kimi_delta_attention(chunk_size: int, carried: bool, agrees: Callable[..., None]) -> None:
    q, k, v, log_decay, start = drawn()
    beta, state = 2 * torch.rand(BATCH, HEADS, LENGTH, 1), start if carried else None
    got, after = vector_delta(q, beta * k, v, log_decay, k, None, state, None, chunk_size, True)
    form = naive_form("naive_recurrent_kda", "kda")
    want, want_after = form(*flipped(q, k, v, log_decay), beta[..., 0].transpose(1, 2), 1.0, state, True)
    agrees(
        "kda",
        "delta rule",
        [got, after],
        [want.transpose(1, 2), want_after],
        oracle="fla-core naive_recurrent_kda",
    )


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 64])
def test_gated_deltanet_2(chunk_size: int, carried: bool, agrees: Callable[..., None]) -> None:
    q, k, v, log_decay, start = drawn()
    erase, write, state = torch.rand_like(k), torch.rand_like(v), start if carried else None
    got, after = vector_delta(q, k, write * v, log_decay, erase * k, None, state, None, chunk_size, True)
    form = naive_form("naive_recurrent_gdn2", "gdn2")
    want, want_after = form(*flipped(q, k, v, log_decay, erase, write), 1.0, state, True)
    agrees(
        "gdn2",
        "delta rule",
        [got, after],
        [want.transpose(1, 2), want_after],
        oracle="fla-core naive_recurrent_gdn2",
    )


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 64])
def test_diagonal_plus_low_rank(chunk_size: int, carried: bool, agrees: Callable[..., None]) -> None:
    """RWKV-7's form: theirs reads the State before its decay and adds what it reads."""
    q, k, v, log_decay, start = drawn(0.6)
    direction = torch.nn.functional.normalize(torch.randn_like(k), dim=-1)
    along, state = torch.rand_like(k) * direction, start if carried else None
    r = direction * (-log_decay).exp()
    got, after = vector_delta(q, k, v, log_decay, r, along, state, None, chunk_size, True)
    form = naive_form("dplr_recurrence", "generalized_delta_rule", "dplr")
    want, want_after = form(q * WIDTH**0.5, k, v, -direction, along, log_decay, state)
    agrees("rwkv7", "delta rule", [got, after], [want, want_after], oracle="fla-core dplr_recurrence")


@pytest.mark.parametrize("merged", [True, False])
def test_one_step_writes_in_place_without_autograd_only(merged: bool) -> None:
    q, k, v, log_decay, state = drawn(length=1)
    before, p = state.clone(), None if merged else torch.randn_like(k)
    _, out_of_place = vector_delta_step(q, k, v, log_decay, k, p, state)
    assert torch.equal(state, before)
    with torch.no_grad():
        _, in_place = vector_delta_step(q, k, v, log_decay, k, p, state)
    assert in_place.data_ptr() == state.data_ptr()
    torch.testing.assert_close(in_place, out_of_place)


@pytest.mark.parametrize("strength", [0.0, 50.0, 1e4, torch.inf])
@pytest.mark.parametrize("merged", [True, False])
def test_closed_and_open_channels_stay_finite(merged: bool, strength: float) -> None:
    """Full corrections, keys that repeat, some channels that forget everything at once, over 500 tokens."""
    q, k = torch.randn(2, 1, 2, 500, 4).unbind(0)
    k = torch.nn.functional.normalize(k[:, :, :1] + 0.01 * k, dim=-1)
    v = torch.randn(1, 2, 500, 3)
    log_decay = torch.full((1, 2, 500, 4), -strength)
    log_decay[..., 1] = -1e-3
    log_decay[:, :, ::7] = 0
    p = None if merged else (2 * k).requires_grad_()
    leaves = [t.requires_grad_() for t in (q, k, v, log_decay)]
    out, state = vector_delta(q, 2 * k if merged else k, v, log_decay, k, p, None, None, 64, True)
    assert state is not None
    gradients = torch.autograd.grad(out.sum() + state.sum(), leaves)
    assert all(t.isfinite().all() for t in (out, state, *gradients))
    assert out.abs().max() < 1e3


@pytest.mark.parametrize("merged", [True, False])
def test_memory_of_the_chunk_form_grows_linearly(merged: bool) -> None:
    largest = []
    for length in (512, 1024, 2048):
        q, k, v, log_decay, _ = drawn(length=length)
        with Largest() as seen:
            vector_delta(q, k, v, log_decay, k, None if merged else k, None, None, 64, True)
        largest.append(seen.numel)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[2] <= 2.1 * largest[1]


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Sees the largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result
