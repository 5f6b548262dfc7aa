"""Batched beam search over `prefill`, `step` and `State.select` alone.

Legend: B sources still searched, K beam size, N n-best, V vocabulary, T tokens so far.

The rules, which make the result of a beam wide enough to prune nothing the exact best of all outputs:

- A hypothesis' score is `log p / ((5 + |y|) / 6) ** alpha` (Wu et al. 2016, equation 14); |y| counts end-of-sequence.
- Every step ranks the K * V continuations of a source by log-probability. A continuation with end-of-sequence is
  *finished* if it stands among the first K; the best K others go on. With K = 1 and alpha = 0 this is greedy decoding.
- A source stops when no live hypothesis can beat its worst kept finished one (the N-th best): log p only falls, so a
  live one can at best keep its log p and end at the length with the largest penalty, which is the next one or the
  limit. Nothing that stopping early leaves out could have been returned.
- At its limit a source stops. Unfinished hypotheses are returned only in places that no finished one takes.

Finished sources leave the batch with the same `select` that reorders the beams, so it costs nothing extra. The rows of
one source stay contiguous and equal in number: memory that they share need not be copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trilemma.config import DecodingConfig
from trilemma.decode.batching import DecodingBatch
from trilemma.decode.hypothesis import NOT_A_NUMBER, Hypothesis, StateType, StepModel, length_penalty
from trilemma.errors import ConfigError, TrilemmaError


@dataclass(frozen=True)
class _Live:
    """Hypotheses that go on: token history [B, K, T] and log-probabilities [B, K], best first; -inf: no hypothesis."""

    history: Tensor
    log_probability: Tensor


@dataclass(frozen=True)
class _Finished:
    """The N best finished hypotheses, best first: history [B, N, T] (padded), the rest [B, N]; score -inf: none."""

    history: Tensor
    log_probability: Tensor
    score: Tensor
    length: Tensor  # end-of-sequence counted


@dataclass(frozen=True)
class _Candidates:
    """The best continuations of each source, best first: all [B, C]."""

    log_probability: Tensor
    parent: Tensor
    token: Tensor
    is_end: Tensor


@torch.no_grad()
def decode_beam(
    model: StepModel[StateType], batch: DecodingBatch, config: DecodingConfig, eos: int, pad: int, margins: bool = False
) -> list[list[Hypothesis]]:
    """The `config.n_best` best outputs of each input, best first.

    Args:
        model: an encoder-decoder or decoder-only model.
        batch: B inputs.
        config: `beam_size`, `n_best`, `length_penalty` are read.
        eos, pad: token ids.
        margins: also record the smallest difference that decided which hypotheses went on (see `Hypothesis.margin`).

    Raises:
        ConfigError: `n_best` is larger than `beam_size`.
        TrilemmaError: the model's output is not a number.
    """
    width, n_best = config.beam_size, config.n_best
    if n_best > width:
        raise ConfigError(f"decoding.n_best={n_best} is more than decoding.beam_size={width}; raise the beam size")
    logits, state = model.prefill(
        batch.inputs,
        batch.lengths,
        source=batch.source,
        source_lengths=batch.source_lengths,
        prefix=batch.prefix,
    )
    device = logits.device
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    sources = torch.arange(batch.size)
    limits = batch.limits.to(device)
    live = _Live(
        torch.zeros(batch.size, 1, 0, dtype=torch.long, device=device),
        torch.zeros(batch.size, 1, dtype=dtype, device=device),
    )
    finished = _no_finished(batch.size, n_best, dtype, device)
    smallest = torch.full((batch.size,), torch.inf, dtype=dtype, device=device)
    results: list[list[Hypothesis]] = [[] for _ in range(batch.size)]
    for length in range(1, int(batch.limits.max()) + 1):
        candidates = _continue(live.log_probability, logits, eos, width, extra=int(margins))
        if margins:
            smallest = torch.minimum(smallest, _pruning_margin(candidates, width))
        finished = _finish(finished, live, candidates, width, length, config.length_penalty)
        parents, tokens, live = _survive(live, candidates, width, pad)
        done = _cannot_improve(live, finished, length, limits, config.length_penalty)
        if bool(done.any()):
            ended = done.nonzero().squeeze(-1)
            _collect(results, sources, ended, live, finished, smallest, length, config.length_penalty)
            if len(ended) == len(sources):
                break
        keep = (~done).nonzero().squeeze(-1)
        rows = (keep[:, None] * (logits.shape[0] // len(sources)) + parents[keep]).flatten()
        if not _is_identity(rows, logits.shape[0]):
            state = state.select(rows)
        if len(keep) < len(sources):
            sources, limits, smallest = sources[keep.cpu()], limits[keep], smallest[keep]
            live, finished = _keep_live(live, keep), _keep_finished(finished, keep)
        logits, state = model.step(tokens[keep].reshape(-1, 1), state)
        logits = logits[:, -1]
    return results


def _continue(live: Tensor, logits: Tensor, eos: int, width: int, extra: int) -> _Candidates:
    """The best 2K (+ extra) continuations: with one end-of-sequence per parent at least K of them go on.

    Args:
        live: [B, rows of a source] log-probabilities (a single row after prefill, K later).
        logits: [B * rows of a source, V].
    """
    batch, rows = live.shape
    vocab = logits.shape[-1]
    # NaN is kept on purpose: it surfaces as an error in `_collect`
    log_probability = live[:, :, None] + torch.log_softmax(logits.to(live.dtype), dim=-1).view(batch, rows, vocab)
    count = min(2 * width + extra, rows * vocab)
    values, flat = log_probability.view(batch, rows * vocab).topk(count, dim=-1)
    tokens = flat % vocab
    return _Candidates(values, flat // vocab, tokens, tokens == eos)


def _finish(
    finished: _Finished, live: _Live, candidates: _Candidates, width: int, length: int, alpha: float
) -> _Finished:
    """Takes continuations with end-of-sequence among the first K into the N best finished ones."""
    is_end = candidates.is_end[:, :width] & (candidates.log_probability[:, :width] > -torch.inf)
    history = torch.nn.functional.pad(finished.history, (0, 1))
    if not bool(is_end.any()):
        return replace(finished, history=history)
    values = candidates.log_probability[:, :width].masked_fill(~is_end, -torch.inf)
    parents = candidates.parent[:, :width, None].expand(-1, -1, length - 1)
    ended = torch.nn.functional.pad(live.history.gather(1, parents), (0, 1))
    scores = torch.cat([finished.score, values / length_penalty(length, alpha)], dim=1)
    best, order = scores.topk(finished.score.shape[1], dim=1)
    lengths = torch.cat([finished.length, torch.full_like(candidates.parent[:, :width], length)], dim=1)
    return _Finished(
        history=torch.cat([history, ended], dim=1).gather(1, order[:, :, None].expand(-1, -1, length)),
        log_probability=torch.cat([finished.log_probability, values], dim=1).gather(1, order),
        score=best,
        length=lengths.gather(1, order),
    )


def _survive(live: _Live, candidates: _Candidates, width: int, pad: int) -> tuple[Tensor, Tensor, _Live]:
    """The best K continuations without end-of-sequence: their parents [B, K], tokens [B, K] and histories."""
    values = candidates.log_probability.masked_fill(candidates.is_end, -torch.inf)
    parents, tokens = candidates.parent, candidates.token
    if values.shape[1] < width:  # a vocabulary smaller than the beam: places without a hypothesis
        missing = width - values.shape[1]
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        parents = torch.nn.functional.pad(parents, (0, missing))
        tokens = torch.nn.functional.pad(tokens, (0, missing), value=pad)
    best, order = values.topk(width, dim=1)
    parents, tokens = parents.gather(1, order), tokens.gather(1, order)
    history = live.history.gather(1, parents[:, :, None].expand(-1, -1, live.history.shape[2]))
    return parents, tokens, _Live(torch.cat([history, tokens[:, :, None]], dim=2), best)


def _cannot_improve(live: _Live, finished: _Finished, length: int, limits: Tensor, alpha: float) -> Tensor:
    """[B] whether a source is done: at its limit, nothing left to follow, or no live hypothesis can be returned."""
    best = live.log_probability[:, 0]
    penalties = ((5.0 + limits.to(best.dtype)) / 6.0) ** alpha
    bound = torch.maximum(best / length_penalty(length + 1, alpha), best / penalties)
    # "not >" rather than "<=": NaN ends the search, and is reported then
    return (limits <= length) | (best == -torch.inf) | ~(bound > finished.score[:, -1])


def _pruning_margin(candidates: _Candidates, width: int) -> Tensor:
    """[B] the smallest difference that decided which continuations were kept."""
    values, is_end = candidates.log_probability, candidates.is_end
    going_on = values.masked_fill(is_end, -torch.inf).sort(dim=1, descending=True).values
    margin = torch.full_like(values[:, 0], torch.inf)
    if values.shape[1] <= width:
        return margin
    gap = going_on[:, width - 1] - going_on[:, width]
    margin = torch.where(going_on[:, width] > -torch.inf, gap, margin)
    at_border = is_end[:, width - 1] | is_end[:, width]
    border = values[:, width - 1] - values[:, width]
    return torch.where(at_border & (values[:, width] > -torch.inf), torch.minimum(margin, border), margin)


def _collect(
    results: list[list[Hypothesis]],
    sources: Tensor,
    ended: Tensor,
    live: _Live,
    finished: _Finished,
    smallest: Tensor,
    length: int,
    alpha: float,
) -> None:
    """Writes the outputs of the sources that end at this step into `results`."""
    if bool(live.log_probability[ended].isnan().any()) or bool(finished.score[ended].isnan().any()):
        raise TrilemmaError(NOT_A_NUMBER)
    done, open_ = _keep_finished(finished, ended), _keep_live(live, ended)
    wanted = done.score.shape[1]
    for row, (source, margin) in enumerate(zip(sources[ended.cpu()].tolist(), smallest[ended].tolist(), strict=True)):
        outputs = results[source]
        for score, total, count, tokens in zip(
            done.score[row].tolist(),
            done.log_probability[row].tolist(),
            done.length[row].tolist(),
            done.history[row].tolist(),
            strict=True,
        ):
            if score > -torch.inf:
                outputs.append(Hypothesis(tokens[: count - 1], total, score, True, margin))
        totals, histories = open_.log_probability[row].tolist(), open_.history[row].tolist()
        for total, tokens in list(zip(totals, histories, strict=True))[: wanted - len(outputs)]:
            if total > -torch.inf:
                outputs.append(Hypothesis(tokens, total, total / length_penalty(length, alpha), False, margin))


def _no_finished(batch: int, n_best: int, dtype: torch.dtype, device: torch.device) -> _Finished:
    nothing = torch.full((batch, n_best), -torch.inf, dtype=dtype, device=device)
    history = torch.zeros(batch, n_best, 0, dtype=torch.long, device=device)
    return _Finished(history, nothing, nothing, torch.zeros(batch, n_best, dtype=torch.long, device=device))


def _keep_live(live: _Live, keep: Tensor) -> _Live:
    return _Live(live.history[keep], live.log_probability[keep])


def _keep_finished(finished: _Finished, keep: Tensor) -> _Finished:
    return _Finished(
        finished.history[keep], finished.log_probability[keep], finished.score[keep], finished.length[keep]
    )


def _is_identity(rows: Tensor, size: int) -> bool:
    """Whether `select(rows)` would change nothing, as is usual for a beam of 1."""
    return len(rows) == size and bool((rows == torch.arange(size, device=rows.device)).all())
