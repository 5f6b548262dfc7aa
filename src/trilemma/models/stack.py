"""Blocks and stacks: lists of sub-layers that all obey the mixer's contract, the feed-forward layer included."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.config import MixerSpec, ModelConfig
from trilemma.errors import CapabilityError, ConfigError
from trilemma.mixers.base import Mixer, Published, Shared
from trilemma.mixers.build import build_from_spec, build_mixer
from trilemma.mixers.cross_attention import CrossAttention
from trilemma.nn.dropout import Dropout
from trilemma.nn.feedforward import FeedForward
from trilemma.nn.norms import make_norm
from trilemma.ragged import Ragged
from trilemma.registry import mixer_class
from trilemma.state import State, TupleState


class SubLayer(nn.Module):
    """A part with its norm, dropout and residual.

    Pre-norm: x + Dropout(part(Norm(x))). Post-norm, as in the paper: Norm(x + Dropout(part(x))).
    """

    def __init__(self, part: Mixer | FeedForward, config: ModelConfig) -> None:
        super().__init__()
        self.part = part
        self.norm = make_norm(config.norm, config.d_model, config.norm_epsilon, config.bias)
        self.dropout = Dropout(config.dropout)
        self.pre = config.norm_position == "pre"

    def forward(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, State | None]:
        """[B, L, d_model] -> the same shape, and the part's State."""
        y, after = self.part(self.norm(x) if self.pre else x, state, ragged, shared)
        x = x + self.dropout(y)
        return x if self.pre else self.norm(x), after


class Block(nn.Module):
    """One layer: mixer, cross-attention in a decoder that has an encoder, feed-forward unless switched off."""

    def __init__(self, parts: list[Mixer | FeedForward], config: ModelConfig) -> None:
        super().__init__()
        self.parts = nn.ModuleList(SubLayer(part, config) for part in parts)

    def contents(self) -> list[Mixer | FeedForward]:
        """The parts without their residuals."""
        return [layer.part for layer in self.parts if isinstance(layer, SubLayer)]

    def forward(
        self, x: Tensor, state: TupleState | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, TupleState | None]:
        """[B, L, d_model] -> the same shape, and the parts' States."""
        states = state.parts if state is not None else (None,) * len(self.parts)
        after = []
        for layer, before in zip(self.parts, states, strict=True):
            x, new = layer(x, before, ragged, shared)
            after.append(new)
        return x, TupleState(tuple(after)) if state is not None else None


class Stack(nn.Module):
    """Blocks in order, what they share, and the final norm of a pre-norm stack.

    Shared are learned tensors (`Mixer.shared_inputs`), which live here, and values that a layer makes for later ones
    (`Mixer.publishes`), which live as long as the call.
    """

    def __init__(self, blocks: list[Block], config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        final = config.norm_position == "pre"
        self.norm = make_norm(config.norm, config.d_model, config.norm_epsilon, config.bias) if final else None
        self.shared = nn.ParameterDict()
        for mixer in self.mixers():
            for name, shape in mixer.shared_inputs().items():
                known = self.shared.get(name)
                if known is not None and tuple(known.shape) != shape:
                    raise ConfigError(f'layers disagree on the shape of the shared "{name}": {shape}')
                if known is None:
                    self.shared[name] = nn.Parameter(torch.zeros(shape))
        self._check_values()

    def _check_values(self) -> None:
        """Each value that a layer reads is made by exactly one layer before it, and is what the reader expects."""
        made: dict[str, Published] = {}
        for mixer in self.mixers():
            for name, kind in mixer.reads().items():
                if name not in made:
                    raise ConfigError(f'mixer "{mixer.name}" reads "{name}", which no layer before it publishes')
                if made[name] != kind:
                    raise ConfigError(f'mixer "{mixer.name}" reads "{name}" as {kind}; it is published as {made[name]}')
            for name, kind in mixer.publishes().items():
                if name in made or name in self.shared:
                    raise ConfigError(f'mixer "{mixer.name}" publishes "{name}", which the stack has already')
                made[name] = kind

    def forward(
        self, x: Tensor, state: TupleState | None = None, ragged: Ragged | None = None
    ) -> tuple[Tensor, TupleState | None]:
        """Runs all blocks.

        Args:
            x: [B, L, d_model].
            state: one TupleState a block, from `init_state` or `memories`; None: whole sequences without memory.
            ragged: the call.
        """
        shared: Shared = dict(self.shared.items())
        states = state.parts if state is not None else (None,) * len(self.blocks)
        after = []
        for block, before in zip(self.blocks, states, strict=True):
            x, new = block(x, before, ragged, shared)
            after.append(new)
        if self.norm is not None:
            x = self.norm(x)
        return x, TupleState(tuple(after)) if state is not None else None

    def parts(self) -> list[list[Mixer | FeedForward]]:
        """The parts of each block."""
        return [block.contents() for block in self.blocks if isinstance(block, Block)]

    def mixers(self) -> list[Mixer]:
        """All mixers, cross-attention included."""
        return [part for parts in self.parts() for part in parts if isinstance(part, Mixer)]

    def init_state(
        self,
        rows: int,
        memory: TupleState | None,
        capacity: int | None,
        rewind: int,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> TupleState:
        """Empty States for all parts; the cross-attentions' come from `memory`."""
        layers = []
        for i, parts in enumerate(self.parts()):
            given = memory.parts[i] if memory is not None else None
            states: list[State | None] = []
            for j, part in enumerate(parts):
                held = given.parts[j] if isinstance(given, TupleState) else None
                states.append(held if held is not None else part.init_state(rows, capacity, rewind, dtype, device))
            layers.append(TupleState(tuple(states)))
        return TupleState(tuple(layers))

    def memories(self, memory: Tensor, lengths: Tensor | None) -> TupleState:
        """The State in which each cross-attention finds its memory; all other parts have none.

        Args:
            memory: [S, K, d_model] the encoder's output. lengths: [S] or None.
        """
        layers: list[State | None] = []
        for parts in self.parts():
            held: list[State | None] = [
                part.remember(memory, lengths) if isinstance(part, CrossAttention) else None for part in parts
            ]
            layers.append(TupleState(tuple(held)))
        return TupleState(tuple(layers))

    def flops(self, length: int, context: int = 0, memory: int = 0) -> int:
        """Forward FLOPs of `length` new tokens of one row after `context`, reading `memory` positions."""
        return sum(
            part.flops(length, memory if isinstance(part, CrossAttention) else context)
            for parts in self.parts()
            for part in parts
        )

    def memory_flops(self, length: int) -> int:
        """FLOPs of `memories` for one source."""
        return sum(mixer.memory_flops(length) for mixer in self.mixers() if isinstance(mixer, CrossAttention))

    def state_bytes(self, context: int, memory: int, dtype: torch.dtype) -> int:
        """Payload bytes of one row's States."""
        return sum(
            part.state_bytes(memory if isinstance(part, CrossAttention) else context, dtype)
            for parts in self.parts()
            for part in parts
        )


def make_stack(config: ModelConfig, role: str) -> Stack:
    """A stack for a role: "encoder" (both directions), "decoder" (causal) or "cross" (causal, with a memory)."""
    encoder = role == "encoder"
    layers = config.num_layers
    if encoder and config.layout == "encoder-decoder":
        layers = config.encoder_layers or config.num_layers
    spec = config.mixer
    if encoder and config.encoder_mixer is not None:
        spec = config.encoder_mixer
    pattern = spec if isinstance(spec, list) else [spec]
    blocks = []
    published: set[str] = set()
    for i in range(layers):
        mixer = _mixer(pattern[i % len(pattern)], config, encoder)
        if published & mixer.publishes().keys():
            mixer = _mixer(pattern[i % len(pattern)], config, encoder, producer=False)
        published |= mixer.publishes().keys()
        parts: list[Mixer | FeedForward] = [mixer]
        if role == "cross":
            parts.append(_cross_mixer(config))
        if config.feed_forward:
            parts.append(FeedForward(config.d_model, config.d_ff or 4 * config.d_model, config.activation, config.bias))
        blocks.append(Block(parts, config))
    return Stack(blocks, config)


def _mixer(spec: MixerSpec, config: ModelConfig, encoder: bool, producer: bool = True) -> Mixer:
    """One mixer; in an encoder a causal one runs in two directions."""
    name = spec if isinstance(spec, str) else str(spec["name"])
    able = mixer_class(name).capabilities
    if encoder and able.causal and not able.bidirectional:
        return build_mixer("bidirectional", config.d_model, False, config.num_heads, inner=spec, producer=producer)
    if able.reads_memory:
        raise CapabilityError(f'model.mixer: "{name}" reads a memory; it is for model.cross_mixer')
    mixer = build_from_spec(spec, config.d_model, not encoder, config.num_heads, producer)
    if config.prefix and not encoder and not mixer.capabilities.prefix:
        raise CapabilityError(f'model.prefix: mixer "{name}" cannot read a prefix in both directions')
    return mixer


def _cross_mixer(config: ModelConfig) -> CrossAttention:
    """The part of a decoder layer that reads the encoder."""
    cross = build_from_spec(config.cross_mixer, config.d_model, True, config.num_heads)
    if not isinstance(cross, CrossAttention):
        raise CapabilityError(f'model.cross_mixer: mixer "{cross.name}" reads no memory')
    return cross
