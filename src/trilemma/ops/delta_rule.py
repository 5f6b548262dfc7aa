"""The delta rule: each token corrects what the State recalls for its key, per head, with an optional scalar decay.

    S_t = exp(a_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,   o_t = S_t^T q_t

DeltaNet (arXiv 2406.06484) has a = 0, Gated DeltaNet (arXiv 2412.06464) a < 0. Three forms that give the same answer:
naive (the recurrence as written), chunkwise (the WY representation in its UT form; memory grows linearly with length),
and one step. In a chunk that begins with S, with g the running sum of a and G_rs = exp(g_r - g_s) for r >= s, else 0:

    A = strictly lower part of diag(b) (G * K K^T),   T = (I + A)^-1 diag(b)
    U = T V,   W = T diag(exp g) K                    U - W S is what the tokens write
    P = G * Q K^T,   R = diag(exp(g_C - g)) K
    O = P U + (diag(exp g) Q - P W) S
    S' = (exp(g_C) I - R^T W) S + R^T U

Both products of keys and of queries with keys bear the decay G, whose exponents are never positive. S' is linear in S:
one matrix product a chunk carries the State on.

Legend: B rows, H heads, L length, N chunks, C chunk size, E key dimension, F value dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilemma.ops.dispatch import served
from trilemma.ops.mixing import mixes
from trilemma.ops.triangular import unit_lower_inverse, unit_lower_inverse_flops
from trilemma.ops.truth import TruthPair, drawn_integer, drawn_normal, drawn_uniform

# A log decay below this forgets all there is, in float64 too; differences of running sums keep their precision.
_CLOSED = -50.0


def delta_rule_naive(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the reference for the other forms.

    Args:
        q, k: [B, H, L, E]. v: [B, H, L, F].
        beta: [B, H, L] b, the part of the correction that is written.
        log_decay: [B, H, L] a, <= 0, or None for no decay.
        state: [B, H, E, F], or None for zeros.

    Returns:
        o [B, H, L, F] and the last state.
    """
    s = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state
    outs = []
    for t in range(k.shape[2]):
        if log_decay is not None:
            s = log_decay[:, :, t, None, None].exp() * s
        recalled = k[:, :, t, None, :] @ s
        written = beta[:, :, t, None, None] * (v[:, :, t, None, :] - recalled)
        s = s + k[:, :, t, :, None] * written
        outs.append((q[:, :, t, None, :] @ s)[:, :, 0])
    return torch.stack(outs, dim=2), s


@mixes("v")
@served("delta_rule")
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = 64,
    want_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Chunkwise form, any length, any chunk size.

    Decays, inverses and the State are in float32 at least; other products in v's type. In bfloat16 that is sound while
    k has norm 1 and beta is at most 1: what is written is then bounded by what is read. Beyond, where a token turns the
    State around, rounding grows with each turn: give v in float32.

    Args:
        q, k, v, beta, log_decay, state: as in `delta_rule_naive`. At padding, beta and log_decay must be zero.
        starts: [B, L] True where a packed sequence begins: nothing crosses it.
        chunk_size: C.
        want_state: whether the last state is needed.

    Returns:
        o [B, H, L, F] in v's type; the last state (float32 at least), or None.
    """
    length, width = k.shape[2:]
    if length == 1 and starts is None and state is not None:
        return delta_rule_step(q, k, v, beta, log_decay, state)
    with torch.autocast(q.device.type, enabled=False):
        size, kind, precise = min(chunk_size, length), v.dtype, torch.promote_types(v.dtype, torch.float32)
        if log_decay is None:
            log_decay = torch.zeros(1, 1, length, dtype=precise, device=k.device)
        queries, keys, values = (_chunks(t.to(kind), size) for t in (q, k, v))  # [B, H, N, C, *]
        beta = _chunks(beta.to(precise), size)  # [B, H, N, C]
        g = _chunks(log_decay.to(precise).clamp(min=_CLOSED), size).cumsum(-1)
        from_begin, to_end, carry = g.exp(), (g[..., -1:] - g).exp(), g[..., -1].exp()
        later = torch.full((size, size), -torch.inf, dtype=precise, device=k.device).triu(1)
        within = (g[..., :, None] - g[..., None, :]).add_(later).exp_()  # [B, H, N, C, C]
        if starts is not None:
            begun = _chunks(starts[:, None], size).cumsum(-1)  # [B, 1, N, C] sequences since the chunk's begin
            within = within * (begun[..., :, None] == begun[..., None, :])
            from_begin, to_end = from_begin * (begun == 0), to_end * (begun == begun[..., -1:])
            carry = carry * (begun[..., -1] == 0)
        across = keys.transpose(-1, -2).contiguous()
        weighted = keys * beta[..., None].to(kind)
        inverse = unit_lower_inverse((weighted @ across).to(precise) * within).to(kind)
        scores = (queries @ across) * within.to(kind)
        wanted = inverse @ (values * beta[..., None].to(kind))
        out = scores @ wanted
        if out.shape[2] == 1 and state is None and not want_state:
            return _tokens(out, length), None
        erased = inverse @ (weighted * from_begin[..., None].to(kind))
        ending = across * to_end[..., None, :].to(kind)
        unchanged = torch.eye(width, dtype=precise, device=k.device) * carry[..., None, None]
        before, final = _carried(unchanged - ending @ erased, (ending @ wanted).to(precise), state)
        out = out + (queries * from_begin[..., None].to(kind) - scores @ erased) @ before.to(kind)
        return _tokens(out, length), final


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token; arguments as in `delta_rule` with L = 1. In place on `state` when autograd is off."""
    kind = state.dtype
    decay = None if log_decay is None else log_decay.to(kind).exp()[..., None]  # [B, H, 1, 1]
    k = k.to(kind)
    with torch.autocast(q.device.type, enabled=False):
        if torch.is_grad_enabled():
            state = state if decay is None else decay * state
            written = beta.to(kind)[..., None] * (v.to(kind) - k @ state)
            state = torch.addcmul(state, k.transpose(-1, -2), written)
        else:
            state = state if decay is None else state.mul_(decay)
            written = beta.to(kind)[..., None] * (v.to(kind) - k @ state)
            state.addcmul_(k.transpose(-1, -2), written)
        return (q.to(kind) @ state).to(v.dtype), state


def delta_rule_flops(length: int, key_dim: int, value_dim: int, chunk_size: int, carried: bool) -> int:
    """FLOPs of the matrix products that `delta_rule` executes for one head; `carried`: with a state from before."""
    if length == 1 and carried:
        return 4 * key_dim * value_dim
    size = min(chunk_size, length)
    chunks = -(-length // size)
    flops = unit_lower_inverse_flops(size) + 4 * size * size * (key_dim + value_dim)
    if chunks > 1 or carried:
        flops += 4 * size * size * key_dim  # W and P W
        flops += 2 * size * key_dim * (key_dim + 2 * value_dim) + 2 * key_dim * key_dim * value_dim
    return chunks * flops


def _carried(kept: Tensor, added: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """State before each chunk [B, H, N, E, F] and after the last: S' = kept S + added.

    Args:
        kept: [B, H, N, E, E].
        added: [B, H, N, E, F].
        state: [B, H, E, F], or None for zeros.
    """
    batch, heads = added.shape[:2]
    current = torch.zeros_like(added[:, :, 0]) if state is None else state.to(added.dtype)
    current, before = current.flatten(0, 1), []
    for keep, add in zip(kept.flatten(0, 1).unbind(1), added.flatten(0, 1).unbind(1), strict=True):
        before.append(current)
        current = torch.baddbmm(add, keep, current)
    return torch.stack(before, dim=1).unflatten(0, (batch, heads)), current.unflatten(0, (batch, heads))


def _chunks(x: Tensor, size: int) -> Tensor:
    """[B, H, L, ...] -> [B, H, N, C, ...], the last chunk filled up with zeros."""
    rest = -x.shape[2] % size
    if rest:
        x = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 3) + (0, rest))
    chunks: Tensor = x.contiguous().unflatten(2, (-1, size))
    return chunks


def _tokens(x: Tensor, length: int) -> Tensor:
    """[B, H, N, C, F] -> [B, H, L, F]."""
    return x.flatten(2, 3)[:, :, :length]


def _draw(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Keys of norm 1 at most and beta from 0 to 2, so that no State explodes; no decay, a usual or a strong one; any
    length and chunk size; with or without a carried state."""

    def normal(*shape: int) -> Tensor:
        return drawn_normal(generator, dtype, *shape)

    batch, heads, width, wide = (drawn_integer(generator, 1, 3) for _ in range(4))
    length, carried = drawn_integer(generator, 1, 40), drawn_integer(generator, 0, 1) == 1
    decayed, strength = drawn_integer(generator, 0, 1) == 1, (0.05, 3.0)[drawn_integer(generator, 0, 1)]
    decay = -strength * drawn_uniform(generator, dtype, batch, heads, length)
    return {
        "q": normal(batch, heads, length, width),
        "k": torch.nn.functional.normalize(normal(batch, heads, length, width), dim=-1),
        "v": normal(batch, heads, length, wide),
        "beta": 2 * drawn_uniform(generator, dtype, batch, heads, length),
        "log_decay": decay if decayed else None,
        "state": normal(batch, heads, width, wide) if carried else None,
        "chunk_size": (1, 2, 7, 64)[drawn_integer(generator, 0, 3)],
    }


def _naive(chunk_size: int, **given: Any) -> tuple[Tensor, ...]:
    return delta_rule_naive(**given)


def _fast(**given: Any) -> tuple[Tensor, ...]:
    out, state = delta_rule(**given, want_state=True)
    assert state is not None
    return out, state


DELTA_RULE = TruthPair("delta_rule", _fast, _naive, _draw)
