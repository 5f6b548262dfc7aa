"""What all layouts are: whole sequences to hidden vectors to logits, and decoding from a State.

Legend: B rows, L length, S source length, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilemma.config import ModelConfig
from trilemma.errors import CapabilityError, ConfigError
from trilemma.mixers.base import Mixer
from trilemma.models.stack import Stack, make_stack
from trilemma.nn.embedding import Embedding, PositionState
from trilemma.nn.linear import HeldInt8Linear, Int4Linear, Int8Embedding, PackedInt8Linear, PackedLinear
from trilemma.ragged import Ragged, zero_padding
from trilemma.state import State, TupleState


@dataclass
class ModelState(State):
    """What a model has read: positions, and the States of all its layers."""

    positions: PositionState
    layers: TupleState


class SequenceModel(nn.Module, ABC):
    """Base of the layouts: embedding, stack, head.

    Attributes:
        config: the architecture, resolved.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size is not set; it comes from the tokenizer")
        self.config = config
        self.embedding = make_embedding(config)
        self.stack = make_stack(config, self._role())
        self.output = self._output(config)
        over_vocabulary = config.logit_bias and config.num_labels is None
        self.logit_bias = nn.Parameter(torch.zeros(config.vocab_size)) if over_vocabulary else None
        self.projection: nn.Module | None = None  # of `quantize` and `pack`, in place of the head's product

    @abstractmethod
    def _role(self) -> str:
        """The stack's role, see `make_stack`."""

    def _output(self, config: ModelConfig) -> nn.Linear | None:
        if config.tie_embeddings:
            return None
        assert config.vocab_size is not None
        output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(output.weight, std=config.d_model**-0.5)
        return output

    @property
    def layout(self) -> str:
        """encoder-decoder, decoder-only or encoder-only."""
        return self.config.layout

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and States: that of the weights, those in 8 bits apart."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden vectors [..., d_model]."""
        if self.projection is not None:
            logits: Tensor = self.projection(hidden)
            return logits
        weight = self.embedding.tokens.weight if self.output is None else self.output.weight
        return nn.functional.linear(hidden, weight, self.logit_bias)

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor | None = None,
        *,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        segments: Tensor | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        """Whole sequences, for training and scoring.

        Args:
            inputs: [B, L] tokens, right-padded; the decoder's, where there is an encoder.
            lengths: [B] valid tokens, None: all.
            source: [B, S] the encoder's tokens, for encoder-decoders. source_lengths: [B].
            prefix: [B] part read in both directions, for decoder-only models with `prefix`.
            segments: [B, L] packed rows, see `Ragged`.
            types: [B, L] token types.

        Returns:
            hidden [B, L, d_model] after the final norm; `head` makes logits of it. A classifier returns one vector a
            row, [B, d_model], unless its pooling is "none".

        Raises:
            CapabilityError: a missing or superfluous source, packed rows where the layout has none.
            ValueError: lengths or source of another number of rows.
        """
        if segments is not None and not self._packs():
            raise CapabilityError(f"packed rows hold several sequences; {self._what()} reads one sequence a row")
        memory = self._memory(len(inputs), source, source_lengths)
        ragged = ragged_of(inputs, lengths, prefix if self.config.prefix else None, segments)
        x, _ = self.embedding(inputs, None, ragged, types)
        hidden, _ = self.stack(x, memory, ragged)
        return self._pooled(hidden, ragged)

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """A text by itself: [B, S] tokens -> [B, S, d_model], after the final norm, zero at padding.

        An encoder-decoder's encoder reads it; another layout's only stack, with `config.prefix` in both directions.
        """
        prefix = None
        if self.config.prefix:
            prefix = source_lengths if source_lengths is not None else source.new_full((len(source),), source.shape[1])
        ragged = ragged_of(source, source_lengths, prefix)
        x, _ = self.embedding(source, None, ragged)
        encoded: Tensor = self.stack(x, None, ragged)[0]
        return zero_padding(encoded, ragged.valid(source.shape[1]) if ragged is not None else None)

    def _memory(self, rows: int, source: Tensor | None, source_lengths: Tensor | None) -> TupleState | None:
        """What the decoder's layers read of the source; None for a layout without an encoder."""
        if source is not None:
            raise CapabilityError(f"{self._what()} has no encoder: put the source before the target")
        return None

    def _packs(self) -> bool:
        """Whether rows may hold several sequences."""
        return True

    def _pooled(self, hidden: Tensor, ragged: Ragged | None) -> Tensor:
        """[B, L, d_model] -> what `head` reads."""
        return hidden

    def _what(self) -> str:
        return f"a{'n' if self.layout.startswith('e') else ''} {self.layout} model"

    def prefill(
        self,
        inputs: Tensor,
        lengths: Tensor | None = None,
        *,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        capacity: int | None = None,
        rewind: int = 0,
    ) -> tuple[Tensor, ModelState]:
        """Reads a prompt (and the source) and begins a State.

        Args:
            inputs: [B, L] the prompt, right-padded, at least one token a row.
            lengths, source, source_lengths, prefix: as in `forward`.
            capacity: tokens to reserve room for, prompt included; None: the State grows.
            rewind: tokens that `State.rewind` may take back.

        Returns:
            logits [B, V] after each row's last valid token, and the State.

        Raises:
            CapabilityError: an encoder-only model, a missing or superfluous source.
        """
        state = self.begin(len(inputs), source=source, source_lengths=source_lengths, capacity=capacity, rewind=rewind)
        ragged = ragged_of(inputs, lengths, prefix if self.config.prefix else None)
        hidden, state = self._advance(inputs, state, ragged)
        if lengths is None:
            last = hidden[:, -1]
        else:
            last = hidden[torch.arange(len(inputs), device=inputs.device), lengths - 1]
        return self.head(last), state

    def begin(
        self,
        rows: int,
        *,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        capacity: int | None = None,
        rewind: int = 0,
    ) -> ModelState:
        """A State that has read the source, if the layout has one, and no token."""
        return self._empty_state(rows, self._memory(rows, source, source_lengths), capacity, rewind)

    def step(self, tokens: Tensor, state: ModelState, lengths: Tensor | None = None) -> tuple[Tensor, ModelState]:
        """Reads more tokens.

        Args:
            tokens: [B, L], one or several a row, right-padded. lengths: [B] valid ones, 0 allowed; None: all.
            state: from `prefill`, `begin` or `step`; it is consumed.

        Returns:
            logits [B, L, V], and the State to go on with.
        """
        hidden, after = self._advance(tokens, state, ragged_of(tokens, lengths, None))
        return self.head(hidden), after

    def _advance(self, tokens: Tensor, state: ModelState, ragged: Ragged | None) -> tuple[Tensor, ModelState]:
        x, positions = self.embedding(tokens, state.positions, ragged)
        hidden, layers = self.stack(x, state.layers, ragged)
        return hidden, ModelState(positions, layers)

    def _empty_state(self, rows: int, memory: TupleState | None, capacity: int | None, rewind: int) -> ModelState:
        layers = self.stack.init_state(rows, memory, capacity, rewind, self.dtype, self.device)
        return ModelState(self.embedding.init_state(rows, self.device), layers)

    def stacks(self) -> list[Stack]:
        """All stacks."""
        return [self.stack]

    def mixers(self) -> list[Mixer]:
        """All mixers of all stacks."""
        return [mixer for stack in self.stacks() for mixer in stack.mixers()]

    def parameter_counts(self) -> dict[str, int]:
        """Counted weights: total, embedding (tables of tokens, positions, types, and an untied output), and the
        rest."""
        total = sum(parameter.numel() for parameter in self.parameters())
        total += sum(module.codes.numel() for module in self.modules() if isinstance(module, Int4Linear))  # two a byte
        again = PackedLinear | PackedInt8Linear | HeldInt8Linear
        if self.config.tie_embeddings and isinstance(self.projection, again):
            total -= self.projection.out_features * self.projection.in_features  # the table, in another form
        tables = [module for module in self.modules() if isinstance(module, nn.Embedding | Int8Embedding)]
        embedding = sum(parameter.numel() for module in tables for parameter in module.parameters())
        if not self.config.tie_embeddings and self.config.num_labels is None and self.config.vocab_size is not None:
            embedding += self.config.vocab_size * self.config.d_model
        return {"total": total, "embedding": embedding, "non_embedding": total - embedding}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay: vectors, embeddings, and what mixers declare."""
        names = {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
        for prefix, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                names.add(f"{prefix}.weight")
            if isinstance(module, Mixer):
                names |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
            if isinstance(module, Stack):
                names |= {f"{prefix}.shared.{name}" for name in module.shared}
        return names

    def flops(self, length: int, source_length: int = 0) -> int:
        """Forward FLOPs of one row's matrix products: `length` tokens, output head included, look-ups not."""
        return self.stack.flops(length) + self._head_flops(length)

    def _head_flops(self, length: int) -> int:
        assert self.config.vocab_size is not None
        return 2 * length * self.config.d_model * self.config.vocab_size

    def step_flops(self, context: int, source_length: int = 0) -> int:
        """Forward FLOPs of one more token after `context`."""
        return self.stack.flops(1, context, source_length) + self._head_flops(1)

    def state_bytes(self, context: int, source_length: int = 0, dtype: torch.dtype = torch.float32) -> int:
        """Payload bytes of one row's State after `context` tokens."""
        return self.stack.state_bytes(context, source_length, dtype)


def make_embedding(config: ModelConfig) -> Embedding:
    """Token embeddings with positions, as the configuration has them."""
    assert config.vocab_size is not None
    return Embedding(
        config.vocab_size,
        config.d_model,
        config.positions,
        config.max_length,
        config.embedding_scale,
        config.embedding_norm,
        config.token_types,
        config.dropout,
        config.norm_epsilon,
    )


def ragged_of(
    tokens: Tensor, lengths: Tensor | None, prefix: Tensor | None = None, segments: Tensor | None = None
) -> Ragged | None:
    """The description of a call on tokens [B, L]; None where every row is whole.

    Raises:
        ValueError: lengths that are not one for each row.
    """
    if lengths is None and prefix is None and segments is None:
        return None
    if lengths is not None and lengths.shape != tokens.shape[:1]:
        raise ValueError(f"lengths {tuple(lengths.shape)} must be [batch] for tokens {tuple(tokens.shape)}")
    return Ragged(lengths, segments, prefix)
