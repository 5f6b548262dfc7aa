"""What decoding is asked for and what it gives back, in token ids.

References: Wu et al. 2016, "Google's Neural Machine Translation System" (arXiv 1609.08144), equation 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from trilemma.errors import TrilemmaError
from trilemma.state import State

StateType = TypeVar("StateType", bound=State)

NOT_A_NUMBER = (
    "the model's output is not a number (NaN or infinite): its weights are damaged or the precision is too low; "
    "try --dtype float32"
)


def require_numbers(values: Tensor) -> Tensor:
    """The values, none of which is NaN.

    Raises:
        TrilemmaError: one is.
    """
    if bool(values.isnan().any()):
        raise TrilemmaError(NOT_A_NUMBER)
    return values


@dataclass(frozen=True)
class Phrase:
    """Words that an output must contain, as tokens.

    Attributes:
        tokens: how they are written anywhere.
        first: how they are written at the very beginning, if that is another way (no space before them), or None.
    """

    tokens: tuple[int, ...]
    first: tuple[int, ...] | None = None

    def ways(self) -> list[tuple[tuple[int, ...], bool]]:
        """Each way, and whether it holds at the beginning only."""
        return [(self.tokens, False), *([] if self.first is None else [(self.first, True)])]


@dataclass(frozen=True)
class Request:
    """One input to decode.

    Attributes:
        prompt: tokens that the decoder has already got, at least one: `[bos]` for an encoder-decoder, the whole prompt
            for a decoder-only model.
        limit: most new tokens, end-of-sequence counted.
        source: tokens of the encoder's input, or None for a decoder-only model.
        prefix: number of leading prompt tokens that see each other, or None for a causal model.
        index: the input's number. It keys the random draws, so that batch-mates change no sample.
        forced: tokens that the output must begin with, fewer than `limit`.
        phrases: what the output must contain (beam search only).
    """

    prompt: list[int]
    limit: int
    source: list[int] | None = None
    prefix: int | None = None
    index: int = 0
    forced: tuple[int, ...] = ()
    phrases: tuple[Phrase, ...] = ()

    def __post_init__(self) -> None:
        assert self.prompt, "a prompt holds at least one token"
        assert self.limit >= 1, "at least one new token"
        assert len(self.forced) < self.limit, "room for what is forced, and an end"

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads before the first new one."""
        return len(self.prompt) + len(self.source or ())


@dataclass(frozen=True)
class Hypothesis:
    """One output.

    Attributes:
        tokens: the new tokens, without end-of-sequence.
        log_probability: natural log-probability under the model (temperature 1, nothing filtered), of `tokens` and, if
            `finished`, of end-of-sequence.
        score: `log_probability / length_penalty(length)`, plus the coverage penalty if there is one: what beams are
            ranked by.
        finished: end-of-sequence was produced; False: the length limit cut the output.
        margin: smallest difference (in log-probability; for sampling in probability) by which a decision on the way to
            this output was taken, infinite unless margins were asked for. Rounding may flip decisions below its own
            size.
        acted: keys of the rules (`trilemma.decode.rules`) that forbade the likeliest continuation of any hypothesis of
            this input; "unmet" where the output lacks a phrase.
    """

    tokens: list[int]
    log_probability: float
    score: float
    finished: bool
    margin: float = float("inf")
    acted: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens that the score counts: end-of-sequence included if it was produced."""
        return len(self.tokens) + int(self.finished)


class StepModel(Protocol[StateType]):
    """All that decoding knows of a model."""

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
    ) -> tuple[Tensor, StateType]:
        """Logits [batch, vocab] after the last valid token, and the state."""

    def step(self, tokens: Tensor, state: StateType, lengths: Tensor | None = None) -> tuple[Tensor, StateType]:
        """tokens [rows, length] -> logits [rows, length, vocab], and the state."""


def length_penalty(length: float, alpha: float) -> float:
    """`((5 + |y|) / 6) ** alpha` (Wu et al. 2016, equation 14), by which a log-probability is divided.

    `length` counts end-of-sequence. It is 1 for a length of 1, and for every length if alpha is 0.
    """
    return float(((5.0 + length) / 6.0) ** alpha)
