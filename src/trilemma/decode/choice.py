"""How a beam chooses among the continuations of its hypotheses.

Legend: B sources still searched (times their groups), K beam size, V vocabulary, R rows of a source (1, then K), C
candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 128


@dataclass(frozen=True)
class Candidates:
    """Continuations of each source, best first: all [B, C].

    Attributes:
        log_probability: of the whole hypothesis; -inf: no hypothesis.
        rank: what they are ordered by, falling; -inf: no hypothesis.
        parent: row of the source that is continued. token: by what. is_end: by end-of-sequence.
    """

    log_probability: Tensor
    rank: Tensor
    parent: Tensor
    token: Tensor
    is_end: Tensor


class Choice(ABC):
    """A way to choose."""

    @abstractmethod
    def candidates(
        self, scores: Tensor, totals: Tensor, history: Tensor, owners: Tensor, eos: int, width: int, extra: int
    ) -> Candidates:
        """The best continuations, enough that K of them are no end-of-sequence (where there are as many).

        Args:
            scores: [B, R, V] log-probabilities of all tokens; NaN is kept on purpose: it is reported later.
            totals: [B, R] log-probabilities of the hypotheses so far.
            history: [B, R, T] tokens so far.
            owners: [B] the inputs in the batch.
            width: K. extra: candidates beyond those needed, which show by how much they lost.
        """


class Likeliest(Choice):
    """The likeliest."""

    def candidates(
        self, scores: Tensor, totals: Tensor, history: Tensor, owners: Tensor, eos: int, width: int, extra: int
    ) -> Candidates:
        """See `Choice`: 2K, for each parent ends at most once."""
        batch, rows, vocab = scores.shape
        count = 2 * width + extra
        of_row, tokens = largest(scores.flatten(0, 1), min(count, vocab))
        continued = (totals[:, :, None] + of_row.view(batch, rows, -1)).flatten(1)
        best, order = continued.topk(min(count, rows * vocab), dim=1)
        token = tokens.view(batch, -1).gather(1, order)
        return Candidates(best, best, order // of_row.shape[1], token, token == eos)


@dataclass(frozen=True)
class Diverse(Choice):
    """Groups one after the other, each avoiding what those before it chose (Vijayakumar et al. 2016, arXiv 1610.02424).

    The penalty is Hamming's: `penalty` for each time a group before has gone on with the token at this step. It decides
    what is chosen here, and is no part of any log-probability. Groups of a source stand side by side among the B.
    """

    groups: int
    penalty: float

    def candidates(
        self, scores: Tensor, totals: Tensor, history: Tensor, owners: Tensor, eos: int, width: int, extra: int
    ) -> Candidates:
        """See `Choice`."""
        rows, vocab = scores.shape[1:]
        grouped = (totals[:, :, None] + scores).view(-1, self.groups, rows, vocab)
        used = scores.new_zeros(len(grouped), vocab)
        parts = []
        for group in range(self.groups):
            own = grouped[:, group]
            count = min(2 * width + extra, rows * vocab)
            rank, flat = largest((own - self.penalty * used[:, None]).flatten(1), count)
            token = flat % vocab
            going_on = (token != eos) & (rank > -torch.inf)
            chosen = going_on & (going_on.cumsum(1) <= width)
            used = used.scatter_add(1, token, chosen.to(used))
            parts.append(Candidates(own.flatten(1).gather(1, flat), rank, flat // vocab, token, token == eos))
        return Candidates(
            _interleaved([part.log_probability for part in parts]),
            _interleaved([part.rank for part in parts]),
            _interleaved([part.parent for part in parts]),
            _interleaved([part.token for part in parts]),
            _interleaved([part.is_end for part in parts]),
        )


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`values.topk(count)` of long rows [B, N], found in the blocks with the largest maxima: several times faster.

    Exact: an element among the `count` largest lies in one of the `count` blocks with the largest maxima.

    Returns:
        values and places [B, count], largest first; of equal values any come.
    """
    whole = values.shape[1] // _BLOCK
    if whole <= 2 * count:
        found = values.topk(count, dim=1)
        return found.values, found.indices
    blocks = values[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK))
    chosen = blocks.amax(2).topk(count, dim=1).indices[:, :, None]
    within = torch.arange(_BLOCK, device=values.device)
    inside = blocks.gather(1, chosen.expand(-1, -1, _BLOCK)).flatten(1)
    places = (chosen * _BLOCK + within).flatten(1)
    rest = torch.arange(whole * _BLOCK, values.shape[1], device=values.device).expand(len(values), -1)
    best, order = torch.cat([inside, values[:, whole * _BLOCK :]], dim=1).topk(count, dim=1)
    return best, torch.cat([places, rest], dim=1).gather(1, order)


def _interleaved(parts: list[Tensor]) -> Tensor:
    """[sources, C] of each group -> [sources * groups, C]."""
    return torch.stack(parts, dim=1).flatten(0, 1)
