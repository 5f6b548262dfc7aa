"""Any causal mixer in two directions, for encoders (as Schuster & Paliwal 1997 did for recurrent nets).

    y = forward(x) + reverse(backward(reverse(x)))

Two mixers of the same kind with weights of their own; reversal happens within each row's valid tokens. What they share
with other layers they share by direction, in the order of x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trilemma.errors import CapabilityError, ConfigError
from trilemma.mixers.base import Capabilities, Mixer, Published, Shared, aligned
from trilemma.mixers.build import build_from_spec
from trilemma.ragged import Ragged
from trilemma.registry import register_mixer
from trilemma.state import State


@register_mixer("bidirectional")
class Bidirectional(Mixer):
    """The wrapper.

    Args:
        d_model: width.
        causal: must be False.
        inner: the causal mixer: a name, or a mapping with "name" and options.
        num_heads: handed to the inner mixer if it has heads.
        producer: handed to the inner mixer if layers of its kind share values.
    """

    capabilities = Capabilities(causal=False, bidirectional=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = False,
        inner: str | dict[str, Any] = "retention",
        num_heads: int | None = None,
        producer: bool = True,
    ) -> None:
        super().__init__(d_model, causal)
        self.ahead = build_from_spec(inner, d_model, True, num_heads, producer)
        self.back = build_from_spec(inner, d_model, True, num_heads, producer)
        if self.ahead.capabilities.reads_memory:
            raise ConfigError(f'bidirectional: "{self.ahead.name}" reads a memory, it is no mixer of its own sequence')
        aligned({**self.ahead.publishes(), **self.ahead.reads()})  # nothing else can be turned round
        self.compiles = self.ahead.compiles

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Around each kind of causal mixer."""
        inner: list[Any] = [
            "retention",
            {"name": "retention", "chunk_size": 3, "normaliser": True},
            {"name": "attention", "window": 4, "position": "rotary"},
            "lstm",
            {"name": "gru", "hidden": 12},
        ]
        return [{"causal": False, "inner": one} for one in inner]

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> State:
        """There is none; `init_state` has refused before."""
        raise CapabilityError("a bidirectional mixer has no State")

    def shared_inputs(self) -> Mapping[str, tuple[int, ...]]:
        """The inner mixer's."""
        return self.ahead.shared_inputs()

    def publishes(self) -> Mapping[str, Published]:
        """The inner mixer's, one in each direction."""
        return _by_direction(self.ahead.publishes())

    def reads(self) -> Mapping[str, Published]:
        """The inner mixer's, one in each direction."""
        return _by_direction(self.ahead.reads())

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        y_ahead = _run("ahead", self.ahead, x, ragged, shared, lambda values: values)
        length = x.shape[1]
        valid = ragged.valid(length) if ragged is not None else None
        if ragged is None or valid is None:
            return y_ahead + _run("back", self.back, x, ragged, shared, lambda values: values.flip(1)), None
        steps = torch.arange(length, device=x.device)
        order = torch.where(valid, valid.sum(1, keepdim=True) - 1 - steps, steps)  # its own inverse
        segments = None if ragged.segments is None else ragged.segments.gather(1, order)
        turned = Ragged(ragged.lengths, segments)
        return y_ahead + _run("back", self.back, x, turned, shared, lambda values: _reordered(values, order)), None

    def count_parameters(self) -> int:
        """Twice the inner mixer's."""
        return self.ahead.count_parameters() + self.back.count_parameters()

    def flops(self, length: int, context: int = 0) -> int:
        """Twice the inner mixer's."""
        return 2 * self.ahead.flops(length)

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """None."""
        return 0


def _run(
    direction: str,
    inner: Mixer,
    x: Tensor,
    ragged: Ragged | None,
    shared: Shared | None,
    turn: Callable[[Tensor], Tensor],
) -> Tensor:
    """y of one direction, in the order of x; `turn` goes there and back."""
    own = dict(shared or {})
    own |= {name: turn(own[f"{direction}.{name}"]) for name in inner.reads()}
    y: Tensor = inner(turn(x), None, ragged, own)[0]
    if shared is not None:
        shared.update({f"{direction}.{name}": turn(own[name]) for name in inner.publishes()})
    return turn(y)


def _reordered(values: Tensor, order: Tensor) -> Tensor:
    """values [B, L, ...] with the tokens of each row taken in the order [B, L]."""
    index = order.view(*order.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand_as(values))


def _by_direction(values: Mapping[str, Published]) -> dict[str, Published]:
    return {f"{direction}.{name}": kind for direction in ("ahead", "back") for name, kind in values.items()}
