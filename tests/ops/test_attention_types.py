"""Attention in bfloat16 on a CPU takes other ways than the fused kernel: the same results, seen once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trilemma.ops.attention import attend, attend_naive, attention_mask
from trilemma.ops.mixing import watched


def drawn(length: int, held: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    shapes = ((2, 4, length, 8), (2, groups, held, 8), (2, groups, held, 8))
    queries, keys, values = (torch.randn(shape).bfloat16() for shape in shapes)
    return queries, keys, values


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 5, 16, 40])
@pytest.mark.parametrize("kind", ["all", "causal", "mask", "blind", "bias"])
def test_every_way_agrees_with_the_equation(kind: str, length: int, groups: int, gradients: bool) -> None:
    held = length if kind == "causal" else length + 3
    tensors = drawn(length, held, groups)
    given: dict[str, Tensor] = {}
    if kind in ("mask", "blind"):
        positions = torch.arange(held)[None].expand(2, -1)
        given["mask"] = attention_mask(positions[:, held - length :], positions, True, window=4)
    if kind == "blind":
        given["mask"] = given["mask"] & (torch.arange(length) % 2 == 0)[None, None, :, None]
    if kind == "bias":
        given["bias"] = -torch.arange(held).float().expand(2, 4, length, held)
    with torch.set_grad_enabled(gradients), watched() as calls:
        found = attend(*(tensor.requires_grad_(gradients) for tensor in tensors), is_causal=kind == "causal", **given)
    wide = [tensor.detach().double().requires_grad_(gradients) for tensor in tensors]
    precise = {key: value if value.dtype == torch.bool else value.double() for key, value in given.items()}
    expected = attend_naive(*wide, is_causal=kind == "causal", **precise)
    assert len(calls) == 1
    assert found.dtype == torch.bfloat16
    assert float((found.double() - expected).detach().abs().max()) < 0.03
    if gradients:
        slope = torch.randn_like(found)
        ours = torch.autograd.grad(found, tensors, slope)
        theirs = torch.autograd.grad(expected, wide, slope.double())
        for one, other in zip(ours, theirs, strict=True):
            assert float((one.double() - other).norm()) < 0.03 * max(1.0, float(other.norm()))
