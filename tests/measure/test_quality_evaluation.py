"""Scores of models: against the training loss, against forced decoding by hand, and never dependent on the batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trilemma.config import RunConfig, merge, parse
from trilemma.data import IGNORE, Dataset, prepare
from trilemma.decode import Prompts
from trilemma.errors import ConfigError, DataError, LengthError
from trilemma.measure import evaluation, quality
from trilemma.measure.evaluation import score_model, score_texts
from trilemma.measure.texts import file_texts, split_texts
from trilemma.models import SequenceModel, build_model

PAIRS = [
    ("eins", "one"),
    ("zwei und drei", "two and three"),
    ("vier", "fïve"),
    ("sechs sieben acht neun", "six"),
    ("", ""),
]


def config_of(**overrides: Any) -> RunConfig:
    values = {
        "model": {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
        "tokenizer": {"kind": "byte"},
        "training": {"batch_tokens": 64},
        "decoding": {"max_length": 5},
    }
    return parse(RunConfig, merge(values, {key.replace("__", "."): value for key, value in overrides.items()}))


def setup(tmp_path: Path, data: Any = None, **overrides: Any) -> tuple[SequenceModel, Dataset, RunConfig]:
    config = config_of(**overrides)
    dataset, _ = prepare(config, cache_dir=tmp_path, data=data)
    config = dataset.resolved(config)
    torch.manual_seed(0)
    return build_model(config.model).double().eval(), dataset, config


@torch.no_grad()
def training_loss(model: SequenceModel, dataset: Dataset) -> tuple[float, int]:
    """Nats and tokens of the test split, computed as training does, batch by batch."""
    total, tokens = 0.0, 0
    for batch in dataset.eval_batches("test"):
        hidden = model(
            batch.inputs,
            batch.lengths,
            source=batch.source,
            source_lengths=batch.source_lengths,
            prefix=batch.prefix,
            segments=batch.segments,
        )
        logits = model.head(hidden).flatten(0, -2)
        total += float(F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"))
        tokens += batch.num_targets
    return total, tokens


@pytest.mark.parametrize(
    "overrides",
    [
        {"model__layout": "encoder-decoder"},
        {"model__layout": "decoder-only"},
        {"model__layout": "decoder-only", "model__prefix": True},
        {"model__layout": "decoder-only", "model__mixer": "retention"},
    ],
    ids=str,
)
def test_likelihood_is_that_of_training(tmp_path: Path, overrides: dict[str, Any]) -> None:
    model, dataset, _ = setup(tmp_path, {"train": PAIRS, "test": PAIRS}, **overrides)
    nats, tokens = training_loss(model, dataset)
    found = score_model(model, dataset, "test", metrics=["loss", "perplexity", "bits_per_byte"])
    assert tokens == sum(len(target.encode()) + 1 for _, target in PAIRS)
    assert found["loss"].value == pytest.approx(nats / tokens, rel=1e-12)
    assert found["perplexity"].value == pytest.approx(math.exp(nats / tokens), rel=1e-12)
    # "fïve" is five bytes
    assert found["bits_per_byte"].value == pytest.approx(nats / math.log(2) / (3 + 13 + 5 + 3), rel=1e-12)
    assert found["loss"].size == 5
    assert found.hypotheses == [], "no metric needed an output"


def test_language_models_are_scored_document_by_document(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("one two three\n\nfour\nfïve six seven eight nine ten\n", encoding="utf-8")
    overrides = {
        "data__task": "language-model", "data__context_length": 64, "data__train": {"path": str(tmp_path / "test.txt")},
        "data__test": {"path": str(tmp_path / "test.txt")}, "model__layout": "decoder-only",
    }  # fmt: skip
    model, dataset, config = setup(tmp_path, **overrides)
    found = score_model(model, dataset, "test")
    size = (tmp_path / "test.txt").stat().st_size
    assert size == dataset.bytes_of("test")
    assert found["loss"].size == 4
    assert found["bits_per_byte"].segments is not None
    assert found["bits_per_byte"].segments[:, 1].sum() == pytest.approx(size)
    # a row holds everything here, so that packed training rows see each document whole
    nats, tokens = training_loss(model, dataset)
    assert found["loss"].value == pytest.approx(nats / tokens, rel=1e-12)
    texts = split_texts(config, "test")
    assert (texts.sources, texts.targets) == dataset.eval_texts("test")
    assert texts.line_ends == 4
    # long documents in pieces: every token is scored once, bytes are shared out exactly
    short = config.model_copy(update={"data": config.data.model_copy(update={"context_length": 5})})
    pieces = score_texts(model, dataset.tokenizer, short, texts.sources, [], line_ends=4)
    assert pieces["loss"].segments is not None
    assert pieces["loss"].segments[:, 1].sum() == tokens
    assert pieces["bits_per_byte"].segments is not None
    assert pieces["bits_per_byte"].segments[:, 1].sum() == pytest.approx(size)
    assert pieces["loss"].size > 4


def test_classifiers(tmp_path: Path) -> None:
    examples = [("a good film", "good"), ("bad", "bad"), ("so so", "bad"), ("très bien", "good")]
    model, dataset, config = setup(
        tmp_path, {"train": examples, "test": examples}, data__task="classification", model__layout="encoder-only"
    )
    found = score_model(model, dataset, "test")
    assert config.data.labels == ["bad", "good"]
    right = sum(p == label for p, (_, label) in zip(found.hypotheses, examples, strict=True))
    assert found["accuracy"].value == 25.0 * right
    assert found["accuracy"].low is not None
    with torch.no_grad():
        total = sum(
            float(F.cross_entropy(model.head(model(b.inputs, b.lengths)), b.labels, reduction="sum"))
            for b in dataset.eval_batches("test")
        )
    assert found["loss"].value == pytest.approx(total / 4, rel=1e-12)
    with pytest.raises(DataError, match='line 2: unknown label "god"; did you mean "good"'):
        score_texts(model, dataset.tokenizer, config, ["a", "b"], ["bad", "god"])


def test_masked_language_models(tmp_path: Path) -> None:
    model, dataset, _ = setup(
        tmp_path, {"train": ["one two three", "four"], "test": ["five six seven eight"]},
        data__task="masked-language-model", data__context_length=32, model__layout="encoder-only",
    )  # fmt: skip
    nats, tokens = training_loss(model, dataset)
    found = score_model(model, dataset, "test")
    assert found["loss"].value == pytest.approx(nats / tokens, rel=1e-12)
    assert "masked-token" in found["perplexity"].signature


def test_scores_do_not_depend_on_the_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, dataset, config = setup(tmp_path, {"train": PAIRS, "test": PAIRS * 5})
    model.float()
    found = []
    for batch_tokens in (1, 40, 10_000):
        monkeypatch.setattr(evaluation, "LIKELIHOOD_BATCH_TOKENS", batch_tokens)
        decoding = config.decoding.model_copy(update={"batch_tokens": batch_tokens})
        found.append(score_model(model, dataset, "test", decoding=decoding))
    for other in found[1:]:
        assert other.hypotheses == found[0].hypotheses
        for ours, theirs in zip(found[0].scores, other.scores, strict=True):
            assert ours.value == pytest.approx(theirs.value, rel=1e-6)
            assert (ours.metric, ours.signature, ours.size) == (theirs.metric, theirs.signature, theirs.size)
    assert [score.metric for score in found[0].scores] == list(evaluation.METRICS["seq2seq"])


def test_outputs_are_compared_with_references(tmp_path: Path) -> None:
    model, dataset, config = setup(tmp_path, {"train": PAIRS, "test": PAIRS})
    found = score_model(model, dataset, "test")
    assert found["bleu"].value == quality.bleu(found.hypotheses, [target for _, target in PAIRS]).value
    assert found.hypotheses[4] == "", "an empty line gives an empty output"
    assert found["exact_match"].value >= 20.0
    assert len(found.notes) == 1
    assert "cut at the length limit" in found.notes[0]
    japanese = config.model_copy(update={"data": config.data.model_copy(update={"target_language": "th"})})
    notes = score_texts(model, dataset.tokenizer, japanese, ["a"], ["b"], metrics=["bleu"]).notes
    assert "BLEU is counted over characters: Thai is written without spaces between words" in notes
    named = japanese.model_copy(update={"data": japanese.data.model_copy(update={"bleu_tokenizer": "none"})})
    found = score_texts(model, dataset.tokenizer, named, ["a"], ["b"], metrics=["bleu"])
    assert "tok:none" in found["bleu"].signature
    assert not any("characters" in note for note in found.notes)


@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only"])
def test_prompts_are_those_of_training(tmp_path: Path, layout: str) -> None:
    """What a training row holds before its first scored label is what decoding starts from."""
    _, dataset, config = setup(tmp_path, {"train": PAIRS, "test": PAIRS}, model__layout=layout)
    prompts = Prompts(dataset.tokenizer, config)
    seen = 0
    for batch in dataset.eval_batches("test"):
        for row, example in enumerate(batch.examples):
            found = prompts.context(dataset.tokenizer.encode(PAIRS[example][0]))
            given = int((batch.labels[row] != IGNORE).long().argmax()) + 1
            assert found.prompt == batch.inputs[row, :given].tolist()
            if batch.source is None:
                assert found.source is None
                assert batch.prefix is not None
                assert given == int(batch.prefix[row])
            else:
                assert batch.source_lengths is not None
                assert found.source == batch.source[row, : batch.source_lengths[row]].tolist()
            seen += 1
    assert seen == len(PAIRS)


def test_split_texts_are_the_datasets(tmp_path: Path) -> None:
    config = config_of(
        data__train={"generated": "numbers", "size": 50},
        data__test={"generated": "numbers", "size": 7},
        training__batch_tokens=512,
    )
    dataset, _ = prepare(config, cache_dir=tmp_path)
    for split in ("valid", "test"):
        texts = split_texts(config, split)
        assert (texts.sources, texts.targets) == dataset.eval_texts(split)
    assert len(split_texts(config, "test").sources) == 7


def test_files(tmp_path: Path) -> None:
    config = config_of()
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.de").write_text("eins\nzwei\n")
    (tmp_path / "a.tsv").write_text("one\teins\ntwo\tzwei\n")
    pair = file_texts(config, [tmp_path / "a.en", tmp_path / "a.de"])
    table = file_texts(config, [tmp_path / "a.tsv"])
    assert pair.sources == table.sources == ["one", "two"]
    assert pair.targets == table.targets == ["eins", "zwei"]
    with pytest.raises(ConfigError, match="3 files were given"):
        file_texts(config, [tmp_path / "a.en"] * 3)
    with pytest.raises(DataError, match=r"nothing\.de"):
        file_texts(config, [tmp_path / "a.en", tmp_path / "nothing.de"])
    no_test = config_of(data__train={"path": "x.tsv"})
    with pytest.raises(DataError, match=r"set data\.test in the config"):
        split_texts(no_test, "test")


def test_a_document_of_a_file_is_what_it_is_in_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    for documents, wanted in ("file", ["one\ntwo\n"]), ("line", ["one", "two"]):
        config = config_of(
            data__task="language-model", model__layout="decoder-only", data__context_length=64,
            data__train={"path": str(tmp_path / "a.txt"), "options": {"documents": documents}},
        )  # fmt: skip
        assert file_texts(config, [tmp_path / "a.txt"]).sources == wanted


def test_a_file_for_a_run_without_data(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("one\teins\n")
    assert file_texts(config_of(data__train=[]), [tmp_path / "a.tsv"]).sources == ["one"]


def test_unknown_metric_and_too_long(tmp_path: Path) -> None:
    model, dataset, config = setup(
        tmp_path, {"train": PAIRS, "test": PAIRS}, model__positions="learned", model__max_length=16,
        data__over_length="drop",
    )  # fmt: skip
    with pytest.raises(ConfigError, match='no metric "blue"; did you mean "bleu"'):
        score_model(model, dataset, "test", metrics=["blue"])
    with pytest.raises(LengthError, match="test: line 4: 22 tokens"):
        score_model(model, dataset, "test", metrics=["bleu"])
    with pytest.raises(LengthError, match=r"test: line 4: 23 tokens, more than model\.max_length = 16"):
        score_model(model, dataset, "test", metrics=["loss"])
    with pytest.raises(ConfigError, match='"bleu" was not measured'):
        score_texts(model, dataset.tokenizer, config, ["a"], ["b"], metrics=["loss"])["bleu"]


def test_segments_give_the_value_back(tmp_path: Path) -> None:
    model, dataset, _ = setup(tmp_path, {"train": PAIRS, "test": PAIRS})
    for score in score_model(model, dataset, "test").scores:
        if score.metric != "chrf":
            assert score.segments is not None
            assert len(score.segments) == score.size
            assert quality.from_segments(score.metric, np.asarray(score.segments)) == pytest.approx(score.value)
