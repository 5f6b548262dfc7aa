"""torch's recurrent kernels (RNN, LSTM, GRU) under our contract: carried states, padding, packed rows.

Legend: B rows, L length, W hidden width, M packed sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from trilemma.ragged import Ragged

Kernel = nn.RNN | nn.LSTM | nn.GRU
Hidden = tuple[Tensor, ...]


def init_kernel(kernel: Kernel, gates: int, forget_bias: float = 0.0) -> None:
    """Xavier for the inputs, orthogonal for each gate's recurrence, zero biases but an LSTM's forget gate."""
    weights = dict(kernel.named_parameters())
    nn.init.xavier_uniform_(weights["weight_ih_l0"])
    for gate in weights["weight_hh_l0"].chunk(gates):
        nn.init.orthogonal_(gate)
    nn.init.zeros_(weights["bias_hh_l0"])
    with torch.no_grad():
        weights["bias_ih_l0"].zero_()[kernel.hidden_size : 2 * kernel.hidden_size] = forget_bias


def run_kernel(kernel: Kernel, x: Tensor, hidden: Hidden | None, ragged: Ragged | None) -> tuple[Tensor, Hidden]:
    """Runs a one-layer kernel (batch_first) over a call.

    Args:
        kernel: nn.RNN, nn.LSTM or nn.GRU.
        x: [B, L, D].
        hidden: the kernel's hidden tensors, [B, W] each (h, c for an LSTM; h for the others), or None for zeros.
        ragged: padding or packing.

    Returns:
        outputs [B, L, W], and the hidden tensors after each row's last valid token.
    """
    if _lacks_autocast(kernel, x.device):
        precise = None if hidden is None else tuple(tensor.float() for tensor in hidden)
        with torch.autocast("cpu", enabled=False):
            y, last = run_kernel(kernel, x.float(), precise, ragged)
        return y, last
    if ragged is not None and ragged.is_packed:
        return _run_packed(kernel, x, ragged), ()
    valid = ragged.valid(x.shape[1]) if ragged is not None else None
    if valid is None or hidden is None:  # outputs at valid tokens do not see the padding after them
        y, last = kernel(x, _join(kernel, hidden, x.dtype))
        return y, _split(last)
    assert ragged is not None and ragged.lengths is not None
    lengths = ragged.lengths.clamp(min=1)  # the kernels refuse empty rows; these are put back below
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    y_packed, last = kernel(packed, _join(kernel, hidden, x.dtype))
    y, _ = pad_packed_sequence(y_packed, batch_first=True, total_length=x.shape[1])
    empty = (ragged.lengths == 0)[:, None]
    kept = tuple(torch.where(empty, old.to(new.dtype), new) for old, new in zip(hidden, _split(last), strict=True))
    return y, kept


def _lacks_autocast(kernel: Kernel, device: torch.device) -> bool:
    """torch's LSTM under autocast asks for a kernel that only CPUs with bfloat16 instructions have: elsewhere it stays
    in float32, as other operations do that autocast has no faster form of."""
    if device.type != "cpu" or not isinstance(kernel, nn.LSTM) or not torch.is_autocast_enabled("cpu"):
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not supported


def _run_packed(kernel: Kernel, x: Tensor, ragged: Ragged) -> Tensor:
    """Each packed sequence as a row of its own, [M, longest, D], then back in place."""
    assert ragged.starts is not None and ragged.packed_positions is not None
    begins = ragged.starts.clone()
    begins[:, 0] = True
    number = begins.flatten().cumsum(0).view_as(begins) - 1  # [B, L] which packed sequence
    place = ragged.packed_positions
    rows = x.new_zeros(int(number.max()) + 1, int(place.max()) + 1, x.shape[-1])
    rows = rows.index_put((number, place), x)
    y, _ = kernel(rows, None)
    result: Tensor = y[number, place]
    return result


def _join(kernel: Kernel, hidden: Hidden | None, dtype: torch.dtype) -> Tensor | Hidden | None:
    if hidden is None:
        return None
    tensors = tuple(tensor[None].to(dtype) for tensor in hidden)
    return tensors if isinstance(kernel, nn.LSTM) else tensors[0]


def _split(last: Tensor | Hidden) -> Hidden:
    return tuple(tensor[0] for tensor in last) if isinstance(last, tuple) else (last[0],)
