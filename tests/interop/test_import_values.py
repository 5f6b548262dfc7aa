"""Defaults of absent keys, null beside absent, values that make no sense, settings of sampling."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CASES, edit_weights, make

from trilemma.errors import ConfigError, TrilemmaError
from trilemma.interop import import_model
from trilemma.interop.families import FAMILIES
from trilemma.interop.generation import decoding_of
from trilemma.interop.importing import needed_shapes, understand

RUBBISH: list[Any] = [None, 0, -1, 7, 1.0, True, "x", [None], [[]], {"rope_theta": None}]
KINDS = {case.config.model_type: case for case in CASES.values()}


def windows(**values: Any) -> list[int | None]:
    mixer = understand({"num_hidden_layers": 3, **values}, "config.json")[1].model.mixer
    specs: list[Any] = mixer if isinstance(mixer, list) else [mixer] * 3
    return [spec["window"] for spec in specs]


def test_windows_absent_and_null() -> None:
    assert windows(model_type="mistral") == [4096] * 3
    assert windows(model_type="mistral", sliding_window=None) == [None] * 3
    qwen = {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
    assert windows(**qwen) == [None, 4096, 4096]
    assert windows(**qwen, sliding_window=None) == [None] * 3
    assert windows(**{**qwen, "use_sliding_window": False}, sliding_window=8) == [None] * 3
    for window in (0, -3):
        with pytest.raises(ConfigError, match=f"sliding_window: 1 or more is needed, found {window}"):
            windows(model_type="mistral", sliding_window=window)
    with pytest.raises(ConfigError, match="layer_types: sliding_attention needs a sliding_window"):
        windows(model_type="qwen3", layer_types=["sliding_attention"] * 3)


def test_mt5_has_defaults_of_its_own() -> None:
    for kind, wanted in (("t5", (8, 6, 2048, 32128)), ("mt5", (6, 8, 1024, 250112))):
        model = understand({"model_type": kind}, "config.json")[1].model
        assert (model.num_heads, model.num_layers, model.d_ff, model.vocab_size) == wanted


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("gpt2", {"n_layer": 0}, r"config\.json: n_layer: 1 or more is needed, found 0"),
        ("gpt2", {"resid_pdrop": 1.0}, r"config\.json: model\.dropout: .* found 1\.0"),
        ("gpt2", {"vocab_size": 0}, r"config\.json: vocab_size: 1 or more is needed, found 0"),
        ("llama", {"num_attention_heads": 0}, r"config\.json: num_attention_heads: 1 or more is needed, found 0"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, "rope_theta: a number above 0 is needed, found None"),
        ("llama", {"num_hidden_layers": 1, "layer_types": [None]}, 'layer_types: "None" cannot be honoured'),
        ("llama", {"num_hidden_layers": 1, "layer_types": [[]]}, r'layer_types: "\[\]" cannot be honoured'),
    ],
)
def test_plausible_values_that_cannot_be(kind: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        understand({"model_type": kind, **values}, "config.json")


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_of_any_key_gives_a_traceback(kind: str) -> None:
    values = {**KINDS[kind].options, "model_type": kind}
    more = dict.fromkeys(("rope_parameters", "rope_theta", "rope_scaling", "layer_types", "sliding_window"), 1)
    for key in {**values, **(more if kind in ("llama", "qwen2") else {})}:
        for value in RUBBISH:
            with contextlib.suppress(TrilemmaError):
                needed_shapes(understand({**values, key: value}, "config.json")[1])


def test_every_kind_is_tried_with_rubbish() -> None:
    assert set(KINDS) == {kind for family in FAMILIES for kind in family.model_types}


def test_a_pooler_that_roberta_s_classifier_does_not_read(tmp_path: Path) -> None:
    make(CASES["roberta-classifier"], tmp_path / "hf")
    pooler = {"roberta.pooler.dense.weight": torch.zeros(32, 32), "roberta.pooler.dense.bias": torch.zeros(32)}
    edit_weights(tmp_path / "hf", lambda tensors: tensors.update(pooler))
    said: list[str] = []
    assert import_model(tmp_path / "hf", tmp_path / "run", say=said.append).exists()
    assert any("the classifier does not read it" in line for line in said)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"do_sample": True}, {"method": "sample", "top_k": 50}),
        ({"do_sample": True, "top_k": 50}, {"top_k": 50}),
        ({"do_sample": True, "top_k": 7}, {"top_k": 7}),
        ({"do_sample": True, "top_k": 0}, {"top_k": None}),
        ({"top_k": 7}, {"method": "beam", "top_k": None}),
        ({"num_beams": 1}, {"method": "greedy"}),
        ({"num_beams": 3, "length_penalty": 0}, {"method": "beam", "beam_size": 3, "length_penalty": 0.0}),
        ({"length_penalty": 1.0}, {"length_penalty": 0.6}),
    ],
)
def test_settings_of_generation(settings: dict[str, Any], wanted: dict[str, Any]) -> None:
    decoding, notes = decoding_of({}, settings, "seq2seq", 96, "folder")
    assert {name: getattr(decoding, name) for name in wanted} == wanted
    assert not notes
