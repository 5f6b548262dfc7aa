"""Phrases that an output must contain: a beam shared evenly among hypotheses that have come equally far.

Dynamic beam allocation (Post and Vilar 2018, arXiv 1804.06609): hypotheses are put into banks by how many tokens of
their phrases they have, and the banks take places in the beam in turn, the fullest bank first. The best hypothesis of
the fullest bank can always go on with a token that it still needs, so every phrase is met if the length limit allows.

How far a hypothesis is follows from its tokens alone; there is nothing to reorder with the beams.

Legend: B sources, N hypotheses of a source, T tokens so far, W patterns of a source, P longest pattern, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

from trilemma.decode.choice import Candidates, Choice
from trilemma.decode.hypothesis import Hypothesis, Phrase
from trilemma.decode.rules import Rule

_ANY, _NOTHING = -1, -2  # a pattern's padding, which anything matches; what stands after the last token


@dataclass(frozen=True)
class Patterns:
    """The phrases of a batch as tokens.

    Attributes:
        tokens: [B, W, P] the ways to write the phrases, padded with -1.
        lengths: [B, W] their lengths, 0: padding. first: [B, W] only at the beginning of the output.
        phrase: [B, W] which phrase a pattern writes. weights: [B, phrases] tokens of its longest way, 0: padding.
    """

    tokens: Tensor
    lengths: Tensor
    first: Tensor
    phrase: Tensor
    weights: Tensor

    @classmethod
    def of(cls, phrases: Sequence[Sequence[Phrase]], device: torch.device) -> Patterns:
        """The patterns of each input's phrases."""
        rows = [[(w, first, n) for n, phrase in enumerate(own) for w, first in phrase.ways()] for own in phrases]
        width = max(1, max(len(row) for row in rows))
        longest = max([1, *(len(way) for row in rows for way, _, _ in row)])
        count = max(1, max(len(own) for own in phrases))
        tokens = torch.full((len(rows), width, longest), _ANY)
        lengths, phrase = torch.zeros(2, len(rows), width, dtype=torch.long)
        first = torch.zeros(len(rows), width, dtype=torch.bool)
        weights = torch.zeros(len(rows), count, dtype=torch.long)
        for b, row in enumerate(rows):
            for w, (way, begins, number) in enumerate(row):
                tokens[b, w, : len(way)] = torch.tensor(way)
                lengths[b, w], first[b, w], phrase[b, w] = len(way), begins, number
                weights[b, number] = max(int(weights[b, number]), len(way))
        return cls(*(tensor.to(device) for tensor in (tokens, lengths, first, phrase, weights)))

    def select(self, owners: Tensor) -> Patterns:
        """Those of some inputs."""
        return Patterns(
            self.tokens[owners], self.lengths[owners], self.first[owners], self.phrase[owners], self.weights[owners]
        )

    def met(self, history: Tensor) -> Tensor:
        """[B, N, phrases] whether each phrase stands in [B, N, T]; padding is met."""
        size = self.tokens.shape[2]
        windows = padded(history, (0, size), value=_NOTHING).unfold(2, size, 1)  # [B, N, T + 1, P]
        patterns = self.tokens[:, None, :, None]
        found = ((windows[:, :, None] == patterns) | (patterns == _ANY)).all(-1)  # [B, N, W, T + 1]
        there = torch.where(self.first[:, None], found[..., 0], found.any(-1)) & (self.lengths > 0)[:, None]
        counts = torch.zeros(*history.shape[:2], self.weights.shape[1], dtype=torch.long, device=history.device)
        where = self.phrase[:, None].expand(-1, history.shape[1], -1)
        return (counts.scatter_add(2, where, there.long()) > 0) | (self.weights == 0)[:, None]

    def begun(self, history: Tensor) -> Tensor:
        """[B, N, W] tokens of each pattern that stand at the end of the history, short of all of them."""
        length = history.shape[2]
        begun = torch.zeros(*history.shape[:2], self.tokens.shape[1], dtype=torch.long, device=history.device)
        for size in range(1, min(length, self.tokens.shape[2] - 1) + 1):
            end = history[:, :, None, length - size :]
            fits = (end == self.tokens[:, None, :, :size]).all(-1) & (self.lengths > size)[:, None]
            fits &= ~self.first[:, None] | (size == length)
            begun = torch.where(fits, size, begun)
        return begun

    def bank(self, history: Tensor) -> Tensor:
        """[B, N] tokens of phrases that a hypothesis has: of all that are met, and of the other that has come furthest.

        One token may begin several phrases but go on with only one of them: counting it for each would let a
        hypothesis that goes on fall behind one that only begins, for ever.
        """
        met = self.met(history)
        begun = torch.zeros_like(met, dtype=torch.long)
        where = self.phrase[:, None].expand(-1, history.shape[1], -1)
        begun = begun.scatter_reduce(2, where, self.begun(history), "amax")
        weights = self.weights[:, None]
        open_ = torch.minimum(begun, (weights - 1).clamp(min=0)).masked_fill(met, 0)
        return (weights * met).sum(-1) + open_.amax(-1)

    def wanted(self, history: Tensor) -> Tensor:
        """[B, N, 2 W] the tokens that begin or continue a phrase that is not met; -1: none."""
        begun = self.begun(history)
        patterns = self.tokens[:, None].expand(-1, history.shape[1], -1, -1)
        open_ = ~self.met(history).gather(2, self.phrase[:, None].expand_as(begun)) & (self.lengths > 0)[:, None]
        late = self.first[:, None] & (begun < history.shape[2])
        following = patterns.gather(3, begun[..., None]).squeeze(3)
        tokens = torch.cat([following, patterns[..., 0]], dim=2)
        fits = torch.cat([open_ & ~late, open_ & ~(self.first[:, None] & (history.shape[2] > 0))], dim=2)
        return torch.where(fits, tokens, -1)


def marked(hypothesis: Hypothesis, phrases: Sequence[Phrase]) -> Hypothesis:
    """The hypothesis, reported under "unmet" if it lacks a phrase, as only one that was cut can."""
    patterns = Patterns.of([phrases], torch.device("cpu"))
    history = torch.tensor(hypothesis.tokens, dtype=torch.long)[None, None]
    if bool(patterns.met(history).all()):
        return hypothesis
    return replace(hypothesis, acted=(*hypothesis.acted, "unmet"))


@dataclass(frozen=True)
class Complete(Rule):
    """No end of the output before all phrases stand in it."""

    patterns: Patterns
    eos: int
    key: ClassVar[str] = "phrases"

    def banned(self, history: Tensor, owners: Tensor, vocab: int) -> Tensor:
        """See `Rule`."""
        mask = torch.zeros(len(history), vocab, dtype=torch.bool, device=history.device)
        mask[:, self.eos] = ~self.patterns.select(owners).met(history[:, None])[:, 0].all(-1)
        return mask


@dataclass(frozen=True)
class Allocated(Choice):
    """Dynamic beam allocation: banks take places in turn, the fullest first, each with its likeliest."""

    patterns: Patterns

    def candidates(
        self, scores: Tensor, totals: Tensor, history: Tensor, owners: Tensor, eos: int, width: int, extra: int
    ) -> Candidates:
        """See `Choice`: the likeliest of all; of each hypothesis the likeliest, its end, and what its phrases need."""
        batch, rows, vocab = scores.shape
        patterns = self.patterns.select(owners)
        flat = (totals[:, :, None] + scores).flatten(1)
        best = flat.topk(min(2 * width + extra, rows * vocab), dim=-1).indices
        offsets = torch.arange(rows, device=scores.device)[:, None] * vocab
        needed = patterns.wanted(history)
        needed = torch.where(needed < 0, best[:, :1, None], needed + offsets)
        likeliest = scores.argmax(-1) + offsets[:, 0]
        ends = (offsets[:, 0] + eos).expand(batch, -1)
        places = torch.cat([best, needed.flatten(1), likeliest, ends], dim=1).sort(dim=1).values
        reached = flat.gather(1, places)
        twice = padded(places[:, 1:] == places[:, :-1], (1, 0))
        reached, order = reached.masked_fill(twice, -torch.inf).sort(dim=1, descending=True, stable=True)
        places = places.gather(1, order)
        parent, token = places // vocab, places % vocab
        continued = history.gather(1, parent[..., None].expand(-1, -1, history.shape[2]))
        bank = patterns.bank(torch.cat([continued, token[..., None]], dim=2))
        turns = _turns(bank, reached > -torch.inf)
        rank, order = torch.where(reached > -torch.inf, -turns.to(reached), reached).sort(dim=1, descending=True)
        parent, token, reached = parent.gather(1, order), token.gather(1, order), reached.gather(1, order)
        return Candidates(reached, rank, parent, token, token == eos)


def _turns(bank: Tensor, alive: Tensor) -> Tensor:
    """[B, C] when each candidate gets its place: first the best of each bank, fullest bank first, then the seconds.

    Args:
        bank: [B, C], in the order of log-probability. alive: [B, C]; others get no place.
    """
    banks = torch.arange(int(bank.max()) + 1, device=bank.device)
    same = (bank[:, :, None] == banks) & alive[:, :, None]
    place = same.cumsum(1).gather(2, bank[:, :, None]).squeeze(2) - 1
    top = bank.amax(1, keepdim=True)
    return place * (top + 1) + (top - bank)
