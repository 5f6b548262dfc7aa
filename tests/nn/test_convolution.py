"""The short convolution against torch's depthwise one, whose backward ours replaces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trilemma.nn.convolution import ShortConvolution


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_values_and_gradients_are_torchs(taps: int) -> None:
    ours, x = ShortConvolution(6, taps).double(), torch.randn(3, 9, 6, dtype=torch.float64, requires_grad=True)
    got, _ = ours(x, None, None)
    line = nn.functional.pad(x, (0, 0, taps - 1, 0)).transpose(1, 2)
    want = nn.functional.silu(nn.functional.conv1d(line, ours.weight.t()[:, None], groups=6).transpose(1, 2))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(got)
    gradients = [torch.autograd.grad((y * weights).sum(), (x, ours.weight)) for y in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_either_type_under_autocast(kind: torch.dtype) -> None:
    """Inputs of a linear layer are in bfloat16 there, others in float32."""
    ours, x = ShortConvolution(6), torch.randn(3, 9, 6, dtype=kind, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = ours(x, None, None)
    want, _ = ours(x.float(), None, None)
    weights = torch.randn_like(want)
    got, want = (torch.autograd.grad((y.float() * weights).sum(), (x, ours.weight)) for y in (got, want))
    torch.testing.assert_close(got, want, rtol=0, atol=0.1, check_dtype=False)
