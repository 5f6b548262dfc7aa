"""Linear layers and embeddings for inference: weights packed once for a CPU's kernels, and weights in 8 or 4 bits.

A CPU's plain float32 product re-orders the weights at every call, or runs a kernel that does not suit the processor;
oneDNN's packed one does the work once. 8-bit weights are a fourth of float32's bytes, and their products run on the
processor's 8-bit units where it has exact ones. 4-bit weights are a sixth of the bytes; only the weights are coded.
Which form a machine should run: `trilemma.nn.kernels`.

Legend: N outputs, K inputs, V vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from trilemma.nn.codes import quantize_rows, row_scales
from trilemma.nn.group_codes import GROUP, join_codes, quantize_groups, values_of

_SHIFT = 128  # the processor's 8-bit units multiply an unsigned by a signed number
_PACKED_ROWS = 32  # the number of rows that the packed layout is chosen for
_EXACT = 1024  # inputs whose products of codes float32 adds without rounding: 1024 * 127^2 < 2^24


class PackedLinear(nn.Linear):
    """A linear layer whose weight lies as oneDNN's kernels read it. For inference on a CPU only.

    Args:
        weight: [N, K] float32 or bfloat16. bias: [N] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _PACKED_ROWS)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", None if bias is None else _frozen(bias))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class Int8Linear(nn.Module):
    """y = s_x s_w (q_x . q_w) + b: 8-bit codes of weights, one scale for each output, and of inputs, one for each row.

    Rows are coded one by one and sums of codes are exact, so a row's result does not depend on its batch-mates.

    Args:
        codes: [N, K] int8. scale: [N] float32. bias: [N] or None.
    """

    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.codes = _frozen(codes)
        self.register_buffer("scale", scale)  # no parameter: the count of weights stays that of the model
        self.bias = None if bias is None else _frozen(bias)
        self.out_features, self.in_features = codes.shape

    @classmethod
    def of(cls, linear: nn.Linear, bias: Tensor | None) -> Int8Linear:
        """The nearest codes of a linear layer's weight, with a bias of one's own."""
        codes, scale = quantize_rows(linear.weight.detach())
        return cls(codes, scale.squeeze(1).float(), bias)

    def packed(self) -> PackedInt8Linear:
        """The same layer for inference on a CPU whose 8-bit kernel is exact."""
        return PackedInt8Linear(self.codes, self.scale, self.bias)

    def held(self) -> HeldInt8Linear:
        """The same layer for inference on any other CPU."""
        return HeldInt8Linear(self.codes, self.scale, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        codes, scale = quantize_rows(x.float())
        pieces = zip(codes.float().split(_EXACT, -1), self.codes.float().split(_EXACT, 1), strict=True)
        sums: Tensor = functools.reduce(torch.add, (inputs @ weight.t() for inputs, weight in pieces))
        y = sums * self.scale * scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """As of `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedInt8Linear(nn.Module):
    """`Int8Linear` on oneDNN's 8-bit kernel. For inference on a CPU only.

    Args:
        codes, scale, bias: of `Int8Linear`.
    """

    scale: Tensor
    zero_points: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.weight = _frozen(torch.ops.onednn.qlinear_prepack(codes.detach(), None))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_points", torch.zeros(self.out_features, dtype=torch.int64), persistent=False)
        self.bias = None if bias is None else _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        codes, scale = quantize_rows(x.float().reshape(-1, self.in_features))
        unsigned = codes.view(torch.uint8).bitwise_xor_(_SHIFT)  # code + 128
        sums: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, _SHIFT, self.weight, self.scale, self.zero_points,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        y = sums.mul_(scale) if self.bias is None else torch.addcmul(self.bias, sums, scale, out=sums)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


class HeldInt8Linear(nn.Module):
    """`Int8Linear` whose codes are kept as float32 numbers: the same sums, four bytes a weight. For inference.

    Where a processor has no exact 8-bit products, float32's are the fastest that are. The pieces are ordinary layers,
    so that large ones can be packed.

    Args:
        codes, scale, bias: of `Int8Linear`.
    """

    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.pieces = nn.ModuleList(_plain(piece.float()) for piece in codes.detach().split(_EXACT, 1))
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        values = x.float()
        scale = row_scales(values)
        inputs = (values / scale).round_().split(_EXACT, -1)
        sums: Tensor = functools.reduce(
            torch.add, (piece(part) for piece, part in zip(self.pieces, inputs, strict=True))
        )
        y = sums * self.scale * scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int4Linear(nn.Module):
    """y = W x + b, where W is 4-bit codes with one scale for each 32 inputs of an output. Inputs are not coded.

    Args:
        codes: [N, K / 2] uint8, two a byte. scale: [N, K / 32] float32. bias: [N] or None.
    """

    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.codes = _frozen(codes)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else _frozen(bias)
        self.out_features, self.in_features = len(codes), scale.shape[1] * GROUP

    @classmethod
    def of(cls, linear: nn.Linear) -> Int4Linear:
        """The nearest codes of a linear layer whose inputs are a multiple of 32."""
        codes, scale = quantize_groups(linear.weight.detach())
        return cls(join_codes(codes), scale, linear.bias)

    def held(self) -> HeldInt4Linear:
        """The same layer with weights that need not be decoded at each call."""
        return HeldInt4Linear(values_of(self.codes, self.scale), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return nn.functional.linear(x.float(), values_of(self.codes, self.scale), self.bias).to(x.dtype)

    extra_repr = Int8Linear.extra_repr


class HeldInt4Linear(nn.Module):
    """`Int4Linear` whose codes are kept as the numbers they stand for, four bytes a weight. For inference.

    The product is an ordinary layer, so that a large one can be packed.

    Args:
        weight: [N, K] float32. bias: [N] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.product = _plain(weight)
        self.bias = None if bias is None else _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y: Tensor = self.product(x.float())
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int8Embedding(nn.Module):
    """A table of vectors as 8-bit codes with one scale for each.

    Args:
        codes: [V, K] int8. scale: [V] float32.
    """

    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.codes = _frozen(codes)
        self.register_buffer("scale", scale)
        self.num_embeddings, self.embedding_dim = codes.shape

    @classmethod
    def of(cls, table: nn.Embedding) -> Int8Embedding:
        """The nearest codes of a table."""
        codes, scale = quantize_rows(table.weight.detach())
        return cls(codes, scale.squeeze(1).float())

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 -> [..., K] float32."""
        return nn.functional.embedding(ids, self.codes) * self.scale[ids][..., None]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=False)


def _plain(weight: Tensor) -> nn.Linear:
    """A linear layer [N, K] of this weight, without bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = _frozen(weight.contiguous())
    return layer
