"""Tokenizers: fixed special ids, exact round trips, and text that can never become a special id."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from trilemma.config import TokenizerConfig
from trilemma.data.tokenizer import BOS, EOS, MASK, PAD, SEP, SPECIALS, UNK, Tokenizer, train_tokenizer
from trilemma.errors import ConfigError, DataError

CORPUS = [
    *["The quick brown fox jumps over the lazy dog, twice.", "Grüße aus München: 12 Äpfel"] * 30,
    *["<eos> < eos > <pad>"] * 60,
    *["你好 世界", "a  b\tc\nd"] * 10,
]
KINDS = ("bpe", "unigram", "byte", "character", "word")
EXACT = ("bpe", "unigram", "byte")


def train(kind: str, size: int = 400, pretokenized: bool = False, lowercase: bool = False) -> Tokenizer:
    config = TokenizerConfig.model_validate({"kind": kind, "vocab_size": size, "pretokenized": pretokenized})
    return train_tokenizer(CORPUS, config, lowercase)


TRAINED = {kind: train(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_are_the_same_everywhere(kind: str) -> None:
    tokenizer = TRAINED[kind]
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (PAD, BOS, EOS) == (0, 1, 2)
    assert (tokenizer.unk, tokenizer.sep, tokenizer.mask) == (UNK, SEP, MASK) == (3, 4, 5)
    assert 6 < tokenizer.vocab_size <= 400


@pytest.mark.parametrize("kind", EXACT)
@given(text=st.text())
def test_every_text_round_trips(kind: str, text: str) -> None:
    tokenizer = TRAINED[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & tokenizer.special_ids
    assert all(0 <= index < tokenizer.vocab_size for index in ids)


@given(text=st.text(alphabet=sorted(set("".join(CORPUS)))))
def test_known_characters_round_trip(text: str) -> None:
    assert TRAINED["character"].decode(TRAINED["character"].encode(text)) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@given(text=st.text())
def test_pretokenized_text_round_trips(kind: str, text: str) -> None:
    tokenizer = train_cached(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


_pretokenized: dict[str, Tokenizer] = {}


def train_cached(kind: str) -> Tokenizer:
    if kind not in _pretokenized:
        _pretokenized[kind] = train(kind, pretokenized=True)
    return _pretokenized[kind]


def test_pretokenized_words_end_at_spaces_only() -> None:
    tokenizer = train_tokenizer(["don 't , stop !"] * 9, TokenizerConfig(kind="word", vocab_size=50, pretokenized=True))
    assert len(tokenizer.encode("don 't , stop !")) == 5
    assert tokenizer.decode(tokenizer.encode("stop , don 't !")) == "stop , don 't !"
    assert len(tokenizer.encode("don't")) == 1  # one word, which it does not know
    words = train_tokenizer(["don't stop!"] * 9, TokenizerConfig(kind="word", vocab_size=50))
    assert len(words.encode("don't stop!")) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*SPECIALS, "<eos>", "a < eos >< pad > b", "</s>", "[MASK]"])
def test_special_names_in_text_are_text(kind: str, text: str) -> None:
    """Though the corpus is full of them. An unknown word may be `unk`, never another special id."""
    tokenizer = TRAINED[kind]
    ids = tokenizer.encode(text)
    assert not set(ids) & (tokenizer.special_ids - {tokenizer.unk})
    if kind in EXACT:
        assert tokenizer.decode(ids) == text


def test_planted_defect_special_names_would_be_found() -> None:
    """The same vocabulary as `tokenizers` reads it by default does turn text into a special id."""
    plain = tokenizers.Tokenizer.from_str(TRAINED["bpe"].serialize())
    assert EOS in plain.encode("a < eos > b").ids


@pytest.mark.parametrize("kind", KINDS)
def test_file_gives_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer = TRAINED[kind]
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode_batch(CORPUS) == tokenizer.encode_batch(CORPUS)
    assert len({other.fingerprint for other in TRAINED.values()}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(kind: str) -> None:
    assert train(kind).fingerprint == TRAINED[kind].fingerprint


def test_byte_ids_are_the_bytes() -> None:
    text = "aé\x00\U0001f600"
    assert TRAINED["byte"].encode(text) == [6 + byte for byte in text.encode()]
    assert TRAINED["byte"].vocab_size == 262


def test_decode_leaves_special_ids_out_but_shows_unknown_words() -> None:
    tokenizer = TRAINED["word"]
    ids = tokenizer.encode("The zebra jumps")
    assert tokenizer.unk in ids
    shown = tokenizer.decode([tokenizer.bos, *ids, tokenizer.sep, tokenizer.mask, tokenizer.eos, tokenizer.pad])
    assert shown == f"The {SPECIALS[UNK]} jumps"


def test_lowercase_is_part_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = train("bpe", lowercase=True)
    assert tokenizer.decode(tokenizer.encode("GRÜSSE The")) == "grüsse the"
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("FOX") == tokenizer.encode("fox")


def foreign(specials: list[str]) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    return tokenizer.to_str()


def test_foreign_special_names_are_mapped_and_missing_ones_added() -> None:
    bert = Tokenizer.parse(foreign(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]).encode(), "x")
    assert (bert.pad, bert.unk, bert.bos, bert.eos, bert.mask) == (0, 1, 2, 3, 4)
    assert bert.sep == bert.vocab_size - 1
    gpt = Tokenizer.parse(foreign(["<|endoftext|>"]).encode(), "x")
    assert gpt.eos == 0 and len(gpt.special_ids) == 6
    assert not set(gpt.encode("<|endoftext|>")) & gpt.special_ids
    again = Tokenizer.parse(gpt.serialize().encode(), "x")
    assert (again.fingerprint, again.special_ids) == (gpt.fingerprint, gpt.special_ids)


def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=120, model_type="bpe", minloglevel=2
    )
    return model.getvalue()


def test_sentencepiece_model(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    path.write_bytes(sentencepiece_model())
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos) == (0, 1, 2)
    assert (tokenizer.pad, tokenizer.sep, tokenizer.mask) == (120, 121, 122) and tokenizer.vocab_size == 123
    text = "The quick brown fox"
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode(text), tokenizer.sep]) == text
    assert not set(tokenizer.encode("</s>")) & {tokenizer.bos, tokenizer.eos}
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.encode(text) == tokenizer.encode(text)
    assert tokenizer.lowercased().encode("THE QUICK") == tokenizer.encode("the quick")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "bpe", "vocab_size": 200}, "tokenizer.vocab_size: 200 is too small for bpe: .* at least 262"),
        ({"kind": "unigram", "vocab_size": 261}, "at least 262"),
        ({"kind": "byte", "pretokenized": True}, "kind byte does not split words"),
        ({"kind": "file"}, "tokenizer.path must name"),
        ({"kind": "file", "path": "x", "pretokenized": True}, "a file brings its own splitting"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(CORPUS, TokenizerConfig.model_validate(values))


def test_files_that_hold_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json: no such file"):
        Tokenizer.load(tmp_path / "none.json")
    cases = [
        (b"", "the file is empty"),
        (b"{", "not a tokenizer.json"),
        (b"{}", "not a tokenizer.json"),
        (json.dumps({"model": 1}).encode(), "not a tokenizer.json"),
        (b"\x80\x04 a pickle", "not a SentencePiece model"),
    ]
    for content, message in cases:
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(DataError, match=f"t.json: {message}"):
            Tokenizer.load(tmp_path / "t.json")


def test_no_text_and_no_unicode() -> None:
    with pytest.raises(DataError, match="holds no text"):
        train_tokenizer(["", " "], TokenizerConfig())
    with pytest.raises(DataError, match="text 2: not valid Unicode at character 3"):
        TRAINED["bpe"].encode_batch(["fine", "ab\ud800"])
    with pytest.raises(DataError, match="token id 9999 is outside the vocabulary"):
        TRAINED["bpe"].decode([9999])
