"""The loss: cross-entropy with label smoothing, summed over scored tokens, without ever holding all logits.

The head runs over chunks of scored positions only. Each chunk's logits are freed by its own backward pass, which is
exact and recomputes nothing: gradients of the hidden vectors are collected and sent through the model once.
Chunks also stay in the processor's caches: at a vocabulary of 8,192 on a CPU, chunks of 8 MB take half the time of the
whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from trilemma.data import IGNORE, Batch
from trilemma.measure.spans import span_log_probabilities

_LOGIT_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}

Head = Callable[[Tensor], Tensor]


def backward(head: Head, hidden: Tensor, labels: Tensor, smoothing: float, scale: float, vocab_size: int) -> Tensor:
    """Adds the gradients of `scale` times the loss sum; returns the loss sum (a scalar without a graph).

    Label smoothing moves `smoothing` of the target's probability evenly to all classes, the target included (Szegedy et
    al. 2016, as in Attention Is All You Need). Positions labelled IGNORE count nowhere.

    Args:
        head: hidden [tokens, d_model] -> logits [tokens, classes].
        hidden: [..., d_model], with a graph.
        labels: hidden's shape without the last axis.
        smoothing: in [0, 1).
        scale: factor of the gradients, 1 / (target tokens of the whole optimizer step).
        vocab_size: classes, for the size of a chunk.
    """
    positions, targets = _scored(labels)
    vectors = hidden.detach().flatten(0, -2).index_select(0, positions)
    gradient = torch.zeros_like(hidden).flatten(0, -2)
    total = torch.zeros((), dtype=_loss_dtype(hidden), device=hidden.device)
    size = _chunk(vocab_size, hidden)
    for start in range(0, len(targets), size):
        chunk = vectors[start : start + size].requires_grad_()
        loss = _loss(head(chunk), targets[start : start + size], smoothing)
        with _plain(hidden):
            (loss * scale).backward()
        assert chunk.grad is not None
        gradient.index_copy_(0, positions[start : start + size], chunk.grad)
        total += loss.detach()
    with _plain(hidden):
        hidden.backward(gradient.view_as(hidden))
    return total


@torch.no_grad()
def evaluate(head: Head, hidden: Tensor, labels: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Over the scored positions: the sum of the cross-entropy, in nats, without smoothing; and how many labels are the
    likeliest class."""
    positions, targets = _scored(labels)
    vectors = hidden.flatten(0, -2).index_select(0, positions)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    hits = torch.zeros((), dtype=torch.int64, device=hidden.device)
    size = _chunk(vocab_size, hidden)
    for start in range(0, len(targets), size):
        logits, wanted = head(vectors[start : start + size]), targets[start : start + size]
        total += _loss(logits, wanted, 0.0)
        hits += (logits.argmax(-1) == wanted).sum()
    return total, hits


def backward_spans(head: Head, hidden: Tensor, batch: Batch, scale: float) -> Tensor:
    """As `backward`, for the first and the last place of answers: the mean of the two cross-entropies over places
    (Devlin et al. 2019, "BERT", section 4.2). Place 0 stands for "not in this window".

    Args:
        hidden: [batch, length, d_model], with a graph. batch: of questions, on hidden's device.
    """
    loss = _span_loss(head, hidden, batch)[0]
    with _plain(hidden):
        (loss * scale).backward()
    return loss.detach()


@torch.no_grad()
def evaluate_spans(head: Head, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """As `evaluate`: the sum of the losses, and how many rows have both places right."""
    loss, scores = _span_loss(head, hidden, batch)
    return loss.double(), (scores.argmax(1) == batch.labels).all(1).sum()


def _span_loss(head: Head, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss sum, and log-probabilities [batch, length, 2]."""
    assert batch.prefix is not None
    logits = head(hidden)
    with _plain(logits):
        scores = span_log_probabilities(logits.to(_loss_dtype(logits)), batch.prefix, batch.lengths)
        return -scores.gather(1, batch.labels[:, None]).sum() / 2, scores


def _loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    with _plain(logits):
        logits = logits.to(_loss_dtype(logits))
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)


def _scored(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions that are scored, and their labels."""
    flat = labels.flatten()
    positions = (flat != IGNORE).nonzero().squeeze(1)
    return positions, flat.index_select(0, positions)


def _chunk(vocab_size: int, hidden: Tensor) -> int:
    return max(16, _LOGIT_BYTES.get(hidden.device.type, 64 << 20) // (4 * vocab_size))


def _loss_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _plain(tensor: Tensor) -> AbstractContextManager[object]:
    """Without autocast: backward passes take the types that forward chose, and the loss is float32."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
