"""The decayed scan with a decay of its own for each token, against fla-core's naive simple GLA (float32 inside)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trilemma.ops.decayed_scan import decayed_scan, decayed_step


def naive_form() -> ModuleType:
    """fla-core's file alone: its package needs Triton."""
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "ops" / "simple_gla" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive_simple_gla", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 64])
def test_per_token_decay(chunk_size: int, carried: bool, agrees: Callable[..., None]) -> None:
    batch, heads, length, width, wide = 2, 3, 23, 8, 5
    q, k = torch.randn(2, batch, heads, length, width)
    v, log_decay = torch.randn(batch, heads, length, wide), -2 * torch.rand(batch, heads, length)
    state = torch.randn(batch, heads, width, wide) if carried else None
    got, after = decayed_scan(q, k, v, log_decay, state, None, chunk_size, True)
    flipped = [t.transpose(1, 2) for t in (q, k, v, log_decay)]
    want, want_after = naive_form().naive_recurrent_simple_gla(*flipped, scale=1.0, initial_state=state)
    assert after is not None
    both, wanted = (got, after), (want.transpose(1, 2), want_after)
    for mixer in ("mamba2", "gated_retention"):
        agrees(mixer, "scan", both, wanted, oracle="fla-core naive_recurrent_simple_gla")


def test_one_step_writes_in_place_without_autograd_only() -> None:
    q, k = torch.randn(2, 1, 2, 1, 4)
    v, log_decay, state = torch.randn(1, 2, 1, 3), -torch.rand(1, 2, 1), torch.randn(1, 2, 4, 3)
    before = state.clone()
    _, out_of_place = decayed_step(q, k, v, log_decay, state)
    assert torch.equal(state, before)
    with torch.no_grad():
        _, in_place = decayed_step(q, k, v, log_decay, state)
    assert in_place.data_ptr() == state.data_ptr()
    torch.testing.assert_close(in_place, out_of_place)


def test_long_closed_gates_stay_finite() -> None:
    """A decay of e^-50 a token over 500 tokens: log space neither overflows nor divides by zero."""
    q, k = torch.randn(2, 1, 1, 500, 4, requires_grad=True).unbind(0)
    v, log_decay = torch.randn(1, 1, 500, 3), torch.full((1, 1, 500), -50.0, requires_grad=True)
    out, state = decayed_scan(q, k, v, log_decay, None, None, 64, True)
    assert state is not None
    (gradient,) = torch.autograd.grad(out.sum() + state.sum(), log_decay)
    assert out.isfinite().all()
    assert state.isfinite().all()
    assert gradient.isfinite().all()


def test_memory_of_the_chunk_form_grows_linearly() -> None:
    """No tensor of [length x length]: the largest one made at twice the length is at most about twice as large."""
    largest = []
    for length in (512, 1024, 2048):
        with _Largest() as seen:
            q, k = torch.randn(2, 1, 1, length, 4).unbind(0)
            decayed_scan(q, k, torch.randn(1, 1, length, 4), -torch.rand(1, 1, length), None, None, 64, True)
        largest.append(seen.numel)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[2] <= 2.1 * largest[1]


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result
