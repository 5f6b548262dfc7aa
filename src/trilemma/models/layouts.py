"""The three layouts of the Transformer, with any mixer in place of attention.

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
from trilemma.nn.feedforward import activation_function
from trilemma.nn.linear import HeldInt8Linear, Int8Embedding, PackedInt8Linear, PackedLinear
from trilemma.nn.norms import make_norm
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
        self.embedding = _embedding(config)
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
        ragged = _ragged(inputs, lengths, prefix if self.config.prefix else None, segments)
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
        ragged = _ragged(source, source_lengths, prefix)
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
        ragged = _ragged(inputs, lengths, prefix if self.config.prefix else None)
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
        hidden, after = self._advance(tokens, state, _ragged(tokens, lengths, None))
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


class DecoderOnly(SequenceModel):
    """A causal stack; with `config.prefix` the source part is read in both directions."""

    def _role(self) -> str:
        return "decoder"


class EncoderDecoder(SequenceModel):
    """An encoder that reads the source in both directions, and a decoder that attends to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.source_embedding = self.embedding if config.share_embeddings is True else _embedding(config)
        if config.share_embeddings == "tokens":
            self.source_embedding.tokens = self.embedding.tokens
        self.encoder = make_stack(config, "encoder")

    def _role(self) -> str:
        return "cross"

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """[B, S] tokens -> [B, S, d_model] the encoder's output, zero at padding."""
        ragged = _ragged(source, source_lengths)
        x, _ = self.source_embedding(source, None, ragged)
        encoded: Tensor = self.encoder(x, None, ragged)[0]
        return zero_padding(encoded, ragged.valid(source.shape[1]) if ragged is not None else None)

    def _packs(self) -> bool:
        return False

    def _memory(self, rows: int, source: Tensor | None, source_lengths: Tensor | None) -> TupleState:
        if source is None:
            raise CapabilityError("an encoder-decoder model needs a source")
        if len(source) != rows:
            raise ValueError(
                f"{rows} rows need as many sources, found {len(source)}; State.select gives a source more rows"
            )
        return self.stack.memories(self.encode(source, source_lengths), source_lengths)

    def stacks(self) -> list[Stack]:
        """Encoder and decoder."""
        return [self.encoder, self.stack]

    def flops(self, length: int, source_length: int = 0) -> int:
        """Encoder layers on the source, decoder layers on the target, cross-attention's keys and values on the
        source."""
        encoder = self.encoder.flops(source_length) + self.stack.memory_flops(source_length)
        return encoder + self.stack.flops(length, 0, source_length) + self._head_flops(length)


class HeadTransform(nn.Module):
    """The layer that BERT has before its output (Devlin et al. 2019, arXiv 1810.04805).

    A classifier's is tanh(W x + b), the pooler; a masked language model's is Norm(activation(W x + b)).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)
        classifier = config.num_labels is not None
        self.function = torch.tanh if classifier else activation_function(config.activation)
        self.norm = None if classifier else make_norm(config.norm, config.d_model, config.norm_epsilon, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> the same shape."""
        hidden: Tensor = self.function(self.dense(x))
        return hidden if self.norm is None else self.norm(hidden)


class EncoderOnly(SequenceModel):
    """A stack that reads in both directions: a masked language model, or with `num_labels` a classifier.

    A classifier of tokens (`pooling` "none") has a plain output, as BERT's for spans and tags, never a transform.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        transforms = config.head_transform and not self._labels_tokens()
        self.head_transform = HeadTransform(config) if transforms else None

    def _role(self) -> str:
        return "encoder"

    def _output(self, config: ModelConfig) -> nn.Linear | None:
        if config.num_labels is None:
            return super()._output(config)
        output = nn.Linear(config.d_model, config.num_labels)
        nn.init.normal_(output.weight, std=0.02)
        nn.init.zeros_(output.bias)
        return output

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over labels [B, num_labels] for a classifier, [B, L, num_labels] for one of tokens, else over the
        vocabulary."""
        if self.head_transform is not None:
            hidden = self.head_transform(hidden)
        if self.config.num_labels is None:
            return super().head(hidden)
        assert self.output is not None
        logits: Tensor = self.output(hidden)
        return logits

    def _labels_tokens(self) -> bool:
        return self.config.num_labels is not None and self.config.pooling == "none"

    def _packs(self) -> bool:
        return self.config.num_labels is None

    def _what(self) -> str:
        return super()._what() if self.config.num_labels is None else "a classifier"

    def _memory(self, rows: int, source: Tensor | None, source_lengths: Tensor | None) -> None:
        if source is not None:
            raise CapabilityError("an encoder-only model reads its inputs; it has no separate source")

    def _pooled(self, hidden: Tensor, ragged: Ragged | None) -> Tensor:
        if self.config.num_labels is None or self._labels_tokens():
            return hidden
        if self.config.pooling == "first":
            return hidden[:, 0]
        rows, length, _ = hidden.shape
        valid = ragged.valid(length) if ragged is not None else None
        count = torch.full((rows, 1), length, device=hidden.device) if valid is None else valid.sum(1, keepdim=True)
        return zero_padding(hidden, valid).sum(1) / count.clamp(min=1).to(hidden.dtype)

    def begin(
        self,
        rows: int,
        *,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        capacity: int | None = None,
        rewind: int = 0,
    ) -> ModelState:
        """Refused: an encoder reads whole sequences."""
        raise CapabilityError("an encoder-only model cannot generate; choose layout decoder-only or encoder-decoder")

    def _head_flops(self, length: int) -> int:
        width = self.config.d_model
        transform = 2 * width * width if self.head_transform is not None else 0
        if self.config.num_labels is None:
            return super()._head_flops(length) + length * transform
        return (2 * width * self.config.num_labels + transform) * (length if self._labels_tokens() else 1)


def _embedding(config: ModelConfig) -> Embedding:
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


def _ragged(
    tokens: Tensor, lengths: Tensor | None, prefix: Tensor | None = None, segments: Tensor | None = None
) -> Ragged | None:
    if lengths is None and prefix is None and segments is None:
        return None
    if lengths is not None and lengths.shape != tokens.shape[:1]:
        raise ValueError(f"lengths {tuple(lengths.shape)} must be [batch] for tokens {tuple(tokens.shape)}")
    return Ragged(lengths, segments, prefix)
