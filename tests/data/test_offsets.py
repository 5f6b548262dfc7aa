"""Offsets of tokens lead back to the raw text, for every kind of tokenizer."""

from __future__ import annotations

import io

import pytest

from trilemma.config import TokenizerConfig
from trilemma.data import Tokenizer, train_tokenizer
from trilemma.errors import DataError

TEXT = "The  Größe of 日本の首都,\nis not İstanbul 🙂."


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram", "character", "word"])
def test_tokens_lie_side_by_side(kind: str, lowercase: bool) -> None:
    tokenizer = train_tokenizer([TEXT] * 3, TokenizerConfig(kind=kind, vocab_size=300), lowercase)  # type: ignore[arg-type]
    check(tokenizer, gaps=kind == "word")


@pytest.mark.parametrize("lowercase", [False, True])
def test_sentencepiece(lowercase: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, TEXT.lower()] * 10), model_writer=model, vocab_size=80,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer.parse(model.getvalue(), "model")
    check(tokenizer.lowercased() if lowercase else tokenizer, gaps=True)


def check(tokenizer: Tokenizer, gaps: bool) -> None:
    ids, offsets = tokenizer.encode_with_offsets(TEXT)
    assert ids == tokenizer.encode(TEXT)
    assert len(ids) == len(offsets)
    reached = 0
    for start, end in offsets:
        assert 0 <= start <= end <= len(TEXT)
        assert start <= reached or not TEXT[reached:start].strip() or gaps
        reached = max(reached, end)
    covered = {place for start, end in offsets for place in range(start, end)}
    assert all(place in covered for place, character in enumerate(TEXT) if not character.isspace())
    assert tokenizer.encode_with_offsets("") == ([], [])


def test_what_is_no_text_is_named() -> None:
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    with pytest.raises(DataError, match="not valid Unicode"):
        tokenizer.encode_with_offsets("a\ud800")
