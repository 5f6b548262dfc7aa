"""What one call looks like: which positions hold tokens, where packed sequences begin, which part is a prefix.

Made once per call and read by every layer, so that no layer can disagree with another about what is padding.

Legend: B batch (rows), L length of this call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.errors import CapabilityError


@dataclass(frozen=True)
class Ragged:
    """Describes the [B, L] tokens of one call.

    Args:
        lengths: [B] valid tokens of each row in this call; they come first, the rest is padding. A row of length 0 is
            legal: its State stays untouched.
        segments: [B, L] packed rows: the number of the sequence that a token belongs to, equal for neighbours of one
            sequence, -1 for padding at the end. Packed calls carry no State.
        prefix: [B] the first `prefix` tokens of the row see each other in both directions. A prefix is never split: it
            lies whole within the first call.
    """

    lengths: Tensor | None = None
    segments: Tensor | None = None
    prefix: Tensor | None = None

    @property
    def is_packed(self) -> bool:
        """Whether rows hold several sequences."""
        return self.segments is not None

    def valid(self, length: int) -> Tensor | None:
        """[B, L] True where a token is real; None when every position is."""
        if self.segments is not None:
            return self._segment_valid
        if self.lengths is None:
            return None
        return torch.arange(length, device=self.lengths.device) < self.lengths[:, None]

    @property
    def _segment_valid(self) -> Tensor:
        assert self.segments is not None
        valid = self.segments >= 0
        if self.lengths is not None:
            steps = torch.arange(self.segments.shape[1], device=self.segments.device)
            valid = valid & (steps < self.lengths[:, None])
        return valid

    @property
    def starts(self) -> Tensor | None:
        """[B, L] True at the first token of each packed sequence but the row's first; None when not packed."""
        if self.segments is None:
            return None
        starts = torch.zeros_like(self.segments, dtype=torch.bool)
        starts[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        return starts

    @property
    def packed_positions(self) -> Tensor | None:
        """[B, L] position of each token within its packed sequence; None when not packed."""
        if self.starts is None:
            return None
        steps = torch.arange(self.starts.shape[1], device=self.starts.device).expand_as(self.starts)
        begins = torch.where(self.starts, steps, torch.zeros_like(steps))
        return steps - begins.cummax(dim=1).values


def call_positions(length: int, ragged: Ragged | None, offset: Tensor | int, device: torch.device) -> Tensor:
    """Positions of the tokens of a call within their sequences.

    Args:
        length: L.
        ragged: the call's description.
        offset: tokens of each row that came before: [B], or one number for all rows.
        device: where the result lives.

    Returns:
        [1, L] when all rows agree, else [B, L]; int64.
    """
    if ragged is not None and ragged.packed_positions is not None:
        return ragged.packed_positions
    steps = torch.arange(length, device=device)[None, :]
    return steps + (offset[:, None] if isinstance(offset, Tensor) else offset)


def check_prefix(ragged: Ragged | None, length: int, offset: Tensor | int) -> None:
    """Refuses a prefix that does not lie whole within the first call of its row.

    Args:
        ragged, length, offset: as in `call_positions`.

    Raises:
        CapabilityError: it is longer than the call, or tokens came before.
    """
    if ragged is None or ragged.prefix is None or torch.compiler.is_compiling():  # reading values breaks the graph
        return
    split = ragged.prefix > (length if ragged.lengths is None else ragged.lengths)
    split = split | ((ragged.prefix > 0) & (offset > 0))
    if bool(split.any()):
        raise CapabilityError("a prefix must lie whole within the first call that its row is given")


def zero_padding(x: Tensor, valid: Tensor | None, dim: int = 1) -> Tensor:
    """`x` with invalid positions set to zero (also where they held NaN).

    Args:
        x: [B, ..., L, ...] with the length at dimension `dim`.
        valid: [B, L], or None for no change.
        dim: where the length is.
    """
    if valid is None:
        return x
    shape = [1] * x.ndim
    shape[0], shape[dim] = valid.shape
    return x.masked_fill(~valid.view(shape), 0)
