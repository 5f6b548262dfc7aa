"""Forced decoding: what probability a model gives to a text that is there already.

Sums are kept in float64 and per text: neither the batch nor the order moves a score beyond the model's own rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trilemma.decode import AnyModel, Request, collate, plan_batches, require_numbers

# Logits of one piece of the head's work: small pieces stay in the processor's caches.
_LOGITS_PER_CHUNK = 1 << 22


@dataclass(frozen=True)
class ForcedScore:
    """What a model makes of a given text.

    Attributes:
        log_probability: natural, of the text and end-of-sequence.
        tokens: how many that are, end-of-sequence counted.
        score: log-probability over the length penalty, as of a generated text.
        token_log_probabilities: of each token, in order; `pieces`: the tokens as text, "<eos>" last.
        unknown: tokens that stand for text which the vocabulary does not have; the probability is not that text's.
    """

    log_probability: float
    tokens: int
    score: float
    token_log_probabilities: list[float]
    pieces: list[str]
    unknown: int = 0


def forced_nats(
    model: AnyModel,
    contexts: Sequence[Request],
    targets: Sequence[Sequence[int]],
    *,
    pad: int,
    device: torch.device | str | None = None,
    batch_tokens: int = 8192,
) -> NDArray[np.float64]:
    """Negative log-likelihood of each target after its context, in nats: [texts].

    Arguments are those of `forced_token_nats`, whose sums these are.
    """
    tokens = forced_token_nats(model, contexts, targets, pad=pad, device=device, batch_tokens=batch_tokens)
    return np.array([nats.sum() for nats in tokens], dtype=np.float64)


@torch.no_grad()
def forced_token_nats(
    model: AnyModel,
    contexts: Sequence[Request],
    targets: Sequence[Sequence[int]],
    *,
    pad: int,
    device: torch.device | str | None = None,
    batch_tokens: int = 8192,
) -> list[NDArray[np.float64]]:
    """Negative log-likelihood of each token of each target after its context and the tokens before, in nats.

    Args:
        contexts: what is given and not scored (`Prompts.context`): prompt, source and prefix are read.
        targets: the scored tokens, end-of-sequence included where it counts; at least one each.
        pad: token id. device: where inputs are put. batch_tokens: padded tokens of one batch.

    Returns:
        one array [tokens] a text.
    """
    rows = [
        Request([*context.prompt, *target[:-1]], 1, context.source, context.prefix, index)
        for index, (context, target) in enumerate(zip(contexts, targets, strict=True))
    ]
    results: list[NDArray[np.float64]] = [np.zeros(0)] * len(rows)
    for positions in plan_batches(rows, batch_tokens):
        batch = collate([rows[i] for i in positions], pad, device)
        hidden = model(
            batch.inputs,
            batch.lengths,
            source=batch.source,
            source_lengths=batch.source_lengths,
            prefix=batch.prefix,
        )
        length = batch.inputs.shape[1]
        starts = [row * length + len(contexts[i].prompt) - 1 for row, i in enumerate(positions)]
        where = np.concatenate([start + np.arange(len(targets[i])) for start, i in zip(starts, positions, strict=True)])
        labels = np.concatenate([np.asarray(targets[i], dtype=np.int64) for i in positions])
        nats = _nats(model, hidden, torch.from_numpy(where), torch.from_numpy(labels)).numpy()
        borders = np.cumsum([len(targets[i]) for i in positions])[:-1]
        for i, part in zip(positions, np.split(nats, borders), strict=True):
            results[i] = part
    return results


def _nats(model: AnyModel, hidden: Tensor, where: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of `labels` at the places `where` of the flattened batch; float64, on the CPU."""
    vectors = hidden.flatten(0, 1).index_select(0, where.to(hidden.device))
    assert model.config.vocab_size is not None
    size = max(1, _LOGITS_PER_CHUNK // model.config.vocab_size)
    parts = []
    for start in range(0, len(labels), size):
        logits = model.head(vectors[start : start + size])
        wide = logits if logits.dtype == torch.float64 else logits.float()
        parts.append(F.cross_entropy(wide, labels[start : start + size].to(wide.device), reduction="none"))
    return require_numbers(torch.cat(parts).cpu().double())
