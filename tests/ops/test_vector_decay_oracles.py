"""The scans with a decay for each channel against fla-core's naive forms (float32 inside), and at extreme decays."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from trilemma.ops.vector_decay import vector_scan, vector_step

BATCH, HEADS, LENGTH, WIDTH, WIDE = 2, 3, 23, 8, 5


def naive_form(*place: str) -> ModuleType:
    """One file of fla-core's ops alone: its package needs Triton."""
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]).joinpath("ops", *place, "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{'_'.join(place)}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(strength: float = 2.0) -> tuple[Tensor, ...]:
    """q, k, v, log_decay and a state."""
    q, k = torch.randn(2, BATCH, HEADS, LENGTH, WIDTH)
    v, log_decay = torch.randn(BATCH, HEADS, LENGTH, WIDE), -strength * torch.rand(BATCH, HEADS, LENGTH, WIDTH)
    return q, k, v, log_decay, torch.randn(BATCH, HEADS, WIDTH, WIDE)


def flipped(*tensors: Tensor) -> list[Tensor]:
    """fla-core has the length before the heads."""
    return [t.transpose(1, 2) for t in tensors]


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 16, 64])
def test_gated_linear_attention(chunk_size: int, carried: bool, agrees: Callable[..., None]) -> None:
    q, k, v, log_decay, start = drawn()
    state = start if carried else None
    got, after = vector_scan(q, k, v, log_decay, state, None, chunk_size, True)
    form = naive_form("gla").naive_recurrent_gla
    want, want_after = form(*flipped(q * WIDTH**0.5, k, v, log_decay), state, True)
    both, wanted = (got, after), (want.transpose(1, 2), want_after)
    agrees("gla", "scan", both, wanted, oracle="fla-core naive_recurrent_gla")


def test_one_step_writes_in_place_without_autograd_only() -> None:
    q, k, v, log_decay, state = drawn()
    q, k, v, log_decay = (t[:, :, :1] for t in (q, k, v, log_decay))
    before = state.clone()
    _, out_of_place = vector_step(q, k, v, log_decay, state)
    assert torch.equal(state, before)
    with torch.no_grad():
        _, in_place = vector_step(q, k, v, log_decay, state)
    assert in_place.data_ptr() == state.data_ptr()
    torch.testing.assert_close(in_place, out_of_place)


@pytest.mark.parametrize("strength", [50.0, 1e4, torch.inf])
def test_closed_channels_stay_finite(strength: float) -> None:
    """Some channels forget everything at once, others nothing, over 500 tokens."""
    q, k = torch.randn(2, 1, 2, 500, 4, requires_grad=True).unbind(0)
    v = torch.randn(1, 2, 500, 3)
    log_decay = torch.full((1, 2, 500, 4), -strength)
    log_decay[..., 1] = -1e-3
    log_decay[:, :, ::7] = 0
    log_decay.requires_grad_()
    out, state = vector_scan(q, k, v, log_decay, None, None, 64, True)
    assert state is not None
    gradients = torch.autograd.grad(out.sum() + state.sum(), (q, k, log_decay))
    assert all(t.isfinite().all() for t in (out, state, *gradients))


def test_memory_of_the_chunk_form_grows_linearly() -> None:
    largest = []
    for length in (512, 1024, 2048):
        with Largest() as seen:
            q, k = torch.randn(2, 1, 1, length, 4).unbind(0)
            vector_scan(q, k, torch.randn(1, 1, length, 4), -torch.rand(1, 1, length, 4), None, None, 64, True)
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
