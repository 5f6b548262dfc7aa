"""Text to requests in the form that a run was trained on, and hypotheses back to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trilemma.config import DecodingConfig, RunConfig
from trilemma.data import Tokenizer
from trilemma.decode.hypothesis import Hypothesis, Request
from trilemma.errors import CapabilityError


@dataclass(frozen=True)
class TooLong:
    """An input that the model cannot or should not read.

    Attributes:
        index: its number. tokens: its length. limit: the longest that is allowed. key: the config's key of that limit.
    """

    index: int
    tokens: int
    limit: int
    key: str

    def __str__(self) -> str:
        return f"{self.tokens} tokens, more than {self.key} = {self.limit}"


@dataclass(frozen=True)
class Prompts:
    """Makes requests for one run.

    Sequence-to-sequence, encoder-decoder: source `src [eos]`, prompt `[bos]`. Decoder-only: prompt `[bos] src [sep]`.
    Language model: prompt `[bos] text`, which the output goes on with. So it was in training (`trilemma.data.batch`).

    Args:
        tokenizer, config: the run's.
    """

    tokenizer: Tokenizer
    config: RunConfig

    @property
    def is_language_model(self) -> bool:
        return self.config.data.task == "language-model"

    def require_generation(self) -> None:
        """Raises `CapabilityError` for runs that produce no text."""
        if self.config.data.task == "probe":
            raise CapabilityError("a probe's run answers its probe and generates no text; use trilemma evaluate")
        if self.config.model.layout == "encoder-only":
            task = self.config.data.task
            verb = "trilemma classify" if task == "classification" else "trilemma evaluate"
            raise CapabilityError(f"an encoder-only run ({task}) generates no text; use {verb}")

    def requests(
        self, texts: Sequence[str], decoding: DecodingConfig, first_index: int = 0, beyond_training: bool = False
    ) -> list[Request | TooLong]:
        """One request a text, numbered from `first_index`.

        Args:
            beyond_training: allow inputs over `data.max_source_length`, as long as the model's positions reach.

        Raises:
            CapabilityError: the run generates no text.
        """
        self.require_generation()
        ids = self.tokenizer.encode_batch(texts)
        return [self._request(row, decoding, first_index + i, beyond_training) for i, row in enumerate(ids)]

    def context(self, ids: list[int], limit: int = 1, index: int = 0) -> Request:
        """The request whose prompt (and source) stand before the first token of the output."""
        tokenizer, encoder = self.tokenizer, self.config.model.layout == "encoder-decoder"
        if encoder:
            return Request([tokenizer.bos], limit, source=[*ids, tokenizer.eos], index=index)
        prompt = [tokenizer.bos, *ids] if self.is_language_model else [tokenizer.bos, *ids, tokenizer.sep]
        return Request(prompt, limit, prefix=len(prompt) if self.config.model.prefix else None, index=index)

    def text(self, hypothesis: Hypothesis) -> str:
        """The text of an output; a line break inside becomes a space, so that one line stays one line."""
        text = self.tokenizer.decode(hypothesis.tokens)
        return text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ")

    def _request(
        self, ids: list[int], decoding: DecodingConfig, index: int, beyond_training: bool
    ) -> Request | TooLong:
        longest = self.config.data.max_source_length
        if not self.is_language_model and not beyond_training and len(ids) > longest:
            return TooLong(index, len(ids), longest, "data.max_source_length")
        limit = decoding.max_length or max(1, int(decoding.max_ratio * len(ids)) + decoding.max_extra)
        positions = self.config.model.max_length
        if positions is None:
            return self.context(ids, limit, index)
        request = self.context(ids, limit, index)
        if len(request.source or ()) > positions or len(request.prompt) > positions:
            return TooLong(index, len(ids), positions - (request.num_tokens - len(ids)), "model.max_length")
        # the last new token is never fed back: position n needs n - 1 new tokens
        return self.context(ids, min(limit, positions - len(request.prompt) + 1), index)
