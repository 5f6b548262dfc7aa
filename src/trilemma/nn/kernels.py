"""Which of torch's CPU kernels for packed weights are right on this machine, and from which size on they pay.

The kernels are no public interface of torch and oneDNN chooses among its own by the processor, so each kind is tried
once in every process against the plain form: floating-point weights apart from 8-bit codes, since one may be right
where the other is not. Where they pay is a rule with measured numbers (docs/decisions.md, 32 and 41), not a clock: the
same machine always runs the same code.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from trilemma.nn.codes import INT8
from trilemma.nn.linear import Int8Linear, PackedInt8Linear, PackedLinear

# Weights of a layer from which on packing pays: below, the kernel's call costs more than it saves. Without AVX-512
# torch's plain product is the faster one for a single row up to here, and as fast for many.
_LEAST_WIDE, _LEAST = 1 << 16, 1 << 22
_TRIED_ROWS = (1, 3, 40)


def least_packed(dtype: torch.dtype) -> int | None:
    """Weights of a linear layer of this type from which on it is packed on this CPU; None: it never is."""
    if not floats_pack(dtype):
        return None
    return _LEAST_WIDE if _has_avx512() else _LEAST


@functools.cache
def floats_pack(dtype: torch.dtype) -> bool:
    """Whether the kernel for packed weights of this type is there and gives the plain form's results."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((24, 40), (24,)))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    try:
        packed = PackedLinear(weight, bias)
        for rows in _TRIED_ROWS:
            x = torch.randn(rows, 40, generator=generator).to(dtype)
            plain = nn.functional.linear(x.float(), weight.float(), bias.float())
            if not torch.allclose(packed(x).float(), plain, rtol=tolerance, atol=tolerance):
                return False
    except (AttributeError, RuntimeError):  # of a build, or a processor, without this kernel
        return False
    return True


@functools.cache
def codes_pack() -> bool:
    """Whether the kernel for packed 8-bit codes is there and its sums are exact, those of the largest codes too.

    Processors without 8-bit dot products (x86 before VNNI) add two products in 16 bits, which saturate: right for most
    codes, and far too small for large ones.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        return all(_exact(*trial) for trial in _trials())
    except (AttributeError, RuntimeError):  # of a build without this kernel
        return False


def explained() -> dict[str, str]:
    """What runs the products of each kind of weights on this CPU, and why, in words."""
    found = {str(dtype).removeprefix("torch."): _float_words(dtype) for dtype in (torch.float32, torch.bfloat16)}
    if codes_pack():
        return {**found, "int8": "packed codes: oneDNN's 8-bit sums are exact here, those of the largest codes too"}
    return {**found, "int8": "codes kept as float32, exact sums: the 8-bit kernel is missing, or wrong for large codes"}


def _float_words(dtype: torch.dtype) -> str:
    least = least_packed(dtype)
    if least is None:
        return "plain: this build or processor has no kernel for packed weights of this type that agrees"
    why = "AVX-512" if _has_avx512() else "no AVX-512: smaller ones gain nothing"
    return f"layers of {least:,} weights or more are packed ({why})"


def _trials() -> list[tuple[Tensor, Tensor]]:
    """(weights' codes [N, K], inputs' codes [rows, K]): all the largest, of one sign and of both, and some in
    between."""
    generator = torch.Generator().manual_seed(0)
    trials = []
    for outputs, inputs in ((40, 64), (24, 37)):
        signs = torch.ones(outputs, 1).index_fill_(0, torch.arange(0, outputs, 2), -1)
        largest = signs.expand(outputs, inputs) * INT8
        mixed = torch.randint(-INT8, INT8 + 1, (outputs, inputs), generator=generator).float()
        for rows in _TRIED_ROWS:
            ones = torch.full((rows, inputs), float(INT8))
            drawn = torch.randint(-INT8, INT8 + 1, (rows, inputs), generator=generator).float()
            drawn[:, 0] = INT8  # so that a row's codes are its values
            trials += [(weight, x) for weight in (largest, mixed) for x in (ones, -ones, drawn)]
    return trials


def _exact(weight: Tensor, x: Tensor) -> bool:
    layer = PackedInt8Linear(weight.to(torch.int8), torch.ones(len(weight)), None)
    return torch.equal(layer(x), Int8Linear(weight.to(torch.int8), torch.ones(len(weight)))(x))


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
