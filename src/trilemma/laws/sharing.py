"""A mixer that shares values with other layers, on trial without them.

Legend: B rows, L length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.mixers.base import Capabilities, Mixer, Shared, aligned
from trilemma.ragged import Ragged
from trilemma.state import State, TupleState

# What a published value may hold at padding: anything finite.
_GARBAGE = 1e3


class Arranged(Mixer):
    """Base: layers that stand for the last of them on trial.

    Their States are kept apart, so that each rewinds in its own way and is replayed, if it is, with what it read.
    """

    capabilities = Capabilities(bidirectional=True)

    def __init__(self, d_model: int, *layers: Mixer) -> None:
        last = layers[-1]
        super().__init__(d_model, last.causal)
        self.layers = nn.ModuleList(layers)
        self.name = last.name  # type: ignore[misc]
        self.capabilities = replace(last.capabilities, rewinds=True)  # type: ignore[misc]
        self.compiles = last.compiles
        self.truth_pairs = last.truth_pairs  # type: ignore[method-assign]

    @property
    def last(self) -> Mixer:
        """The layer on trial."""
        return self.mixers()[-1]

    def mixers(self) -> list[Mixer]:
        """The layers."""
        return [layer for layer in self.layers if isinstance(layer, Mixer)]

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> TupleState:
        """The layers' States."""
        return TupleState(tuple(layer.init_state(rows, capacity, rewind, dtype, device) for layer in self.mixers()))

    def shared_inputs(self) -> Mapping[str, tuple[int, ...]]:
        """The layers' together."""
        return {name: shape for layer in self.mixers() for name, shape in layer.shared_inputs().items()}

    def flops(self, length: int, context: int = 0) -> int:
        """The layers' together."""
        return sum(layer.flops(length, context) for layer in self.mixers())

    def count_parameters(self) -> int:
        """The layers' together."""
        return sum(layer.count_parameters() for layer in self.mixers())

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """The layers' together."""
        return sum(layer.state_bytes(length, dtype) for layer in self.mixers())


class Sharing(Arranged):
    """A mixer with what it reads as further channels of x and what it publishes as further channels of y.

    So every law that cuts, pads, packs, reorders or differentiates x and y, [B, L, d_model + width of the values], does
    it to the shared values too.

    Args:
        mixer: publishes values, or reads values that are aligned with tokens.
    """

    def __init__(self, mixer: Mixer) -> None:
        given = aligned(mixer.reads())
        made = {name: shape for name, shape in mixer.publishes().items() if isinstance(shape, tuple)}
        width = max(sum(map(math.prod, shapes.values())) for shapes in (given, made))
        super().__init__(mixer.d_model + width, mixer)
        self.given, self.made = given, made

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        valid = ragged.valid(x.shape[1]) if ragged is not None else None
        widths = [self.last.d_model, *map(math.prod, self.given.values())]
        own, *values = x.split([*widths, x.shape[2] - sum(widths)], dim=-1)
        handed: dict[str, Any] = dict(shared or {})
        for (name, shape), value in zip(self.given.items(), values, strict=False):  # the rest is unused
            spoiled = value if valid is None else torch.where(valid[..., None], value, _GARBAGE)
            handed[name] = spoiled.unflatten(2, shape)
        before = state.parts[0] if isinstance(state, TupleState) else None
        y, after = self.last(own, before, ragged, handed)
        y = torch.cat([y, *(handed[name].flatten(2).to(y.dtype) for name in self.made)], dim=-1)
        y = torch.nn.functional.pad(y, (0, x.shape[2] - y.shape[2]))
        return y, None if state is None else TupleState((after,))


class Behind(Arranged):
    """A reader behind its producer, for values that are not aligned with tokens: nothing else can make them up.

    Args:
        producer: publishes what `reader` reads.
        reader: on trial.
    """

    def __init__(self, producer: Mixer, reader: Mixer) -> None:
        super().__init__(reader.d_model, producer, reader)

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        before = state.parts if isinstance(state, TupleState) else (None, None)
        handed: dict[str, Any] = dict(shared or {})
        y, first = self.layers[0](x, before[0], ragged, handed)
        more, second = self.layers[1](x, before[1], ragged, handed)
        return y + more, None if state is None else TupleState((first, second))
