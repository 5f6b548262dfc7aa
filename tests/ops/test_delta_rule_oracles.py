"""The delta rule against fla-core's naive forms (float32 inside) and transformers' chunked one; at extreme gates."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from trilemma.ops.delta_rule import delta_rule, delta_rule_naive, delta_rule_step
from trilemma.ops.triangular import unit_lower_inverse

BATCH, HEADS, LENGTH, WIDTH, WIDE = 2, 3, 150, 8, 5


def naive_form(name: str) -> ModuleType:
    """One file of fla-core's ops alone: its package needs Triton."""
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "ops" / name / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(strength: float = 2.0, length: int = LENGTH) -> tuple[Tensor, ...]:
    """q, k of norm 1, v, beta up to 2, log_decay and a state."""
    q, k = torch.randn(2, BATCH, HEADS, length, WIDTH)
    v, state = torch.randn(BATCH, HEADS, length, WIDE), torch.randn(BATCH, HEADS, WIDTH, WIDE)
    beta, decay = torch.rand(2, BATCH, HEADS, length)
    return q, torch.nn.functional.normalize(k, dim=-1), v, 2 * beta, -strength * decay, state


def flipped(*tensors: Tensor) -> list[Tensor]:
    """[B, H, L, ...] <-> [B, L, H, ...]."""
    return [t.transpose(1, 2) for t in tensors]


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 32, 64])
def test_without_decay(chunk_size: int, carried: bool, agrees: Callable[..., None]) -> None:
    q, k, v, beta, _, start = drawn()
    state = start if carried else None
    got, after = delta_rule(q, k, v, beta, None, state, None, chunk_size, True)
    want, want_after = naive_form("delta_rule").delta_rule_recurrence(q * WIDTH**0.5, k, v, beta, state)
    oracle = "fla-core delta_rule_recurrence"
    agrees("deltanet", "delta rule", (got, after), (want, want_after), oracle=oracle)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 32, 64])
def test_with_decay(chunk_size: int, carried: bool, agrees: Callable[..., None]) -> None:
    q, k, v, beta, log_decay, start = drawn()
    state = start if carried else None
    got, after = delta_rule(q, k, v, beta, log_decay, state, None, chunk_size, True)
    form = naive_form("gated_delta_rule").naive_recurrent_gated_delta_rule
    want, want_after = form(*flipped(q, k, v, beta, log_decay), 1.0, state, True)
    oracle = "fla-core naive_recurrent_gated_delta_rule"
    want = want.transpose(1, 2), want_after
    agrees("gated_deltanet", "gated delta rule", (got, after), want, oracle=oracle)
    chunked, chunked_after = torch_chunk_gated_delta_rule(
        *flipped(q * WIDTH**0.5, k, v, log_decay, beta), initial_state=state, output_final_state=True
    )
    oracle = "transformers torch_chunk_gated_delta_rule"
    want = chunked.transpose(1, 2), chunked_after
    agrees("gated_deltanet", "gated delta rule", (got, after), want, oracle=oracle)


def test_one_step_writes_in_place_without_autograd_only() -> None:
    *tokens, state = drawn(length=1)
    before = state.clone()
    _, out_of_place = delta_rule_step(*tokens, state)
    assert torch.equal(state, before)
    with torch.no_grad():
        _, in_place = delta_rule_step(*tokens, state)
    assert in_place.data_ptr() == state.data_ptr()
    torch.testing.assert_close(in_place, out_of_place)


@pytest.mark.parametrize("strength", [50.0, 1e4, torch.inf])
def test_closed_gates_stay_finite(strength: float) -> None:
    """Most tokens forget everything; what the others keep is exact."""
    q, k, v, beta, _, _ = (t.double() for t in drawn(length=300))
    log_decay = torch.full_like(beta, -strength)
    log_decay[:, :, ::7] = -1e-3
    leaves = [t.requires_grad_() for t in (q, k, v, beta, log_decay)]
    out, state = delta_rule(*leaves, None, None, 64, True)
    assert state is not None
    gradients = torch.autograd.grad(out.sum() + state.sum(), leaves)
    assert all(t.isfinite().all() for t in (out, state, *gradients))
    for got, want in zip((out, state), delta_rule_naive(*leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 64, 100])
def test_the_inverse(size: int) -> None:
    """Also of what a Neumann series in float32 would lose: one key again and again, turned round each time."""
    a = torch.stack([torch.randn(size, size) / 4, torch.full((size, size), 2.0)]).double().requires_grad_()
    got = unit_lower_inverse(a)
    want = torch.linalg.inv(a.tril(-1) + torch.eye(size))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(a)
    gradients = [torch.autograd.grad((inverse * weights).sum(), a)[0] for inverse in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    rough = unit_lower_inverse(a.detach().float())
    torch.testing.assert_close(rough[1], got[1].float(), rtol=1e-5, atol=1e-5)


def test_memory_of_the_chunk_form_grows_linearly() -> None:
    """No tensor of [length x length]: the largest one made at twice the length is at most about twice as large."""
    largest = []
    for length in (512, 1024, 2048):
        with Largest() as seen:
            delta_rule(*drawn(length=length)[:5], None, None, 64, True)
        largest.append(seen.numel)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[2] <= 2.1 * largest[1]


class Largest(TorchDispatchMode):
    """The size of the largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result
