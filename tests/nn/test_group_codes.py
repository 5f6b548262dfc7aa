"""4-bit codes: as near as the definition allows, joined without loss, and never silent about what is no number."""

from __future__ import annotations

import pytest
import torch

from trilemma.nn.group_codes import GROUP, join_codes, quantize_groups, values_of


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Plain rounding, -7 to 7, to a scale that the largest value of each group sets, one group at a time."""
    result = torch.empty_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], GROUP):
            group = x[row, start : start + GROUP]
            scale = float(group.abs().max()) / 7 or 1.0
            result[row, start : start + GROUP] = (group / scale).round() * scale
    return result


@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (0, 64)])
def test_no_group_is_farther_than_plain_rounding(shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) + 0.3) * torch.logspace(-4, 4, shape[0])[:, None]
    codes, scale = quantize_groups(x)
    assert (codes.shape, scale.shape) == (x.shape, (shape[0], shape[1] // GROUP))
    assert bool(((codes >= -8) & (codes <= 7)).all())
    errors, plain = (
        (values - x).unflatten(-1, (-1, GROUP)).square().sum(-1)
        for values in (values_of(join_codes(codes), scale), rounded(x))
    )
    assert bool((errors <= plain * (1 + 1e-5)).all())


def test_other_scales_are_tried_for_a_gain() -> None:
    x = torch.randn(40, 64)
    codes, scale = quantize_groups(x)
    found, plain = (float((values - x).square().mean()) for values in (values_of(join_codes(codes), scale), rounded(x)))
    assert 0.5 * plain < found < 0.9 * plain


def test_two_codes_share_a_byte_and_come_back() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 4)
    joined = join_codes(codes)
    assert (joined.shape, joined.dtype) == ((3, 32), torch.uint8)
    scale = torch.tensor([[1.0, -2.0]]).repeat(3, 1)
    expected = codes.float() * scale.repeat_interleave(GROUP, 1)
    assert torch.equal(values_of(joined, scale), expected)


def test_zeros_stay_zero_and_what_is_no_number_is_seen() -> None:
    x = torch.randn(3, 64)
    x[0, :32] = 0
    x[1, 5] = float("nan")
    x[2, 40] = float("inf")
    codes, scale = quantize_groups(x)
    values = values_of(join_codes(codes), scale)
    assert torch.equal(values[0, :32], torch.zeros(32))
    assert values[1, :32].isnan().all()
    assert values[2, 32:].isnan().all()
    assert values[1, 32:].isfinite().all()
    assert values[2, :32].isfinite().all()
