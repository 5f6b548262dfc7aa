"""The Python API of a trained run, without a run directory."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from trilemma.config import RunConfig, TokenizerConfig, parse
from trilemma.data import train_tokenizer
from trilemma.decode import Ensemble
from trilemma.errors import CapabilityError, ConfigError, DataError, LengthError
from trilemma.models import build_model
from trilemma.predictor import Predictor


def predictor_of(layout: str = "encoder-decoder", data: dict[str, Any] | None = None, **model: Any) -> Predictor:
    torch.manual_seed(3)
    values = {
        "model": {
            "layout": layout,
            "d_model": 16,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
            "vocab_size": 262,
            **model,
        },
        "data": {"max_source_length": 30, **(data or {})},
        "tokenizer": {"kind": "byte"},
        "decoding": {"max_length": 5},
    }
    config = parse(RunConfig, values)
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"), lowercase=config.data.lowercase)
    network = build_model(config.model).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return Predictor(network, tokenizer, config)


def test_translate_and_generate() -> None:
    predictor = predictor_of()
    lines = ["one", "", "two", "three"]
    best = predictor.translate(lines)
    assert best[1] == ""
    results = predictor.generate(lines, n_best=3)
    assert [result.text for result in results] == best
    assert [len(result.outputs) for result in results] == [3, 1, 3, 3]
    assert predictor.translate([]) == []
    assert predictor.translate(["one"], beam_size=1, length_penalty=0.0) == predictor.translate(
        ["one"], method="greedy"
    )


def test_settings_are_checked() -> None:
    predictor = predictor_of()
    with pytest.raises(ConfigError, match='unknown key "beam"'):
        predictor.translate(["a"], beam=4)
    for key in ("temperature", "top_k", "top_p"):
        with pytest.raises(ConfigError, match=f"decoding.{key} has no effect with decoding.method=greedy"):
            predictor.translate(["one"], method="greedy", **{key: 1})
        predictor.translate(["one"], method="sample", **{key: 1})
    with pytest.raises(ConfigError, match="temperature"):
        predictor.translate(["a"], method="sample", temperature=0.0)
    with pytest.raises(ConfigError, match="window"):
        list(predictor.stream(["a"], window=0))


def test_streams_are_lazy() -> None:
    predictor = predictor_of()
    endless = (f"line {number}" for number in itertools.count())
    first = list(itertools.islice(predictor.stream(endless, window=4, method="greedy"), 6))
    assert [result.index for result in first] == list(range(6))
    assert next(endless) == "line 8", "more than two windows were read"


def test_over_length() -> None:
    predictor = predictor_of()
    lines = ["a", "b" * 31, "c"]
    with pytest.raises(LengthError, match=r"line 2: 31 tokens, more than data\.max_source_length = 30"):
        predictor.translate(lines)
    results = predictor.generate(lines, over_length="skip")
    assert [result.skipped is None for result in results] == [True, False, True]
    assert results[1].text == ""


def test_scores_are_those_of_generation() -> None:
    """Bytes decode to text and back to the same tokens, so that an output can be scored as a text."""
    for layout in ("encoder-decoder", "decoder-only"):
        predictor = predictor_of(layout, logit_bias=True)
        bias = predictor.model.logit_bias
        assert bias is not None
        with torch.no_grad():
            bias[: 6 + 32] -= 100.0  # specials and control bytes
            bias[6 + 127 :] -= 100.0  # parts of longer characters
            bias[predictor.tokenizer.eos] += 106.0
        outputs = [result.outputs[0] for result in predictor.generate(["one", "two"], max_length=40)]
        assert all(output.finished for output in outputs)
        scores = predictor.score(["one", "two"], [output.text for output in outputs])
        for output, score in zip(outputs, scores, strict=True):
            assert score.tokens == output.tokens
            assert score.log_probability == pytest.approx(output.log_probability, rel=1e-9)


def test_score_of_a_language_model() -> None:
    predictor = predictor_of("decoder-only", {"task": "language-model"})
    whole, part = predictor.score(["abc", "ab"])
    assert (whole.tokens, part.tokens) == (4, 3)
    assert whole.log_probability < 0
    with pytest.raises(DataError, match="texts alone"):
        predictor.score(["a"], ["b"])
    assert predictor.translate(["abc"], method="greedy")[0] is not None


def test_what_a_run_cannot_do() -> None:
    with pytest.raises(CapabilityError, match="not classification"):
        predictor_of().classify(["a"])
    with pytest.raises(DataError, match="2 sources and 1 targets"):
        predictor_of().score(["a", "b"], ["c"])
    encoder = predictor_of("encoder-only", {"task": "masked-language-model"})
    with pytest.raises(CapabilityError, match="generates no text"):
        encoder.translate(["a"])


def test_lower_case() -> None:
    predictor = predictor_of(data={"lowercase": True})
    assert predictor.translate(["ONE Two"]) == predictor.translate(["one two"])


def test_batching_report() -> None:
    report = predictor_of().batching_report(["one", "two and three", "four"])
    assert report.holds
    assert report.size == 3


def test_line_breaks_in_an_output_become_spaces() -> None:
    predictor = predictor_of(logit_bias=True)
    assert predictor.model.logit_bias is not None
    with torch.no_grad():
        predictor.model.logit_bias[6 + ord("\n")] += 1000.0
    assert predictor.translate(["a"], method="greedy", max_length=4) == ["    "]


def test_the_shortest_positions_of_an_ensemble_are_those_of_its_lines() -> None:
    first, short = (predictor_of("decoder-only", positions="learned", max_length=most) for most in (40, 8))
    both = Predictor(first.model, first.tokenizer, first.config, ensemble=Ensemble([first.model, short.model]))
    lines = ["abc", "abcdefghij"]
    assert len(first.translate(lines)) == 2
    with pytest.raises(LengthError, match=r"line 2: 10 tokens, more than model.max_length = 6"):
        both.translate(lines)
    kept, left = both.generate(lines, over_length="skip", max_length=20)
    assert (kept.skipped, left.text) == (None, "")
    assert kept.outputs[0].tokens <= 8 - 5 + 1


def test_unknown_characters_of_a_line_are_counted() -> None:
    tokenizer = train_tokenizer(["abc"], TokenizerConfig(kind="character"), lowercase=False)
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": tokenizer.vocab_size}
    config = parse(RunConfig, {"model": sizes})
    predictor = Predictor(build_model(config.model).eval(), tokenizer, config)
    assert [line.unknown for line in predictor.generate(["ab", "a\u2603b\u2603", ""], max_length=2)] == [0, 2, 0]


def test_one_text_is_not_a_list_of_its_characters() -> None:
    predictor, language = predictor_of(), predictor_of("decoder-only", {"task": "language-model"})
    labels = {"task": "classification", "labels": ["no", "yes"]}
    classifier = predictor_of("encoder-only", labels, num_labels=2)
    for asked in (
        lambda: predictor.translate("one"),
        lambda: next(iter(predictor.stream("one"))),
        lambda: predictor.score("one", ["eins"]),
        lambda: predictor.score(["one", "two", "six"], "eins"),
        lambda: language.score("one"),
        lambda: classifier.classify("one"),
        lambda: classifier.embed("one"),
    ):
        with pytest.raises(DataError, match=r"a list of texts is needed, found one text; put it in brackets"):
            asked()


def test_a_token_with_another_role_is_not_unknown() -> None:
    words = predictor_of().tokenizer
    assert words.count_unknown([words.unk, 9, words.unk]) == 2
    assert replace(words, unk=words.eos).count_unknown([words.eos, 9]) == 0
