"""Text to token ids and back: trained here, or brought along.

Every vocabulary that is trained here has the same six special ids (`SPECIALS`). Their names hold a space, which no
trained model can produce from text, and special names are never looked for in text: what a user writes, "<eos>"
included, is text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from trilemma.config import TokenizerConfig
from trilemma.data.backends import BOUND, SENTENCEPIECE, Backend, Bound, HuggingFace, Offsets, SentencePiece
from trilemma.data.pieces import MARIAN, MarianPieces
from trilemma.data.unigram import WordCounter, repeatable
from trilemma.errors import CheckpointError, ConfigError, DataError

PAD, BOS, EOS, UNK, SEP, MASK = range(6)
SPECIALS = ("< pad >", "< bos >", "< eos >", "< unk >", "< sep >", "< mask >")

ROLES = ("pad", "bos", "eos", "unk", "sep", "mask")
# Names by which tokenizers of others call the same six, in the order of preference.
FOREIGN_NAMES: dict[str, tuple[str, ...]] = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "bos": ("<s>", "<bos>", "[CLS]", "<|startoftext|>", "<|begin_of_text|>", "<|bos|>"),
    "eos": ("</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|eos|>", "<|endoftext|>"),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
    "sep": ("<sep>", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
}


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its six special ids; `vocab_size` counts all of them.

    `encode` adds no special ids; `decode` leaves them out, but shows `unk`, because it stands for text. For kinds byte,
    bpe and unigram `decode(encode(text)) == text` for every valid text (lower-cased where asked for).
    """

    backend: Backend
    pad: int
    bos: int
    eos: int
    unk: int
    sep: int
    mask: int
    vocab_size: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without special ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores that TOKENIZERS_PARALLELISM and RAYON_NUM_THREADS allow.

        Raises:
            DataError: a text holds lone surrogates, which are not Unicode text.
        """
        try:
            return self.backend.encode_batch(texts)
        except (UnicodeEncodeError, TypeError):
            for number, text in enumerate(texts, start=1):
                _check_text(text, number)
            raise

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Ids of one text, and the characters of the raw text that each of them stands for.

        Tokens that share a character (parts of its bytes) both hold it; a token may hold the space before its word.
        """
        _check_text(text, 1)
        return self.backend.encode_with_offsets(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids are left out, except `unk`.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        special = {self.pad, self.bos, self.eos, self.sep, self.mask}
        kept = [int(index) for index in ids if int(index) not in special]
        for index in kept:
            if not 0 <= index < self.vocab_size:
                raise DataError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
        return self.backend.decode(kept)

    def count_unknown(self, ids: Sequence[int]) -> int:
        """How many ids stand for text that the vocabulary does not have; 0 where `unk` has another role as well."""
        return 0 if self.unk in (self.pad, self.bos, self.eos, self.sep) else ids.count(self.unk)

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset((self.pad, self.bos, self.eos, self.unk, self.sep, self.mask))

    def of_targets(self) -> Tokenizer:
        """The tokenizer of what a model writes: the same ids; another splitting where a side has its own (Marian)."""
        return replace(self, backend=self.backend.of_targets())

    def serialize(self) -> str:
        """The content of tokenizer.json."""
        return self.backend.serialize()

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json; readable by `tokenizers` unless it is a SentencePiece model."""
        Path(path).write_text(self.serialize(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json or a SentencePiece .model.

        Raises:
            DataError: the file is missing or holds no tokenizer.
        """
        file = Path(path)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{file}: no such file") from None
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
        return cls.parse(content, str(file))

    @classmethod
    def parse(cls, content: bytes, where: str) -> Tokenizer:
        """A tokenizer from the bytes of a tokenizer.json or of a SentencePiece model."""
        if not content:
            raise DataError(f"{where}: the file is empty")
        if content.lstrip()[:1] != b"{":
            return _from_sentencepiece(SentencePiece(content, False, where))
        try:
            values = json.loads(content.decode("utf-8"))
        except ValueError as error:
            raise DataError(f"{where}: not a tokenizer.json: {error}") from None
        if values.get("format") in (SENTENCEPIECE, BOUND) and values.get("version") != 1:
            raise CheckpointError(f"{where}: version {values.get('version')} is newer than this trilemma; upgrade")
        if values.get("format") == SENTENCEPIECE:
            return _from_sentencepiece(_stored_sentencepiece(values, where))
        if values.get("format") == BOUND:
            inner = json.dumps(values["tokenizer"]).encode()
            return cls.bound(inner, where, values["special"], values["vocab_size"], values.get("before"))
        try:
            return _from_tokenizers(tokenizers.Tokenizer.from_str(content.decode("utf-8")))
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(f"{where}: not a tokenizer.json: {error}") from None

    @classmethod
    def bound(
        cls, content: bytes, where: str, special: Mapping[str, int], vocab_size: int, before: int | None = None
    ) -> Tokenizer:
        """A tokenizer used as it is, with special ids that a trained model fixed; several roles may share one id.

        Args:
            content, where: as for `parse`.
            special: an id for each of ROLES.
            vocab_size: the model's; it may be larger than the tokenizer.
            before: an id that every text begins with.

        Raises:
            DataError: not a tokenizer, or one that does not match the vocabulary.
        """
        inner = _plain_backend(content, where)
        if inner.size > vocab_size:
            raise DataError(
                f"{where}: the tokenizer does not match the vocabulary: it has {inner.size} entries, the model "
                f"{vocab_size}; use the tokenizer that the model was trained with"
            )
        for role, index in [*special.items(), ("first", before or 0)]:
            if not 0 <= index < vocab_size:
                raise DataError(
                    f"{where}: the tokenizer does not match the vocabulary: its {role} id {index} is outside the "
                    f"model's {vocab_size} entries"
                )
        return _finish(Bound(inner, special, vocab_size, before), [special[role] for role in ROLES], vocab_size)

    def lowercased(self) -> Tokenizer:
        """The same vocabulary; text is lower-cased before it is encoded, wherever the tokenizer is used."""
        if isinstance(self.backend, Bound):
            if isinstance(self.backend.inner, MarianPieces):
                raise ConfigError("data.lowercase: a Marian tokenizer reads text as it is")
            lowered = Tokenizer.parse(self.backend.inner.serialize().encode(), "tokenizer").lowercased()
            held = self.backend
            return Tokenizer.bound(
                lowered.serialize().encode(), "tokenizer", held.special, self.vocab_size, held.before
            )
        if isinstance(self.backend, SentencePiece):
            return _from_sentencepiece(SentencePiece(self.backend.model, True, "tokenizer"))
        copy = tokenizers.Tokenizer.from_str(self.serialize())
        lower = normalizers.Lowercase()
        copy.normalizer = lower if copy.normalizer is None else normalizers.Sequence([lower, copy.normalizer])
        return _from_tokenizers(copy)


def _stored_sentencepiece(values: Mapping[str, Any], where: str) -> SentencePiece:
    return SentencePiece(base64.b64decode(values["model"]), bool(values["lowercase"]), where)


def _plain_backend(content: bytes, where: str) -> Backend:
    """A tokenizer.json (also ours of a SentencePiece model) or a SentencePiece model, with nothing added."""
    if content.lstrip()[:1] != b"{":
        return SentencePiece(content, False, where)
    try:
        values = json.loads(content.decode("utf-8"))
        if values.get("format") == SENTENCEPIECE:
            return _stored_sentencepiece(values, where)
        if values.get("format") == MARIAN:
            return MarianPieces.parse(values, where)
        return HuggingFace(_settled(tokenizers.Tokenizer.from_str(content.decode("utf-8"))))
    except DataError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{where}: not a tokenizer.json: {error}") from None


def _check_text(text: object, number: int) -> None:
    if not isinstance(text, str):
        raise DataError(f"text {number}: a string is needed, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"text {number}: not valid Unicode at character {error.start + 1}") from None


def _finish(backend: Backend, ids: list[int], size: int) -> Tokenizer:
    digest = hashlib.sha256(backend.serialize().encode("utf-8")).hexdigest()
    pad, bos, eos, unk, sep, mask = ids
    return Tokenizer(backend, pad, bos, eos, unk, sep, mask, vocab_size=size, fingerprint=digest)


def _from_tokenizers(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    """Finds the six special ids by name; those that are missing are added at the end of the vocabulary."""
    names = []
    taken: set[str] = set()
    for own, foreign in zip(SPECIALS, FOREIGN_NAMES.values(), strict=True):
        found = [name for name in (own, *foreign) if tokenizer.token_to_id(name) is not None and name not in taken]
        names.append(found[0] if found else own)
        taken.add(names[-1])
    missing = [name for name in names if tokenizer.token_to_id(name) is None]
    if missing:
        tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in missing])
    ids = [cast(int, tokenizer.token_to_id(name)) for name in names]
    backend = HuggingFace(_settled(tokenizer))
    return _finish(backend, ids, max(backend.size, max(ids) + 1))


def _settled(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as its file will give it back: reading rounds unigram scores, and the fingerprint must not move."""
    text = tokenizer.to_str(pretty=False)
    for _ in range(8):
        tokenizer = tokenizers.Tokenizer.from_str(text)
        again = tokenizer.to_str(pretty=False)
        if again == text:
            return tokenizer
        text = again
    raise AssertionError("a tokenizer's file does not settle")


def _from_sentencepiece(backend: SentencePiece) -> Tokenizer:
    processor = backend.processor
    own = [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id(), -1, -1]
    for position in (SEP, MASK):
        for name in FOREIGN_NAMES[ROLES[position]]:
            index = processor.piece_to_id(name)
            if own[position] < 0 and index != processor.unk_id():
                own[position] = index
    size = backend.size
    for position, index in enumerate(own):
        if index < 0:  # absent from the model: the next free id
            own[position], size = size, size + 1
    return _finish(backend, [int(index) for index in own], size)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, lowercase: bool = False) -> Tokenizer:
    """Trains a vocabulary of at most `config.vocab_size` entries, special ones included.

    Args:
        texts: read once.
        config: `kind` bpe and unigram work on UTF-8 bytes, so that every text round-trips; byte needs no training;
            character and word map what they have not seen to `unk`. `pretokenized`: words end at spaces only.

    Raises:
        ConfigError: `vocab_size` is too small, or an option does not fit the kind.
        DataError: there is no text to learn from.
    """
    if config.kind == "file":
        return bring_tokenizer(config, lowercase)
    if config.kind == "task":
        raise ConfigError("tokenizer.kind task: only data.task probe brings a vocabulary of its own")
    if config.pretokenized and config.kind in ("byte", "character"):
        raise ConfigError(f"tokenizer.pretokenized: kind {config.kind} does not split words; use bpe, unigram or word")
    tokenizer, trainer = _untrained(config)
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    if config.kind == "unigram":
        counter = WordCounter(tokenizer)
        tokenizer.train_from_iterator(counter.passing(_nonempty(texts)), trainer=trainer)
        tokenizer = repeatable(tokenizer, counter.words, len(SPECIALS))
    elif trainer is not None:
        tokenizer.train_from_iterator(_nonempty(texts), trainer=trainer)
    return _from_tokenizers(tokenizer)


def symbol_tokenizer(symbols: Sequence[str]) -> Tokenizer:
    """A vocabulary of given symbols, divided by spaces in text: symbol i has id i + 6, after the special ones."""
    vocabulary = {name: index for index, name in enumerate([*SPECIALS, *symbols])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=SPECIALS[UNK]))
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return _from_tokenizers(tokenizer)


def bring_tokenizer(config: TokenizerConfig, lowercase: bool = False) -> Tokenizer:
    """The tokenizer in `config.path`, a tokenizer.json or a SentencePiece .model."""
    if config.path is None:
        raise ConfigError("tokenizer.kind is file: tokenizer.path must name a tokenizer.json or a SentencePiece .model")
    if config.pretokenized:
        raise ConfigError("tokenizer.pretokenized: applies to tokenizers trained here; a file brings its own splitting")
    tokenizer = Tokenizer.load(config.path)
    return tokenizer.lowercased() if lowercase else tokenizer


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    some = False
    for text in texts:
        some = some or bool(text.strip())
        yield text
    if not some:
        raise DataError("the tokenizer cannot be trained: the training data holds no text")


def _untrained(config: TokenizerConfig) -> tuple[tokenizers.Tokenizer, Any]:
    """An empty tokenizer and its trainer; None where there is nothing to train."""
    specials = [tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIALS]
    size, unknown = config.vocab_size, SPECIALS[UNK]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if config.kind in ("bpe", "unigram") and size < len(SPECIALS) + 256:
        raise ConfigError(
            f"tokenizer.vocab_size: {size} is too small for {config.kind}: 256 bytes and {len(SPECIALS)} special "
            f"entries need at least {len(SPECIALS) + 256}"
        )
    common: dict[str, Any] = {"vocab_size": size, "special_tokens": specials, "show_progress": False}
    if config.kind == "byte":
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
        tokenizer.add_special_tokens(specials)
        _byte_level(tokenizer, config)
        return tokenizer, None
    if config.kind == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        _byte_level(tokenizer, config)
        return tokenizer, trainers.BpeTrainer(initial_alphabet=alphabet, **common)
    if config.kind == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        _byte_level(tokenizer, config)
        return tokenizer, trainers.UnigramTrainer(initial_alphabet=alphabet, unk_token=unknown, **common)
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab={}, unk_token=unknown))
    if config.kind == "character":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    elif config.pretokenized:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, trainers.WordLevelTrainer(**common)


def _byte_level(tokenizer: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Splits into words, each carrying the space before it, and writes every byte as one visible character."""
    if config.pretokenized or config.kind == "byte":
        split = pre_tokenizers.Split(" ", "merged_with_next")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()


def _byte_vocabulary() -> dict[str, int]:
    """Special entries, then byte b at id 6 + b, under the visible characters that ByteLevel writes for bytes."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    names = {byte: chr(byte) for byte in visible} | {byte: chr(256 + rank) for rank, byte in enumerate(hidden)}
    vocabulary = {name: index for index, name in enumerate(SPECIALS)}
    return vocabulary | {names[byte]: len(SPECIALS) + byte for byte in range(256)}
