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
from functools import partial
from typing import Any

import torch
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
    return _by_chunks(head, hidden, positions[None], targets, partial(_loss, smoothing=smoothing), scale, vocab_size)


def backward_twice(
    head: Head, hidden: Tensor, labels: Tensor, smoothing: float, alpha: float, scale: float, vocab_size: int
) -> Tensor:
    """As `backward`, for rows that ran twice with different dropout (R-Drop, Liang et al. 2021, arXiv 2106.14448).

    With P and Q the two predictions of a scored position and CE its smoothed cross-entropy, the loss is

        (CE(P) + CE(Q)) / 2 + alpha / 4 * (KL(P || Q) + KL(Q || P)),

    which is half of the paper's equations (1) to (3), where the two cross-entropies are added: so alpha is the paper's,
    and the loss is on the scale of one without R-Drop. Both predictions get gradients from both divergences, as in the
    authors' code; label smoothing is in the cross-entropy alone.

    Args:
        hidden: [2 * batch, ..., d_model]: all rows once, then all again in the same order.
        labels: [batch, ...], of the rows once.
        alpha: weight of the divergence; above 0.
    """
    positions, targets = _scored(labels)
    pairs = torch.stack([positions, positions + labels.numel()])
    loss = partial(_loss_of_pairs, smoothing=smoothing, alpha=alpha)
    return _by_chunks(head, hidden, pairs, targets, loss, scale, vocab_size)


def _by_chunks(
    head: Head,
    hidden: Tensor,
    positions: Tensor,
    targets: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    scale: float,
    vocab_size: int,
) -> Tensor:
    """The loss sum over chunks of targets, and its gradients.

    Args:
        positions: [passes, targets] flat places in `hidden` that predict each target.
        loss_of: logits [passes * targets, classes], pass by pass, and targets [targets] -> their loss sum.
    """
    vectors, gradient = hidden.detach().flatten(0, -2), torch.zeros_like(hidden).flatten(0, -2)
    total = torch.zeros((), dtype=_loss_dtype(hidden), device=hidden.device)
    size = max(1, _chunk(vocab_size, hidden) // len(positions))
    for start in range(0, len(targets), size):
        places = positions[:, start : start + size].flatten()
        chunk = vectors.index_select(0, places).requires_grad_()
        loss = loss_of(head(chunk), targets[start : start + size])
        with _plain(hidden):
            (loss * scale).backward()
        assert chunk.grad is not None
        gradient.index_copy_(0, places, chunk.grad)
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
        loss: Tensor = _CrossEntropy.apply(logits.to(_loss_dtype(logits)), targets, smoothing)  # type: ignore[no-untyped-call]
        return loss


class _CrossEntropy(torch.autograd.Function):
    """The summed cross-entropy with label smoothing, from one softmax, which becomes its gradient in place.

    With P = softmax(l), m = max(l) and log sum exp(l) = m - ln max(P), a row's loss is

        (1 - s) (m - l_target) + s (m - mean(l)) - ln max(P),  and its gradient  P - s / classes - (1 - s) onehot.

    torch's own form takes twice as many passes over the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """logits: [tokens, classes]; targets: [tokens] -> a scalar."""
        shares, top = logits.softmax(-1), logits.amax(-1)
        away = top - logits.gather(1, targets[:, None]).squeeze(1)
        if smoothing:
            away = torch.lerp(away, top - logits.mean(-1), smoothing)
        ctx.save_for_backward(shares, targets)
        ctx.smoothing = smoothing
        return (away - shares.amax(-1).log()).sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        """Once only: the softmax is overwritten."""
        gradient, targets = ctx.saved_tensors
        if ctx.smoothing:
            gradient.sub_(ctx.smoothing / gradient.shape[-1])
        right = targets[:, None]
        gradient.scatter_add_(1, right, gradient.new_full(right.shape, ctx.smoothing - 1))
        return gradient.mul_(scale), None, None


def _loss_of_pairs(logits: Tensor, targets: Tensor, smoothing: float, alpha: float) -> Tensor:
    """R-Drop's loss sum; logits: [2 * targets, classes]. KL(P || Q) + KL(Q || P) sums (P - Q) (ln P - ln Q)."""
    with _plain(logits):
        logits = logits.to(_loss_dtype(logits))
        entropy = _loss(logits, targets.repeat(2), smoothing)
        one, two = logits.log_softmax(-1).chunk(2)
        return entropy / 2 + alpha / 4 * ((one.exp() - two.exp()) * (one - two)).sum()


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
