"""Texts: minimum Bayes risk, unknown words, prefixes and phrases as they are written."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from sacrebleu.metrics.chrf import CHRF

from trilemma.config import RunConfig, TokenizerConfig, parse
from trilemma.data import Tokenizer, train_tokenizer
from trilemma.decode import Hypothesis, Line, Prompts, Written
from trilemma.decode.outputs import _replaced
from trilemma.decode.risk import expected_chrf
from trilemma.errors import CapabilityError, ConfigError, DataError, LengthError
from trilemma.models import build_model
from trilemma.predictor import Predictor

TEXTS = ["the old dog sleeps here", "a cat sees the dog", "here is a bird", "old birds sleep"]


def predictor_of(kind: str = "word", layout: str = "encoder-decoder", **data: Any) -> Predictor:
    """Random weights over a vocabulary of words."""
    torch.manual_seed(3)
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig.model_validate({"kind": kind, "vocab_size": 290}))
    values = {
        "model": {
            "layout": layout,
            "d_model": 16,
            "d_ff": 16,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": tokenizer.vocab_size,
            "tie_embeddings": False,
            "logit_bias": True,
        },
        "data": data,
        "decoding": {"max_length": 8, "beam_size": 4},
    }
    config = parse(RunConfig, values)
    network = build_model(config.model).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
        assert network.logit_bias is not None
        network.logit_bias[[tokenizer.pad, tokenizer.bos, tokenizer.sep, tokenizer.mask]] -= 100.0
    return Predictor(network, tokenizer, config)


# Minimum Bayes risk


def test_expected_chrf_is_the_mean_of_sentence_scores() -> None:
    texts, weights = ["the dog sleeps", "the dog slept", "the dog sleeps", "", "a bird"], [0.1, 0.3, 0.2, 0.15, 0.25]
    metric = CHRF()
    expected = [
        sum(
            weight * (100 if text == other else metric.sentence_score(text, [other]).score)
            for other, weight in zip(texts, weights, strict=True)
        )
        for text in texts
    ]
    np.testing.assert_allclose(expected_chrf(texts, weights), expected)
    assert expected_chrf(["one"], [1.0]).tolist() == [100.0]


@pytest.mark.parametrize("method", ["sample", "beam"])
def test_the_output_with_the_best_expected_chrf_is_chosen(method: str) -> None:
    predictor = predictor_of()
    lines = ["old birds", "the dog", "", "here"]
    settings: dict[str, Any] = {"method": method, "beam_size": 6, "seed": 2}
    if method == "sample":
        settings["temperature"] = 0.7
    candidates = predictor.generate(lines, n_best=6, **settings)
    chosen = predictor.generate(lines, mbr=6, n_best=2, **settings)
    changed = 0
    for before, after in zip(candidates, chosen, strict=True):
        if len(before.outputs) == 1:
            assert [one.text for one in after.outputs] == [""]
            continue
        chances = [1.0 if method == "sample" else np.exp(one.log_probability) for one in before.outputs]
        values = expected_chrf([one.text for one in before.outputs], [c / sum(chances) for c in chances])
        assert after.outputs[0].score == pytest.approx(max(values))
        assert after.text in {
            one.text for one, value in zip(before.outputs, values, strict=True) if value == max(values)
        }
        assert len({one.text for one in after.outputs}) == len(after.outputs)
        changed += after.text != before.text
    assert changed or method == "beam", "the most probable was always the safest"
    beam = {"method": "beam", "beam_size": 6, "mbr": 6}
    alone = [predictor.generate([line], **beam)[0].text for line in lines]
    assert predictor.translate(lines, **beam) == alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "greedy", "mbr": 4}, "mbr chooses among several outputs, greedy decoding gives one"),
        ({"method": "beam", "mbr": 5}, r"mbr=5 is more than decoding\.beam_size=4"),
        ({"method": "sample", "mbr": 3, "n_best": 4}, r"n_best=4 is more than decoding\.mbr=3 candidates"),
        ({"mbr": 1}, "greater than or equal to 2"),
        ({"no_repeat_ngram": 0}, "greater than or equal to 1"),
        ({"coverage_penalty": -1.0}, "greater than or equal to 0"),
        ({"unknown": "forget"}, "'keep', 'ban' or 'replace'"),
        ({"beam_groups": 3}, "no multiple of"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predictor_of().decoding(**settings)


# Unknown words


def test_unknown_tokens_are_kept_banned_or_replaced() -> None:
    predictor = predictor_of()
    assert predictor.model.logit_bias is not None
    with torch.no_grad():
        predictor.model.logit_bias[predictor.tokenizer.unk] += 8.0
    lines = ["old Zebra sleeps", "Quagga", "the dog"]
    shown = predictor.tokenizer.decode([predictor.tokenizer.unk])
    kept = predictor.generate(lines, method="greedy")
    assert all(shown in one.text for one in kept)
    banned = predictor.generate(lines, method="greedy", unknown="ban")
    assert not any(shown in one.text for one in banned)
    assert all(one.outputs[0].acted == ("unknown",) for one in banned)
    replaced = predictor.generate(lines, method="greedy", unknown="replace", alignments="tokens")
    for line, before, after in zip(lines, kept, replaced, strict=True):
        links = {target: source for source, target in after.outputs[0].alignment or []}
        expected = [
            line.split()[links[at]] if word == "\0" else word
            for at, word in enumerate(before.text.replace(shown, "\0").split())
        ]
        assert after.text.split() == expected
        assert after.outputs[0].acted == ("unknown",)
        assert after.outputs[0].log_probability == before.outputs[0].log_probability
    assert set(replaced[1].text.split()) >= {"Quagga"}


def test_pieces_are_replaced_without_the_spaces_of_their_sign() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["der Hund ist gross, ja"] * 50),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = Tokenizer.parse(model.getvalue(), "pieces")
    tokens = tokenizer.encode("der Hünd, ß ist")
    unknown = [at for at, token in enumerate(tokens) if token == tokenizer.unk]
    assert len(unknown) == 2
    prompts = Prompts(tokenizer, RunConfig())
    written = Written("", Hypothesis(tokens, 0.0, 0.0, True))
    assert _replaced(written, prompts, dict(zip(unknown, "üß", strict=True))).text == "der Hünd, ß ist"


def test_a_language_model_has_no_source() -> None:
    predictor = predictor_of(layout="decoder-only", task="language-model")
    for settings in ({"unknown": "replace"}, {"alignments": "words"}):
        with pytest.raises(CapabilityError, match="a language model has no source to align with"):
            predictor.translate(["the dog"], **settings)


# Prefixes and phrases


@pytest.mark.parametrize("kind", ["word", "bpe", "byte", "character", "unigram"])
@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only"])
def test_outputs_hold_what_lines_demand(kind: str, layout: str) -> None:
    predictor = predictor_of(kind, layout)
    lines = [
        Line("the dog", prefix="a cat "),
        "here",
        Line("old birds", phrases=("the dog", "bird")),
        Line("a bird", prefix="old", phrases=("sees",)),
    ]
    results = predictor.generate(lines, max_length=40, beam_size=2, length_penalty=0.0)
    assert results[0].text.startswith("a cat")
    words = " ".join(["", *results[2].text.split()])
    assert " the dog" in words
    assert " bird" in words
    assert results[3].text.startswith("old")
    assert " sees" in results[3].text
    assert results[1].text == predictor.translate(["here"], max_length=40, beam_size=2, length_penalty=0.0)[0]


def test_a_phrase_may_begin_an_output() -> None:
    """Byte pairs write a word after a space otherwise than at the beginning; both are the phrase."""
    predictor = predictor_of("bpe")
    (phrase,) = predictor._prompts.requests([Line("x", phrases=("dog",))], predictor.decoding())[0].phrases  # type: ignore[union-attr]
    assert phrase.first is not None
    assert predictor.tokenizer.decode(phrase.tokens) == " dog"
    assert predictor.tokenizer.decode(phrase.first) == "dog"
    unspaced = predictor_of("bpe", target_language="zh-CN")
    (phrase,) = unspaced._prompts.requests([Line("x", phrases=("dog",))], unspaced.decoding())[0].phrases  # type: ignore[union-attr]
    assert (unspaced.tokenizer.decode(phrase.tokens), phrase.first) == ("dog", None)


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (Line("the dog", prefix="Zebra"), DataError, 'line 2: the vocabulary cannot write the prefix "Zebra"'),
        (Line("the dog", phrases=("a Zebra",)), DataError, 'line 2: the vocabulary cannot write the phrase "a Zebra"'),
        (Line("the dog", phrases=(" ",)), DataError, "line 2: an empty phrase"),
        (Line(" ", prefix="the"), DataError, "line 2 is empty and gives an empty output"),
        (
            Line("the dog", prefix="the old dog sleeps", phrases=("here is a bird",)),
            LengthError,
            "line 2: 8 tokens in prefix and phrases, more than the output's limit less one",
        ),
    ],
)
def test_demands_that_cannot_be(line: Line, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        predictor_of().translate(["here", line])


def test_phrases_need_a_beam() -> None:
    with pytest.raises(ConfigError, match=r"phrases need decoding\.method=beam; decoding\.method=sample"):
        predictor_of().translate([Line("the dog", phrases=("a",))], method="sample")
