"""A tiny recurrent model with random weights: every prefix has its own distribution, and rows never meet.

`scale` sharpens the distributions; `eos_bias` makes end-of-sequence likelier or, at -inf, impossible.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.decode import Request, length_penalty
from trilemma.state import State

PAD, BOS, EOS = 0, 1, 2


@dataclass
class HiddenState(State):
    hidden: Tensor  # [rows, width]


class TinyModel:
    def __init__(
        self,
        vocab: int = 8,
        width: int = 6,
        seed: int = 0,
        scale: float = 3.0,
        eos_bias: float = 0.0,
        dtype: torch.dtype = torch.float64,
        leak: float = 0.0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype)
        self.recurrent = torch.randn(width, width, generator=generator, dtype=torch.float64).to(dtype)
        self.output = (scale * torch.randn(width, vocab, generator=generator, dtype=torch.float64)).to(dtype)
        self.bias = torch.zeros(vocab, dtype=dtype)
        self.bias[EOS] = eos_bias
        self.leak = leak  # a planted defect: rows see the batch's mean
        self.rows_stepped = 0
        self.steps = 0

    def _advance(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        new = torch.tanh(hidden @ self.recurrent + self.embedding[tokens])
        return new + self.leak * new.mean(0, keepdim=True)

    def _read(self, hidden: Tensor, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        for position in range(tokens.shape[1]):
            new = self._advance(hidden, tokens[:, position])
            if lengths is not None:
                new = torch.where((position < lengths)[:, None], new, hidden)
            hidden = new
        return hidden

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
    ) -> tuple[Tensor, HiddenState]:
        hidden = torch.zeros(inputs.shape[0], self.recurrent.shape[0], dtype=self.recurrent.dtype)
        if source is not None:
            hidden = self._read(hidden, source, source_lengths)
        hidden = self._read(hidden, inputs, lengths)
        return hidden @ self.output + self.bias, HiddenState(hidden)

    def step(self, tokens: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, HiddenState]:
        assert isinstance(state, HiddenState)
        assert tokens.shape[0] == state.hidden.shape[0], "as many tokens as rows"
        self.rows_stepped += tokens.shape[0]
        self.steps += 1
        hidden, outputs = state.hidden, []
        for position in range(tokens.shape[1]):
            hidden = self._advance(hidden, tokens[:, position])
            outputs.append(hidden @ self.output + self.bias)
        state.hidden.copy_(hidden)  # in place, as the contract allows without autograd
        return torch.stack(outputs, dim=1), state

    def log_probability(self, request: Request, tokens: list[int]) -> float:
        """Of `tokens` (which may end with end-of-sequence), alone and from scratch."""
        total = 0.0
        source = None if request.source is None else torch.tensor([request.source], dtype=torch.long)
        for position, token in enumerate(tokens):
            prompt = torch.tensor([request.prompt + tokens[:position]])
            logits, _ = self.prefill(prompt, source=source)
            total += float(torch.log_softmax(logits[0].double(), -1)[token])
        return total


def all_outputs(model: TinyModel, request: Request, alpha: float, vocab: int) -> list[tuple[float, list[int]]]:
    """Every finished output within the limit, as (score, tokens without end-of-sequence), best first."""
    outputs = []
    others = [token for token in range(vocab) if token != EOS]
    for length in range(request.limit):
        for tokens in itertools.product(others, repeat=length):
            total = model.log_probability(request, [*tokens, EOS])
            outputs.append((total / length_penalty(length + 1, alpha), list(tokens)))
    return sorted(outputs, key=lambda pair: -pair[0])


def random_requests(count: int, seed: int = 0, vocab: int = 8, limit: int = 12, encoder: bool = True) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for index in range(count):
        length = int(torch.randint(0, 9, (1,), generator=generator))
        tokens = torch.randint(3, vocab, (length,), generator=generator).tolist()
        if encoder:
            requests.append(Request([BOS], limit, source=[*tokens, EOS], index=index))
        else:
            requests.append(Request([BOS, *tokens, 4], limit, index=index))
    return requests


def close(first: float, second: float, tolerance: float = 1e-9) -> bool:
    return math.isclose(first, second, rel_tol=tolerance, abs_tol=tolerance)
