"""Marian's tokenizer: a SentencePiece model for each side, and one vocabulary that gives the pieces their ids."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from trilemma.data.backends import Offsets, SentencePiece
from trilemma.errors import DataError

MARIAN = "trilemma-marian"
_UNKNOWN = "<unk>"
_LANGUAGE = re.compile(r">>.*?<<")  # many-to-many models read the target's language before the text


class MarianPieces:
    """Pieces of two SentencePiece models under the ids of a vocabulary.

    Args:
        vocabulary: from pieces to ids; holds "<unk>".
        source, target: the SentencePiece models.
        where: for messages. writes: texts are the target's.
    """

    def __init__(
        self, vocabulary: Mapping[str, int], source: bytes, target: bytes, where: str, writes: bool = False
    ) -> None:
        if not isinstance(vocabulary, dict) or not all(isinstance(index, int) for index in vocabulary.values()):
            raise DataError(f"{where}: a mapping from pieces to ids is needed")
        if _UNKNOWN not in vocabulary:
            raise DataError(f'{where}: the vocabulary lacks "{_UNKNOWN}"')
        self.vocabulary: dict[str, int] = vocabulary
        self.where, self.writes = where, writes
        self.models = source, target
        self.processors = [SentencePiece(model, False, where).processor for model in self.models]
        self.size = max(vocabulary.values()) + 1
        self._pieces = {index: piece for piece, index in vocabulary.items()}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        split = [_split(text) for text in texts]
        pieces = self.processors[self.writes].encode([text for _, text in split], out_type=str)
        return [self._ids([*code, *found]) for (code, _), found in zip(split, pieces, strict=True)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        code, rest = _split(text)
        begin = len(text) - len(rest)
        found = self.processors[self.writes].encode(rest, out_type="offset_mapping")["offsets"]
        return self.encode_batch([text])[0], [*((0, begin) for _ in code), *((begin + a, begin + b) for a, b in found)]

    def _ids(self, pieces: Sequence[str]) -> list[int]:
        unknown = self.vocabulary[_UNKNOWN]
        return [self.vocabulary.get(piece, unknown) for piece in pieces]

    def decode(self, ids: list[int]) -> str:
        text = self.processors[1].decode_pieces([self._pieces.get(index, _UNKNOWN) for index in ids])
        return cast(str, text).replace("▁", " ").strip()

    def of_targets(self) -> MarianPieces:
        return MarianPieces(self.vocabulary, *self.models, self.where, writes=True)

    def serialize(self) -> str:
        source, target = (base64.b64encode(model).decode("ascii") for model in self.models)
        values = {"format": MARIAN, "version": 1, "vocabulary": self.vocabulary, "source": source, "target": target}
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> MarianPieces:
        """From what `serialize` wrote."""
        source, target = (base64.b64decode(values[side]) for side in ("source", "target"))
        return cls(values["vocabulary"], source, target, where)


def _split(text: str) -> tuple[list[str], str]:
    """A language code at the beginning, if there is one, and the text after it."""
    code = _LANGUAGE.match(text)
    return ([code[0]], text[code.end() :]) if code else ([], text)
