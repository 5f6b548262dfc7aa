"""Scaled rotations: the frequencies of transformers, and what is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trilemma import build_mixer
from trilemma.errors import ConfigError
from trilemma.interop.importing import understand
from trilemma.mixers.attention import Attention
from trilemma.nn.positions import RotaryScaling, rotation_frequencies, scaled_frequencies

CPU = torch.device("cpu")
YARN = {"kind": "yarn", "factor": 2.0, "original_length": 64}
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHORTEST = "yarn of a text in which nothing turns once"  # all pairs keep their speed
# Parameters as published models have them, and some at the borders.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama 3.1": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA31},
    "llama 3.2": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA31, "factor": 32},
    "llama 3 without an original length": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 2.0,
        "low_freq_factor": 1,
        "high_freq_factor": 3.5,
    },
    "linear": {"type": "linear", "factor": 4.0},
    "qwen 2.5": {"type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    "deepseek": {
        "rope_type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
    "gpt-oss": {
        "rope_type": "yarn",
        "rope_theta": 150000,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "yarn with a magnitude": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.25, "beta_fast": 0},
    "yarn of a short text": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 7},
    SHORTEST: {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2},
    "yarn without a factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
}


def read(parameters: dict[str, Any], name: str = "rope_parameters", **others: Any) -> dict[str, Any]:
    """The mixer's options that rotations come to."""
    values = {
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 4096,
        name: parameters,
    }
    mixer = understand({**values, **others}, "config.json")[1].model.mixer
    assert isinstance(mixer, dict)
    return mixer


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_are_transformers(name: str, head_dim: int) -> None:
    theirs = LlamaConfig(head_dim=head_dim, max_position_embeddings=4096, rope_parameters={**PUBLISHED[name]})
    wanted, size = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, CPU)
    options = read(PUBLISHED[name], head_dim=head_dim)
    mixer = build_mixer(**options, d_model=2 * head_dim, num_heads=2)
    assert isinstance(mixer, Attention)
    assert mixer.rotary_scaling is not None
    base = mixer.rotary_base
    got = scaled_frequencies(head_dim, base, mixer.rotary_scaling, CPU, torch.float32)
    torch.testing.assert_close(got, wanted, rtol=3e-6, atol=0)
    assert mixer.rotary_scaling.size == pytest.approx(size, rel=1e-9)
    if name == SHORTEST:
        return
    plain = rotation_frequencies(head_dim, base, False, CPU, torch.float32)
    assert not torch.allclose(plain, wanted, rtol=1e-2, atol=0)


def test_older_files_say_the_same() -> None:
    new = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA31}
    old = {"rope_type": "llama3", **LLAMA31}
    assert read(old, "rope_scaling", rope_theta=500000.0) == read(new)
    assert read({"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": None})["rotary_scaling"] is None


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"rope_type": "llama3", "factor": 8.0},
            r'config\.json: rope_parameters: the key "low_freq_factor" is missing',
        ),
        ({"type": "linear"}, 'rope_parameters: the key "factor" is missing'),
        ({"type": "linear", "factor": 0.5}, "rope_parameters: rotary_scaling: factor must be from 1 to 1e6, found 0.5"),
        ({"type": "linear", "factor": "big"}, "factor: float is needed, found 'big'"),
        ({**PUBLISHED["llama 3.1"], "high_freq_factor": 1.0}, "0 < low < high is needed, found 1.0 and 1.0"),
        ({**PUBLISHED["qwen 2.5"], "original_max_position_embeddings": 0}, "1 or more is needed, found 0"),
        ({"rope_type": "dynamic", "factor": 2.0}, 'rope_type "dynamic" cannot be honoured: it turns every token'),
        ({"rope_type": "longrope"}, 'rope_type "longrope" cannot be honoured: .* have to be turned anew'),
        ({"rope_type": "proportional"}, 'rope_type "proportional" cannot .*; only default, linear, llama3, yarn can'),
        ({"mrope_section": [1, 2]}, 'rope_parameters: the key "mrope_section" .* is not known .* remove it from'),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only"),
    ],
)
def test_what_cannot_be_honoured_is_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(parameters)


def test_how_far_a_model_reads() -> None:
    """Users of yarn add it to a file whose max_position_embeddings is still the length before."""
    lengths = {"qwen 2.5": 4 * 32768, "yarn without a factor": 4096, "llama 3.1": 4096, "linear": 4096}
    for name, wanted in lengths.items():
        values = {"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": PUBLISHED[name]}
        assert understand(values, "config.json")[1].model.max_length == wanted, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_value_of_any_key_gives_a_traceback(name: str) -> None:
    for key in {**PUBLISHED[name], "rope_theta": 1.0, "partial_rotary_factor": 1.0}:
        for value in (None, 0, -1, 0.5, 1e308, float("nan"), float("inf"), True, "x", [None], {}):
            with contextlib.suppress(ConfigError):
                read({**PUBLISHED[name], key: value})


def test_two_sections_that_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match="rope_parameters and rope_scaling say different things"):
        read({"rope_theta": 1e6}, rope_scaling={"type": "linear", "factor": 2.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "alibi"}, 'rotary_scaling belongs to position rotary, found "alibi"'),
        ({"position": "rotary", "rotary_base": 1.0}, "rotary_scaling needs a rotary_base above 1, found 1.0"),
        (
            {"position": "rotary", "rotary_scaling": {"kind": "llama3", "factor": 2.0}},
            "llama3 needs an original_length",
        ),
        ({"position": "rotary", "rotary_scaling": {"kind": "linear", "factor": 2.0, "low": 2.0}}, "linear has no low"),
        ({"position": "rotary", "rotary_scaling": {**YARN, "magnitude": 0.0}}, "magnitude must be above 0, found 0.0"),
        (
            {"position": "rotary", "rotary_scaling": {**YARN, "high": 0.0}},
            "0 < low < high is needed, found 1.0 and 0.0",
        ),
        ({"position": "rotary", "rotary_scaling": {"kind": "ntk", "factor": 2.0}}, "option rotary_scaling: .* 'ntk'"),
    ],
)
def test_our_own_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_mixer("attention", 8, **{"rotary_scaling": {"kind": "linear", "factor": 2.0}, **options})


def test_an_unknown_key_of_our_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rotary_scaling: .*'faktor'"):
        build_mixer("attention", 8, position="rotary", rotary_scaling={"kind": "linear", "factor": 2.0, "faktor": 3.0})


def test_scaling_by_one_changes_nothing() -> None:
    for scaling in (
        RotaryScaling("linear", 1.0),
        RotaryScaling("llama3", 1.0, original_length=16),
        RotaryScaling("yarn", 1.0, original_length=16),
    ):
        plain = rotation_frequencies(8, 1e4, False, CPU, torch.float64)
        torch.testing.assert_close(scaled_frequencies(8, 1e4, scaling, CPU, torch.float64), plain)
        assert scaling.size == 1
