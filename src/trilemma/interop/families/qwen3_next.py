"""Qwen3-Next without experts, and Qwen3.5 of texts, which computes the same: gated DeltaNet, every few layers gated
attention; norms are stored less 1."""

from __future__ import annotations

from typing import Any

import torch

from trilemma.config import MixerSpec, ModelConfig, RunConfig
from trilemma.errors import CapabilityError, ConfigError
from trilemma.interop.families.base import Blueprint, Family, check_layer_types, decoder_rules, require
from trilemma.interop.families.rotary import reach, read_rotary, write_rotary
from trilemma.interop.keys import Keys
from trilemma.interop.weights import LeftOut, Rule, Weight
from trilemma.mixers.attention import Attention
from trilemma.mixers.gated_deltanet import GatedDeltaNet
from trilemma.models import SequenceModel

_LINEAR, _FULL = "linear_attention", "full_attention"
_QK_EPSILON = 1e-6  # our per-head norms add this
_OF_EXPERTS = (
    *("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok", "norm_topk_prob"),
    *("output_router_logits", "router_aux_loss_coef"),
)

# Qwen3.5 of texts alone, and beside its pictures, which are left out.
_NEWER, _WITH_PICTURES = "qwen3_5_text", "qwen3_5"
_OF_PICTURES = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_LEFT_OUT = [
    LeftOut(r"mtp\..*", "the head that guesses a token further on"),
    LeftOut(r"model\.visual\..*", "pictures are not read"),
]


def _read(keys: Keys) -> Blueprint:
    kind = keys.need("model_type", str)
    if kind != _WITH_PICTURES:
        return _of_texts(keys, "model", kind == _NEWER, tied=False)
    text, tied = keys.within("text_config"), keys.take("tie_word_embeddings", False)
    keys.skip(*_OF_PICTURES)
    blueprint = _of_texts(text, "model.language_model", True, tied)
    text.finish()
    return blueprint


def _of_texts(keys: Keys, base: str, newer: bool, tied: bool) -> Blueprint:
    """Of a language model: its keys, what its weights' names begin with, and whether it is tied by default."""
    layers, heads = keys.size("num_hidden_layers", 32 if newer else 48), keys.size("num_attention_heads", 16)
    types = _types(keys, layers)
    if newer:
        keys.only("attn_output_gate", True)
        keys.only("output_gate_type", "swish")  # of gated DeltaNet
        keys.skip("mamba_ssm_dtype", "mlp_only_layers", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    else:
        _refuse_experts(keys, layers)
    keys.only("hidden_act", "silu")  # the convolutions' too
    epsilon = keys.take("rms_norm_eps", 1e-6)
    if _FULL in types and epsilon != _QK_EPSILON:
        raise ConfigError(f"{keys.where}: rms_norm_eps is {epsilon}; with query and key norms only 1e-06 is honoured")
    head_dim, max_length = keys.size("head_dim", 256), keys.size("max_position_embeddings", 32768)
    # A picture's parts are placed on three axes; a text's tokens have one number on all of them.
    rotary = read_rotary(keys, max_length, head_dim, ("mrope_section", "mrope_interleaved") if newer else ())
    attention: dict[str, Any] = {
        "name": "attention",
        "num_kv_heads": keys.size("num_key_value_heads", 4 if newer else 2),
        "head_dim": head_dim,
        "position": "rotary",
        "rotary_interleaved": False,
        **rotary,
        "qk_norm": True,
        "output_gate": True,
        "bias": keys.take("attention_bias", False),
    }
    deltanet = _deltanet(keys, epsilon)
    mixers: list[MixerSpec] = [deltanet if kind == _LINEAR else attention for kind in types]
    model = ModelConfig(
        layout="decoder-only",
        vocab_size=keys.size("vocab_size", 248320 if newer else 151936),
        d_model=keys.size("hidden_size", 4096 if newer else 2048),
        d_ff=keys.size("intermediate_size", 12288 if newer else 5632),
        num_layers=layers,
        num_heads=heads,
        mixer=mixers,
        norm="rmsnorm",
        norm_epsilon=epsilon,
        activation="swiglu",
        bias=False,
        positions="none",
        max_length=reach(rotary, max_length),
        embedding_scale=False,
        tie_embeddings=keys.take("tie_word_embeddings", tied),
        dropout=0.0,
    )
    rules = [*decoder_rules(model, base, centred=True), *_LEFT_OUT]
    for i, kind in enumerate(types):
        ours, theirs = f"stack.blocks.{i}.parts.0.part", f"{base}.layers.{i}"
        if kind == _LINEAR:
            rules += _deltanet_rules(ours, f"{theirs}.linear_attn", deltanet, newer)
        else:
            rules += _attention_rules(ours, f"{theirs}.self_attn", heads, attention)
    return Blueprint(model, "language-model", rules, prefix="model.")


def _types(keys: Keys, layers: int) -> list[str]:
    """The kind of each layer."""
    interval = keys.size("full_attention_interval", 4)
    types = keys.maybe("layer_types", list)
    if types is None:
        return [_LINEAR if (i + 1) % interval else _FULL for i in range(layers)]
    check_layer_types(keys, types, layers, _LINEAR, _FULL)
    return types


def _refuse_experts(keys: Keys, layers: int) -> None:
    """Raises ConfigError where a layer's feed-forward part is a mixture of experts."""
    experts, step = keys.take("num_experts", 512), keys.size("decoder_sparse_step", 1)
    dense: list[int] = keys.take("mlp_only_layers", [])
    keys.skip(*_OF_EXPERTS)
    sparse = [i for i in range(layers) if experts > 0 and (i + 1) % step == 0 and i not in dense]
    if sparse:
        raise ConfigError(
            f"{keys.where}: num_experts: layer {sparse[0]} is a mixture of {experts} experts ({len(sparse)} layers in "
            "all), and there are no mixtures of experts here; only models whose layers all have a dense mlp can be "
            "imported: num_experts 0, or every layer in mlp_only_layers"
        )


def _deltanet(keys: Keys, epsilon: float) -> dict[str, Any]:
    """Our gated DeltaNet."""
    key_dim, value_dim = keys.size("linear_key_head_dim", 128), keys.size("linear_value_head_dim", 128)
    key_heads, value_heads = keys.size("linear_num_key_heads", 16), keys.size("linear_num_value_heads", 32)
    sizes = {"linear_value_head_dim": (value_dim, key_dim), "linear_num_value_heads": (value_heads, key_heads)}
    for name, (values, unit) in sizes.items():
        if values % unit:
            raise ConfigError(f"{keys.where}: {name} is {values}; only multiples of the keys' {unit} can be honoured")
    return {
        "name": "gated_deltanet",
        "num_heads": key_heads,
        "head_dim": key_dim,
        "expand_v": value_dim // key_dim,
        "num_value_heads": value_heads,
        "conv_size": keys.size("linear_conv_kernel_dim", 4),
        "epsilon": epsilon,
    }


def _attention_rules(ours: str, theirs: str, heads: int, options: dict[str, Any]) -> list[Rule]:
    """Their first projection holds queries and gate head by head; ours all queries, and the gate at the end."""
    inner, both = heads * options["head_dim"], 2 * options["num_kv_heads"] * options["head_dim"]
    queries, gate = torch.arange(2 * inner).unflatten(0, (heads, 2, -1)).unbind(1)
    order = torch.cat([queries.flatten(), torch.arange(2 * inner, 2 * inner + both), gate.flatten()])
    rules: list[Rule] = [
        Weight(f"{ours}.query_norm.weight", f"{theirs}.q_norm.weight", offset=1.0),
        Weight(f"{ours}.key_norm.weight", f"{theirs}.k_norm.weight", offset=1.0),
    ]
    for end in ("weight", "bias") if options["bias"] else ("weight",):
        names = tuple(f"{theirs}.{name}_proj.{end}" for name in "qkv")
        rules.append(Weight(f"{ours}.qkv.{end}", names, sizes=(2 * inner, both // 2, both // 2), order=order))
        rules.append(Weight(f"{ours}.out.{end}", f"{theirs}.o_proj.{end}"))
    return rules


def _deltanet_rules(ours: str, theirs: str, options: dict[str, Any], newer: bool) -> list[Rule]:
    """Ours projects q, k, v, gate, step and strength, as the newer files do; older ones hold together what belongs to
    a head of keys."""
    groups, key, share = options["num_heads"], options["head_dim"], options["num_value_heads"] // options["num_heads"]
    value = share * options["expand_v"] * key
    wide, narrow = groups * (2 * key + 2 * value), groups * 2 * share
    names: tuple[str, ...] = ("qkv", "z", "a", "b")
    sizes: tuple[int, ...] = (groups * (2 * key + value), groups * value, groups * share, groups * share)
    order = None
    if not newer:
        names, sizes = ("qkvz", "ba"), (wide, narrow)
        parts = torch.arange(wide).unflatten(0, (groups, -1)).split([key, key, value, value], dim=1)
        strength, step = (torch.arange(narrow) + wide).unflatten(0, (groups, -1)).split([share, share], dim=1)
        order = torch.cat([part.flatten() for part in (*parts, step, strength)])
    projections = tuple(f"{theirs}.in_proj_{name}.weight" for name in names)
    return [
        Weight(f"{ours}.project.weight", projections, sizes=sizes, order=order),
        Weight(f"{ours}.conv.weight", f"{theirs}.conv1d.weight", transposed=True, ones=(1,)),
        Weight(f"{ours}.A_log", f"{theirs}.A_log"),
        Weight(f"{ours}.dt_bias", f"{theirs}.dt_bias"),
        Weight(f"{ours}.norm.weight", f"{theirs}.norm.weight"),
        Weight(f"{ours}.out.weight", f"{theirs}.out_proj.weight"),
    ]


def _write(model: SequenceModel, run: RunConfig) -> dict[str, Any]:
    config, family = model.config, "qwen3_next"
    require(config, family, layout="decoder-only", norm="rmsnorm", norm_position="pre", positions="none")
    require(config, family, embedding_scale=False, embedding_norm=False, logit_bias=False, prefix=False, token_types=0)
    require(config, family, feed_forward=True, bias=False, norm_epsilon=_QK_EPSILON, activation="swiglu")
    attentions = [mixer for mixer in model.mixers() if isinstance(mixer, Attention)]
    deltanets = [mixer for mixer in model.mixers() if isinstance(mixer, GatedDeltaNet)]
    if not attentions or not deltanets or len(attentions) + len(deltanets) < config.num_layers:
        raise CapabilityError(f"{family}: mixers must be gated_deltanet and attention, at least one of each")
    for mixer in attentions:
        placed = mixer.position == "rotary" and not mixer.rotary_interleaved and mixer.window is None
        if not placed or mixer.query_norm is None or not mixer.gate_width or mixer.scale is not None:
            raise CapabilityError(
                f"{family}: attention needs output_gate, qk_norm, position rotary with rotary_interleaved false, and "
                "no window or scale of its own"
            )
    for net in deltanets:
        if net.negative_eigenvalues or net.norm.epsilon != _QK_EPSILON:
            raise CapabilityError(f"{family}: gated_deltanet needs epsilon {_QK_EPSILON}, and no negative_eigenvalues")
    if len({_attention_shape(mixer) for mixer in attentions}) > 1 or len({_net_shape(net) for net in deltanets}) > 1:
        raise CapabilityError(f"{family}: all attention layers must be alike, and all of gated_deltanet")
    first, net = attentions[0], deltanets[0]
    return {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff or 4 * config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "attention_bias": first.out.bias is not None,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length or run.data.context_length,
        "rms_norm_eps": config.norm_epsilon,
        **write_rotary(first, partial=True),
        "layer_types": [_LINEAR if isinstance(mixer, GatedDeltaNet) else _FULL for mixer in model.mixers()],
        "linear_conv_kernel_dim": net.conv.taps,
        "linear_key_head_dim": net.head_dim,
        "linear_value_head_dim": net.value_dim,
        "linear_num_key_heads": net.num_heads,
        "linear_num_value_heads": net.num_value_heads,
        "num_experts": 0,
        "mlp_only_layers": [],
        "tie_word_embeddings": config.tie_embeddings,
    }


def _attention_shape(mixer: Attention) -> tuple[object, ...]:
    sizes = (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.out.bias is None)
    return (*sizes, mixer.rotary_dim, mixer.rotary_base, mixer.rotary_scaling)


def _net_shape(net: GatedDeltaNet) -> tuple[int, ...]:
    return net.num_heads, net.num_value_heads, net.head_dim, net.value_dim, net.conv.taps


QWEN3_NEXT = Family("qwen3_next", ("qwen3_next", _NEWER, _WITH_PICTURES), _read, _write)
