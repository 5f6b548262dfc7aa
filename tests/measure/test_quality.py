"""Metrics against hand-made numbers and against sacrebleu itself."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import sacrebleu

from trilemma.errors import ConfigError, DataError
from trilemma.measure import quality

HYPOTHESES = ["the cat sat on the mat", "a dog runs", "", "ein Hund läuft über die Straße .", "no match here at all"]
REFERENCES = ["the cat sat on a mat", "a dog runs fast", "nothing", "Ein Hund läuft über eine Straße.", "etwas anderes"]


def test_bleu_is_sacrebleus() -> None:
    score = quality.bleu(HYPOTHESES, REFERENCES, "de")
    assert score.value == sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES], force=True).score
    assert score.size == 5
    assert "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in score.signature


def test_chrf_is_sacrebleus() -> None:
    score = quality.chrf(HYPOTHESES, REFERENCES)
    assert score.value == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score
    assert "nc:6|nw:0" in score.signature
    assert score.segments is not None
    assert score.segments[1, 0] == sacrebleu.sentence_chrf(HYPOTHESES[1], [REFERENCES[1]]).score


def test_bleu_segments_give_every_corpus_back() -> None:
    score = quality.bleu(HYPOTHESES, REFERENCES)
    assert score.segments is not None
    assert score.segments.shape == (5, 10)
    assert score.segments[0].tolist() == [6, 6, 5, 3, 2, 1, 6, 5, 4, 3]
    generator = np.random.default_rng(0)
    for _ in range(20):
        rows = generator.integers(0, 5, 7)
        expected = sacrebleu.corpus_bleu([HYPOTHESES[r] for r in rows], [[REFERENCES[r] for r in rows]], force=True)
        assert quality.from_segments("bleu", score.segments[rows]) == pytest.approx(expected.score, abs=1e-9)
    mean_of_sentences = np.mean([quality.from_segments("bleu", score.segments[[row]]) for row in range(5)])
    assert abs(mean_of_sentences - score.value) > 1, "a mean of sentence scores would pass unseen"


@pytest.mark.parametrize(
    ("language", "expected"),
    [("zh", "zh"), ("zh-CN", "zh"), ("ZH_tw", "zh"), ("de", "13a"), (None, "13a"), ("th", "char"), ("en-US", "13a")],
)
def test_the_tokenizer_follows_the_language(language: str | None, expected: str) -> None:
    assert quality.bleu_tokenizer(language).name == expected


@pytest.mark.parametrize(("language", "extra"), [("ja", "sacrebleu[ja]"), ("ko-KR", "sacrebleu[ko]")])
def test_a_missing_tokenizer_is_said(language: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_importable", lambda module: False)
    chosen = quality.bleu_tokenizer(language)
    assert chosen.name == "char"
    assert chosen.reason is not None
    assert extra in chosen.reason
    monkeypatch.setattr(quality, "_importable", lambda module: True)
    assert quality.bleu_tokenizer(language) == quality.BleuTokenizer(f"{language[:2]}-mecab")


def test_chinese_is_not_scored_as_one_word() -> None:
    output, reference = ["一只黑色的狗在草地上奔跑。"], ["一只黑狗在草地上奔跑。"]
    chinese, default = quality.bleu(output, reference, "zh"), quality.bleu(output, reference, "de")
    assert "tok:zh" in chinese.signature
    assert chinese.value > default.value + 20


def test_exact_match_and_accuracy() -> None:
    score = quality.exact_match(["a", "b ", "c", "d"], ["a", "b", "x", "d"])
    assert score.value == 75.0
    assert score.segments is not None
    assert quality.from_segments("exact_match", score.segments[:2]) == 100.0
    right = quality.accuracy([1] * 95 + [0] * 5, [1] * 100)
    assert right.value == 95.0
    # Wilson's interval for 95 of 100, from the closed form in decimal arithmetic
    assert right.low == pytest.approx(88.8249, abs=1e-4)
    assert right.high == pytest.approx(97.8457, abs=1e-4)
    assert quality.wilson(0, 10) == (0.0, pytest.approx(0.277533, abs=1e-6))
    assert quality.wilson(10, 10)[1] == 1.0


def test_perplexity_and_bits_per_byte() -> None:
    assert quality.perplexity(math.log(8) * 5, 5).value == pytest.approx(8)
    assert "unit:token" in quality.perplexity(1.0, 5).signature
    assert quality.bits_per_byte(math.log(2) * 24, 8).value == pytest.approx(3)
    assert "unit:bits-per-utf8-byte" in quality.bits_per_byte(1.0, 5).signature
    score = quality.bits_per_byte([1.0, 4.0], [3, 2])
    assert score.value == pytest.approx(1 / math.log(2))
    assert score.segments is not None
    assert quality.from_segments("bits_per_byte", score.segments) == pytest.approx(score.value)
    both = quality.perplexity([1.0, 3.0], [1, 1])
    assert both.value == pytest.approx(math.exp(2))
    assert both.segments is not None
    assert quality.from_segments("perplexity", both.segments[:1]) == pytest.approx(math.e)
    assert quality.perplexity(1e6, 2).value == math.inf
    assert quality.loss([1.0, 3.0], [1, 3]).value == 1.0


def test_sums_do_not_depend_on_order() -> None:
    values = 10.0 ** np.random.default_rng(0).uniform(-9, 9, size=1000)
    ones = np.ones(1000)
    order = np.random.default_rng(1).permutation(1000)
    assert quality.loss(values, ones).value == quality.loss(values[order], ones).value


def test_bad_input() -> None:
    for function in (quality.bleu, quality.chrf, quality.exact_match, quality.accuracy):
        with pytest.raises(DataError, match="nothing to score"):
            function([], [])
        with pytest.raises(DataError, match="2 outputs and 1 references"):
            function(["a", "b"], ["a"])
    with pytest.raises(DataError, match="no bytes"):
        quality.bits_per_byte(1.0, 0)
    with pytest.raises(ConfigError, match='"chrf"'):
        quality.from_segments("chrf", np.ones((1, 1)))


def test_bootstrap_intervals() -> None:
    """For a mean of independent values the interval is that of the normal distribution."""
    values = np.random.default_rng(0).normal(5.0, 2.0, size=2000)
    score = quality.with_interval(quality.loss(values, np.ones(2000)))
    assert score.low is not None
    assert score.high is not None
    half = 1.96 * values.std() / math.sqrt(2000)
    assert score.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert score.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert score.interval == "bootstrap95|samples:1000|seed:0"
    bleu = quality.with_interval(quality.bleu(HYPOTHESES, REFERENCES))
    assert bleu.low is not None
    assert bleu.high is not None
    assert bleu.low < bleu.value < bleu.high
    assert quality.with_interval(bleu) == bleu
    assert quality.with_interval(quality.loss([1.0], [1])).low is None
    assert quality.with_interval(quality.chrf(HYPOTHESES, REFERENCES)).low is None


def test_json_is_plain() -> None:
    text = json.dumps([quality.bleu(HYPOTHESES, REFERENCES).to_json(), quality.accuracy([1], [1]).to_json()])
    assert json.loads(text)[1]["low"] == pytest.approx(20.6549, abs=1e-3)
    assert "segments" not in text
    assert "bleu" in str(quality.bleu(HYPOTHESES, REFERENCES))


def test_a_tokenizer_can_be_named() -> None:
    """Tokenised text is scored over its own words."""
    output, reference = ["so-called 3,5 % ."], ["so-called 3,5 % !"]
    plain, default = quality.bleu(output, reference, "de", "none"), quality.bleu(output, reference, "de")
    assert "tok:none" in plain.signature
    assert "tok:13a" in default.signature
    assert plain.segments is not None
    assert plain.segments[0, :2].tolist() == [4, 4]  # words between spaces
