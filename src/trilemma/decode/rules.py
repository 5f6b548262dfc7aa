"""Which tokens a hypothesis may go on with: small objects, each one rule, applied together at every step.

A rule looks at the tokens so far and at nothing else, so it has no state to reorder with the beams. What is forbidden
gets the log-probability -inf; everything else keeps the model's own, so scores stay those of forced decoding. Where
every way on is forbidden, and no other hypothesis of the input has one, the output ends with end-of-sequence.

Legend: R rows (hypotheses), V vocabulary, T new tokens so far, B inputs of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

from trilemma.config import DecodingConfig
from trilemma.decode.batching import DecodingBatch
from trilemma.errors import ConfigError


class Rule(ABC):
    """One rule.

    Attributes:
        key: the config's key that asks for it, under which it is reported when it acts.
    """

    key: ClassVar[str]

    @abstractmethod
    def banned(self, history: Tensor, owners: Tensor, vocab: int) -> Tensor:
        """[R or 1, V] True where a token may not follow.

        Args:
            history: [R, T] new tokens so far. owners: [R] the input that a row belongs to.
        """


@dataclass(frozen=True)
class Ban(Rule):
    """Never these tokens."""

    tokens: tuple[int, ...]
    key: ClassVar[str] = "unknown"

    def banned(self, history: Tensor, owners: Tensor, vocab: int) -> Tensor:
        """See `Rule`."""
        mask = torch.zeros(1, vocab, dtype=torch.bool, device=history.device)
        mask[:, list(self.tokens)] = True
        return mask


class Banned(Ban):
    """Never the tokens that the config lists."""

    key: ClassVar[str] = "banned"

    def banned(self, history: Tensor, owners: Tensor, vocab: int) -> Tensor:
        """See `Rule`; `ConfigError` for an id that the vocabulary lacks."""
        if strange := [token for token in self.tokens if not 0 <= token < vocab]:
            raise ConfigError(f"decoding.banned: {strange[0]} is no token; ids are 0 to {vocab - 1}")
        return super().banned(history, owners, vocab)


@dataclass(frozen=True)
class NoRepeat(Rule):
    """No n-gram of the new tokens twice (Paulus et al. 2018, arXiv 1705.04304, section 2.5)."""

    size: int
    key: ClassVar[str] = "no_repeat_ngram"

    def banned(self, history: Tensor, owners: Tensor, vocab: int) -> Tensor:
        """See `Rule`."""
        mask = torch.zeros(len(history), vocab, dtype=torch.bool, device=history.device)
        if history.shape[1] < self.size:
            return mask
        seen = history.unfold(1, self.size, 1)  # [R, T - n + 1, n]
        now = history[:, None, history.shape[1] - self.size + 1 :]
        again = (seen[:, :, :-1] == now).all(-1)
        # a window that is no repetition marks a column beyond the vocabulary
        return padded(mask, (0, 1)).scatter(1, torch.where(again, seen[:, :, -1], vocab), True)[:, :vocab]


@dataclass(frozen=True)
class Rules:
    """All rules of a batch, and the beginnings that are forced.

    Attributes:
        rules: in the order in which they are reported.
        forced: [B, P] the tokens that each output must begin with, -1 where none is forced.
    """

    rules: Sequence[Rule]
    forced: Tensor

    @classmethod
    def of(cls, config: DecodingConfig, batch: DecodingBatch, eos: int, unk: int | None) -> Rules:
        """What a config and the requests of a batch ask for.

        Args:
            eos, unk: ids of end-of-sequence and of the unknown token.

        Raises:
            ConfigError: the unknown token is to be banned, and is end-of-sequence too.
        """
        rules: list[Rule] = []
        if config.no_repeat_ngram is not None:
            rules.append(NoRepeat(config.no_repeat_ngram))
        if config.banned:
            rules.append(Banned(tuple(config.banned)))
        if config.unknown == "ban":
            assert unk is not None, "the unknown token's id is needed"
            if unk == eos:
                raise ConfigError("decoding.unknown=ban: this vocabulary has no unknown token; its id ends outputs")
            rules.append(Ban((unk,)))
        longest = max(len(request.forced) for request in batch.requests)
        forced = [[*request.forced, *[-1] * (longest - len(request.forced))] for request in batch.requests]
        return cls(rules, torch.tensor(forced, device=batch.inputs.device).reshape(batch.size, longest).long())

    def __bool__(self) -> bool:
        return bool(self.rules) or self.forced.shape[1] > 0

    @property
    def keys(self) -> list[str]:
        """What reports name."""
        return [rule.key for rule in self.rules]

    def apply(self, scores: Tensor, history: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """Forbids.

        Args:
            scores: [R, V] logits or log-probabilities. history: [R, T]. owners: [R].

        Returns:
            [R, V] with -inf where a token is forbidden, and [R, rules] whether a rule forbade the likeliest token. A
            forced token is stronger than any rule.
        """
        position, allowed = history.shape[1], scores
        forced = torch.full_like(owners, -1)
        if position < self.forced.shape[1]:
            forced = self.forced[owners, position]
        free = forced < 0
        likeliest = scores.argmax(-1, keepdim=True)
        acted = torch.zeros(len(scores), len(self.rules), dtype=torch.bool, device=scores.device)
        for number, rule in enumerate(self.rules):
            banned = rule.banned(history, owners, scores.shape[1]).expand_as(scores)
            allowed = allowed.masked_fill(banned & free[:, None], -torch.inf)
            acted[:, number] = banned.gather(1, likeliest).squeeze(1) & free
        if not bool(free.all()):
            others = torch.arange(scores.shape[1], device=scores.device)[None] != forced[:, None]
            allowed = allowed.masked_fill(others & ~free[:, None], -torch.inf)
        return allowed, acted

    def acting(self, acted: Sequence[bool]) -> tuple[str, ...]:
        """The keys of the rules that acted."""
        return tuple(key for key, done in zip(self.keys, acted, strict=True) if done)
