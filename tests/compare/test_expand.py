"""A study expands to plain runs: matching, budgets, learning rates, names, and what candidates may not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from trilemma.compare.expand import choose_rate, expand, final_jobs, run_name, slug, sweep_jobs
from trilemma.compare.matching import count, match_parameters
from trilemma.config import ModelConfig, parse
from trilemma.data import Dataset, prepare
from trilemma.errors import ConfigError
from trilemma.models import build_model
from trilemma.study import StudyConfig
from trilemma.train.counters import flops_of

TINY = {"d_model": 32, "num_layers": 2, "num_heads": 2, "dropout": 0.0}
DATA = {"train": {"generated": "reverse", "size": 60}, "valid": {"generated": "reverse", "size": 8}}


def study(*candidates: Mapping[str, Any], **changes: Any) -> StudyConfig:
    base: dict[str, Any] = {
        "model": TINY,
        "data": {**DATA, "test": {"generated": "reverse", "size": 8}},
        "tokenizer": {"kind": "character"},
        "training": {"batch_tokens": 256, "warmup_steps": 2, "precision": "float32", "device": "cpu"},
    }
    values = {
        "base": base,
        "candidates": list(candidates) or [{"name": "a"}],
        "budget": {"amount": 1000},
        **changes,
    }
    return parse(StudyConfig, values)


@pytest.fixture(scope="module", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRILEMMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def dataset(_private_cache: None) -> Dataset:
    return prepare(study().base)[0]


RIVALS: dict[str, dict[str, Any]] = {
    "retention": {"model.mixer": "retention"},
    "lstm both": {"model.mixer": "lstm", "model.encoder_mixer": {"name": "bidirectional", "inner": "lstm"}},
    "gru": {"model.mixer": "gru"},
    "decoder-only": {"model.layout": "decoder-only"},
    "swiglu": {"model.activation": "swiglu"},
    "pattern": {"model.mixer": ["attention", "retention"]},
}


@pytest.mark.parametrize("name", RIVALS)
def test_parameters_are_matched_within_two_percent_as_counted(name: str) -> None:
    found = expand(study({"name": "transformer"}, {"name": name, "overrides": RIVALS[name]}))
    target, own = (_counted(variant.config.model) for variant in found.variants)
    assert abs(own / target - 1) <= 0.02
    assert all(variant.config.model.d_model == 32 for variant in found.variants)


def _counted(config: ModelConfig) -> int:
    """Independent of `count`: a model with weights, embeddings taken out by hand."""
    model = build_model(config.model_copy(update={"vocab_size": 30}))
    embeddings = {id(parameter) for module in model.modules() for parameter in _embedding_weights(module)}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in embeddings)


def _embedding_weights(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return list(module.parameters(recurse=False)) if isinstance(module, torch.nn.Embedding) else []


def test_depth_moves_where_the_width_alone_does_not_fit() -> None:
    config = parse(ModelConfig, {**TINY, "layout": "decoder-only"})
    target = 5 * count(config)
    match = match_parameters(config, target, 0.02)
    assert abs(match.off) <= 0.02
    assert match.config.num_layers > config.num_layers
    assert match.config.d_ff is not None
    assert 32 <= match.config.d_ff <= 6 * 32


def test_what_cannot_be_matched_is_listed() -> None:
    lonely = {"name": "narrow", "overrides": {"model.d_ff": 8}}
    wide = {"name": "wide", "overrides": {"model.d_model": 64}}
    found = expand(study({"name": "a"}, lonely, wide))
    texts = {item.candidate: [] for item in found.inequalities}
    for item in found.inequalities:
        texts[item.candidate].append(item.text)
    assert any("(its d_ff is given, so it was not matched)" in text for text in texts["narrow"])
    assert "d_model is 64, the base's is 32" in texts["wide"]
    assert "a" not in texts


def test_changes_of_depth_and_of_training_are_listed() -> None:
    deep = {"name": "decoder-only", "overrides": {"model.layout": "decoder-only"}}
    smooth = {"name": "smooth", "overrides": {"training.label_smoothing": 0.1}}
    texts = [f"{item.candidate}: {item.text}" for item in expand(study({"name": "a"}, deep, smooth)).inequalities]
    assert "smooth: training.label_smoothing is 0.1, the base's is 0.0" in texts
    assert any(text.startswith("decoder-only: ") and text.endswith("layers, to match parameters") for text in texts)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"data.lowercase": True}, "data.lowercase"),
        ({"tokenizer": {"kind": "byte"}}, "tokenizer.kind"),
        ({"training.max_tokens": 5}, "training.max_tokens"),
        ({"training": {"precision": "bfloat16"}}, "training.precision"),
        ({"seed": 5}, "seed"),
    ],
)
def test_what_candidates_share_cannot_be_overridden(overrides: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf'candidate "b": {key} must be the same for all candidates'):
        expand(study({"name": "a"}, {"name": "b", "overrides": overrides}))


def test_mistakes_in_names_are_clear() -> None:
    with pytest.raises(ConfigError, match='two are called "a"'):
        expand(study({"name": "a"}, {"name": "a"}))
    with pytest.raises(ConfigError, match='no candidate is called "transfomer"; did you mean "transformer"'):
        expand(study({"name": "transformer"}, reference="transfomer"))
    with pytest.raises(ConfigError, match=r'candidate "b": unknown key "model\.mixr"; did you mean "mixer"'):
        expand(study({"name": "a"}, {"name": "b", "overrides": {"model.mixr": "gru"}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": [0]}, r"contexts\.0: .* greater than or equal to 1, found 0"),
        ({"contexts": [8, -5]}, r"contexts\.1: .*found -5"),
        ({"batch_sizes": [0]}, r"batch_sizes\.0: .*found 0"),
        ({"seeds": [-1]}, r"seeds\.0: .*found -1"),
        ({"seeds": [1, 1]}, r"seeds: each may be given once, found \[1, 1\]"),
        ({"seeds": []}, "seeds: "),
        ({"learning_rates": [1e-3, -1.0]}, r"learning_rates\.1: .*found -1"),
        ({"candidates": [{"name": "a", "seeds": [1, 1, 1]}]}, r"candidates\.0\.seeds: each may be given once"),
        ({"candidates": [{"name": "a", "seeds": [-1]}]}, r"candidates\.0\.seeds\.0: .*found -1"),
    ],
)
def test_items_of_lists_are_held_to_their_bounds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study(**changes)


def test_a_sweep_cannot_have_more_seeds_than_a_candidate() -> None:
    few = {"name": "b", "seeds": [4]}
    asked = study({"name": "a"}, few, seeds=[1, 2], sweep_seeds=2, learning_rates=[1e-3, 2e-3])
    with pytest.raises(ConfigError, match=r'sweep_seeds: 2 are asked for, candidate "b" has the seeds \[4\]'):
        expand(asked)


@pytest.mark.parametrize(
    ("name", "controls"),
    [("a (again)", {"same_twice": True}), ("a (handicapped)", {"known_gap": {"model.positions": "none"}})],
)
def test_the_name_of_a_control_is_reserved(name: str, controls: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r'candidates: "a \(.*\)" is the name of a control; choose another'):
        expand(study({"name": "a"}, {"name": name}, controls=controls))
    assert len(expand(study({"name": "a"}, {"name": name})).variants) == 2


def test_no_two_variants_share_a_folder() -> None:
    names = ["a b", "a/b", "a-b-2", "a b again"]
    asked = study(*({"name": name} for name in names), reference="a b", controls={"same_twice": True}, seeds=[1])
    asked = asked.model_copy(update={"controls": asked.controls.model_copy(update={"known_gap": {"model.d_ff": 8}})})
    found = expand(asked)
    runs = [job.planned.name for job in final_jobs(found, asked, dict.fromkeys(names, 1e-3))]
    folders = {name.partition("-lr")[0] for name in runs}
    assert len(folders) == len(found.variants) == 6
    assert {"a-b", "a-b-2", "a-b-2-2", "a-b-again", "a-b-again-2", "a-b-handicapped"} == folders


@pytest.mark.parametrize(
    ("gap", "message"),
    [
        ({"training.max_tokens": 5}, r"controls\.known_gap: training\.max_tokens must be the same for all candidates"),
        ({"data.lowercase": True}, r"controls\.known_gap: data\.lowercase must be the same for all candidates"),
        ({"training.learning_rate": 1e-9}, r"training\.learning_rate is the reference's"),
        ({}, r"controls\.known_gap: changes nothing of the reference"),
        ({"model.positions": "sinusoidal"}, r"controls\.known_gap: changes nothing of the reference"),
    ],
)
def test_a_known_gap_must_be_one(gap: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(study(controls={"known_gap": gap}))


@pytest.mark.parametrize("lock", ["tokens", "seconds"])
def test_a_locked_budget_is_the_only_thing_that_ends_a_run(lock: str, dataset: Dataset) -> None:
    found = expand(study(budget={"lock": lock, "amount": 1000}), dataset)
    training = found.variants[0].config.training
    ends = (training.steps, training.max_tokens, training.max_seconds)
    assert ends == ((None, 1000, None) if lock == "tokens" else (None, None, 1000.0))


def test_a_flops_budget_becomes_steps_that_are_counted(dataset: Dataset) -> None:
    amount = 3e9
    other = {"name": "b", "overrides": {"model.layout": "decoder-only"}}
    twice = {"name": "c", "overrides": {"training.r_drop": 5.0}}
    rivals = study({"name": "a"}, other, twice, budget={"lock": "flops", "amount": amount})
    found = expand(rivals, dataset)
    found_steps = {}
    for variant in found.variants:
        model = build_model(dataset.resolved(variant.config).model)
        own, _ = prepare(variant.config, dataset.tokenizer)
        steps = variant.config.training.steps
        assert steps is not None
        found_steps[variant.name] = steps
        passes = 2 if variant.name == "c" else 1
        spent = passes * sum(3 * flops_of(model, own.micro_batch(k), {}) for k in range(steps))
        one = spent / steps
        assert abs(spent - amount) <= one
    assert all(steps > 3 for steps in found_steps.values())
    assert found_steps["c"] < 0.6 * found_steps["a"]


def test_validations_fall_on_a_quarter_and_half_of_the_budget(dataset: Dataset) -> None:
    found = expand(study(budget={"amount": 20_000}), dataset)
    every = found.variants[0].config.training.validate_every
    per_step = sum(dataset.micro_batch(k).num_targets for k in range(20)) / 20
    assert every is not None
    assert 10 <= 20_000 / per_step / every <= 15


def test_validations_read_less_than_training_does(dataset: Dataset) -> None:
    training = expand(study(budget={"amount": 20_000}), dataset).variants[0].config.training
    per_step = sum(dataset.micro_batch(k).num_targets for k in range(20)) / 20
    assert training.validate_tokens is not None
    read = 20_000 / per_step * training.batch_tokens
    assert 12 * training.validate_tokens == pytest.approx(0.75 * read, rel=0.1)
    for asked in ({"validate_every": 2}, {"validate_tokens": 9}):
        base = study(budget={"amount": 20_000}).base
        base = base.model_copy(update={"training": base.training.model_copy(update=asked)})
        kept = expand(study(budget={"amount": 20_000}).model_copy(update={"base": base}), dataset)
        assert kept.variants[0].config.training.validate_tokens == asked.get("validate_tokens")


def test_controls_take_other_seeds_and_the_named_handicap() -> None:
    asked = study(seeds=[1, 2, 3], controls={"same_twice": True, "known_gap": {"model.positions": "none"}})
    found = expand(asked)
    assert [(variant.role, variant.seeds) for variant in found.variants] == [
        ("candidate", [1, 2, 3]),
        ("same-twice", [4, 5, 6]),
        ("known-gap", [1, 2, 3]),
    ]
    assert found.variants[1].config.model == found.variants[0].config.model
    assert found.variants[2].config.model.positions == "none"


def test_runs_are_ordered_seed_by_seed_and_differ_in_seed_and_rate_only() -> None:
    asked = study({"name": "a"}, {"name": "b", "overrides": {"model.mixer": "gru"}}, seeds=[5, 7])
    jobs = final_jobs(expand(asked), asked, {"a": 1e-3, "b": 2e-3})
    assert [job.planned.name for job in jobs] == [
        "a-lr0.001-seed5",
        "b-lr0.002-seed5",
        "a-lr0.001-seed7",
        "b-lr0.002-seed7",
    ]
    first, _, third, _ = (job.config for job in jobs)
    assert (first.seed, third.seed) == (5, 7)
    assert first.model_copy(update={"seed": 7}) == third


def test_every_candidate_gets_the_same_learning_rates(dataset: Dataset) -> None:
    asked = study({"name": "a"}, {"name": "b"}, learning_rates=[3e-3, 1e-3], sweep_share=0.25, seeds=[4, 5])
    jobs = sweep_jobs(expand(asked, dataset), asked, dataset)
    rates = {name: [j.planned.learning_rate for j in jobs if j.planned.candidate == name] for name in "ab"}
    assert rates == {"a": [1e-3, 3e-3], "b": [1e-3, 3e-3]}
    assert {job.config.training.max_tokens for job in jobs} == {250}
    assert {job.config.seed for job in jobs} == {4}
    assert jobs[0].planned.name == "a-lr0.001-seed4-sweep"


@pytest.mark.parametrize(
    ("losses", "rate", "widen"),
    [
        ({1e-3: 2.0, 2e-3: 1.0, 4e-3: 3.0}, 2e-3, None),
        ({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}, 1e-3, 5e-4),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0}, 4e-3, 8e-3),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: float("nan")}, 2e-3, None),
        ({1e-3: 3.0}, 1e-3, None),
    ],
)
def test_an_optimum_at_the_edge_widens_the_grid(losses: dict[float, float], rate: float, widen: float | None) -> None:
    choice = choose_rate(losses, widen=True)
    assert choice.learning_rate == rate
    assert choice.widen == (None if widen is None else pytest.approx(widen))


def test_an_optimum_that_stays_at_the_edge_is_flagged() -> None:
    choice = choose_rate({1e-3: 2.0, 2e-3: 1.0}, widen=False)
    assert choice.widen is None
    assert "lies at the edge of what was tried" in choice.text
    with pytest.raises(ConfigError, match=r"no run of the sweep ended with a loss; tried 0\.001"):
        choose_rate({1e-3: float("nan")}, widen=True)


def test_run_names_are_plain_directories(tmp_path: Path) -> None:
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("模型 α") == "candidate"
    assert slug(".hidden") == "hidden"
    assert run_name("a b", ["a b", "a/b"], 1e-3, 1, False) == "a-b-lr0.001-seed1"
    assert run_name("a/b", ["a b", "a/b"], 1e-3, 1, True) == "a-b-2-lr0.001-seed1-sweep"
