"""The diagonal scan: its hand-written gradient, its few rounds, and gates that are shut."""

from __future__ import annotations

import math

import pytest
import torch

from trilemma.ops.diagonal_scan import diagonal_scan, diagonal_scan_naive


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8])
def test_gradients_are_those_of_finite_differences(length: int) -> None:
    a = torch.rand(2, length, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(diagonal_scan, (a, b, state))


@pytest.mark.parametrize("length", [1, 100, 1000])
def test_rounds_grow_with_the_logarithm_of_the_length(length: int) -> None:
    with _Calls() as seen:
        diagonal_scan(torch.rand(1, length, 2), torch.randn(1, length, 2))
    assert seen.count <= 5 + 20 * math.log2(length + 1)


def test_shut_and_open_gates_are_exact() -> None:
    """A decay of 0 is a new beginning, a decay of 1 a sum, and neither leaves anything behind in the gradient."""
    a = torch.tensor([1.0, 1, 1, 0, 1, 0, 0, 1])[None, :, None].requires_grad_()
    b = torch.arange(1.0, 9)[None, :, None]
    h = diagonal_scan(a, b)
    assert h[0, :, 0].tolist() == [1, 3, 6, 4, 9, 6, 7, 15]
    (gradient,) = torch.autograd.grad(h[0, -1, 0], a)
    assert gradient[0, :, 0].tolist() == [0, 0, 0, 0, 0, 0, 6, 7]


def test_long_sequences_keep_their_precision() -> None:
    a, b = 1 - 1e-4 * torch.rand(1, 4096, 3), torch.randn(1, 4096, 3)
    want = diagonal_scan_naive(a.double(), b.double())
    assert (diagonal_scan(a, b) - want).abs().max() < 1e-5 * want.abs().max()


class _Calls(torch.utils._python_dispatch.TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))
