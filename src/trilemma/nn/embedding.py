"""Token embeddings with absolute positions: the stateful first layer of every model.

Legend: B rows, L length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trilemma.errors import CapabilityError, ConfigError, LengthError
from trilemma.nn.dropout import Dropout
from trilemma.nn.norms import make_norm
from trilemma.nn.positions import sinusoid
from trilemma.ragged import Ragged, call_positions
from trilemma.state import State, updated


@dataclass
class PositionState(State):
    """How many tokens each row has read.

    Attributes:
        lengths: [B].
        bound: at least max(lengths), known to Python.
    """

    lengths: Tensor
    bound: int

    def rewind(self, counts: Tensor) -> PositionState:
        """Steps back."""
        if bool((counts < 0).any()) or bool((counts > self.lengths).any()):
            raise CapabilityError("no more tokens can be taken back than were read")
        return replace(self, lengths=updated(self.lengths, self.lengths - counts))


class Embedding(nn.Module):
    """Tokens (and token types) to vectors, plus absolute positions, scale, norm and dropout.

    Args:
        vocab_size: number of tokens.
        d_model: width.
        positions: none, sinusoidal (the paper's layout), sinusoidal-t2t (tensor2tensor's), sinusoidal-halves (the
            paper's angles, all sines before all cosines, as in Marian) or learned.
        max_length: longest sequence; needed by learned positions, a limit for the others if given.
        scale: multiplies the token vectors by sqrt(d_model) ("Attention Is All You Need", section 3.4).
        norm: layernorm over the sum (BERT), or None.
        token_types: number of token types (BERT), 0 for none.
        dropout: on the result.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        positions: str = "sinusoidal",
        max_length: int | None = None,
        scale: bool = True,
        norm: bool = False,
        token_types: int = 0,
        dropout: float = 0.0,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        if positions == "learned" and max_length is None:
            raise ConfigError("model.positions: learned needs model.max_length")
        if positions.startswith("sinusoidal") and d_model % 2:
            raise ConfigError(f"model.positions: {positions} needs an even d_model, found {d_model}")
        self.d_model, self.positions, self.max_length = d_model, positions, max_length
        self.factor = math.sqrt(d_model) if scale else 1.0
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.types = nn.Embedding(token_types, d_model) if token_types else None
        self.learned = nn.Embedding(max_length, d_model) if positions == "learned" and max_length else None
        self.norm = make_norm("layernorm", d_model, epsilon) if norm else None
        self.dropout = Dropout(dropout)
        deviation = d_model**-0.5 if scale else 0.02
        for table in (self.tokens, self.types, self.learned):
            if table is not None:
                nn.init.normal_(table.weight, std=deviation)

    def init_state(self, rows: int, device: torch.device | str) -> PositionState:
        """Nothing read yet."""
        return PositionState(torch.zeros(rows, dtype=torch.int64, device=device), 0)

    def forward(
        self,
        ids: Tensor,
        state: PositionState | None = None,
        ragged: Ragged | None = None,
        types: Tensor | None = None,
    ) -> tuple[Tensor, PositionState | None]:
        """Embeds a call.

        Args:
            ids: [B, L] int64. types: [B, L] int64 or None for type 0.
            state, ragged: as for a mixer.

        Returns:
            [B, L, d_model], and the State to go on with.

        Raises:
            LengthError: positions beyond max_length.
        """
        length = ids.shape[1]
        before = 0 if state is None else state.bound
        if self.max_length is not None and before + length > self.max_length:
            longest = before + length
            if state is not None:  # the bound may be loose: look at the rows themselves
                added = length if ragged is None or ragged.lengths is None else ragged.lengths
                longest = int((state.lengths + added).max())
            elif ragged is not None and ragged.lengths is not None:
                longest = int(ragged.lengths.max())
            if longest > self.max_length:
                raise LengthError(
                    f"a sequence of {longest} tokens is longer than the model's {self.max_length} positions; "
                    "shorten it, or train with a larger model.max_length"
                )
        x = self.tokens(ids) * self.factor if self.factor != 1.0 else self.tokens(ids)
        if self.types is not None:
            x = x + self.types(torch.zeros_like(ids) if types is None else types)
        if self.positions != "none":
            places = call_positions(length, ragged, 0 if state is None else state.lengths, ids.device)
            x = x + self._encoding(places, x.dtype)
        if self.norm is not None:
            x = self.norm(x)
        x = self.dropout(x)
        if state is None:
            return x, None
        added = length if ragged is None or ragged.lengths is None else ragged.lengths
        return x, PositionState(updated(state.lengths, state.lengths + added), state.bound + length)

    def _encoding(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        if self.learned is not None and self.max_length is not None:
            encoded: Tensor = self.learned(places.clamp(max=self.max_length - 1))  # only padding can lie beyond
            return encoded
        layout = "tensor2tensor" if self.positions == "sinusoidal-t2t" else "paper"
        encoded = sinusoid(places, self.d_model, layout, dtype)
        if self.positions == "sinusoidal-halves":
            encoded = encoded.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return encoded
