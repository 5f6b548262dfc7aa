"""Llama and the decoders built like it: Mistral, Qwen2, Qwen3 (RMSNorm, rotations in halves, grouped keys, SwiGLU)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilemma.config import MixerSpec, ModelConfig, RunConfig
from trilemma.errors import CapabilityError, ConfigError
from trilemma.interop.families.base import (
    GATED_ACTIVATIONS,
    Blueprint,
    Family,
    check_layer_types,
    decoder_rules,
    named,
    require,
)
from trilemma.interop.families.rotary import reach, read_rotary, write_rotary
from trilemma.interop.keys import Keys
from trilemma.interop.weights import LeftOut, Rule, Weight, Zeros
from trilemma.mixers.attention import Attention
from trilemma.models import SequenceModel
from trilemma.runs.tensors import model_tensors

# Our per-head norms add this; other values of theirs cannot be honoured together with query and key norms.
_QK_EPSILON = 1e-6
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _read(keys: Keys) -> Blueprint:
    kind = keys.need("model_type", str)
    d_model, layers = keys.size("hidden_size", 4096), keys.size("num_hidden_layers", 32)
    heads = keys.size("num_attention_heads", 32)
    kv_heads = keys.size("num_key_value_heads", 8 if kind == "mistral" else 32 if kind.startswith("qwen") else heads)
    default_head = 128 if kind == "qwen3" else d_model // heads
    head_dim = keys.size("head_dim", default_head)
    qk_norm = kind == "qwen3"
    bias = kind == "qwen2" or (kind != "mistral" and keys.take("attention_bias", False))
    epsilon = keys.take("rms_norm_eps", 1e-6)
    if qk_norm and epsilon != _QK_EPSILON:
        raise ConfigError(f"{keys.where}: rms_norm_eps is {epsilon}; with query and key norms only 1e-06 is honoured")
    keys.skip("is_llama_config")
    max_length = keys.size("max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(kind, 32768))
    rotary = read_rotary(keys, max_length)
    common: dict[str, Any] = {
        "name": "attention",
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "position": "rotary",
        "rotary_interleaved": False,
        **rotary,
        "qk_norm": qk_norm,
        "bias": bias,
    }
    windows = _windows(keys, kind, layers)
    mixers: list[MixerSpec] = [{**common, "window": window} for window in windows]
    model = ModelConfig(
        layout="decoder-only",
        vocab_size=keys.size("vocab_size", 151936 if kind.startswith("qwen") else 32000),
        d_model=d_model,
        d_ff=keys.size("intermediate_size", {"llama": 11008, "mistral": 14336}.get(kind, 22016)),
        num_layers=layers,
        num_heads=heads,
        mixer=mixers[0] if len(set(windows)) == 1 else mixers,
        norm="rmsnorm",
        norm_epsilon=epsilon,
        activation=keys.choose("hidden_act", GATED_ACTIVATIONS, "silu"),
        bias=keys.take("mlp_bias", False) if kind == "llama" else False,
        positions="none",
        max_length=reach(rotary, max_length),
        embedding_scale=False,
        tie_embeddings=keys.take("tie_word_embeddings", False),
        dropout=0.0,
    )
    return Blueprint(model, "language-model", _rules(model, head_dim, kv_heads, bias, kind), prefix="model.")


def _windows(keys: Keys, kind: str, layers: int) -> list[int | None]:
    """The sliding window of each layer."""
    window, types, first = None, keys.maybe("layer_types", list), 0
    if kind != "llama":  # null is no window; absent is one of 4096
        window = keys.maybe("sliding_window", int) if "sliding_window" in keys.values else 4096
    if kind.startswith("qwen"):
        sliding, first = keys.take("use_sliding_window", False), keys.take("max_window_layers", 28)
        window = window if sliding else None
    if window is not None and window < 1:
        raise ConfigError(f"{keys.where}: sliding_window: 1 or more is needed, found {window}")
    if types is None:
        types = [_SLIDING if window and i >= first else _FULL for i in range(layers)]
    check_layer_types(keys, types, layers, _FULL, _SLIDING)
    if _SLIDING in types and window is None:
        raise ConfigError(
            f"{keys.where}: layer_types: {_SLIDING} needs a sliding_window, which is absent or not in use"
        )
    return [window if kind_of == _SLIDING else None for kind_of in types]


def _rules(model: ModelConfig, head_dim: int, kv_heads: int, bias: bool, kind: str) -> list[Rule]:
    heads, width = (model.num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), model.d_ff or 0
    rules = decoder_rules(model)
    rules.append(LeftOut(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed"))
    for i in range(model.num_layers):
        ours, theirs = f"stack.blocks.{i}.parts", f"model.layers.{i}"
        attention, feed = f"{ours}.0.part", f"{ours}.1.part"
        projections = ("q_proj", "k_proj", "v_proj")
        for end in ("weight", "bias") if bias else ("weight",):
            names = tuple(f"{theirs}.self_attn.{name}.{end}" for name in projections)
            rules.append(Weight(f"{attention}.qkv.{end}", names, sizes=heads))
        rules.append(Weight(f"{attention}.out.weight", f"{theirs}.self_attn.o_proj.weight"))
        if bias:
            o_bias = f"{attention}.out.bias"
            rules.append(Zeros(o_bias) if kind == "qwen2" else Weight(o_bias, f"{theirs}.self_attn.o_proj.bias"))
        if kind == "qwen3":
            rules.append(Weight(f"{attention}.query_norm.weight", f"{theirs}.self_attn.q_norm.weight"))
            rules.append(Weight(f"{attention}.key_norm.weight", f"{theirs}.self_attn.k_norm.weight"))
        if model.bias:
            biases = (f"{theirs}.mlp.gate_proj.bias", f"{theirs}.mlp.up_proj.bias")
            rules.append(Weight(f"{feed}.up.bias", biases, sizes=(width, width)))
            rules.append(Weight(f"{feed}.down.bias", f"{theirs}.mlp.down_proj.bias"))
    return rules


def _write(model: SequenceModel, run: RunConfig) -> dict[str, Any]:
    config, family = model.config, "llama"
    require(config, family, layout="decoder-only", norm="rmsnorm", norm_position="pre", positions="none")
    require(config, family, embedding_scale=False, embedding_norm=False, logit_bias=False, prefix=False, token_types=0)
    require(config, family, feed_forward=True)
    mixers = [mixer for mixer in model.mixers() if isinstance(mixer, Attention)]
    if len(mixers) < config.num_layers:
        raise CapabilityError(f"{family}: every mixer must be attention")
    first = mixers[0]
    for mixer in mixers:
        whole = mixer.position == "rotary" and mixer.rotary_dim == mixer.head_dim
        if not whole or mixer.gate_width or mixer.scale is not None:
            raise CapabilityError(
                f"{family}: attention needs position rotary for whole heads, no output_gate and no scale of its own"
            )
    if len({(mixer.rotary_base, mixer.rotary_scaling) for mixer in mixers}) > 1:
        raise CapabilityError(f"{family}: all layers must have the same rotations")
    windows = [mixer.window for mixer in mixers]
    if len(sizes := {window for window in windows if window}) > 1:
        raise CapabilityError(f"{family}: all windows must have one size, found {sorted(sizes)}")
    bias, qk_norm = first.qkv.bias is not None, first.query_norm is not None
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff or 4 * config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "hidden_act": named(GATED_ACTIVATIONS, config.activation, family),
        "max_position_embeddings": config.max_length or run.data.context_length,
        "rms_norm_eps": config.norm_epsilon,
        **write_rotary(first),
        "tie_word_embeddings": config.tie_embeddings,
    }
    more: dict[str, Any] = {}
    if qk_norm or (any(windows) and (bias or len(set(windows)) > 1)):
        types = [_SLIDING if window else _FULL for window in windows]
        kind, more["layer_types"] = "qwen3" if qk_norm else "qwen2", types
        more |= {"attention_bias": bias} if qk_norm else {}
        if any(windows):
            more |= {"use_sliding_window": True, "sliding_window": max(sizes), "max_window_layers": 0}
    elif any(windows):
        kind, more["sliding_window"] = "mistral", windows[0]
    else:
        kind, more = "llama", {"attention_bias": bias, "mlp_bias": config.bias}
    architecture = {"qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "llama": "Llama"}[kind]
    return {"model_type": kind, "architectures": [f"{architecture}ForCausalLM"], **values, **more}


def _tensors(model: SequenceModel) -> dict[str, Tensor]:
    """With rotated pairs of neighbours put into the two halves of their head: the scores are the same."""
    tensors = model_tensors(model)
    for name, mixer in model.named_modules():
        if not isinstance(mixer, Attention) or not mixer.rotary_interleaved:
            continue
        heads = mixer.num_heads + mixer.num_kv_heads  # queries and keys; values are not rotated
        for end in ("weight", "bias") if mixer.qkv.bias is not None else ("weight",):
            rotated, values = tensors[f"{name}.qkv.{end}"].split([heads * mixer.head_dim, mixer.kv_width])
            halves = rotated.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            tensors[f"{name}.qkv.{end}"] = torch.cat([halves, values])
        for norm in ("query_norm", "key_norm") if mixer.query_norm is not None else ():
            tensors[f"{name}.{norm}.weight"] = tensors[f"{name}.{norm}.weight"].unflatten(0, (-1, 2)).t().flatten()
    return tensors


LLAMA = Family("llama", ("llama", "mistral", "qwen2", "qwen3"), _read, _write, _tensors)
