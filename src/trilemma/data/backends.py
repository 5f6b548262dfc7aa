"""What turns text into ids: a `tokenizers` object, a SentencePiece model, or one of them bound to a model's ids."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import tokenizers

from trilemma.errors import DataError

# How a tokenizer.json of ours says that it holds no `tokenizers` object.
SENTENCEPIECE = "trilemma-sentencepiece"
BOUND = "trilemma-bound"

Offsets = list[tuple[int, int]]  # first character of each token, and the one after its last


class Backend(Protocol):
    """What turns text into ids: a `tokenizers` object or a SentencePiece processor."""

    size: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]: ...

    def decode(self, ids: list[int]) -> str: ...

    def of_targets(self) -> Backend: ...

    def serialize(self) -> str: ...


class HuggingFace:
    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.encode_special_tokens = True  # "<eos>" in a text is text
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size(with_added_tokens=True)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [item.ids for item in encoded]

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def of_targets(self) -> Backend:
        return self

    def serialize(self) -> str:
        return self.tokenizer.to_str(pretty=False)


class SentencePiece:
    def __init__(self, model: bytes, lowercase: bool, where: str) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise DataError(f"{where}: a SentencePiece model needs the package: pip install sentencepiece") from None
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(f"{where}: not a SentencePiece model: {error}") from None
        self.model, self.lowercase = model, lowercase
        self.size = int(self.processor.get_piece_size())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        prepared = [text.lower() for text in texts] if self.lowercase else list(texts)
        return cast("list[list[int]]", self.processor.encode(prepared, out_type=int))

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        # lower-casing may lengthen a character: each one of the prepared text has its place in the raw one
        places = [i for i, character in enumerate(text) for _ in (character.lower() if self.lowercase else character)]
        found = self.processor.encode(text.lower() if self.lowercase else text, out_type="offset_mapping")
        ends = [*places, len(text)]
        spans = [(ends[a], ends[b - 1] + 1 if b > a else ends[a]) for a, b in found["offsets"]]
        return cast("list[int]", found["ids"]), spans

    def decode(self, ids: list[int]) -> str:
        return cast(str, self.processor.decode(ids))

    def of_targets(self) -> Backend:
        return self

    def serialize(self) -> str:
        model = base64.b64encode(self.model).decode("ascii")
        return json.dumps({"format": SENTENCEPIECE, "version": 1, "lowercase": self.lowercase, "model": model})


class Bound:
    """A tokenizer whose special ids and vocabulary size a model has fixed: it is left as it is, and nothing is added.

    Ids from the tokenizer's own size up to `size` (the padding of an embedding table) stand for no text. `before` is an
    id that each text begins with, on either side (BART).
    """

    def __init__(self, inner: Backend, special: Mapping[str, int], size: int, before: int | None = None) -> None:
        self.inner, self.special, self.size, self.before = inner, dict(special), size, before
        self._before = [] if before is None else [before]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*self._before, *ids] for ids in self.inner.encode_batch(texts)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        ids, spans = self.inner.encode_with_offsets(text)
        return [*self._before, *ids], [*((0, 0) for _ in self._before), *spans]

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode([index for index in ids if index < self.inner.size and index != self.before])

    def of_targets(self) -> Backend:
        return Bound(self.inner.of_targets(), self.special, self.size, self.before)

    def serialize(self) -> str:
        inner = json.loads(self.inner.serialize())
        values = {"format": BOUND, "version": 1, "special": self.special, "vocab_size": self.size}
        return json.dumps({**values, "before": self.before, "tokenizer": inner}, ensure_ascii=False)
