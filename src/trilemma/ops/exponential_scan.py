"""The scan of the mLSTM (Beck et al. 2024, arXiv 2405.04517): a matrix memory with exponential gates and a normaliser.

    S_t = f_t S_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t,  o_t = S_t^T q_t / max(|n_t^T q_t|, 1)

An input gate i = exp(.) has no bound, so S and n are held divided by exp(m_t), with m_t = max(log f_t + m_{t-1},
log i_t) and m_0 = 0. Then no exponent is above zero, and o_t = S_t^T q_t / max(|n_t^T q_t|, exp(-m_t)). The answer does
not depend on m, nor does its gradient: m counts as a constant. n is the last column of the matrix S.

Three forms that give the same answer and the same State: naive, chunkwise (parallel within chunks, a State between
them; memory grows linearly with length), and one step.

Legend: B rows, H heads, L length, N chunks, C chunk size, E key dimension, F value dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilemma.ops.mixing import mixes
from trilemma.ops.truth import TruthPair, drawn_integer, drawn_normal, drawn_uniform

_LIMIT = 60.0  # on |m| where exp(-m) is taken: beyond it, single precision holds neither exp(-m) nor its square

Memory = tuple[Tensor, Tensor]  # the matrix [B, H, E, F + 1] and its m [B, H]


def exponential_scan_naive(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, state: Memory | None = None
) -> tuple[Tensor, Memory]:
    """The recurrence, token by token: the reference for `exponential_scan`, whose arguments it takes."""
    matrix, m = empty_memory(k, v) if state is None else state
    outs = []
    for t in range(k.shape[2]):
        kept = log_forget[:, :, t] + m.detach()
        m = torch.maximum(kept, log_input[:, :, t]).detach()
        matrix = (kept - m).exp()[..., None, None] * matrix
        added = k[:, :, t, :, None] * with_ones(v)[:, :, t, None, :]
        matrix = matrix + (log_input[:, :, t] - m).exp()[..., None, None] * added
        outs.append(_normalised((q[:, :, t, None, :] @ matrix)[:, :, 0], m))
    return torch.stack(outs, dim=2), (matrix, m)


@mixes("v")
def exponential_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    state: Memory | None = None,
    starts: Tensor | None = None,
    chunk_size: int = 64,
    want_state: bool = False,
) -> tuple[Tensor, Memory | None]:
    """Chunkwise form, any length, any chunk size.

    Args:
        q, k: [B, H, L, E]. v: [B, H, L, F].
        log_input: [B, H, L]; -inf at padding.
        log_forget: [B, H, L], <= 0; 0 at padding.
        state: what an earlier call left, or None for nothing.
        starts: [B, L] True where a packed sequence begins: nothing crosses it.
        chunk_size: C.
        want_state: whether the last state is needed.

    Returns:
        o [B, H, L, F]; the last state (float32 at least), or None.
    """
    length = k.shape[2]
    if length == 1:
        return exponential_step(q, k, v, log_input, log_forget, empty_memory(k, v) if state is None else state)
    size = min(chunk_size, length)
    chunks = -(-length // size)
    rest = chunks * size - length
    precise = torch.promote_types(log_forget.dtype, torch.float32)
    matrix, m = empty_memory(k, v) if state is None else (part.to(precise) for part in state)
    v = with_ones(v)
    log_input, log_forget = log_input.to(precise), log_forget.to(precise)
    if rest:
        q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, rest)) for t in (q, k, v))
        log_input = torch.nn.functional.pad(log_input, (0, rest), value=-torch.inf)
        log_forget = torch.nn.functional.pad(log_forget, (0, rest))
    q, k, v = (t.unflatten(2, (chunks, size)) for t in (q, k, v))  # [B, H, N, C, *]
    g = log_forget.unflatten(2, (chunks, size)).cumsum(-1)
    seen = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    fresh = None
    if starts is not None:  # number of the packed sequence, counted within the chunk
        number = torch.nn.functional.pad(starts, (0, rest)).unflatten(1, (chunks, size)).cumsum(-1)[:, None]
        seen, fresh = seen & (number[..., :, None] == number[..., None, :]), number > 0
    # log of each token's weight for each later one, before division by exp(m)
    weight = g[..., :, None] + (log_input.unflatten(2, (chunks, size)) - g)[..., None, :]
    weight = weight.masked_fill(~seen, -torch.inf)
    before, m_each, m = _maxima(weight.detach().amax(-1), g.detach(), m.detach(), fresh)
    within = (weight - m_each[..., None]).exp()  # [B, H, N, C, C]
    read = ((q @ k.transpose(-1, -2)) * within.to(q.dtype)) @ v
    if chunks > 1 or state is not None or want_state:
        from_begin = g + before[..., None] - m_each
        from_begin = (from_begin if fresh is None else from_begin.masked_fill(fresh, -torch.inf)).exp()
        added = ((k * within[..., -1, :, None].to(k.dtype)).transpose(-1, -2) @ v).to(precise)  # [B, H, N, E, F + 1]
        matrices, matrix = _carried(added, from_begin[..., -1], matrix)
        read = read + (q * from_begin[..., None].to(q.dtype)) @ matrices.to(q.dtype)
    out = _normalised(read, m_each).flatten(2, 3)[:, :, :length]
    return out, (matrix, m) if want_state else None


def exponential_step(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, state: Memory
) -> tuple[Tensor, Memory]:
    """One token; arguments as in `exponential_scan` with L = 1. In place on `state` when autograd is off."""
    matrix, m = state
    kept = log_forget[..., 0].to(m.dtype) + m.detach()
    entering = log_input[..., 0].to(m.dtype)
    peak = torch.maximum(kept, entering).detach()
    kept, entering = (kept - peak).exp()[..., None, None], (entering - peak).exp()[..., None, None]
    added = (k.to(matrix.dtype) * entering).transpose(-1, -2) * with_ones(v).to(matrix.dtype)
    if torch.is_grad_enabled():
        matrix, m = kept * matrix + added, peak
    else:
        matrix.mul_(kept).add_(added)
        m.copy_(peak)
    with torch.autocast(q.device.type, enabled=False):  # the State is read in its own precision
        read = q.to(matrix.dtype) @ matrix
    return _normalised(read, m[..., None]).to(v.dtype), (matrix, m)


def empty_memory(k: Tensor, v: Tensor) -> Memory:
    """Zeros, float32 at least."""
    (batch, heads, _, width), precise = k.shape, torch.promote_types(k.dtype, torch.float32)
    matrix = torch.zeros(batch, heads, width, v.shape[-1] + 1, dtype=precise, device=k.device)
    return matrix, matrix.new_zeros(batch, heads)


def with_ones(v: Tensor) -> Tensor:
    """v [..., F] with one more value, constantly 1: what it collects is the normaliser."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def _normalised(read: Tensor, m: Tensor) -> Tensor:
    """[..., F + 1] -> [..., F], in read's type."""
    floor = (-m).clamp(-_LIMIT, _LIMIT).exp()[..., None]
    return (read[..., :-1] / torch.maximum(read[..., -1:].to(m.dtype).abs(), floor)).to(read.dtype)


def _maxima(peaks: Tensor, g: Tensor, m: Tensor, fresh: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """m before each chunk [B, H, N], after each token [B, H, N, C], and after the last chunk [B, H].

    `peaks` [B, H, N, C] is the largest log weight that a token of the same chunk has. A packed sequence that begins
    within a chunk (`fresh`) starts from m = 0.
    """
    before = []
    for n in range(peaks.shape[2]):
        before.append(m)
        kept = g[:, :, n, -1] + m
        m = torch.maximum(peaks[:, :, n, -1], kept if fresh is None else kept.masked_fill(fresh[:, :, n, -1], 0))
    befores = torch.stack(before, dim=2)
    kept = g + befores[..., None]
    return befores, torch.maximum(peaks, kept if fresh is None else kept.masked_fill(fresh, 0)), m


def _carried(added: Tensor, carry: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix before each chunk [B, H, N, E, F + 1] and after the last, from each chunk's own part and its decay."""
    before = []
    for new, kept in zip(added.unbind(2), carry[..., None, None].unbind(2), strict=True):
        before.append(matrix)
        matrix = torch.addcmul(new, kept, matrix)
    return torch.stack(before, dim=2), matrix


def _draw(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Any length and chunk size; gates mild, wide open and shut; with or without a carried state.

    Keys are positive and the coordinates of a query have one sign, so that the normaliser n^T q stays away from zero,
    where gradients grow without bound and no two orders of summation agree.
    """
    batch, heads, width, wide = (drawn_integer(generator, 1, 3) for _ in range(4))
    length, carried = drawn_integer(generator, 1, 40), drawn_integer(generator, 0, 1) == 1
    strength, offset = (0.1, 3.0, 20.0)[drawn_integer(generator, 0, 2)], drawn_integer(generator, -8, 8)
    sign = drawn_normal(generator, dtype, batch, heads, length, 1).sign()
    return {
        "q": sign * (drawn_uniform(generator, dtype, batch, heads, length, width) + 0.2),
        "k": drawn_uniform(generator, dtype, batch, heads, length, width) + 0.2,
        "v": drawn_normal(generator, dtype, batch, heads, length, wide),
        "log_input": strength * drawn_normal(generator, dtype, batch, heads, length) + offset,
        "log_forget": -strength * drawn_uniform(generator, dtype, batch, heads, length),
        "matrix": drawn_uniform(generator, dtype, batch, heads, width, wide + 1) if carried else None,
        "m": drawn_normal(generator, dtype, batch, heads) if carried else None,
        "chunk_size": (1, 2, 7, 64)[drawn_integer(generator, 0, 3)],
    }


def _naive(matrix: Tensor | None, m: Tensor | None, chunk_size: int, **given: Any) -> tuple[Tensor, ...]:
    out, (matrix, m) = exponential_scan_naive(**given, state=_memory(matrix, m))
    return out, matrix, m


def _fast(matrix: Tensor | None, m: Tensor | None, **given: Any) -> tuple[Tensor, ...]:
    out, after = exponential_scan(**given, state=_memory(matrix, m), want_state=True)
    assert after is not None
    return out, *after


def _memory(matrix: Tensor | None, m: Tensor | None) -> Memory | None:
    return None if matrix is None or m is None else (matrix, m)


EXPONENTIAL_SCAN = TruthPair("exponential_scan", _fast, _naive, _draw)
