"""Any causal mixer in two directions, for encoders (as Schuster & Paliwal 1997 did for recurrent nets).

    y = forward(x) + reverse(backward(reverse(x)))

Two mixers of the same kind with weights of their own; reversal happens within each row's valid tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trilemma.errors import CapabilityError, ConfigError
from trilemma.mixers.base import Capabilities, Mixer, build_from_spec
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
    """

    capabilities = Capabilities(causal=False, bidirectional=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = False,
        inner: str | dict[str, Any] = "retention",
        num_heads: int | None = None,
    ) -> None:
        super().__init__(d_model, causal)
        self.ahead = build_from_spec(inner, d_model, True, num_heads)
        self.back = build_from_spec(inner, d_model, True, num_heads)
        if self.ahead.capabilities.reads_memory:
            raise ConfigError(f'bidirectional: "{self.ahead.name}" reads a memory, it is no mixer of its own sequence')
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

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        y_ahead, _ = self.ahead(x, None, ragged, shared)
        length = x.shape[1]
        valid = ragged.valid(length) if ragged is not None else None
        if ragged is None or valid is None:
            y_back, _ = self.back(x.flip(1), None, ragged, shared)
            return y_ahead + y_back.flip(1), None
        steps = torch.arange(length, device=x.device)
        order = torch.where(valid, valid.sum(1, keepdim=True) - 1 - steps, steps)  # its own inverse
        index = order[:, :, None].expand_as(x)
        segments = None if ragged.segments is None else ragged.segments.gather(1, order)
        y_back, _ = self.back(x.gather(1, index), None, Ragged(ragged.lengths, segments), shared)
        return y_ahead + y_back.gather(1, index), None

    def count_parameters(self) -> int:
        """Twice the inner mixer's."""
        return self.ahead.count_parameters() + self.back.count_parameters()

    def flops(self, length: int, context: int = 0) -> int:
        """Twice the inner mixer's."""
        return 2 * self.ahead.flops(length)

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """None."""
        return 0
