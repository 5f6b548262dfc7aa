"""Configuration: every mistake is one message that says what, where, the nearest valid name; round trips are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilemma.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    Section,
    Source,
    apply_overrides,
    dump,
    load_config,
    merge,
    parse,
    read_yaml,
    set_key,
)
from trilemma.errors import ConfigError, nearest
from trilemma.settings import yaml_text, yaml_value
from trilemma.study import Budget, Candidate, StudyConfig, load_study


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "run.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def message(folder: Path, text: str | bytes, overrides: list[str] | None = None, study: bool = False) -> str:
    """The error's text, with the folder taken away."""
    with pytest.raises(ConfigError) as caught:
        (load_study if study else load_config)(write(folder, text), overrides)
    return str(caught.value).replace(f"{folder}/", "")


SOURCE_KINDS = "give exactly one of: path, source with target, generated"

MISTAKES = {
    "unknown section": ("seed: 1\nmodle: {}\n", 'run.yaml:2: unknown key "modle"; did you mean "model"?'),
    "unknown key": (
        "model:\n  layout: decoder-only\n  d_modle: 8\n",
        'run.yaml:3: unknown key "model.d_modle"; did you mean "d_model"?',
    ),
    "unknown key of a source": (
        "data:\n  train: {pth: a.txt}\n",
        'run.yaml:2: unknown key "data.train.pth"; did you mean "path"?',
    ),
    "unknown key in a list of sources": (
        "data:\n  train:\n    - path: a.txt\n    - path: b.txt\n      wight: 2\n",
        'run.yaml:5: unknown key "data.train.1.wight"; did you mean "weight"?',
    ),
    "not a number": (
        "model:\n  d_model: wide\n",
        "run.yaml:2: model.d_model: Input should be a valid integer, unable to parse string as an integer, "
        "found 'wide'",
    ),
    "a truth value for a number": (
        "training:\n  clip_norm: true\n",
        "run.yaml:2: training.clip_norm: a number is needed, found true",
    ),
    "too small": (
        "model:\n  num_layers: 0\n",
        "run.yaml:2: model.num_layers: Input should be greater than or equal to 1, found 0",
    ),
    "not finite": (
        "training: {learning_rate: .nan}\n",
        "run.yaml:1: training.learning_rate: Input should be a finite number, found nan",
    ),
    "not one of the choices": (
        "model:\n  layout: decoder\n",
        "run.yaml:2: model.layout: Input should be 'encoder-decoder', 'decoder-only' or 'encoder-only', "
        "found 'decoder'; did you mean \"decoder-only\"?",
    ),
    "no section": ("model: 3\n", "run.yaml:1: model: a mapping is needed, found 3"),
    "no source": ("data:\n  train: 5\n", "run.yaml:2: data.train: a mapping or a list is needed, found 5"),
    "no mixer": ("model:\n  mixer: 5\n", "run.yaml:2: model.mixer: text, a mapping or a list is needed, found 5"),
    "nameless mixer": (
        "model:\n  mixer: {window: 5}\n",
        'run.yaml:2: model.mixer: a mixer with options needs the key "name", found window',
    ),
    "nameless mixer in a pattern": (
        "model:\n  mixer:\n  - lstm\n  - {window: 5}\n",
        'run.yaml:2: model.mixer: a mixer with options needs the key "name", found window',
    ),
    "empty pattern": (
        "model:\n  mixer: []\n",
        "run.yaml:2: model.mixer: the pattern is empty; name at least one mixer",
    ),
    "two kinds of source": (
        "data:\n  train: {path: a.txt, generated: numbers}\n",
        f"run.yaml:2: data.train: {SOURCE_KINDS}",
    ),
    "half a source": ("data:\n  valid: {source: a.en}\n", "run.yaml:2: data.valid: source and target go together"),
    "a key given twice": (
        "seed: 1\nname: x\nseed: 2\n",
        'run.yaml:3: not valid YAML: the key "seed" is given twice, first on line 1',
    ),
    "broken YAML": (
        "seed: 1\nmodel: [\n",
        "run.yaml:3: not valid YAML: expected the node content, but found '<stream end>'",
    ),
    "a list": ("- a\n", "run.yaml: a mapping of sections is needed, found list"),
    "empty": ("# nothing\n", "run.yaml: the file is empty"),
    "not UTF-8": (b"name: x\nnotes: \xff\n", "run.yaml:2: not valid UTF-8"),
    "of a later version": ("version: 9\n", "run.yaml: version 9 is newer than this trilemma (1); upgrade"),
    "code": (
        "name: !!python/object/apply:os.system [ls]\n",
        "run.yaml:1: not valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_clear_message(case: str, tmp_path: Path) -> None:
    text, expected = MISTAKES[case]
    assert message(tmp_path, text) == expected


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    told = message(tmp_path, "model:\n  d_modle: 8\n  dropout: 1.5\nseeds: 3\n").splitlines()
    assert len(told) == 3
    assert [line.partition(": ")[0] for line in sorted(told)] == ["run.yaml:2", "run.yaml:3", "run.yaml:4"]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file$"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r": cannot be read: Is a directory$"):
        load_config(tmp_path)


OVERRIDE_MISTAKES = {
    "model.d_model": 'override "model.d_model": write section.key=value',
    "=3": 'override "=3": write section.key=value',
    "model.mixer=[lstm": 'override "model.mixer=[lstm": the value is not valid YAML',
    "model.d_modle=8": 'override "model.d_modle=8": unknown key "model.d_modle"; did you mean "d_model"?',
    "model.d_model=": 'override "model.d_model=": model.d_model: Input should be a valid integer, found None',
    "model..d=1": 'cannot set "model..d": a part of the name is empty',
    "seed.x=1": 'cannot set "seed.x": seed holds 1, it is no section',
    "model.encoder_mixer.window=4": 'cannot set "model.encoder_mixer.window": encoder_mixer names no mixer yet; '
    "set it first: encoder_mixer={name: ...}",
}


@pytest.mark.parametrize("override", OVERRIDE_MISTAKES)
def test_a_mistaken_override_is_named(override: str, tmp_path: Path) -> None:
    assert message(tmp_path, "seed: 1\n", [override]) == OVERRIDE_MISTAKES[override]


def test_the_last_override_of_a_key_is_blamed_and_the_file_is_not(tmp_path: Path) -> None:
    told = message(tmp_path, "model:\n  d_model: 8\n", ["model.d_model=16", "model.d_model=x"])
    assert told.startswith('override "model.d_model=x": ')


def test_overrides_are_read_as_yaml(tmp_path: Path) -> None:
    given_overrides = ["model.d_model=64", "name=a=b", "training.learning_rate=5e-4", "decoding.top_k=null"]
    config = load_config(write(tmp_path, "model: {d_model: 8}\n"), [*given_overrides, "model.bias=false"])
    assert (config.model.d_model, config.name, config.training.learning_rate) == (64, "a=b", 5e-4)
    assert config.decoding.top_k is None and config.model.bias is False


@pytest.mark.parametrize(
    ("text", "override", "expected"),
    [
        ("seed: 1\n", "model.mixer.window=8", {"name": "attention", "window": 8}),
        ("model: {mixer: retention}\n", "model.mixer.chunk_size=8", {"name": "retention", "chunk_size": 8}),
        ("model: {mixer: {name: lstm, hidden: 4}}\n", "model.mixer.hidden=8", {"name": "lstm", "hidden": 8}),
        ("seed: 1\n", "model.mixer=[gru, lstm]", ["gru", "lstm"]),
        ("model: {mixer: [gru, lstm]}\n", "model.mixer.1=gru", ["gru", "gru"]),
        ("model: {mixer: [gru, attention]}\n", "model.mixer.1.window=8", ["gru", {"name": "attention", "window": 8}]),
    ],
)
def test_mixers_are_overridden_by_option(text: str, override: str, expected: Any, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, text), [override]).model.mixer == expected


def test_cross_and_encoder_mixers_are_overridden_by_option(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {encoder_mixer: attention}\n")
    model = load_config(file, ["model.cross_mixer.num_kv_heads=1", "model.encoder_mixer.window=4"]).model
    assert model.cross_mixer == {"name": "cross_attention", "num_kv_heads": 1}
    assert model.encoder_mixer == {"name": "attention", "window": 4}


def test_a_pattern_is_not_lost_to_an_option(tmp_path: Path) -> None:
    told = message(tmp_path, "model: {mixer: [gru, lstm]}\n", ["model.mixer.window=8"])
    assert told == ('cannot set "model.mixer.window": a list of 2 stands here; "window" is no index from 0 to 1')


def test_items_of_lists_are_overridden_by_index(tmp_path: Path) -> None:
    text = "candidates:\n- {name: a}\n- {name: b}\nbudget: {amount: 5}\n"
    study = load_study(write(tmp_path, text), ["candidates.1.name=c", "base.model.mixer.window=3", "seeds=[1, 2]"])
    assert [candidate.name for candidate in study.candidates] == ["a", "c"]
    assert study.base.model.mixer == {"name": "attention", "window": 3}
    assert study.seeds == [1, 2]


STUDY_MISTAKES = {
    "candidates:\n- {name: a, overides: {}}\nbudget: {amount: 1}\n": 'run.yaml:2: unknown key "candidates.0.overides"; '
    'did you mean "overrides"?',
    "candidates: [{name: a}]\n": 'run.yaml: the key "budget" is missing',
    "candidates: [{}]\nbudget: {amount: 1}\n": 'run.yaml:1: the key "candidates.0.name" is missing',
    "candidates: [{name: a}]\nbudget:\n  amount: 1\n  lock: token\n": "run.yaml:4: budget.lock: Input should be "
    "'tokens', 'seconds' or 'flops', found 'token'; did you mean \"tokens\"?",
    "base: {model: {d_modle: 3}}\ncandidates: [{name: a}]\nbudget: {amount: 1}\n": "run.yaml:1: unknown key "
    '"base.model.d_modle"; did you mean "d_model"?',
}


@pytest.mark.parametrize("text", STUDY_MISTAKES)
def test_a_mistake_in_a_study(text: str, tmp_path: Path) -> None:
    assert message(tmp_path, text, study=True) == STUDY_MISTAKES[text]


def test_yaml_means_what_it_shows(tmp_path: Path) -> None:
    """The traps of YAML 1.1: off, no, 1e-3, dates, 12:30 and 010."""
    text = (
        "name: 2026-01-01\n"
        "data: {source_language: no, target_language: de}\n"
        "training: {compile: off, tensorboard: on, learning_rate: 1e-3}\n"
        "model: {bias: no, mixer: {name: retention, epsilon: 1e-5, gate: false}}\n"
        "notes: {at: 12:30, code: 010, not: 1e5x}\n"
    )
    config = load_config(write(tmp_path, text))
    assert config.name == "2026-01-01" and config.data.source_language == "no"
    assert (config.training.compile, config.training.tensorboard) == ("off", "on")
    assert config.training.learning_rate == 1e-3 and config.model.bias is False
    assert config.model.mixer == {"name": "retention", "epsilon": 1e-5, "gate": False}
    assert config.notes == {"at": "12:30", "code": "010", "not": "1e5x"}


def test_anchors_and_merges_work_and_may_be_overridden(tmp_path: Path) -> None:
    text = "training: &t {steps: 5}\ndecoding: {<<: {beam_size: 2, n_best: 2}, beam_size: 3}\n"
    config = load_config(write(tmp_path, text))
    assert (config.training.steps, config.decoding.beam_size, config.decoding.n_best) == (5, 3, 2)


FULL = RunConfig(
    name="off",
    model=ModelConfig(mixer=["retention", {"name": "attention", "window": 4, "scale": 1e-30}], vocab_size=7),
    data=DataConfig(train=[Source(path="a.txt", weight=0.1), Source(generated="copy", size=3)], target_language="no"),
    notes={"precision": "1e5", "compile": "yes: because\nof it", "null": "~"},
)
STUDY = StudyConfig(
    candidates=[Candidate(name="x", overrides={"model.mixer": "lstm", "model.d_ff": None})], budget=Budget(amount=1e15)
)


@pytest.mark.parametrize("config", [RunConfig(), FULL, STUDY], ids=["default", "full", "study"])
def test_dump_and_parse_are_a_round_trip(config: Section, tmp_path: Path) -> None:
    assert parse(type(config), read_yaml(write(tmp_path, dump(config)))) == config


@given(
    st.dictionaries(st.text(max_size=8), st.text(max_size=12), max_size=4),
    st.dictionaries(
        st.sampled_from("abc"), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    ),
)
def test_any_text_and_number_survives_yaml(notes: dict[str, str], options: dict[str, Any]) -> None:
    values = {"notes": notes, "mixer": {"name": "x", **options}}
    assert yaml_value(yaml_text(values)) == values


@pytest.mark.parametrize(
    "text",
    [
        "1e5",
        "1E-3",
        "a\x85b",
        "\u2028",
        " a\r\n",
        "\ufeff",
        "-.5",
        "010",
        "0o7",
        "12:30",
        "no",
        "on",
        "y",
        "~",
        "null",
        ".inf",
        "<<",
    ],
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    again = yaml_value(yaml_text({"key": text}))["key"]
    assert again == text and isinstance(again, str)


def test_sections_are_frozen_and_never_share_what_they_were_given() -> None:
    values = {"model": {"mixer": [{"name": "attention"}]}}
    apply_overrides(values, ["model.mixer.0.window=2", "model.d_model=4"])
    merge(values, {"model": {"d_ff": 3}, "model.mixer.0.window": 3})
    assert values == {"model": {"mixer": [{"name": "attention"}]}}
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().model.d_model = 3  # type: ignore[misc]


def test_merge_joins_sections_and_replaces_mixers() -> None:
    base = {"model": {"d_model": 8, "mixer": {"name": "attention", "window": 4}}, "seed": 1}
    merged = merge(base, {"model": {"d_ff": 3, "mixer": {"name": "lstm"}}, "training.steps": 5})
    assert merged == {
        "model": {"d_model": 8, "d_ff": 3, "mixer": {"name": "lstm"}},
        "seed": 1,
        "training": {"steps": 5},
    }


def test_set_key_makes_the_sections_on_its_way() -> None:
    values: dict[str, Any] = {"model": None}
    set_key(values, "model.d_ff", 3)
    set_key(values, "a.b.c", [1])
    assert values == {"model": {"d_ff": 3}, "a": {"b": {"c": [1]}}}
    with pytest.raises(
        ConfigError, match=r'cannot set "a\.b\.c\.1": a list of 1 stands here; "1" is no index from 0 to 0'
    ):
        set_key(values, "a.b.c.1", 2)


def test_every_key_has_a_default_or_is_asked_for() -> None:
    assert RunConfig().model.layout == "encoder-decoder"
    with pytest.raises(ConfigError) as caught:
        parse(StudyConfig, {}, "study")
    assert str(caught.value).splitlines() == [
        'study: the key "candidates" is missing',
        'study: the key "budget" is missing',
    ]


def test_nearest_names_one_or_lists_all() -> None:
    assert nearest("retentoin", ["attention", "retention"]) == '; did you mean "retention"?'
    assert nearest("zzz", ["b", "a"]) == "; valid: a, b"
    assert nearest("zzz", []) == ""


def test_a_study_given_as_a_run_is_sent_to_compare(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("candidates: [{name: a}]\nbudget: {amount: 1}\n")
    with pytest.raises(ConfigError, match=r"study.yaml: this is a study, not one model; run it with: trilemma compare"):
        load_config(path)
