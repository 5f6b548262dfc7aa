"""The decayed scan: S_t = exp(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, per head.

The common core of RetNet (arXiv 2307.08621, constant a), gated RetNet, Mamba-2's SSD (arXiv 2405.21060) and
scalar-gated linear attention. Three forms that give the same answer: naive (the recurrence as written), chunkwise
(parallel within chunks, a State between them; memory grows linearly with length), and one step.

Legend: B rows, H heads, L length, N chunks, C chunk size, E key dimension, F value dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilemma.ops.truth import TruthPair, drawn_integer, drawn_normal, drawn_uniform


def decayed_scan_naive(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the reference for the other forms.

    Args:
        q, k: [B, H, L, E]. v: [B, H, L, F].
        log_decay: [B or 1, H, L] or [1, H, 1], <= 0.
        state: [B, H, E, F], or None for zeros.

    Returns:
        o [B, H, L, F] and the last state.
    """
    batch, heads, length, width = k.shape
    s = torch.zeros(batch, heads, width, v.shape[-1], dtype=v.dtype, device=v.device) if state is None else state
    decay = log_decay.exp().expand(-1, -1, length)
    outs = []
    for t in range(length):
        s = decay[:, :, t, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, None, :] @ s)[:, :, 0])
    return torch.stack(outs, dim=2), s


def decayed_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = 64,
    want_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Chunkwise form, any length, any chunk size.

    Args:
        q, k, v, log_decay, state: as in `decayed_scan_naive`. At padding, k and log_decay must be zero.
        starts: [B, L] True where a packed sequence begins: nothing crosses it.
        chunk_size: C.
        want_state: whether the last state is needed.

    Returns:
        o [B, H, L, F]; the last state (float32 at least), or None.
    """
    length = k.shape[2]
    if length == 1 and starts is None and state is not None:
        return decayed_step(q, k, v, log_decay, state)
    size = min(chunk_size, length)
    chunks = -(-length // size)
    rest = chunks * size - length
    constant = log_decay.shape[2] == 1 and length > 1
    if rest:
        q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, rest)) for t in (q, k, v))
        if not constant:
            log_decay = torch.nn.functional.pad(log_decay, (0, rest))
    q, k, v = (t.unflatten(2, (chunks, size)) for t in (q, k, v))  # [B, H, N, C, *]
    precise = torch.promote_types(log_decay.dtype, torch.float32)
    if constant:  # one pattern for all chunks; the padded tail only makes the last state older, mended below
        g = log_decay.to(precise) * torch.arange(1, size + 1, device=q.device)
        g = g[:, :, None]  # [1, H, 1, C]
    else:
        g = log_decay.to(precise).unflatten(2, (chunks, size)).cumsum(-1)  # [B or 1, H, N, C]
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    within = (g[..., :, None] - g[..., None, :]).masked_fill(~lower, -torch.inf).exp()  # [., H, ., C, C]
    resets = _resets(starts, chunks, size, rest) if starts is not None else None  # [B, 1, N, C]
    if resets is not None:
        within = within * (resets[..., :, None] == resets[..., None, :])
    out = ((q @ k.transpose(-1, -2)) * within.to(q.dtype)) @ v
    if chunks == 1 and state is None and not want_state:
        return out.flatten(2, 3)[:, :, :length], None
    last = g[..., -1]  # [., H, .]
    to_end = (last[..., None] - g).exp()  # decay from a token to its chunk's end
    from_begin = g.exp()
    carry = last.exp()
    if rest and constant:  # the last chunk is shorter: its end comes sooner
        to_end, carry = _shorter_last(to_end, carry, log_decay.to(precise), g, chunks, size - rest)
    if resets is not None:
        to_end = to_end * (resets == resets[..., -1:])
        from_begin = from_begin * (resets == 0)
        carry = carry * (resets[..., -1] == 0)
    added = ((k * to_end[..., None].to(k.dtype)).transpose(-1, -2) @ v).to(precise)  # [B, H, N, E, F]
    before, final = _carried(added, carry.expand(-1, -1, chunks), state)
    out = out + (q * from_begin[..., None].to(q.dtype)) @ before.to(q.dtype)
    return out.flatten(2, 3)[:, :, :length], final


def decayed_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token; arguments as in `decayed_scan` with L = 1. In place on `state` when autograd is off."""
    decay = log_decay.to(state.dtype).exp()[..., None]  # [., H, 1, 1]
    k_e1 = k.transpose(-1, -2).to(state.dtype)
    if torch.is_grad_enabled():
        state = decay * state + k_e1 * v.to(state.dtype)
    else:
        state.mul_(decay).addcmul_(k_e1, v.to(state.dtype))
    with torch.autocast(q.device.type, enabled=False):  # the State is read in its own precision
        return (q.to(state.dtype) @ state).to(v.dtype), state


def _carried(added: Tensor, carry: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """State before each chunk [B, H, N, E, F] and after the last, from each chunk's own part and its decay."""
    current = torch.zeros_like(added[:, :, 0]) if state is None else state.to(added.dtype)
    before = []
    for n in range(added.shape[2]):
        before.append(current)
        current = torch.addcmul(added[:, :, n], carry[:, :, n, None, None], current)
    return torch.stack(before, dim=2), current


def _shorter_last(
    to_end: Tensor, carry: Tensor, log_decay: Tensor, g: Tensor, chunks: int, kept: int
) -> tuple[Tensor, Tensor]:
    """Constant decay, padded last chunk: its end is token `kept`, not token C."""
    end = log_decay[:, :, None] * kept  # [1, H, 1, 1]
    short = (end - g).clamp(max=0).exp()  # beyond `kept` k is zero
    to_end = torch.cat([to_end.expand(-1, -1, chunks - 1, -1), short], dim=2)
    carry = torch.cat([carry.expand(-1, -1, chunks - 1), end[..., 0].exp()], dim=2)
    return to_end, carry


def _resets(starts: Tensor, chunks: int, size: int, rest: int) -> Tensor:
    """[B, 1, N, C] how many packed sequences have begun since the chunk's first token, that one included."""
    padded = torch.nn.functional.pad(starts, (0, rest))
    counts: Tensor = padded.unflatten(1, (chunks, size)).cumsum(-1)
    return counts[:, None]


def _draw(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Constant or per-token decay (also none at all), any length and chunk size, with or without a carried state."""

    def normal(*shape: int) -> Tensor:
        return drawn_normal(generator, dtype, *shape)

    batch, heads, width, wide = (drawn_integer(generator, 1, 3) for _ in range(4))
    length, carried = drawn_integer(generator, 1, 40), drawn_integer(generator, 0, 1) == 1
    constant, strength = drawn_integer(generator, 0, 1) == 1, (0.0, 0.05, 3.0)[drawn_integer(generator, 0, 2)]
    shape = (1, heads, 1) if constant else (batch, heads, length)
    return {
        "q": normal(batch, heads, length, width),
        "k": normal(batch, heads, length, width),
        "v": normal(batch, heads, length, wide),
        "log_decay": -strength * drawn_uniform(generator, dtype, *shape),
        "state": normal(batch, heads, width, wide) if carried else None,
        "chunk_size": (1, 2, 7, 64)[drawn_integer(generator, 0, 3)],
    }


def _naive(chunk_size: int, **given: Any) -> tuple[Tensor, ...]:
    return decayed_scan_naive(**given)


def _fast(**given: Any) -> tuple[Tensor, ...]:
    out, state = decayed_scan(**given, want_state=True)
    assert state is not None
    return out, state


DECAYED_SCAN = TruthPair("decayed_scan", _fast, _naive, _draw)
