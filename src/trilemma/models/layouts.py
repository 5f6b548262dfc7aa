"""The three layouts of the Transformer, with any mixer in place of attention.

Legend: B rows, L length, S source length, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.config import ModelConfig
from trilemma.errors import CapabilityError
from trilemma.models.model import ModelState, SequenceModel, make_embedding, ragged_of
from trilemma.models.stack import Stack, make_stack
from trilemma.nn.feedforward import activation_function
from trilemma.nn.norms import make_norm
from trilemma.ragged import Ragged, zero_padding
from trilemma.state import TupleState


class DecoderOnly(SequenceModel):
    """A causal stack; with `config.prefix` the source part is read in both directions."""

    def _role(self) -> str:
        return "decoder"


class EncoderDecoder(SequenceModel):
    """An encoder that reads the source in both directions, and a decoder that attends to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.source_embedding = self.embedding if config.share_embeddings is True else make_embedding(config)
        if config.share_embeddings == "tokens":
            self.source_embedding.tokens = self.embedding.tokens
        self.encoder = make_stack(config, "encoder")

    def _role(self) -> str:
        return "cross"

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """[B, S] tokens -> [B, S, d_model] the encoder's output, zero at padding."""
        ragged = ragged_of(source, source_lengths)
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
