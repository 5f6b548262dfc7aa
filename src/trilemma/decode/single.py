"""Greedy decoding and sampling: one hypothesis a row, batched, over `prefill`, `step` and `State.select` alone."""

from __future__ import annotations

import torch
from torch import Tensor

from trilemma.config import DecodingConfig
from trilemma.decode.batching import DecodingBatch
from trilemma.decode.hypothesis import NOT_A_NUMBER, Hypothesis, StateType, StepModel, length_penalty
from trilemma.decode.rules import Rules
from trilemma.decode.sampling import draw, uniform
from trilemma.errors import TrilemmaError

# Finished rows are dropped once they are this part of the batch: dropping copies the states of the others.
_DROP_FRACTION = 0.25


@torch.no_grad()
def decode_single(
    model: StepModel[StateType],
    batch: DecodingBatch,
    config: DecodingConfig,
    eos: int,
    pad: int,
    margins: bool = False,
    unk: int | None = None,
) -> list[list[Hypothesis]]:
    """Greedy decoding, or `config.n_best` independent samples of each input.

    A row ends with end-of-sequence or at its limit. Log-probabilities are the model's own, whatever the temperature and
    the filters. Samples of one input are returned best score first.

    Returns:
        One list of hypotheses for each input of the batch.

    Raises:
        TrilemmaError: the model's output is not a number.
    """
    copies = config.n_best if config.method == "sample" else 1
    rules = Rules.of(config, batch, eos, unk)
    logits, state = model.prefill(
        batch.inputs,
        batch.lengths,
        source=batch.source,
        source_lengths=batch.source_lengths,
        prefix=batch.prefix,
    )
    device = logits.device
    rows = torch.arange(batch.size * copies)
    if copies > 1:
        state = state.select((rows // copies).to(device))
        logits = logits.repeat_interleave(copies, dim=0)
    limits = batch.limits.repeat_interleave(copies)
    history = torch.full((len(rows), int(limits.max())), pad)
    totals = torch.zeros(len(rows), dtype=torch.float64)
    smallest = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    ended = torch.zeros(len(rows), dtype=torch.bool)  # by end-of-sequence
    produced = torch.zeros(len(rows), dtype=torch.long)
    acted = torch.zeros(len(rows), len(rules.keys), dtype=torch.bool)
    for position in range(int(limits.max())):
        allowed = logits
        if rules:
            owners = (rows // copies).to(device)
            allowed, acting = rules.apply(logits, history[rows, :position].to(device), owners)
            stuck = (allowed == -torch.inf).all(-1)
            allowed[:, eos] = torch.where(stuck, logits[:, eos], allowed[:, eos])
        tokens, gaps = _choose(allowed, batch.indices, rows, copies, position, config, margins)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        gains = wide.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1).cpu().double()
        chosen = tokens.cpu()
        active = ~ended[rows]  # rows that are finished but not yet dropped change nothing any more
        at = rows[active]
        if rules:
            acted[at] |= acting.cpu()[active]
        totals[at] += gains[active]
        smallest[at] = torch.minimum(smallest[at], gaps[active])
        ended[at] = chosen[active] == eos
        produced[at] += 1
        history[at, position] = chosen[active]
        at_limit = limits[rows] == position + 1
        finished = ended[rows] | at_limit
        if bool(finished.all()):
            break
        # a row never steps past its own limit: positions and reserved capacity end there
        if bool(at_limit.any()) or int(finished.sum()) >= _DROP_FRACTION * len(rows):
            keep = (~finished).nonzero().squeeze(-1)
            rows = rows[keep]
            keep = keep.to(device)
            state, tokens = state.select(keep), tokens[keep]
        logits, state = model.step(tokens[:, None], state)
        logits = logits[:, -1]
    keys = [rules.acting(row) for row in acted.tolist()]
    return _results(history, produced, totals, smallest, ended, keys, copies, config.length_penalty)


def _choose(
    logits: Tensor,
    indices: Tensor,
    rows: Tensor,
    copies: int,
    position: int,
    config: DecodingConfig,
    margins: bool,
) -> tuple[Tensor, Tensor]:
    """Next token of each row [rows] (on the device), and the margins [rows] of the choice (on the CPU)."""
    if config.method == "sample":
        draws = torch.from_numpy(
            uniform(config.seed, indices[rows // copies].numpy(), (rows % copies).numpy(), position)
        )
        # sampling needs float64, which some devices (mps) have not
        at = torch.device("cpu") if logits.device.type == "mps" else logits.device
        tokens, gaps = draw(logits.to(at), draws.to(at), config.temperature, config.top_k, config.top_p)
        return tokens.to(logits.device), gaps.cpu()
    if not margins:
        return logits.argmax(-1), torch.full((len(rows),), torch.inf, dtype=torch.float64)
    best = logits.topk(min(2, logits.shape[-1]), dim=-1)
    values = best.values.cpu().double()
    gaps = values[:, 0] - values[:, -1]
    return logits.argmax(-1), gaps


def _results(
    history: Tensor,
    produced: Tensor,
    totals: Tensor,
    smallest: Tensor,
    ended: Tensor,
    acted: list[tuple[str, ...]],
    copies: int,
    alpha: float,
) -> list[list[Hypothesis]]:
    if not bool(totals.isfinite().all()):
        raise TrilemmaError(NOT_A_NUMBER)
    outputs: list[list[Hypothesis]] = []
    for row, (length, total, gap, done) in enumerate(
        zip(produced.tolist(), totals.tolist(), smallest.tolist(), ended.tolist(), strict=True)
    ):
        tokens = history[row, : length - int(done)].tolist()
        hypothesis = Hypothesis(tokens, total, total / length_penalty(length, alpha), done, gap, acted[row])
        if row % copies == 0:
            outputs.append([])
        outputs[-1].append(hypothesis)
    for group in outputs:
        group.sort(key=lambda hypothesis: -hypothesis.score)
    return outputs
