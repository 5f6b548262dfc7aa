"""How much of its source a decoder looks at when it predicts a token: cross-attention's weights.

Legend: R rows, H heads, L length, S source length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.config import DecodingConfig
from trilemma.decode.ensemble import Ensemble, members
from trilemma.errors import CapabilityError, ConfigError
from trilemma.mixers.base import MemoryMixer, Mixer
from trilemma.models import SequenceModel
from trilemma.ops.mixing import MixingCall, watched


@contextmanager
def listening(mixers: Sequence[Mixer]) -> Iterator[list[list[MixingCall]]]:
    """The calls of operators within the block, by mixer and in order."""
    heard: list[list[MixingCall]] = [[] for _ in mixers]
    begins: list[int] = []
    with watched() as calls:

        def before(module: nn.Module, given: Any) -> None:
            begins.append(len(calls))

        def after(own: list[MixingCall]) -> Any:
            return lambda module, given, result: own.extend(calls[begins.pop() :])

        hooks = [mixer.register_forward_pre_hook(before) for mixer in mixers]
        hooks += [mixer.register_forward_hook(after(own)) for mixer, own in zip(mixers, heard, strict=True)]
        try:
            yield heard
        finally:
            for hook in hooks:
                hook.remove()


def readers(model: SequenceModel) -> list[MemoryMixer]:
    """The parts of the decoder that read the source, layer by layer; none without an encoder."""
    return [part for parts in model.stack.parts() for part in parts if isinstance(part, MemoryMixer)]


def chosen_layer(layers: int, layer: int | None) -> int:
    """The index of `decoding.alignment_layer`; None: the last but one, whose weights align best (Garg et al. 2019).

    Raises:
        ConfigError: there is no such layer.
    """
    if layer is None:
        return max(0, layers - 2)
    if not 1 <= layer <= layers:
        raise ConfigError(f"decoding.alignment_layer={layer}: this model's decoder has the layers 1 to {layers}")
    return layer - 1


def over_heads(weights: Tensor, head: int | None) -> Tensor:
    """[R, H, L, S] -> [R, L, S]: the mean, or the head numbered from 1.

    Raises:
        ConfigError: there is no such head.
    """
    if head is None:
        return weights.mean(1)
    if not 1 <= head <= weights.shape[1]:
        raise ConfigError(f"decoding.alignment_head={head}: this layer has the heads 1 to {weights.shape[1]}")
    return weights[:, head - 1]


def cross_weights(call: MixingCall, rows: int) -> Tensor:
    """[R, H, L, S] attention over the memory: the operator run on the identity instead of on values.

    Rows of one source may have come side by side, as more queries of it (`Memory.group`).
    """
    values = call.values
    identity = torch.eye(values.shape[2], dtype=values.dtype, device=values.device).expand(*values.shape[:2], -1, -1)
    weights: Tensor = call.operator(**call.arguments | {call.argument: identity})
    heads, source = weights.shape[1], weights.shape[3]
    return weights.transpose(1, 2).reshape(rows, -1, heads, source).transpose(1, 2)


class Inattentive:
    """Nobody looks.

    Attributes:
        weights: [R, S] what each row looked at in its last call, padding of the source 0; here S = 0.
    """

    weights: Tensor

    @contextmanager
    def looking(self, rows: int, lengths: Tensor | None = None) -> Iterator[None]:
        """Around one call of a model with `rows` rows; `lengths` [R] are the valid tokens of its input, None: all."""
        yield
        self.weights = torch.zeros(rows, 0)


class Attentive(Inattentive):
    """Looks at one layer's cross-attention when a token is predicted; the members of an ensemble are averaged.

    Raises:
        CapabilityError: a model without cross-attention. ConfigError: no such layer or head.
    """

    def __init__(self, model: object, layer: int | None, head: int | None) -> None:
        if not isinstance(model, (SequenceModel, Ensemble)) or not all(readers(one) for one in members(model)):
            raise CapabilityError(
                "decoding.coverage_penalty counts cross-attention, which only an encoder-decoder has; set it to 0"
            )
        found = [readers(one) for one in members(model)]
        self.mixers = [mixers[chosen_layer(len(mixers), layer)] for mixers in found]
        self.head = head

    @contextmanager
    def looking(self, rows: int, lengths: Tensor | None = None) -> Iterator[None]:
        """See `Inattentive`."""
        with listening(self.mixers) as heard:
            yield
        mean = torch.stack([over_heads(cross_weights(calls[0], rows), self.head) for calls in heard]).mean(0)
        last = torch.full((rows,), mean.shape[1], device=mean.device) if lengths is None else lengths
        self.weights = mean[torch.arange(rows, device=mean.device), last - 1]


def observer(model: object, config: DecodingConfig) -> Inattentive:
    """Who looks while a beam decodes: somebody only where a coverage penalty asks for it."""
    if not config.coverage_penalty:
        return Inattentive()
    return Attentive(model, config.alignment_layer, config.alignment_head)
