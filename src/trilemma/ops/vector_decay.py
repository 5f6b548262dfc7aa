"""The scan with a decay for each key channel: S_t = Diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, per head.

The core of gated linear attention (GLA, arXiv 2312.06635). Three forms that give the same answer: naive (the recurrence
as written), chunkwise and one step. Within a chunk the scores

    P_ts = sum_c q_tc k_sc a_(s+1)c ... a_tc                                   s <= t

do not factor into matrices safely: taking both factors relative to the chunk's begin divides by decays. Here the chunk
is halved again and again. For t in a right half and s in its left half both factors are taken relative to the border
between the halves, so that they are products of decays and never quotients, and each level is one batched matrix
product. Joining two halves multiplies one factor of each by the other half's decay. A packed sequence's first token has
a decay of zero, which is all that a border takes.

Legend: B rows, H heads, L length, N chunks, C chunk size (a power of two), E key dimension, F value dimension, M = BHN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trilemma.ops.dispatch import served
from trilemma.ops.mixing import mixes
from trilemma.ops.truth import TruthPair, drawn_integer, drawn_normal, drawn_uniform


def vector_scan_naive(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the reference for the other forms.

    Args:
        q, k: [B, H, L, E]. v: [B, H, L, F].
        log_decay: [B, H, L, E] log(a), <= 0.
        state: [B, H, E, F], or None for zeros.

    Returns:
        o [B, H, L, F] and the last state.
    """
    s = empty_matrix(k, v) if state is None else state
    outs = []
    for t in range(k.shape[2]):
        s = log_decay[:, :, t, :, None].exp() * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, None, :] @ s)[:, :, 0])
    return torch.stack(outs, dim=2), s


@mixes("v")
@served("vector_scan")
def vector_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = 64,
    want_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Chunkwise form, any length, in float32 at least.

    Args:
        q, k, v, log_decay, state: as in `vector_scan_naive`. At padding, k and log_decay must be zero.
        starts: [B, L] True where a packed sequence begins: nothing crosses it.
        chunk_size: rounded up to a power of two.
        want_state: whether the last state is needed.

    Returns:
        o [B, H, L, F] of v's type; the last state (float32 at least), or None.
    """
    if k.shape[2] == 1:
        return vector_step(q, k, v, log_decay, empty_matrix(k, v) if state is None else state)
    with torch.autocast(q.device.type, enabled=False):
        cut = Chunks(k, chunk_size)
        v_mcf = cut.split(v)
        found = decayed_products([cut.split(q)], [cut.split(k)], cut.decay(log_decay, starts))
        out = found.products[0][0] @ v_mcf
        if cut.count == 1 and state is None and not want_state:
            return cut.join(out).to(v.dtype), None
        added = cut.by_row(found.to_end[0].transpose(1, 2) @ v_mcf)
        carry = cut.by_row(found.total.transpose(1, 2))
        current = empty_matrix(k, v) if state is None else state.to(added.dtype)
        before = []
        for n in range(cut.count):
            before.append(current)
            current = torch.addcmul(added[:, :, n], carry[:, :, n], current)
        out = out + found.from_begin[0] @ torch.stack(before, dim=2).flatten(0, 2)
        return cut.join(out).to(v.dtype), current


def empty_matrix(k: Tensor, v: Tensor) -> Tensor:
    """[B, H, E, F] zeros of float32 at least: no token read yet."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    return v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=dtype)


def vector_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token; arguments as in `vector_scan` with L = 1. In place on `state` when autograd is off."""
    decay = log_decay.to(state.dtype).exp().transpose(-1, -2)  # [B, H, E, 1]
    k_e1 = k.transpose(-1, -2).to(state.dtype)
    if torch.is_grad_enabled():
        state = decay * state + k_e1 * v.to(state.dtype)
    else:
        state.mul_(decay).addcmul_(k_e1, v.to(state.dtype))
    with torch.autocast(q.device.type, enabled=False):
        return (q.to(state.dtype) @ state).to(v.dtype), state


def vector_scan_flops(length: int, key_dim: int, value_dim: int, chunk_size: int, carried: bool) -> int:
    """FLOPs of the matrix products that `vector_scan` executes for one head; `carried`: with a state from before."""
    if length == 1:
        return 2 * key_dim * value_dim
    size, chunks = chunk_shape(length, chunk_size)
    within = decayed_products_flops(size, key_dim) + 2 * size * size * value_dim
    between = 4 * size * key_dim * value_dim if chunks > 1 or carried else 0
    return chunks * (within + between)


def chunk_shape(length: int, chunk_size: int) -> tuple[int, int]:
    """C, a power of two, and N."""
    size = 1 << (min(chunk_size, length) - 1).bit_length()
    return size, -(-length // size)


class Chunks:
    """Cuts [B, H, L, *] into chunks [M, C, *] of float32 at least, padded with zeros, and joins them again.

    Attributes:
        size, count: C and N.
    """

    def __init__(self, k: Tensor, chunk_size: int) -> None:
        self.batch, self.heads, self.length = k.shape[:3]
        self.size, self.count = chunk_shape(self.length, chunk_size)
        self.precise = torch.promote_types(k.dtype, torch.float32)

    def split(self, t: Tensor) -> Tensor:
        """[B, H, L, *] -> [M, C, *]."""
        t = torch.nn.functional.pad(t.to(self.precise), (0, 0, 0, self.size * self.count - self.length))
        return t.reshape(-1, self.size, t.shape[-1])

    def decay(self, log_decay: Tensor, starts: Tensor | None) -> Tensor:
        """[M, C, E] decays: 1 where chunks are padded, 0 where a packed sequence begins."""
        decay = self.split(log_decay).exp()
        if starts is not None:
            begins = starts[:, None, :, None].expand(-1, self.heads, -1, -1)
            decay = decay * (1 - self.split(begins))
        return decay

    def by_row(self, t: Tensor) -> Tensor:
        """[M, *, *] -> [B, H, N, *, *]."""
        return t.view(self.batch, self.heads, self.count, *t.shape[1:])

    def join(self, t: Tensor) -> Tensor:
        """[M, C, *] -> [B, H, L, *]."""
        return self.by_row(t).flatten(2, 3)[:, :, : self.length]


class DecayedProducts(NamedTuple):
    """What `decayed_products` finds.

    Attributes:
        products: [j][i], each [M, C, C]: sum_c x_tc y_sc a_(s+1)c ... a_tc for s <= t, else 0.
        from_begin: of each x, [M, C, E]: x_t times the decays from the chunk's begin to t.
        to_end: of each y, [M, C, E]: y_s times the decays after s to the chunk's end.
        total: [M, 1, E] decay of the whole chunk.
    """

    products: list[list[Tensor]]
    from_begin: list[Tensor]
    to_end: list[Tensor]
    total: Tensor


def decayed_products(xs: Sequence[Tensor], ys: Sequence[Tensor], decay: Tensor) -> DecayedProducts:
    """All products of one of `xs` with one of `ys` under the decays between them.

    Args:
        xs, ys: [M, C, E] each, C a power of two.
        decay: [M, C, E] a_t, from 0 to 1.
    """
    size, width = decay.shape[1:]
    total = decay.reshape(-1, 1, width)
    lefts = [(x * decay).reshape(-1, 1, width) for x in xs]
    rights = [y.reshape(-1, 1, width) for y in ys]
    products = [[(x * y).sum(-1).reshape(-1, 1, 1) for y in ys] for x in xs]
    for half in (1 << level for level in range(size.bit_length() - 1)):
        first, second = total.view(-1, 2, 1, width).unbind(1)
        one = torch.ones_like(first)
        lefts = [x.view(-1, 2, half, width) for x in lefts]
        rights = [y.view(-1, 2, half, width) for y in rights]
        products = [
            [_joined(p, _scores(x[:, 1], y[:, 0])) for p, y in zip(row, rights, strict=True)]
            for row, x in zip(products, lefts, strict=True)
        ]
        onward, back = torch.stack([one, first], dim=1), torch.stack([second, one], dim=1)
        lefts = [(x * onward).view(-1, 2 * half, width) for x in lefts]
        rights = [(y * back).view(-1, 2 * half, width) for y in rights]
        total = first * second
    return DecayedProducts(products, lefts, rights, total)


def decayed_products_flops(size: int, width: int) -> int:
    """FLOPs of the matrix products that `decayed_products` executes for one pair in one chunk."""
    return size * max(size - 4, 0) * width


def _scores(x: Tensor, y: Tensor) -> Tensor:
    """[K, h, E] each -> [K, h, h]; matrix products are slower for the smallest."""
    return (x[:, :, None] * y[:, None]).sum(-1) if x.shape[1] < 4 else x @ y.transpose(1, 2)


def _joined(blocks: Tensor, corner: Tensor) -> Tensor:
    """Lower-triangular blocks [2K, h, h], two by two with what lies below the first [K, h, h] -> [K, 2h, 2h]."""
    first, second = blocks.unflatten(0, (-1, 2)).unbind(1)
    upper = torch.nn.functional.pad(first, (0, first.shape[-1]))
    return torch.cat([upper, torch.cat([corner, second], dim=-1)], dim=-2)


def drawn_scan(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a scan: no decay, a usual or a strong one, any length, with or without a carried state."""

    def normal(*shape: int) -> Tensor:
        return drawn_normal(generator, dtype, *shape)

    batch, heads, width, wide = (drawn_integer(generator, 1, 3) for _ in range(4))
    length, carried = drawn_integer(generator, 1, 40), drawn_integer(generator, 0, 1) == 1
    strength = (0.0, 0.05, 3.0)[drawn_integer(generator, 0, 2)]
    return {
        "q": normal(batch, heads, length, width),
        "k": normal(batch, heads, length, width),
        "v": normal(batch, heads, length, wide),
        "log_decay": -strength * drawn_uniform(generator, dtype, batch, heads, length, width),
        "state": normal(batch, heads, width, wide) if carried else None,
        "chunk_size": (1, 2, 7, 64)[drawn_integer(generator, 0, 3)],
    }


def _naive(chunk_size: int, **given: Any) -> tuple[Tensor, ...]:
    return vector_scan_naive(**given)


def _fast(**given: Any) -> tuple[Tensor, ...]:
    out, state = vector_scan(**given, want_state=True)
    assert state is not None
    return out, state


VECTOR_SCAN = TruthPair("vector_scan", _fast, _naive, drawn_scan)
