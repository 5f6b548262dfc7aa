"""Batched beam search over `prefill`, `step` and `State.select` alone.

Legend: B sources still searched (times their groups), K beam size (of a group), N n-best, V vocabulary, T tokens so
far, S source length.

The rules, which make the result of a beam wide enough to prune nothing the exact best of all outputs:

- A hypothesis' score is `log p / ((5 + |y|) / 6) ** alpha` plus the coverage penalty, beta times the sum over source
  positions of `log(min(attention received, 1))` (Wu et al. 2016, equation 14); |y| counts end-of-sequence.
- Every step ranks the continuations of a source by log-probability, or as another `Choice` does. A continuation with
  end-of-sequence is *finished* if it stands among the first K; the best K others go on. With K = 1 and alpha = 0 this
  is greedy decoding. What `Rules` forbid is no continuation.
- A source stops when no live hypothesis can beat its worst kept finished one (the N-th best): log p only falls, so a
  live one can at best keep its log p, lose its coverage penalty, and end at the length with the largest length penalty,
  which is the next one or the limit. Nothing that stopping early leaves out could have been returned.
- At its limit a source stops. Unfinished hypotheses are returned only in places that no finished one takes.

Finished sources leave the batch with the same `select` that reorders the beams, so it costs nothing extra. The rows of
one source stay contiguous and equal in number: memory that they share need not be copied.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from trilemma.config import DecodingConfig
from trilemma.decode.attention import observer
from trilemma.decode.batching import DecodingBatch
from trilemma.decode.choice import Candidates, Choice, Diverse, Likeliest
from trilemma.decode.hypothesis import NOT_A_NUMBER, Hypothesis, StateType, StepModel, length_penalty
from trilemma.decode.lexical import Allocated, Complete, Patterns
from trilemma.decode.rules import Rules
from trilemma.errors import ConfigError, TrilemmaError


@dataclass(frozen=True)
class _Live:
    """Hypotheses that go on, best first; -inf: no hypothesis.

    Token history [B, K, T], log-probabilities [B, K], and the attention that each source position has received
    [B, K, S], padding counted as covered; S = 0 where nobody asked.
    """

    history: Tensor
    log_probability: Tensor
    attended: Tensor


@dataclass(frozen=True)
class _Finished:
    """The N best finished hypotheses, best first: history [B, N, T] (padded), the rest [B, N]; score -inf: none."""

    history: Tensor
    log_probability: Tensor
    score: Tensor
    length: Tensor  # end-of-sequence counted


@dataclass(frozen=True)
class _Book:
    """What is kept of each search: [B] where its result goes, its limit, the smallest margin; [B, rules] who acted."""

    place: Tensor
    limit: Tensor
    margin: Tensor
    acted: Tensor


Parts = TypeVar("Parts", _Live, _Finished, _Book)


@dataclass(frozen=True)
class _Score:
    """Length and coverage penalty, alpha and beta."""

    alpha: float
    beta: float

    def __call__(self, log_probability: Tensor, length: int, attended: Tensor) -> Tensor:
        """[B, K], of log-probabilities [B, K] and attention [B, K, S]."""
        normalised = log_probability / length_penalty(length, self.alpha)
        if not attended.shape[2]:
            return normalised
        least = torch.finfo(torch.float32).tiny  # a position that nobody looked at costs much, but not everything
        return normalised + self.beta * attended.clamp(least, 1).log().sum(-1)


@torch.no_grad()
def decode_beam(
    model: StepModel[StateType],
    batch: DecodingBatch,
    config: DecodingConfig,
    eos: int,
    pad: int,
    margins: bool = False,
    unk: int | None = None,
) -> list[list[Hypothesis]]:
    """The `config.n_best` best outputs of each input, best first.

    Args:
        model: an encoder-decoder or decoder-only model.
        batch: B inputs.
        config: all keys that are not about sampling are read.
        eos, pad, unk: token ids; unk is needed to ban it.
        margins: also record the smallest difference that decided which hypotheses went on (see `Hypothesis.margin`).

    Raises:
        ConfigError: `n_best` is larger than `beam_size`, or settings that exclude each other.
        CapabilityError: a coverage penalty for a model without cross-attention.
        TrilemmaError: the model's output is not a number.
    """
    check_beam(config)
    groups, width = config.beam_groups, config.beam_size // config.beam_groups
    n_best = min(config.n_best, width)
    eyes, score = observer(model, config), _Score(config.length_penalty, config.coverage_penalty)
    choice, rules = _choice(config, batch, eos, unk)
    with eyes.looking(batch.size, batch.lengths):
        logits, state = model.prefill(
            batch.inputs,
            batch.lengths,
            source=batch.source,
            source_lengths=batch.source_lengths,
            prefix=batch.prefix,
        )
    weights, device = eyes.weights.to(logits.device), logits.device
    if groups > 1:
        rows = torch.arange(batch.size, device=device).repeat_interleave(groups)
        logits, weights, state = logits[rows], weights[rows], state.select(rows)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    live = _begin(batch, groups, weights.shape[1], dtype, device)
    book = _open_book(batch, groups, len(rules.keys), dtype, device)
    finished = _no_finished(len(book.place), n_best, dtype, device)
    results: list[list[Hypothesis]] = [[] for _ in book.place]
    for length in range(1, int(batch.limits.max()) + 1):
        live = _attended(live, weights)
        owners = book.place // groups
        scores, acting = _continue(live, logits, rules, owners, eos)
        book = replace(book, acted=book.acted | acting)
        totals = live.log_probability
        candidates = choice.candidates(scores, totals, live.history, owners, eos, width, int(margins))
        if margins:
            book = replace(book, margin=torch.minimum(book.margin, _pruning_margin(candidates, width)))
        finished = _finish(finished, live, candidates, width, length, score)
        parents, tokens, live = _survive(live, candidates, width, pad)
        done = _cannot_improve(live, finished, length, book.limit, config.length_penalty)
        done = done.view(-1, groups).all(1).repeat_interleave(groups)
        if bool(done.any()):
            ended = _rows(book, done)
            outputs = _collect(_rows(live, done), _rows(finished, done), length, score)
            told = zip(ended.place.tolist(), ended.margin.tolist(), ended.acted.tolist(), outputs, strict=True)
            for place, margin, flags, found in told:
                results[place] = [replace(one, margin=margin, acted=rules.acting(flags)) for one in found]
            if len(ended.place) == len(done):
                break
        keep = (~done).nonzero().squeeze(-1)
        rows = (keep[:, None] * (logits.shape[0] // len(done)) + parents[keep]).flatten()
        if not _is_identity(rows, logits.shape[0]):
            state = state.select(rows)
        if len(keep) < len(done):
            book, live, finished = _rows(book, ~done), _rows(live, ~done), _rows(finished, ~done)
        with eyes.looking(len(rows)):
            logits, state = model.step(tokens[keep].reshape(-1, 1), state)
        logits, weights = logits[:, -1], eyes.weights.to(device)
    return results if groups == 1 else _merged(results, groups, config.n_best)


def check_beam(config: DecodingConfig) -> None:
    """Refuses settings of a beam that exclude each other.

    Raises:
        ConfigError: more outputs than the beam holds, or groups that do not divide it.
    """
    if config.n_best > config.beam_size:
        raise ConfigError(
            f"decoding.n_best={config.n_best} is more than decoding.beam_size={config.beam_size}; raise the beam size"
        )
    if config.beam_size % config.beam_groups:
        raise ConfigError(
            f"decoding.beam_size={config.beam_size} is no multiple of decoding.beam_groups={config.beam_groups}: "
            "the beam is divided evenly among its groups"
        )


def _choice(config: DecodingConfig, batch: DecodingBatch, eos: int, unk: int | None) -> tuple[Choice, Rules]:
    """How continuations are chosen, and what is forbidden."""
    rules = Rules.of(config, batch, eos, unk)
    if any(request.phrases for request in batch.requests):
        if config.beam_groups > 1:
            raise ConfigError("phrases and decoding.beam_groups exclude each other: both divide the beam")
        patterns = Patterns.of([request.phrases for request in batch.requests], batch.inputs.device)
        return Allocated(patterns), Rules([*rules.rules, Complete(patterns, eos)], rules.forced)
    if config.beam_groups > 1:
        return Diverse(config.beam_groups, config.diversity_penalty), rules
    return Likeliest(), rules


def _begin(batch: DecodingBatch, groups: int, source: int, dtype: torch.dtype, device: torch.device) -> _Live:
    """One empty hypothesis for each source and group."""
    count = batch.size * groups
    attended = torch.zeros(count, 1, source, dtype=dtype, device=device)
    if source and batch.source_lengths is not None:
        padding = torch.arange(source, device=device) >= batch.source_lengths.to(device)[:, None]
        attended = padding.repeat_interleave(groups, dim=0)[:, None].to(dtype)
    history = torch.zeros(count, 1, 0, dtype=torch.long, device=device)
    return _Live(history, torch.zeros(count, 1, dtype=dtype, device=device), attended)


def _attended(live: _Live, weights: Tensor) -> _Live:
    """With the attention [B * rows, S or less] of this step: a memory shrinks when its longest source has left."""
    missing = live.attended.shape[2] - weights.shape[1]
    weights = torch.nn.functional.pad(weights, (0, missing)).view(live.attended.shape)
    return replace(live, attended=live.attended + weights)


def _open_book(batch: DecodingBatch, groups: int, rules: int, dtype: torch.dtype, device: torch.device) -> _Book:
    count = batch.size * groups
    return _Book(
        place=torch.arange(count, device=device),
        limit=batch.limits.to(device).repeat_interleave(groups),
        margin=torch.full((count,), torch.inf, dtype=dtype, device=device),
        acted=torch.zeros(count, rules, dtype=torch.bool, device=device),
    )


def _continue(live: _Live, logits: Tensor, rules: Rules, owners: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all tokens [B, rows of a source, V], and which rules acted [B, rules].

    NaN is kept on purpose: it surfaces as an error in `_collect`.
    """
    batch, rows = live.log_probability.shape
    free = torch.log_softmax(logits.to(live.log_probability.dtype), dim=-1)
    if not rules:
        return free.view(batch, rows, -1), torch.zeros(batch, 0, dtype=torch.bool, device=logits.device)
    allowed, acting = rules.apply(free, live.history.flatten(0, 1), owners.repeat_interleave(rows))
    free, allowed = free.view(batch, rows, -1), allowed.view(batch, rows, -1)
    alive = live.log_probability > -torch.inf
    # a source whose hypotheses have no way on ends them
    stuck = ((allowed == -torch.inf).all(2) | ~alive).all(1, keepdim=True)
    ends = torch.where(stuck, free[:, :, eos], allowed[:, :, eos])
    allowed = torch.cat([allowed[:, :, :eos], ends[:, :, None], allowed[:, :, eos + 1 :]], dim=2)
    return allowed, (acting.view(batch, rows, -1) & alive[:, :, None]).any(1)


def _finish(
    finished: _Finished, live: _Live, candidates: Candidates, width: int, length: int, score: _Score
) -> _Finished:
    """Takes continuations with end-of-sequence among the first K into the N best finished ones."""
    is_end = candidates.is_end[:, :width] & (candidates.log_probability[:, :width] > -torch.inf)
    history = torch.nn.functional.pad(finished.history, (0, 1))
    if not bool(is_end.any()):
        return replace(finished, history=history)
    values = candidates.log_probability[:, :width].masked_fill(~is_end, -torch.inf)
    ended = torch.nn.functional.pad(_of(live.history, candidates.parent[:, :width]), (0, 1))
    scores = torch.cat([finished.score, score(values, length, _of(live.attended, candidates.parent[:, :width]))], dim=1)
    best, order = scores.topk(finished.score.shape[1], dim=1)
    lengths = torch.cat([finished.length, torch.full_like(candidates.parent[:, :width], length)], dim=1)
    return _Finished(
        history=torch.cat([history, ended], dim=1).gather(1, order[:, :, None].expand(-1, -1, length)),
        log_probability=torch.cat([finished.log_probability, values], dim=1).gather(1, order),
        score=best,
        length=lengths.gather(1, order),
    )


def _survive(live: _Live, candidates: Candidates, width: int, pad: int) -> tuple[Tensor, Tensor, _Live]:
    """The best K continuations without end-of-sequence: their parents [B, K], tokens [B, K] and histories."""
    rank = candidates.rank.masked_fill(candidates.is_end, -torch.inf)
    values = candidates.log_probability.masked_fill(candidates.is_end, -torch.inf)
    parents, tokens = candidates.parent, candidates.token
    if values.shape[1] < width:  # a vocabulary smaller than the beam: places without a hypothesis
        missing = width - values.shape[1]
        rank, values = (torch.nn.functional.pad(one, (0, missing), value=-torch.inf) for one in (rank, values))
        parents = torch.nn.functional.pad(parents, (0, missing))
        tokens = torch.nn.functional.pad(tokens, (0, missing), value=pad)
    order = rank.topk(width, dim=1).indices
    best, parents, tokens = values.gather(1, order), parents.gather(1, order), tokens.gather(1, order)
    history = torch.cat([_of(live.history, parents), tokens[:, :, None]], dim=2)
    return parents, tokens, _Live(history, best, _of(live.attended, parents))


def _of(values: Tensor, parents: Tensor) -> Tensor:
    """[B, rows, X] of the parents [B, C] -> [B, C, X]."""
    return values.gather(1, parents[:, :, None].expand(-1, -1, values.shape[2]))


def _cannot_improve(live: _Live, finished: _Finished, length: int, limits: Tensor, alpha: float) -> Tensor:
    """[B] whether a source is done: at its limit, nothing left to follow, or no live hypothesis can be returned."""
    best = live.log_probability.amax(1)
    penalties = ((5.0 + limits.to(best.dtype)) / 6.0) ** alpha
    bound = torch.maximum(best / length_penalty(length + 1, alpha), best / penalties)
    # "not >" rather than "<=": NaN ends the search, and is reported then
    return (limits <= length) | (best == -torch.inf) | ~(bound > finished.score[:, -1])


def _pruning_margin(candidates: Candidates, width: int) -> Tensor:
    """[B] the smallest difference that decided which continuations were kept."""
    values, is_end = candidates.rank, candidates.is_end
    going_on = values.masked_fill(is_end, -torch.inf).sort(dim=1, descending=True).values
    margin = torch.full_like(values[:, 0], torch.inf)
    if values.shape[1] <= width:
        return margin
    gap = going_on[:, width - 1] - going_on[:, width]
    margin = torch.where(going_on[:, width] > -torch.inf, gap, margin)
    at_border = is_end[:, width - 1] | is_end[:, width]
    border = values[:, width - 1] - values[:, width]
    return torch.where(at_border & (values[:, width] > -torch.inf), torch.minimum(margin, border), margin)


def _collect(live: _Live, finished: _Finished, length: int, score: _Score) -> list[list[Hypothesis]]:
    """The outputs of sources that end at this step."""
    if bool(live.log_probability.isnan().any()) or bool(finished.score.isnan().any()):
        raise TrilemmaError(NOT_A_NUMBER)
    wanted = finished.score.shape[1]
    open_scores = score(live.log_probability, length, live.attended)
    results = []
    for row in range(len(finished.score)):
        outputs = [
            Hypothesis(tokens[: count - 1], total, value, True)
            for tokens, total, value, count in zip(
                finished.history[row].tolist(),
                finished.log_probability[row].tolist(),
                finished.score[row].tolist(),
                finished.length[row].tolist(),
                strict=True,
            )
            if value > -torch.inf
        ]
        cut = [
            Hypothesis(tokens, total, value, False)
            for tokens, total, value in zip(
                live.history[row].tolist(), live.log_probability[row].tolist(), open_scores[row].tolist(), strict=True
            )
            if total > -torch.inf
        ]
        results.append([*outputs, *cut[: wanted - len(outputs)]])
    return results


def _merged(results: list[list[Hypothesis]], groups: int, n_best: int) -> list[list[Hypothesis]]:
    """The outputs of each source: the best of every group, then the second ones, each output once.

    In the order of a plain beam: finished ones first, then by score.
    """
    merged = []
    for start in range(0, len(results), groups):
        own = results[start : start + groups]
        in_turn = (one for rank in zip_longest(*own) for one in rank if one is not None)
        found: dict[tuple[tuple[int, ...], bool], Hypothesis] = {}
        for one in in_turn:
            if len(found) < n_best:
                found.setdefault((tuple(one.tokens), one.finished), one)
        acted = tuple(dict.fromkeys(key for outputs in own for one in outputs for key in one.acted))
        order = sorted(found.values(), key=lambda one: (not one.finished, -one.score))
        merged.append([replace(one, acted=acted) for one in order])
    return merged


def _no_finished(batch: int, n_best: int, dtype: torch.dtype, device: torch.device) -> _Finished:
    nothing = torch.full((batch, n_best), -torch.inf, dtype=dtype, device=device)
    history = torch.zeros(batch, n_best, 0, dtype=torch.long, device=device)
    return _Finished(history, nothing, nothing, torch.zeros(batch, n_best, dtype=torch.long, device=device))


def _rows(parts: Parts, mask: Tensor) -> Parts:
    """Those of some searches: all tensors of a dataclass, where mask [B]."""
    return replace(parts, **{field.name: getattr(parts, field.name)[mask] for field in fields(parts)})


def _is_identity(rows: Tensor, size: int) -> bool:
    """Whether `select(rows)` would change nothing, as is usual for a beam of 1."""
    return len(rows) == size and bool((rows == torch.arange(size, device=rows.device)).all())
