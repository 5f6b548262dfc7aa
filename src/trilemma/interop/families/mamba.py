"""Mamba and Mamba-2: stacks of their mixers alone, without feed-forward layers."""

from __future__ import annotations

import math
from typing import Any

from trilemma.config import ModelConfig, RunConfig
from trilemma.errors import CapabilityError, ConfigError
from trilemma.interop.families.base import Blueprint, Family, require
from trilemma.interop.keys import Keys
from trilemma.interop.weights import Rule, Weight
from trilemma.mixers.mamba import Mamba
from trilemma.mixers.mamba2 import Mamba2
from trilemma.models import SequenceModel

# How weights begin, which kernel runs, and sizes that others repeat.
_WITHOUT_EFFECT = (
    *("time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme"),
    *("rescale_prenorm_residual", "residual_in_fp32", "use_mambapy", "use_associative_scan", "fused_add_norm"),
    *("intermediate_size", "time_step_rank", "layer_types", "d_inner", "d_model", "n_layer", "pad_vocab_size_multiple"),
    "norm_before_gate",  # transformers' Mamba-2 gates first, whatever it says
)


def _read(keys: Keys) -> Blueprint:
    first = keys.need("model_type", str) == "mamba"
    keys.only("use_conv_bias", True)
    keys.only("hidden_act", "silu")
    keys.only("rms_norm", True)
    keys.only("ssm_cfg", {})
    keys.skip(*_WITHOUT_EFFECT)
    d_model, expand = keys.size("hidden_size", 768 if first else 4096), keys.size("expand", 2)
    epsilon = keys.take("layer_norm_epsilon", 1e-5)
    mixer: dict[str, Any] = {"expand": expand}
    if first:
        rank = keys.values.get("time_step_rank", "auto")
        mixer |= {
            "name": "mamba",
            "d_state": keys.size("state_size", 16),
            "taps": keys.size("conv_kernel", 4),
            "dt_rank": rank if isinstance(rank, int) else math.ceil(d_model / 16),
            "bias": keys.take("use_bias", False),
        }
    else:
        keys.only("use_bias", False)
        keys.only("time_step_limit", [0.0, math.inf], [0.0, {"__float__": "Infinity"}], None)
        heads, head_dim = keys.size("num_heads", 128), keys.size("head_dim", 64)
        if heads * head_dim != expand * d_model:
            raise ConfigError(
                f"{keys.where}: num_heads * head_dim is {heads * head_dim}, expand * hidden_size {expand * d_model}"
            )
        mixer |= {
            "name": "mamba2",
            "d_state": keys.size("state_size", 128),
            "head_dim": head_dim,
            "num_groups": keys.size("n_groups", 8),
            "conv_size": keys.size("conv_kernel", 4),
            "chunk_size": min(64, keys.size("chunk_size", 256)),
            "epsilon": epsilon,
        }
    model = ModelConfig(
        layout="decoder-only",
        vocab_size=keys.size("vocab_size", 50280 if first else 32768),
        d_model=d_model,
        num_layers=keys.size("num_hidden_layers", 32 if first else 64),
        mixer=mixer,
        norm="rmsnorm",
        norm_epsilon=epsilon,
        feed_forward=False,
        positions="none",
        embedding_scale=False,
        tie_embeddings=keys.take("tie_word_embeddings", first),
        dropout=0.0,
    )
    rules = _rules(model, _MAMBA if first else _MAMBA2)
    if first and mixer["bias"]:
        for i in range(model.num_layers):
            for name, other in (("project", "in_proj"), ("out", "out_proj")):
                rules.append(Weight(f"stack.blocks.{i}.parts.0.part.{name}.bias", f"{_at(i)}.{other}.bias"))
    return Blueprint(model, "language-model", rules, prefix="backbone.")


# Our names in a mixer, and theirs.
_BOTH = {
    "project.weight": "in_proj.weight",
    "conv.bias": "conv1d.bias",
    "A_log": "A_log",
    "D": "D",
    "out.weight": "out_proj.weight",
}
_MAMBA = {
    **_BOTH,
    "select.weight": "x_proj.weight",
    "dt_project.weight": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
}
_MAMBA2 = {**_BOTH, "dt_bias": "dt_bias", "norm_weight": "norm.weight"}


def _at(layer: int) -> str:
    return f"backbone.layers.{layer}.mixer"


def _rules(model: ModelConfig, names: dict[str, str]) -> list[Rule]:
    tied = ("lm_head.weight",) if model.tie_embeddings else ()
    rules: list[Rule] = [
        Weight("embedding.tokens.weight", "backbone.embeddings.weight", aliases=tied),
        Weight("stack.norm.weight", "backbone.norm_f.weight"),
    ]
    if not model.tie_embeddings:
        rules.append(Weight("output.weight", "lm_head.weight"))
    for i in range(model.num_layers):
        ours = f"stack.blocks.{i}.parts.0"
        rules.append(Weight(f"{ours}.norm.weight", f"backbone.layers.{i}.norm.weight"))
        rules.append(Weight(f"{ours}.part.conv.weight", f"{_at(i)}.conv1d.weight", transposed=True, ones=(1,)))
        rules += [Weight(f"{ours}.part.{name}", f"{_at(i)}.{other}") for name, other in names.items()]
    return rules


def _write(model: SequenceModel, run: RunConfig) -> dict[str, Any]:
    config, family = model.config, "mamba"
    require(config, family, layout="decoder-only", norm="rmsnorm", norm_position="pre", positions="none")
    require(config, family, embedding_scale=False, embedding_norm=False, logit_bias=False, token_types=0)
    require(config, family, feed_forward=False)
    mixers = model.mixers()
    kind = mixers[0]
    if any(type(mixer) is not type(kind) for mixer in mixers) or not isinstance(kind, (Mamba, Mamba2)):
        raise CapabilityError(f"{family}: every mixer must be mamba, or every one mamba2")
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "state_size": kind.d_state,
        "conv_kernel": kind.conv.taps,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if isinstance(kind, Mamba):
        more = {
            "expand": kind.d_inner // config.d_model,
            "intermediate_size": kind.d_inner,
            "time_step_rank": kind.dt_rank,
            "use_bias": kind.project.bias is not None,
        }
        return {"model_type": "mamba", "architectures": ["MambaForCausalLM"], **values, **more}
    if kind.epsilon != config.norm_epsilon:
        raise CapabilityError(
            f"{family}: mamba2's epsilon {kind.epsilon} and model.norm_epsilon {config.norm_epsilon} must be equal"
        )
    more = {
        "expand": kind.inner // config.d_model,
        "num_heads": kind.num_heads,
        "head_dim": kind.head_dim,
        "n_groups": kind.num_groups,
    }
    return {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], **values, **more}


MAMBA = Family("mamba", ("mamba", "mamba2"), _read, _write)
