"""The decayed scan: S_t = exp(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, per head.

The common core of RetNet (arXiv 2307.08621, constant a), gated RetNet (arXiv 2405.05254), Mamba-2's SSD (arXiv
2405.21060), Mamba-3 (arXiv 2603.15569) and scalar-gated linear attention. Three forms that give the same answer: naive
(the recurrence as written), chunkwise (parallel within chunks, a State between them; memory grows linearly with
length), and one step.

Heads may share queries and keys in groups (Mamba-2's B and C): products with them are then made once for the group. A
token may write and read several times at once (Mamba-3's MIMO): K_t is [R, E], V_t is [R, F] and S gains K_t^T V_t.

Legend: B rows, H heads, G groups of heads, P = H / G, L length, R rank, N chunks, C chunk size, E key dimension, F
value dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trilemma.ops.dispatch import served
from trilemma.ops.mixing import mixes
from trilemma.ops.truth import TruthPair, drawn_integer, drawn_normal, drawn_uniform


def decayed_scan_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    rank: int = 1,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the reference for the other forms.

    Args:
        q, k: [B, G, L * R, E]; the R rows of a token are neighbours.
        v: [B, H, L * R, F].
        log_decay: [B or 1, H, L] or [1, H, 1], <= 0.
        state: [B, H, E, F], or None for zeros.
        rank: R.

    Returns:
        o [B, H, L * R, F] and the last state.
    """
    batch, heads, length, wide = *v.shape[:2], v.shape[2] // rank, v.shape[3]
    q, k = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (q, k))
    s = torch.zeros(batch, heads, k.shape[-1], wide, dtype=v.dtype, device=v.device) if state is None else state
    decay = log_decay.exp().expand(-1, -1, length)
    outs = []
    for t in range(length):
        now = slice(t * rank, (t + 1) * rank)
        s = decay[:, :, t, None, None] * s + k[:, :, now].transpose(-1, -2) @ v[:, :, now]
        outs.append(q[:, :, now] @ s)
    return torch.cat(outs, dim=2), s


@mixes("v")
@served("decayed_scan")
def decayed_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = 64,
    want_state: bool = False,
    rank: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Chunkwise form, any length, any chunk size; one token with a State is one step.

    Args:
        q, k, v, log_decay, state, rank: as in `decayed_scan_naive`. At padding log_decay and k or v must be zero.
        starts: [B, L] True where a packed sequence begins: nothing crosses it.
        chunk_size: C, in tokens.
        want_state: whether the last state is needed.

    Returns:
        o [B, H, L * R, F]; the last state (float32 at least), or None.
    """
    if k.shape[2] == rank and starts is None and state is not None:
        return decayed_step(q, k, v, log_decay, state)
    return chunkwise_scan(q, k, v, log_decay, state, starts, chunk_size, want_state, rank)


def chunkwise_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    want_state: bool,
    rank: int,
    weights: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`decayed_scan` without its step.

    Args:
        weights: two of [B, H, L], with which a token's k v^T enters its own output, and later ones; None: 1.
    """
    length, groups = k.shape[2] // rank, k.shape[1]
    size = min(chunk_size, length)
    chunks = -(-length // size)
    rest = chunks * size - length
    constant = log_decay.shape[2] == 1 and length > 1
    if rest:
        q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, rest * rank)) for t in (q, k, v))
    # One copy here, or one for each product below.
    q, k = (t.contiguous().unflatten(2, (chunks, size * rank)) for t in (q, k))  # [B, G, N, C R, E]
    v = v.unflatten(2, (chunks, size * rank)).unflatten(1, (groups, -1))  # [B, G, P, N, C R, F]
    if v.shape[2] == 1:
        v = v.contiguous()
    precise = torch.promote_types(log_decay.dtype, torch.float32)
    if constant:  # one pattern for all chunks; the padded tail only makes the last state older, mended below
        g = log_decay.to(precise) * torch.arange(1, size + 1, device=q.device)
        g = g[:, :, None]  # [1, H, 1, C]
    else:
        g = _chunked(log_decay.to(precise), chunks, rest).cumsum(-1)  # [B or 1, H, N, C]
    g = g.repeat_interleave(rank, dim=-1).unflatten(1, (groups, -1))  # [B or 1, G, P, N or 1, C R]
    # [B or 1, G, P, N or 1, C R, C R]
    within: Tensor = _PairDecay.apply(g, rank, q.dtype)  # type: ignore[no-untyped-call]
    later = None
    if weights is not None:
        own, later = (
            _chunked(weight, chunks, rest).repeat_interleave(rank, dim=-1).unflatten(1, (groups, -1))
            for weight in weights
        )  # [B, G, P, N, C R]
        within = _weighted(within, own, later, rank)
    resets = _resets(starts, chunks, rest, rank) if starts is not None else None  # [B, 1, 1, N, C R]
    if resets is not None:
        within = within * (resets[..., :, None] == resets[..., None, :])
    out = ((q @ k.transpose(-1, -2))[:, :, None] * within) @ v  # [B, G, P, N, C R, F]
    if chunks == 1 and state is None and not want_state:
        return _tokens(out, length * rank), None
    last = g[..., -1]  # [., G, P, .]
    to_end = (last[..., None] - g).exp()  # decay from a token to its chunk's end
    from_begin = g.exp()
    carry = last.exp()
    if rest and constant:  # the last chunk is shorter: its end comes sooner
        to_end, carry = _shorter_last(to_end, carry, log_decay.to(precise).view_as(last), g, chunks, size - rest)
    if resets is not None:
        to_end = to_end * (resets == resets[..., -1:])
        from_begin = from_begin * (resets == 0)
        carry = carry * (resets[..., -1] == 0)
    if later is not None:
        to_end = to_end * later
    added = k.transpose(-1, -2) @ _side_by_side(v * to_end[..., None].to(v.dtype))  # [B, G, N, E, P F]
    before, final = _carried(added, carry.expand(len(q), -1, -1, chunks), state, precise)
    read = (q @ before).unflatten(-1, (v.shape[2], -1)).permute(0, 1, 4, 2, 3, 5)
    return _tokens(torch.addcmul(out, read, from_begin[..., None].to(out.dtype)), length * rank), final


def decayed_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token; arguments as in `decayed_scan` with L = 1. In place on `state` when autograd is off."""
    rank, per_group, dtype = k.shape[2], state.shape[1] // k.shape[1], v.dtype
    q, k, v = (t.to(state.dtype) for t in (q, k, v))
    if per_group > 1:
        q, k = (t.repeat_interleave(per_group, dim=1) for t in (q, k))
    decay = log_decay.to(state.dtype).exp()[..., None]  # [., H, 1, 1]
    with torch.autocast(q.device.type, enabled=False):  # the State is written and read in its own precision
        written = (k.transpose(-1, -2), v) if rank == 1 else (k.transpose(-1, -2) @ v, torch.ones_like(decay))
        if torch.is_grad_enabled():
            state = torch.addcmul(decay * state, *written)
        else:
            state.mul_(decay).addcmul_(*written)
        out = q @ state
    return out.to(dtype), state


def decayed_scan_flops(
    length: int, context: int, keys: tuple[int, int], values: tuple[int, int], chunk_size: int, rank: int = 1
) -> int:
    """FLOPs of the form that a call of this length runs: chunkwise as executed, or one step.

    Args:
        length, context: new tokens, and whether (above 0) a State is carried.
        keys: G and E.
        values: H and F.
    """
    (groups, key_dim), (heads, value_dim) = keys, values
    per_state = 2 * rank * heads * key_dim * value_dim
    if length == 1 and context > 0:
        return per_state if rank == 1 else 2 * per_state
    size = min(chunk_size, length)
    chunks, rows = -(-length // size), size * rank
    within = 2 * rows * rows * (groups * key_dim + heads * value_dim)
    between = 2 * size * per_state if chunks > 1 or context > 0 else 0
    return chunks * (within + between)


def _side_by_side(v: Tensor) -> Tensor:
    """[B, G, P, N, C, F] -> [B, G, N, C, P F]: one product serves all heads of a group."""
    return v.permute(0, 1, 3, 4, 2, 5).flatten(-2)


def _tokens(out: Tensor, rows: int) -> Tensor:
    """[B, G, P, N, C, F] -> [B, H, rows, F]."""
    return out.flatten(3, 4)[:, :, :, :rows].flatten(1, 2)


def _chunked(tokens: Tensor, chunks: int, rest: int) -> Tensor:
    """[..., L] -> [..., N, C], with `rest` zeros at the end."""
    padded: Tensor = torch.nn.functional.pad(tokens, (0, rest)).unflatten(-1, (chunks, -1))
    return padded


def _weighted(within: Tensor, own: Tensor, later: Tensor, rank: int) -> Tensor:
    """The decays [., C R, C R] times the weight of what is read: `own` where a token reads itself, else `later`."""
    token = torch.arange(within.shape[-1], device=within.device) // rank
    same = (token[:, None] == token).to(within.dtype)
    weighted = within * later[..., None, :].to(within.dtype)
    return torch.addcmul(weighted, (own - later)[..., None, :].to(within.dtype), same)


def _carried(added: Tensor, carry: Tensor, state: Tensor | None, precise: torch.dtype) -> tuple[Tensor, Tensor]:
    """State before each chunk [B, G, N, E, P F] and after the last [B, H, E, F].

    Args:
        added: [B, G, N, E, P F] each chunk's own part.
        carry: [B, G, P, N] each chunk's decay.
    """
    groups, shared = carry.shape[1:3]
    added = added.unflatten(-1, (shared, -1))
    if state is None:
        first = torch.zeros_like(added[:, :, 0], dtype=precise)
    else:
        first = state.to(precise).unflatten(1, (groups, -1)).transpose(2, 3)  # [B, G, E, P, F]
    before, final = _ChunkStates.apply(added, carry, first)  # type: ignore[no-untyped-call]
    return before.flatten(-2), final.transpose(2, 3).flatten(1, 2)


class _PairDecay(torch.autograd.Function):
    """exp(g_t - g_s) for t >= s, else 0: what is left at t of what s wrote.

    Nothing is exponentiated above 0, and nothing below 2^-100, where exponentials become slow and are as good as zero.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
        """g: [..., C R] -> [..., C R, C R] of type `dtype`."""
        token = torch.arange(g.shape[-1], device=g.device) // rank
        g = g * math.log2(math.e)
        decay = (g[..., :, None] - g[..., None, :]).clamp_(-100, 0).exp2_()
        decay = (decay * (token[:, None] >= token)).to(dtype)
        ctx.save_for_backward(decay)
        ctx.precise = g.dtype
        return decay

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (decay,) = ctx.saved_tensors
        products = gradient * decay
        return products.sum(-1, dtype=ctx.precise) - products.sum(-2, dtype=ctx.precise), None, None


class _ChunkStates(torch.autograd.Function):
    """The recurrence over chunks, in its own precision: S_n = carry_n S_{n-1} + added_n."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, carry: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """[B, G, N, E, P, F], [B, G, P, N], S_0 [B, G, E, P, F] -> S_0 ... S_{N-1} of added's type and shape, S_N."""
        before, current = torch.empty_like(added), first.clone()
        for n, decay in enumerate(carry[:, :, None, :, None].unbind(-1)):
            before[:, :, n] = current
            current.mul_(decay).add_(added[:, :, n])
        ctx.save_for_backward(before, carry)
        return before, current

    @staticmethod
    def backward(ctx: Any, for_before: Tensor, for_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before, carry = ctx.saved_tensors
        for_added, for_carry, current = torch.empty_like(before), torch.empty_like(carry), for_last.clone()
        for n in reversed(range(before.shape[2])):
            for_added[:, :, n] = current
            for_carry[..., n] = (current * before[:, :, n]).sum((2, 4))
            current.mul_(carry[:, :, None, :, None, n]).add_(for_before[:, :, n])
        return for_added, for_carry, current


def _shorter_last(
    to_end: Tensor, carry: Tensor, log_decay: Tensor, g: Tensor, chunks: int, kept: int
) -> tuple[Tensor, Tensor]:
    """Constant decay, padded last chunk: its end is token `kept`, not token C."""
    end = log_decay[..., None] * kept  # [1, G, P, 1, 1]
    short = (end - g).clamp(max=0).exp()  # beyond `kept` k is zero
    to_end = torch.cat([to_end.expand(-1, -1, -1, chunks - 1, -1), short], dim=3)
    carry = torch.cat([carry.expand(-1, -1, -1, chunks - 1), end[..., 0].exp()], dim=3)
    return to_end, carry


def _resets(starts: Tensor, chunks: int, rest: int, rank: int) -> Tensor:
    """[B, 1, 1, N, C R] how many packed sequences have begun since the chunk's first token, that one included."""
    counts: Tensor = _chunked(starts, chunks, rest).cumsum(-1).repeat_interleave(rank, dim=-1)
    return counts[:, None, None]


def _draw(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Constant or per-token decay (also none at all), shared keys, several ranks, any length and chunk size, with or
    without a carried state."""

    def normal(*shape: int) -> Tensor:
        return drawn_normal(generator, dtype, *shape)

    batch, groups, shared, rank, width, wide = (drawn_integer(generator, 1, 3) for _ in range(6))
    length, carried = drawn_integer(generator, 1, 40), drawn_integer(generator, 0, 1) == 1
    constant, strength = drawn_integer(generator, 0, 1) == 1, (0.0, 0.05, 3.0)[drawn_integer(generator, 0, 2)]
    heads, rows = groups * shared, length * rank
    shape = (1, heads, 1) if constant else (batch, heads, length)
    return {
        "q": normal(batch, groups, rows, width),
        "k": normal(batch, groups, rows, width),
        "v": normal(batch, heads, rows, wide),
        "log_decay": -strength * drawn_uniform(generator, dtype, *shape),
        "state": normal(batch, heads, width, wide) if carried else None,
        "chunk_size": (1, 2, 7, 64)[drawn_integer(generator, 0, 3)],
        "rank": rank,
    }


def _naive(chunk_size: int, **given: Any) -> tuple[Tensor, ...]:
    return decayed_scan_naive(**given)


def _fast(**given: Any) -> tuple[Tensor, ...]:
    out, state = decayed_scan(**given, want_state=True)
    assert state is not None
    return out, state


DECAYED_SCAN = TruthPair("decayed_scan", _fast, _naive, _draw)
