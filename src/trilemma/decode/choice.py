"""How a beam chooses among the continuations of its hypotheses.

Legend: B sources still searched (times their groups), K beam size, V vocabulary, R rows of a source (1, then K), C
candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


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
        self, values: Tensor, history: Tensor, owners: Tensor, eos: int, width: int, extra: int
    ) -> Candidates:
        """The best continuations, enough that K of them are no end-of-sequence (where there are as many).

        Args:
            values: [B, R, V] log-probabilities of all continuations; NaN is kept on purpose: it is reported later.
            history: [B, R, T] tokens so far.
            owners: [B] the inputs in the batch.
            width: K. extra: candidates beyond those needed, which show by how much they lost.
        """


class Likeliest(Choice):
    """The likeliest."""

    def candidates(
        self, values: Tensor, history: Tensor, owners: Tensor, eos: int, width: int, extra: int
    ) -> Candidates:
        """See `Choice`: 2K, for each parent ends at most once."""
        best, flat = values.flatten(1).topk(min(2 * width + extra, values[0].numel()), dim=-1)
        token = flat % values.shape[2]
        return Candidates(best, best, flat // values.shape[2], token, token == eos)


@dataclass(frozen=True)
class Diverse(Choice):
    """Groups one after the other, each avoiding what those before it chose (Vijayakumar et al. 2016, arXiv 1610.02424).

    The penalty is Hamming's: `penalty` for each time a group before has gone on with the token at this step. It decides
    what is chosen here, and is no part of any log-probability. Groups of a source stand side by side among the B.
    """

    groups: int
    penalty: float

    def candidates(
        self, values: Tensor, history: Tensor, owners: Tensor, eos: int, width: int, extra: int
    ) -> Candidates:
        """See `Choice`."""
        rows, vocab = values.shape[1:]
        grouped = values.view(-1, self.groups, rows, vocab)
        used = values.new_zeros(len(grouped), vocab)
        parts = []
        for group in range(self.groups):
            own = grouped[:, group]
            count = min(2 * width + extra, rows * vocab)
            rank, flat = (own - self.penalty * used[:, None]).flatten(1).topk(count, dim=-1)
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


def _interleaved(parts: list[Tensor]) -> Tensor:
    """[sources, C] of each group -> [sources * groups, C]."""
    return torch.stack(parts, dim=1).flatten(0, 1)
