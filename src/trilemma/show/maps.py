"""Mixing matrices of a model's layers.

Every mixer that stands on an operator linear in its values has one for each head: attention's weights, and the matrix
that a linear recurrence stands for (`trilemma.ops.mixing`).

Legend: H heads, L length, K positions that values come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.mixers.base import MemoryMixer, Mixer
from trilemma.mixers.bidirectional import Bidirectional
from trilemma.models import SequenceModel
from trilemma.ops.mixing import MixingCall, watched
from trilemma.show.reading import Reading


@dataclass(frozen=True)
class Map:
    """How one layer mixes.

    Attributes:
        stack: encoder or decoder. layer: from 1.
        mixer: its name, with the direction where there are two.
        operator: what mixes; several a layer are numbered.
        columns: where values come from: "inputs", "source" or "blocks" (a part of the input, or the mixer's own pieces
            of it).
        matrix: [H, L, K]; None for a mixer that has none.
        error: the largest difference of M v from what the layer computed, in parts of its largest value.
    """

    stack: str
    layer: int
    mixer: str
    operator: str = ""
    columns: str = "inputs"
    matrix: Tensor | None = None
    error: float = 0.0

    @property
    def title(self) -> str:
        """Which layer this is, in words."""
        operator = f" ({self.operator})" if self.operator else ""
        return f"{self.stack} layer {self.layer}: {self.mixer}{operator}"

    @property
    def file(self) -> str:
        """Its file's stem."""
        return "-".join([self.stack, f"{self.layer:02d}", *f"{self.mixer} {self.operator}".split()])


@torch.no_grad()
def collect(model: SequenceModel, reading: Reading, layers: set[int] | None = None) -> list[Map]:
    """The maps of a model for one reading, in the order of its layers; several where a layer mixes several times.

    Args:
        model: in evaluation mode.
        layers: numbers from 1; None: all.
    """
    device = next(model.parameters()).device
    seen: list[tuple[_Place, list[MixingCall]]] = []
    with watched() as calls:
        hooks = []
        for place in _places(model):
            if layers is None or place.layer in layers:
                hooks += _watch(place, calls, seen)
        try:
            model(**reading.tensors(device))
        finally:
            for hook in hooks:
                hook.remove()
    sizes = {"inputs": len(reading.inputs), "source": len(reading.source or ())}
    return [found for place, own in seen for found in _maps(place, own, sizes)]


@dataclass(frozen=True)
class _Place:
    """A mixer and where it stands; `turned`: it reads the tokens from the last to the first."""

    stack: str
    layer: int
    label: str
    mixer: Mixer
    turned: bool = False


def _places(model: SequenceModel) -> Iterator[_Place]:
    stacks = model.stacks()
    for stack in stacks:
        encodes = stack is not model.stack or model.layout == "encoder-only"
        for number, parts in enumerate(stack.parts(), start=1):
            for part in parts:
                if not isinstance(part, Mixer):
                    continue
                place = _Place("encoder" if encodes else "decoder", number, part.name, part)
                if isinstance(part, Bidirectional):
                    yield replace(place, label=f"{part.ahead.name} ahead", mixer=part.ahead)
                    yield replace(place, label=f"{part.back.name} back", mixer=part.back, turned=True)
                else:
                    yield place


def _watch(
    place: _Place, calls: list[MixingCall], seen: list[tuple[_Place, list[MixingCall]]]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that write down which calls a mixer made."""
    begins: list[int] = []

    def before(module: nn.Module, given: Any) -> None:
        begins.append(len(calls))

    def after(module: nn.Module, given: Any, result: Any) -> None:
        seen.append((place, calls[begins.pop() :]))

    return [place.mixer.register_forward_pre_hook(before), place.mixer.register_forward_hook(after)]


def _maps(place: _Place, calls: list[MixingCall], sizes: dict[str, int]) -> Iterator[Map]:
    blank = Map(place.stack, place.layer, place.label)
    calls = [call for call in calls if call.values.shape[2]]  # a short text has no compressed blocks yet
    if not calls:
        yield blank
    for number, call in enumerate(calls, start=1):
        matrix = call.matrix()
        error = call.error(matrix)
        columns = "source" if isinstance(place.mixer, MemoryMixer) else "inputs"
        rows = sizes["source" if place.stack == "encoder" and sizes["source"] else "inputs"]
        wide = sizes["source"] if columns == "source" else rows
        tokens = _of_tokens(matrix[0], rows, wide)
        if tokens.shape[2] != wide:
            columns = "blocks"
        if place.turned:
            tokens = tokens.flip(1, 2)
        operator = call.name if len(calls) == 1 else f"{call.name} {number}"
        yield replace(blank, operator=operator, columns=columns, matrix=tokens.cpu(), error=error)


def _of_tokens(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """[H, L, K] where an operator handles several rows a token (Mamba-3's ranks): their sums."""
    _, length, wide = matrix.shape
    if length != rows and length % rows == 0:
        matrix = matrix.unflatten(1, (rows, -1)).sum(2)
    if wide != columns and wide % columns == 0:
        matrix = matrix.unflatten(2, (columns, -1)).sum(3)
    return matrix
