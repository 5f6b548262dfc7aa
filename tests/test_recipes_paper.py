"""Recipes that follow a paper, held to its numbers: Vaswani et al. 2017; Wu et al. 2021 for Transformer-Tiny."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from trilemma.compare.expand import expand
from trilemma.compare.matching import count, skeleton
from trilemma.compare.records import flatten
from trilemma.config import RunConfig, load_config
from trilemma.study import load_study
from trilemma.train.schedules import learning_rate

RECIPES = Path(__file__).parent.parent / "recipes"

# Table 3 (sizes, dropout, smoothing, steps), sections 5.2 (seconds a step) and 6.1 (averaging).
PAPER: dict[str, dict[str, Any]] = {
    "base": {"d_model": 512, "d_ff": 2048, "heads": 8, "dropout": 0.1, "steps": 100_000, "second": 0.4, "average": 5},
    "big": {"d_model": 1024, "d_ff": 4096, "heads": 16, "dropout": 0.3, "steps": 300_000, "second": 1.0, "average": 20},
}


def recipe(name: str) -> RunConfig:
    return load_config(RECIPES / f"transformer-{name}.yaml")


@pytest.mark.parametrize("name", PAPER)
def test_sizes_are_the_papers(name: str) -> None:
    model, paper = recipe(name).model, PAPER[name]
    assert (model.layout, model.norm_position, model.activation) == ("encoder-decoder", "post", "relu")
    assert (model.d_model, model.d_ff, model.num_heads) == (paper["d_model"], paper["d_ff"], paper["heads"])
    assert (model.num_layers, model.encoder_layers or model.num_layers) == (6, 6)
    assert model.d_model // model.num_heads == 64
    assert model.dropout == paper["dropout"]
    assert model.tie_embeddings
    assert model.share_embeddings
    assert model.embedding_scale


@pytest.mark.parametrize(("name", "weights"), [("base", 62_984_192), ("big", 214_048_768)])
def test_weights_are_the_papers(name: str, weights: int) -> None:
    """62.98 M and 214.05 M in matrices at a vocabulary of 37,000."""
    config = recipe(name)
    model = skeleton(config.model.model_copy(update={"vocab_size": config.tokenizer.vocab_size}))
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.ndim >= 2) == weights


@pytest.mark.parametrize("name", PAPER)
def test_training_is_the_papers(name: str) -> None:
    training, paper = recipe(name).training, PAPER[name]
    assert training.steps == paper["steps"]
    assert training.batch_tokens * training.accumulate == 25_000 + 25_000
    assert (training.beta1, training.beta2, training.epsilon) == (0.9, 0.98, 1e-9)
    assert training.label_smoothing == 0.1
    assert (training.clip_norm, training.weight_decay, training.ema) == (None, 0.0, None)
    assert training.average_last == paper["average"]
    assert training.checkpoint_every * paper["second"] == pytest.approx(600)


@pytest.mark.parametrize("name", PAPER)
def test_learning_rate_is_equation_3(name: str) -> None:
    training, width = recipe(name).training, PAPER[name]["d_model"]
    for step in (1, 100, 4000, 4001, 100_000):
        expected = width**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert learning_rate(training, width, step) == pytest.approx(expected, rel=1e-12)
    if name == "base":
        assert learning_rate(training, width, 4000) == pytest.approx(6.99e-4, rel=1e-3)


@pytest.mark.parametrize("name", PAPER)
def test_decoding_is_the_papers(name: str) -> None:
    decoding = recipe(name).decoding
    assert (decoding.method, decoding.beam_size, decoding.length_penalty, decoding.n_best) == ("beam", 4, 0.6, 1)
    assert (decoding.max_length, decoding.max_ratio, decoding.max_extra) == (None, 1.0, 50)  # input length + 50


def test_tiny_is_the_published_one() -> None:
    config = recipe("tiny")
    model, training = config.model, config.training
    assert (model.d_model, model.d_ff, model.num_layers, model.num_heads) == (128, 256, 4, 4)
    assert (model.norm_position, model.activation, model.dropout) == ("post", "relu", 0.3)
    vocabulary = 10_000 + 256 + 6  # merges, bytes, special entries
    assert config.tokenizer.vocab_size == vocabulary
    assert config.tokenizer.pretokenized
    counts = skeleton(model.model_copy(update={"vocab_size": vocabulary})).parameter_counts()
    assert counts["total"] / 1e6 == pytest.approx(2.6, abs=0.05)
    assert (training.steps, training.warmup_steps, training.patience, training.average_last) == (8000, 2000, 10, 10)
    assert training.batch_tokens * training.accumulate == 2 * (2 * 4096)  # two GPUs, two sides
    assert (training.beta1, training.beta2, training.label_smoothing) == (0.9, 0.98, 0.1)
    assert learning_rate(training, 128, 2000) == 5e-3
    assert learning_rate(training, 128, 8000) == pytest.approx(5e-3 * math.sqrt(2000 / 8000))
    assert (config.decoding.method, config.decoding.beam_size) == ("beam", 5)
    assert config.data.bleu_tokenizer == "none"


def test_tiny_reads_its_data_and_no_test_file_guides_it() -> None:
    """The tokenised corpus; whatever decides (tokenizer, stopping, weights) comes from train and val."""
    data = recipe("tiny").data
    assert isinstance(data.train, list) is False
    names = [str(value) for value in (data.train.source, data.train.target)]  # type: ignore[union-attr]
    assert all("/tok/train.lc.norm.tok." in name for name in names)
    assert data.valid is not None
    assert "/val." in str(data.valid.source)
    assert data.test is not None
    assert "/test_2016_flickr." in str(data.test.source)


@pytest.mark.parametrize("name", ["tiny", "base", "big"])
def test_a_recipe_says_where_its_numbers_come_from(name: str) -> None:
    head = (RECIPES / f"transformer-{name}.yaml").read_text(encoding="utf-8").partition("\nname:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert ("Wu et al." if name == "tiny" else "arXiv 1706.03762v7") in head


def test_the_ablations_start_from_the_published_recipe() -> None:
    """The reference is transformer-tiny but for the budget; each candidate leaves it in one step, the last in all."""
    study = load_study(RECIPES / "transformer-tiny-ablations.yaml")
    published = flatten(recipe("tiny").model_dump(mode="json"))
    base = flatten(study.base.model_dump(mode="json"))
    assert {key for key in base if base[key] != published[key]} == {
        "name", "training.steps", "training.warmup_steps", "training.patience",
    }  # fmt: skip
    assert base["training.warmup_steps"] * 4 == published["training.warmup_steps"]
    steps = {one.name: set(one.overrides) for one in study.candidates}
    assert steps.pop("published") == set()
    together = steps.pop("all together")
    steps.pop("no averaging")
    assert together == set().union(*steps.values())
    assert {"training.r_drop", "training.subword_dropout", "training.ema", "model.norm_position"} <= together
    sizes = [count(variant.config.model) for variant in expand(study).variants]
    assert max(sizes) / min(sizes) < 1.001


def test_the_heirs_keep_their_depth_at_equal_parameters() -> None:
    found = expand(load_study(RECIPES / "translation-heirs.yaml"))
    assert not found.inequalities
    sizes = [count(variant.config.model) for variant in found.variants]
    assert max(sizes) / min(sizes) < 1.02
    for variant in found.variants:
        model = variant.config.model
        assert (model.num_layers, model.encoder_layers) == (4, None)
        assert model.d_ff is not None
        assert model.d_ff >= 2 * model.d_model
