"""Text to requests in the form that a run was trained on, and hypotheses back to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trilemma.config import DecodingConfig, RunConfig
from trilemma.data import Tokenizer
from trilemma.data.languages import is_unspaced
from trilemma.decode.hypothesis import Hypothesis, Phrase, Request
from trilemma.errors import CapabilityError, DataError


@dataclass(frozen=True)
class Line:
    """One input with what its output must hold; spaces at the ends of prefix and phrases do not count.

    Attributes:
        text: what is read. prefix: what the output begins with. phrases: what it contains.
    """

    text: str
    prefix: str = ""
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class TooLong:
    """An input that the model cannot or should not read.

    Attributes:
        index: its number. tokens: its length. limit: the longest that is allowed. key: the config's key of that limit.
        what: of what there are too many, where it is not the text itself.
    """

    index: int
    tokens: int
    limit: int
    key: str
    what: str = ""

    def __str__(self) -> str:
        return f"{self.tokens} tokens{self.what}, more than {self.key} = {self.limit}"


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
            verb = {"classification": "classify", "question-answering": "answer"}.get(task, "evaluate")
            raise CapabilityError(f"an encoder-only run ({task}) generates no text; use trilemma {verb}")

    def requests(
        self, texts: Sequence[str | Line], decoding: DecodingConfig, first_index: int = 0, beyond_training: bool = False
    ) -> list[Request | TooLong]:
        """One request a text, numbered from `first_index`.

        Args:
            beyond_training: allow inputs over `data.max_source_length`, as long as the model's positions reach.

        Raises:
            CapabilityError: the run generates no text.
            DataError: a prefix or phrase that the vocabulary cannot write, or that an empty line has.
        """
        self.require_generation()
        lines = [text if isinstance(text, Line) else Line(text) for text in texts]
        ids = self.tokenizer.encode_batch([line.text for line in lines])
        requests = [self._request(row, decoding, first_index + i, beyond_training) for i, row in enumerate(ids)]
        return [self._demanding(request, line) for request, line in zip(requests, lines, strict=True)]

    def context(self, ids: list[int], limit: int = 1, index: int = 0) -> Request:
        """The request whose prompt (and source) stand before the first token of the output."""
        tokenizer, encoder = self.tokenizer, self.config.model.layout == "encoder-decoder"
        if encoder:
            return Request([tokenizer.bos], limit, source=[*ids, tokenizer.eos], index=index)
        prompt = [tokenizer.bos, *ids] if self.is_language_model else [tokenizer.bos, *ids, tokenizer.sep]
        return Request(prompt, limit, prefix=len(prompt) if self.config.model.prefix else None, index=index)

    def text(self, hypothesis: Hypothesis) -> str:
        """The text of an output; a line break inside becomes a space, so that one line stays one line."""
        return one_line(self.tokenizer.decode(hypothesis.tokens))

    def _demanding(self, request: Request | TooLong, line: Line) -> Request | TooLong:
        """The request with what the line's output must hold."""
        if isinstance(request, TooLong) or not (line.prefix.strip() or line.phrases):
            return request
        where = f"line {request.index + 1}"
        if not line.text.strip():
            raise DataError(f"{where} is empty and gives an empty output; it can have no prefix and no phrases")
        forced = self._written(line.prefix.strip(), where, "prefix") if line.prefix.strip() else []
        phrases = tuple(self._phrase(phrase.strip(), where) for phrase in line.phrases)
        needed = len(forced) + sum(max(len(way) for way, _ in phrase.ways()) for phrase in phrases)
        if needed >= request.limit:
            key = "the output's limit less one (decoding.max_length, max_ratio, max_extra)"
            return TooLong(request.index, needed, request.limit - 1, key, " in prefix and phrases")
        return replace(request, forced=tuple(forced), phrases=phrases)

    def _phrase(self, text: str, where: str) -> Phrase:
        """How a phrase is written after other words, and, where that differs, at the beginning."""
        if not text:
            raise DataError(f"{where}: an empty phrase")
        alone = self._written(text, where, "phrase")
        before, both = self.tokenizer.of_targets().encode_batch(["x", f"x {text}"])
        anywhere = is_unspaced(self.config.data.target_language)
        if anywhere or both[: len(before)] != before or len(both) == len(before):
            return Phrase(tuple(alone))
        inside = both[len(before) :]
        return Phrase(tuple(inside), None if inside == alone or self.is_language_model else tuple(alone))

    def _written(self, text: str, where: str, what: str) -> list[int]:
        ids = self.tokenizer.of_targets().encode(text.lower() if self.config.data.lowercase else text)
        if not ids or self.tokenizer.unk in ids:
            raise DataError(f'{where}: the vocabulary cannot write the {what} "{text}"')
        return ids

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


def one_line(text: str) -> str:
    """With a space for each line break, so that one line stays one line."""
    return text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ")
