"""The tokenizer of a model directory, and which of its ids are the special ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from trilemma.config import ModelConfig
from trilemma.data.pieces import MarianPieces
from trilemma.data.tokenizer import FOREIGN_NAMES, ROLES, Tokenizer
from trilemma.errors import CheckpointError, ConfigError
from trilemma.interop.keys import read_json
from trilemma.runs import files

_SENTENCEPIECE = ("spiece.model", "tokenizer.model")
_MARIAN = ("vocab.json", "source.spm", "target.spm")
_SMALL = 1 << 30
Lookup = Callable[[str], int | None]
# An encoder's rows begin and end with these.
_ENCODER_ROLES = {"bos": "cls", "eos": "sep"}
_NAMES = {**FOREIGN_NAMES, "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "<sep>", "</s>")}


def read_tokenizer(
    directory: Path, config: Mapping[str, Any], model: ModelConfig, begins: bool = False
) -> tuple[Tokenizer, list[str]]:
    """The tokenizer, bound to the model's special ids and vocabulary size, and notes on how they were found.

    Ids come from generation_config.json, config.json, or the names in special_tokens_map.json and
    tokenizer_config.json; last, from the usual names. Without an id of their own, padding and beginning are
    end-of-sequence, a decoder's beginning is padding, and so are roles that the vocabulary lacks.

    Args:
        directory, config, model: what is imported. begins: every text begins with the beginning's id.

    Raises:
        CheckpointError: no tokenizer. DataError: it does not match the vocabulary.
    """
    path, content, lookup = _tokenizer(directory)
    assert model.vocab_size is not None
    found = _Ids(directory, config, lookup)
    eos, notes = found.end(model)
    ids = {"eos": eos}
    pad = found.of("pad")
    ids["pad"] = eos if pad is None else pad
    if model.layout == "encoder-decoder":
        start = found.of("decoder_start")
        ids["bos"] = ids["pad"] if start is None else start
    else:
        bos = found.of(_role("bos", model))
        ids["bos"] = eos if bos is None else bos
    for role in ("unk", "sep", "mask"):
        own = found.of(role)
        ids[role] = ids["pad"] if own is None else own
    if path.name != "tokenizer.json" and (added := read_json(directory / "added_tokens.json")):
        names = ", ".join(map(str, list(added)[:3])) + (", ..." if len(added) > 3 else "")
        notes.append(f"added_tokens.json is not read: its {len(added)} tokens ({names}) are text to {path.name}")
    notes.append("special ids: " + ", ".join(f"{role} {ids[role]}" for role in ROLES))
    before = found.of("bos") if begins else None
    return Tokenizer.bound(content, str(path), ids, model.vocab_size, before), notes


def _role(role: str, model: ModelConfig) -> str:
    return _ENCODER_ROLES.get(role, role) if model.layout == "encoder-only" else role


def _tokenizer(directory: Path) -> tuple[Path, bytes, Lookup]:
    """The tokenizer's file, its content as `Tokenizer.bound` reads it, and from a token to its id."""
    for name in ("tokenizer.json", *_SENTENCEPIECE):
        path = directory / name
        if files.file_size(path) is not None:
            content = files.read_file(path, _SMALL)
            return path, content, _lookup(content, path)
    if all(files.file_size(directory / name) is not None for name in _MARIAN):
        sides = [files.read_file(directory / name, _SMALL) for name in _MARIAN[1:]]
        vocabulary = read_json(directory / _MARIAN[0])
        pieces = MarianPieces(vocabulary, sides[0], sides[1], str(directory / _MARIAN[0]))
        return directory / _MARIAN[0], pieces.serialize().encode(), vocabulary.get
    raise CheckpointError(
        f"{directory}: no tokenizer: tokenizer.json, SentencePiece's {' or '.join(_SENTENCEPIECE)}, or Marian's "
        f"{', '.join(_MARIAN)}, is needed. transformers writes the first for most models: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _lookup(content: bytes, path: Path) -> Lookup:
    """From a token to its id, None where the vocabulary lacks it."""
    plain = Tokenizer.parse(content, str(path))  # names what is wrong with the file
    if path.name == "tokenizer.json":
        found: Lookup = tokenizers.Tokenizer.from_str(content.decode("utf-8")).token_to_id
        return found
    held = {role: getattr(plain, role) for role in ROLES}
    return {name: held[role] for role in ROLES for name in FOREIGN_NAMES[role] if held[role] < plain.backend.size}.get


class _Ids:
    """Where the special ids of a directory are told."""

    def __init__(self, directory: Path, config: Mapping[str, Any], lookup: Lookup) -> None:
        self.generation = read_json(directory / "generation_config.json")
        self.config, self.lookup = config, lookup
        self.names = {
            **read_json(directory / "tokenizer_config.json"),
            **read_json(directory / "special_tokens_map.json"),
        }
        self.where = directory

    def numbers(self, role: str) -> list[int]:
        """Ids that the configs give, first those of generation."""
        for values in (self.generation, self.config):
            found = values.get(f"{role}_token_id")
            if isinstance(found, int) and not isinstance(found, bool):
                return [found]
            if isinstance(found, list) and found and all(isinstance(item, int) for item in found):
                return found
        return []

    def by_name(self, role: str) -> int | None:
        """The id of the token that the tokenizer's files name for the role, or that usually has it."""
        name = self.names.get(f"{role}_token")
        name = name.get("content") if isinstance(name, dict) else name
        for candidate in (name, *_NAMES.get(role, ())):
            found = self.lookup(candidate) if isinstance(candidate, str) else None
            if found is not None:
                return found
        return None

    def of(self, role: str) -> int | None:
        """The id of a role, or None."""
        numbers = self.numbers(role)
        return numbers[0] if numbers else self.by_name(role)

    def end(self, model: ModelConfig) -> tuple[int, list[str]]:
        """End-of-sequence; of several, the tokenizer's own."""
        role = _role("eos", model)
        numbers = self.numbers(role)
        own = self.by_name(role)
        if len(numbers) > 1:
            chosen = own if own in numbers else numbers[0]
            others = [number for number in numbers if number != chosen]
            return chosen, [f"outputs end with id {chosen} alone; the checkpoint also ends them with {others}"]
        chosen_or_none = numbers[0] if numbers else own
        if chosen_or_none is None:
            raise ConfigError(f"{self.where}: no {role}_token_id in config.json and no such name in the tokenizer")
        return chosen_or_none, []
