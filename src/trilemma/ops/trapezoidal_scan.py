"""The trapezoidal scan: S_t = exp(a_t) (S_{t-1} + b_t k_{t-1} v_{t-1}^T) + c_t k_t v_t^T, o_t = S_t^T q_t, per head.

The core of Mamba-3 (arXiv 2603.15569). A token's k v^T enters twice, with its own weight c_t and at the next token with
b_{t+1}. The decayed scan computes it if the token is written once, with c_t for its own output and c_t + b_{t+1} for
later ones.

Legend: as in `decayed_scan`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilemma.ops.decayed_scan import chunkwise_scan, decayed_scan_flops, decayed_step
from trilemma.ops.mixing import mixes
from trilemma.ops.truth import TruthPair, drawn_integer, drawn_normal, drawn_uniform


def trapezoidal_scan_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    now: Tensor,
    before: Tensor,
    state: Tensor | None = None,
    last_k: Tensor | None = None,
    last_v: Tensor | None = None,
    rank: int = 1,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token.

    Args:
        q, k: [B, H, L * R, E]. v: [B, H, L * R, F].
        log_decay: [B, H, L] a, <= 0.
        now, before: [B, H, L] c and b, >= 0.
        state, last_k, last_v: S [B, H, E, F], and the last token's k [B, H, R, E] and v [B, H, R, F]; or all None.
        rank: R.

    Returns:
        o [B, H, L * R, F] and the last S.
    """
    s = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state
    if last_k is None or last_v is None:
        last_k, last_v = torch.zeros_like(k[:, :, :rank]), torch.zeros_like(v[:, :, :rank])
    outs = []
    for t, tokens in enumerate(torch.arange(v.shape[2]).split(rank)):
        decay, c, b = (part[:, :, t, None, None] for part in (log_decay.exp(), now, before))
        s = decay * (s + b * last_k.transpose(-1, -2) @ last_v)
        last_k, last_v = k[:, :, tokens], v[:, :, tokens]
        s = s + c * last_k.transpose(-1, -2) @ last_v
        outs.append(q[:, :, tokens] @ s)
    return torch.cat(outs, dim=2), s


@mixes("v")
def trapezoidal_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    now: Tensor,
    before: Tensor,
    state: Tensor | None = None,
    last_k: Tensor | None = None,
    last_v: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = 64,
    want_state: bool = False,
    rank: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Chunkwise form, any length, any chunk size; one token with a State is one step, in place when autograd is off.

    Args:
        q, k, v, log_decay, now, before, state, last_k, last_v, rank: as in `trapezoidal_scan_naive`. At padding
            log_decay, now and before must be zero.
        starts: [B, L] True where a packed sequence begins: nothing crosses it.
        chunk_size: in tokens.
        want_state: whether the last S is needed.

    Returns:
        o [B, H, L * R, F]; the last S (float32 at least), or None.
    """
    if state is not None:
        assert last_k is not None
        assert last_v is not None
        state = _with_last(state, last_k, last_v, before[:, :, :1])
    if now.shape[2] == 1 and starts is None and state is not None:
        return decayed_step(q, k, v * now[..., None].to(v.dtype), log_decay, state)
    after = torch.nn.functional.pad(before[:, :, 1:], (0, 1))  # zero where the next token is padding
    return chunkwise_scan(q, k, v, log_decay, state, starts, chunk_size, want_state, rank, (now, now + after))


def trapezoidal_scan_flops(
    length: int, context: int, heads: int, key_dim: int, value_dim: int, chunk_size: int, rank: int
) -> int:
    """As `decayed_scan_flops`, and the last token's second part."""
    scan = decayed_scan_flops(length, context, (heads, key_dim), (heads, value_dim), chunk_size, rank)
    return scan + (2 * rank * heads * key_dim * value_dim if context > 0 else 0)


def _with_last(s: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """S with the last token's k v^T once more, by weight [B, H, 1]; in place when autograd is off."""
    with torch.autocast(s.device.type, enabled=False):
        added = k.to(s.dtype).transpose(-1, -2) @ (v * weight[..., None]).to(s.dtype)
    return s + added if torch.is_grad_enabled() else s.add_(added)


def _draw(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Any length, chunk size and rank, weights of zero among them, with or without a carried state."""

    def normal(*shape: int) -> Tensor:
        return drawn_normal(generator, dtype, *shape)

    def positive() -> Tensor:
        drawn = drawn_uniform(generator, dtype, batch, heads, length) - 0.2
        return drawn.clamp(min=0)

    batch, heads, rank, width, wide = (drawn_integer(generator, 1, 3) for _ in range(5))
    length, carried = drawn_integer(generator, 1, 40), drawn_integer(generator, 0, 1) == 1
    strength = (0.0, 0.05, 3.0)[drawn_integer(generator, 0, 2)]
    return {
        "q": normal(batch, heads, length * rank, width),
        "k": normal(batch, heads, length * rank, width),
        "v": normal(batch, heads, length * rank, wide),
        "log_decay": -strength * drawn_uniform(generator, dtype, batch, heads, length),
        "now": positive(),
        "before": positive(),
        "state": normal(batch, heads, width, wide) if carried else None,
        "last_k": normal(batch, heads, rank, width) if carried else None,
        "last_v": normal(batch, heads, rank, wide) if carried else None,
        "chunk_size": (1, 2, 7, 64)[drawn_integer(generator, 0, 3)],
        "rank": rank,
    }


def _naive(chunk_size: int, **given: Any) -> tuple[Tensor, ...]:
    return trapezoidal_scan_naive(**given)


def _fast(**given: Any) -> tuple[Tensor, ...]:
    out, state = trapezoidal_scan(**given, want_state=True)
    assert state is not None
    return out, state


TRAPEZOIDAL_SCAN = TruthPair("trapezoidal_scan", _fast, _naive, _draw)
