"""The selective scan of Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3): a linear recurrence in each channel.

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t,    y_t = c_t . h_t

The states of all tokens would be N times as large as the input. They live for one segment at a time and are built
again for the gradient, so that memory is that of the input, and a segment's work stays in the processor's cache.

Legend: B rows, L length, E channels, N states a channel, T tokens of a segment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilemma.ops.diagonal_scan import before, scan_
from trilemma.ops.mixing import mixes
from trilemma.ops.truth import TruthPair, drawn_integer, drawn_normal, drawn_uniform

# Numbers of a segment's states: about what a processor's cache holds, and what keeps an accelerator busy.
_CACHED, _LAUNCHED = 2**19, 2**24


def selective_scan_naive(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the reference for `selective_scan`, whose arguments it takes."""
    h = x.new_zeros(len(x), *a.shape) if state is None else state
    outs = []
    for t in range(x.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], 0, h)
        h = (dt[:, t, None] * a).exp() * h + (dt[:, t] * x[:, t])[:, None] * b[:, t, :, None]
        outs.append((c[:, t, :, None] * h).sum(1))
    return torch.stack(outs, dim=1), h


@mixes("x", axes="blh")
def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    segment_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan in segments, for any length.

    Args:
        x: [B, L, E].
        dt: [B, L, E] step sizes, at least 0; 0 at padding.
        a: [N, E] below 0.
        b, c: [B, L, N].
        state: [B, N, E], or None for zeros.
        starts: [B, L] True where a packed sequence begins: nothing crosses it.
        segment_size: T; changes speed and memory, never the answer. None: what fits.

    Returns:
        y [B, L, E], and the last state.
    """
    state = x.new_zeros(len(x), *a.shape) if state is None else state.to(x.dtype)
    if segment_size is None:
        held = _CACHED if x.device.type == "cpu" else _LAUNCHED
        segment_size = max(8, held // (len(x) * a.numel()))
    y, last = _SelectiveScan.apply(x, dt, a, b, c, state, starts, segment_size)  # type: ignore[no-untyped-call]
    return y, last


def selective_step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token; arguments as in `selective_scan` with L = 1. In place on `state` when autograd is off."""
    decay, added = (dt * a).exp(), (dt * x) * b.transpose(1, 2)
    state = decay * state + added if torch.is_grad_enabled() else state.mul_(decay).add_(added)
    return (c.transpose(1, 2) * state).sum(1, keepdim=True), state


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        state: Tensor,
        starts: Tensor | None,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        outs, states = [], [state]
        for part in _segments(x.shape[1], size):
            _, h = _run(x, dt, a, b, states[-1], starts, part)
            outs.append((h * c[:, part, :, None]).sum(2))
            states.append(h[:, -1].clone())
        ctx.save_for_backward(x, dt, a, b, c, starts, torch.stack(states[:-1]))
        ctx.size = size
        return torch.cat(outs, dim=1), states[-1]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, starts, states = ctx.saved_tensors
        grad_x, grad_dt, grad_b, grad_c = (torch.empty_like(t) for t in (x, dt, b, c))
        grad_a = torch.zeros_like(a)
        for number, part in reversed(list(enumerate(_segments(x.shape[1], ctx.size)))):
            decay, h = _run(x, dt, a, b, states[number], starts, part)
            grad_h = grad_y[:, part, None] * c[:, part, :, None]  # [B, T, N, E]
            grad_h[:, -1] += grad_state
            scan_(decay[:, 1:], grad_h, reverse=True)
            grad_state = decay[:, 0] * grad_h[:, 0]
            grad_c[:, part] = (h * grad_y[:, part, None]).sum(3)
            grad_b[:, part] = (grad_h * (dt[:, part] * x[:, part])[:, :, None]).sum(3)
            grad_added = (grad_h * b[:, part, :, None]).sum(2)  # of dt x
            grad_x[:, part] = grad_added * dt[:, part]
            grad_power = before(h, states[number]).mul_(grad_h).mul_(decay)  # of dt a
            grad_a += (grad_power * dt[:, part, None]).sum((0, 1))
            grad_dt[:, part] = (grad_power * a).sum(2) + grad_added * x[:, part]
        return grad_x, grad_dt, grad_a, grad_b, grad_c, grad_state, None, None


def _segments(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _run(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, state: Tensor, starts: Tensor | None, part: slice
) -> tuple[Tensor, Tensor]:
    """One segment: decays and states [B, T, N, E]."""
    decay = (dt[:, part, None] * a).exp_()
    if starts is not None:
        decay.masked_fill_(starts[:, part, None, None], 0)
    h = (dt[:, part] * x[:, part])[:, :, None] * b[:, part, :, None]
    h[:, 0].addcmul_(decay[:, 0], state)
    scan_(decay[:, 1:], h)
    return decay, h


def _draw(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Any length and segment size, steps short, long and zero, with or without a state and packed sequences."""
    batch, length, channels, width = (drawn_integer(generator, 1, high) for high in (3, 40, 4, 4))
    strength = (0.01, 1.0, 30.0)[drawn_integer(generator, 0, 2)]
    carried, packed = drawn_integer(generator, 0, 1) == 1, drawn_integer(generator, 0, 2) == 0
    skipped = drawn_uniform(generator, dtype, batch, length, 1) < 0.1
    return {
        "x": drawn_normal(generator, dtype, batch, length, channels),
        "dt": (strength * drawn_uniform(generator, dtype, batch, length, channels)).masked_fill(skipped, 0),
        "a": -3 * drawn_uniform(generator, dtype, width, channels),
        "b": drawn_normal(generator, dtype, batch, length, width),
        "c": drawn_normal(generator, dtype, batch, length, width),
        "state": drawn_normal(generator, dtype, batch, width, channels) if carried else None,
        "starts": drawn_uniform(generator, dtype, batch, length) < 0.1 if packed else None,
        "segment_size": (1, 2, 7, None)[drawn_integer(generator, 0, 3)],
    }


def _naive(segment_size: int | None, **given: Any) -> tuple[Tensor, ...]:
    return selective_scan_naive(**given)


SELECTIVE_SCAN = TruthPair("selective_scan", lambda **given: selective_scan(**given), _naive, _draw)
