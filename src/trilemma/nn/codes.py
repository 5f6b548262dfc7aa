"""8-bit codes with one scale a row: x ~ codes * scale."""

from __future__ import annotations

import torch
from torch import Tensor

INT8 = 127  # codes are -127 to 127: symmetric, so that zero is zero
_SMALLEST = 1e-30  # scale of a row of zeros


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest 8-bit codes of each row: x ~ codes * scale.

    Args:
        x: [..., K]. What is not a number stays one: it goes into the row's scale.

    Returns:
        codes [..., K] int8, -127 to 127; scale [..., 1].
    """
    scale = row_scales(x)
    return (x / scale).round_().to(torch.int8), scale


def row_scales(x: Tensor) -> Tensor:
    """[..., K] -> [..., 1]: what a code of 1 stands for in each row, so that its largest value has the code 127."""
    return x.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST).div_(INT8)


def quantize_rows_naive(x: Tensor) -> tuple[Tensor, Tensor]:
    """Reference for `quantize_rows`, for a matrix [rows, K], as the definition is written."""
    codes, scales = torch.zeros(x.shape, dtype=torch.int8), torch.zeros(len(x), 1, dtype=x.dtype)
    for row, values in enumerate(x.tolist()):
        scales[row] = max([abs(value) for value in values] + [_SMALLEST]) / INT8
        for column, value in enumerate(values):
            codes[row, column] = round(value / float(scales[row]))
    return codes, scales
