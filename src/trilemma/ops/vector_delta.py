"""The delta rule with a decay for each key channel, and what it is a case of, per head:

    S_t = Diag(a_t) S_{t-1} - p_t u_t^T + k_t v_t^T,   u_t = (Diag(a_t) S_{t-1})^T r_t,   o_t = S_t^T q_t

A token reads the decayed State at r, erases what it found along p and writes v along k. Where p is k, what is written
is the difference v - u: Kimi delta attention (arXiv 2510.26692) and Gated DeltaNet-2 (arXiv 2605.22791). RWKV-7 (arXiv
2503.14456) has a p of its own.

In a chunk that begins with S, products with the decays between two tokens (see `vector_decay`) written (X|Y), w = -u
where p is not k, else w = v - u:

    A = strictly lower part of (r|p),   T = (I + A)^-1
    w = Y - Z S,   Y = T v  or  -T (strictly lower part of (r|k)) v,   Z = T r~
    o = (q|p) w + (q|k) v + q~ S                              without (q|k) v where p is k
    S' = Diag(total) S + p^^T w + k^^T v                      without k^^T v where p is k

x~ is x times the decay since the chunk's begin, y^ is y times the decay to its end. Both w and S' are linear in S, so
that one matrix product a chunk carries the State on.

Legend: B rows, H heads, L length, N chunks, C chunk size (a power of two), E key dimension, F value dimension, M = BHN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilemma.ops.dispatch import served
from trilemma.ops.mixing import mixes
from trilemma.ops.triangular import unit_lower_inverse, unit_lower_inverse_flops
from trilemma.ops.truth import TruthPair, drawn_integer, drawn_uniform
from trilemma.ops.vector_decay import (
    Chunks,
    chunk_shape,
    decayed_products,
    decayed_products_flops,
    drawn_scan,
    empty_matrix,
)


def vector_delta_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    r: Tensor,
    p: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the reference for the other forms.

    Args:
        q, k, r: [B, H, L, E]. v: [B, H, L, F].
        log_decay: [B, H, L, E] log(a), <= 0.
        p: [B, H, L, E]; None: k.
        state: [B, H, E, F], or None for zeros.

    Returns:
        o [B, H, L, F] and the last state.
    """
    s = empty_matrix(k, v) if state is None else state
    p = k if p is None else p
    outs = []
    for t in range(k.shape[2]):
        s = log_decay[:, :, t, :, None].exp() * s
        found = r[:, :, t, None, :] @ s
        s = s - p[:, :, t, :, None] * found + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, None, :] @ s)[:, :, 0])
    return torch.stack(outs, dim=2), s


@mixes("v")
@served("vector_delta")
def vector_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    r: Tensor,
    p: Tensor | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = 64,
    want_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Chunkwise form, any length, in float32 at least.

    Args:
        q, k, v, log_decay, r, p, state: as in `vector_delta_naive`. At padding, k, p and log_decay must be zero.
        starts: [B, L] True where a packed sequence begins: nothing crosses it.
        chunk_size: rounded up to a power of two.
        want_state: whether the last state is needed.

    Returns:
        o [B, H, L, F] of v's type; the last state (float32 at least), or None.
    """
    if k.shape[2] == 1:
        return vector_delta_step(q, k, v, log_decay, r, p, empty_matrix(k, v) if state is None else state)
    with torch.autocast(q.device.type, enabled=False):
        cut = Chunks(k, chunk_size)
        v_mcf, decay = cut.split(v), cut.decay(log_decay, starts)
        ys = [cut.split(y) for y in (p, k) if y is not None]
        found = decayed_products([cut.split(r), cut.split(q)], ys, decay)
        (erased, *recalled), (corrected, *direct) = found.products
        inverse = unit_lower_inverse(erased)
        wanted = -(recalled[0].tril(-1) @ v_mcf) if recalled else v_mcf
        whole = cut.count == 1 and state is None and not want_state
        if not whole:
            wanted = torch.cat([wanted, found.from_begin[0]], dim=-1)
        fix = inverse @ wanted  # [M, C, F + E]: Y and Z
        shape = [v_mcf.shape[-1], wanted.shape[-1] - v_mcf.shape[-1]]
        out, read = (corrected @ fix).split(shape, dim=-1)
        for product in direct:
            out = out + product @ v_mcf
        if whole:
            return cut.join(out).to(v.dtype), None
        added, kept = (found.to_end[0].transpose(1, 2) @ fix).split(shape, dim=-1)
        for end in found.to_end[1:]:
            added = added + end.transpose(1, 2) @ v_mcf
        onward = cut.by_row(torch.diag_embed(found.total[:, 0]) - kept)  # S' = onward S + added
        added = cut.by_row(added)
        current = empty_matrix(k, v) if state is None else state.to(added.dtype)
        before = []
        for n in range(cut.count):
            before.append(current)
            current = onward[:, :, n] @ current + added[:, :, n]
        out = out + (found.from_begin[1] - read) @ torch.stack(before, dim=2).flatten(0, 2)
        return cut.join(out).to(v.dtype), current


def vector_delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, r: Tensor, p: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token; arguments as in `vector_delta` with L = 1. In place on `state` when autograd is off."""
    kind = state.dtype
    decay = log_decay.to(kind).exp().transpose(-1, -2)  # [B, H, E, 1]
    k_e1, v_1f = k.transpose(-1, -2).to(kind), v.to(kind)
    with torch.autocast(q.device.type, enabled=False):
        state = decay * state if torch.is_grad_enabled() else state.mul_(decay)
        found = r.to(kind) @ state  # [B, H, 1, F]
        if p is None:
            v_1f = v_1f - found
        if torch.is_grad_enabled():
            state = state + k_e1 * v_1f
        else:
            state.addcmul_(k_e1, v_1f)
        if p is not None:
            p_e1 = p.transpose(-1, -2).to(kind)
            state = state - p_e1 * found if torch.is_grad_enabled() else state.addcmul_(p_e1, found, value=-1)
        return (q.to(kind) @ state).to(v.dtype), state


def vector_delta_flops(
    length: int, key_dim: int, value_dim: int, chunk_size: int, carried: bool, merged: bool = True
) -> int:
    """FLOPs of the matrix products that `vector_delta` executes for one head.

    Args:
        carried: with a state from before.
        merged: p is k.
    """
    if length == 1:
        return 4 * key_dim * value_dim
    size, chunks = chunk_shape(length, chunk_size)
    between = chunks > 1 or carried
    wide = value_dim + (key_dim if between else 0)
    flops = (2 if merged else 4) * decayed_products_flops(size, key_dim) + unit_lower_inverse_flops(size)
    flops += 4 * size * size * wide + (0 if merged else 4 * size * size * value_dim)
    if between:
        flops += 2 * size * key_dim * (wide + (1 if merged else 2) * value_dim)
        flops += 2 * key_dim * key_dim * value_dim
    return chunks * flops


def _draw(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """As for the plain scan; r and p lie along one direction of norm 1, gated from 0 to 1: no State explodes."""
    drawn = drawn_scan(generator, dtype)
    direction = torch.nn.functional.normalize(drawn["k"], dim=-1)
    gates = [drawn_uniform(generator, dtype, *direction.shape) for _ in range(2)]
    merged = drawn_integer(generator, 0, 1) == 1
    erasing = {"k": direction, "p": None} if merged else {"p": direction * gates[1]}
    return drawn | erasing | {"r": direction * gates[0]}


def _naive(chunk_size: int, **given: Any) -> tuple[Tensor, ...]:
    return vector_delta_naive(**given)


def _fast(**given: Any) -> tuple[Tensor, ...]:
    out, state = vector_delta(**given, want_state=True)
    assert state is not None
    return out, state


VECTOR_DELTA = TruthPair("vector_delta", _fast, _naive, _draw)
