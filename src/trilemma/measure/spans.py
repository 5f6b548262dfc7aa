"""Answers as spans of a passage: which places may start and end one, and which span is the best.

Legend: B rows, L places of `[bos] question [sep] window [eos]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def span_log_probabilities(logits: Tensor, passage: Tensor, lengths: Tensor) -> Tensor:
    """Log-probabilities [B, L, 2] of first and last places: over the window's tokens and place 0, "not here".

    The question, special tokens and padding have none (-inf).

    Args:
        logits: [B, L, 2]. passage: [B] the window's first place. lengths: [B] valid places, the last one `[eos]`.
    """
    places = torch.arange(logits.shape[1], device=logits.device)
    inside = (places >= passage[:, None]) & (places < lengths[:, None] - 1)
    allowed = inside | (places == 0)
    return torch.log_softmax(logits.masked_fill(~allowed[..., None], -torch.inf), dim=1)


def best_spans(scores: Tensor, starts: Tensor, ends: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest spans of at most `longest` tokens.

    Args:
        scores: [B, L, 2] log-probabilities of first and last places.
        starts, ends: [B, L] where a span may start and end.
        longest: in tokens, at least 1.

    Returns:
        first and last places [B], and log-probabilities [B]; -inf where a row has no span.
    """
    first = scores[..., 0].masked_fill(~starts, -torch.inf)
    last = scores[..., 1].masked_fill(~ends, -torch.inf)
    length = scores.shape[1]
    within = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu().tril(longest - 1)
    sums = (first[:, :, None] + last[:, None, :]).masked_fill(~within, -torch.inf).flatten(1)
    best, place = sums.max(1)
    return place // length, place % length, best
