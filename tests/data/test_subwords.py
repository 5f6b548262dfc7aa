"""Subword dropout: the tokenizer's own pieces without it, the same text with it, draws that depend on nothing else."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Iterator

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from trilemma.config import TokenizerConfig
from trilemma.data.order import Draws
from trilemma.data.subwords import SubwordDropout
from trilemma.data.tokenizer import Tokenizer, train_tokenizer
from trilemma.errors import ConfigError

CORPUS = [
    *["The quick brown fox jumps over the lazy dog, twice.", "Grüße aus München: 12 Äpfel, zwölf Äpfel"] * 30,
    *["two young , white males are outside near many bushes .", "aaaa aaaaaaaa abababab", "你好 世界 你好"] * 20,
]
NAIVE = "training.subword_dropout leaves out merges of a BPE over bytes"


def train(kind: str = "bpe", pretokenized: bool = False, lowercase: bool = False) -> Tokenizer:
    return train_tokenizer(
        CORPUS,
        TokenizerConfig.model_validate({"kind": kind, "vocab_size": 420, "pretokenized": pretokenized}),
        lowercase,
    )


TRAINED = {"words": train(), "pretokenized": train(pretokenized=True), "lowercase": train(lowercase=True)}
TEXTS = st.one_of(st.text(), st.text(alphabet=sorted(set("".join(CORPUS)))), st.sampled_from(CORPUS))


def draws(number: int = 0) -> Draws:
    return Draws(7, "test", number)


@pytest.mark.parametrize("name", TRAINED)
@given(text=TEXTS)
def test_without_dropout_the_pieces_are_the_tokenizers(name: str, text: str) -> None:
    assert SubwordDropout(TRAINED[name], 0.0).encode(text, draws()) == TRAINED[name].encode(text)


@pytest.mark.parametrize("name", TRAINED)
@given(text=TEXTS, rate=st.floats(0.0, 0.999), number=st.integers(0, 99))
def test_every_text_round_trips_at_any_rate(name: str, text: str, rate: float, number: int) -> None:
    tokenizer = TRAINED[name]
    ids = SubwordDropout(tokenizer, rate).encode(text, draws(number))
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text))
    assert tokenizer.decode(ids) == (text.lower() if name == "lowercase" else text)
    assert not set(ids) & tokenizer.special_ids


def decisions(rate: float, number: int) -> Iterator[bool]:
    """The stream of draws that `SubwordDropout` reads, one by one."""
    stream = draws(number)
    while True:
        yield from (stream.uniform(128) < rate).tolist()


def algorithm_1(subwords: SubwordDropout, word: str, skips: Iterator[bool]) -> list[int]:
    """BPE-dropout as the paper writes it: all merges that are possible now, looked for again at each step."""
    symbols = [subwords._vocabulary[character] for character in word]
    while True:
        pairs = enumerate(itertools.pairwise(symbols))
        possible = sorted((*subwords._merges[pair], place) for place, pair in pairs if pair in subwords._merges)
        kept = next(((new, place) for _, new, place in possible if not next(skips)), None)
        if kept is None:
            return symbols
        symbols[kept[1] : kept[1] + 2] = [kept[0]]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
@given(text=TEXTS, number=st.integers(0, 99))
def test_it_is_the_papers_algorithm(rate: float, text: str, number: int) -> None:
    subwords = SubwordDropout(TRAINED["words"], rate)
    skips = decisions(rate, number)
    expected = [index for word in subwords._words(text) for index in algorithm_1(subwords, word, skips)]
    assert subwords.encode(text, draws(number)) == expected


def test_a_merge_is_left_out_at_the_rate() -> None:
    """Of a word of one merge; and where it is left out there is nothing else."""
    pair = tokenizers.Tokenizer(models.BPE())
    pair.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=257, show_progress=False)
    pair.train_from_iterator(["ab"] * 9, trainer=trainer)
    tokenizer = Tokenizer.parse(pair.to_str().encode(), "pair")
    assert len(tokenizer.encode("ab")) == 1
    for rate in (0.1, 0.5):
        encode = SubwordDropout(tokenizer, rate).encoder("rate")
        split = sum(len(ids) == 2 for ids in encode(["ab"] * 4000))
        assert abs(split - 4000 * rate) < 5 * (4000 * rate * (1 - rate)) ** 0.5


def test_draws_depend_on_purpose_and_place_alone() -> None:
    subwords = SubwordDropout(TRAINED["words"], 0.3)
    whole = subwords.encoder("one")(CORPUS)
    encode = SubwordDropout(TRAINED["words"], 0.3).encoder("one")
    assert [ids for start in range(0, len(CORPUS), 7) for ids in encode(CORPUS[start : start + 7])] == whole
    assert subwords.encoder("two")(CORPUS) != whole
    assert len({tuple(ids) for ids in whole[:60:2]}) > 20, "the same text is split alike at all places"


def test_draws_never_change() -> None:
    """A cache that was made by an earlier version stays what it was."""
    tokenizer = TRAINED["words"]
    pieces = [tokenizer.decode([index]) for index in SubwordDropout(tokenizer, 0.3).encode(CORPUS[0], draws())]
    assert "|".join(pieces) == "The| quick| b|r|o|w|n| fo|x| jumps| o|v|e|r| t|he| |l|a|z|y| |do|g|,| twic|e|."


def test_a_long_word_takes_no_square_of_its_length() -> None:
    subwords = SubwordDropout(TRAINED["words"], 0.1)
    times = []
    for length in (5_000, 40_000):
        started = time.process_time()
        assert TRAINED["words"].decode(subwords.encode("ab" * (length // 2), draws())) == "ab" * (length // 2)
        times.append(time.process_time() - started)
    assert times[1] < 30 * times[0]


@pytest.mark.parametrize("kind", ["unigram", "byte", "character", "word"])
def test_other_tokenizers_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=NAIVE):
        SubwordDropout(train(kind), 0.1)


def test_tokenizers_of_others_are_refused_where_they_are_no_plain_bpe() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=60, minloglevel=9
    )
    with pytest.raises(ConfigError, match=NAIVE):
        SubwordDropout(Tokenizer.parse(model.getvalue(), "model"), 0.1)
    characters = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Whitespace()
    characters.train_from_iterator(CORPUS, trainer=trainers.BpeTrainer(vocab_size=90, show_progress=False))
    with pytest.raises(ConfigError, match=NAIVE):
        SubwordDropout(Tokenizer.parse(characters.to_str().encode(), "characters"), 0.1)
