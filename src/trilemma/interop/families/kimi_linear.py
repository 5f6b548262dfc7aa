"""Kimi Linear without experts: layers of Kimi delta attention, every few layers one of latent attention."""

from __future__ import annotations

from typing import Any

from trilemma.config import MixerSpec, ModelConfig, RunConfig
from trilemma.errors import CapabilityError, ConfigError
from trilemma.interop.families.base import Blueprint, Family, check_layer_types, decoder_rules, require
from trilemma.interop.keys import Keys
from trilemma.interop.weights import Rule, Weight, Zeros
from trilemma.mixers.kda import KimiDeltaAttention
from trilemma.mixers.latent_attention import LatentAttention
from trilemma.models import SequenceModel

_LINEAR, _FULL = "linear_attention", "full_attention"
_DENSE, _SPARSE = "dense", "sparse"
# What only experts or rotations read, which these models lack, and widths that others add up to.
_WITHOUT_EFFECT = (
    *("moe_intermediate_size", "moe_layer_freq", "moe_renormalize", "moe_router_activation_func", "num_expert_group"),
    *("num_experts", "num_experts_per_token", "num_shared_experts", "routed_scaling_factor", "topk_group"),
    *("use_grouped_topk", "output_router_logits", "rope_theta", "rope_scaling", "head_dim", "qk_head_dim"),
)
# transformers writes the dense layers' weights under the name that published files have for experts.
_ENDINGS = {f".block_sparse_moe.{name}.weight": f".mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}


def _read(keys: Keys) -> Blueprint:
    keys.only("mla_use_nope", True)
    keys.only("attention_bias", False)
    keys.only("tie_word_embeddings", False)
    keys.only("num_nextn_predict_layers", 0)
    keys.only("hidden_act", "silu")  # the convolutions' too
    layers, heads = keys.size("num_hidden_layers", 27), keys.size("num_attention_heads", 32)
    keys.only("num_key_value_heads", heads, None)
    _refuse_experts(keys, layers)
    keys.skip(*_WITHOUT_EFFECT)
    epsilon = keys.take("rms_norm_eps", 1e-5)
    linear = keys.within("linear_attn_config")
    types = _types(keys, linear, layers)
    kda: dict[str, Any] = {
        "name": "kda",
        "num_heads": linear.size("num_heads", keys.size("linear_num_heads", 32)),
        "head_dim": linear.size("head_dim", keys.size("linear_head_dim", 128)),
        "conv_size": linear.size("short_conv_kernel_size", keys.size("linear_conv_kernel_dim", 4)),
        "epsilon": epsilon,
    }
    linear.finish()
    latent: dict[str, Any] = {
        "name": "latent_attention",
        "head_dim": keys.size("qk_nope_head_dim", 128),
        "value_dim": keys.size("v_head_dim", 128),
        "kv_lora_rank": keys.size("kv_lora_rank", 512),
        "q_lora_rank": keys.size("q_lora_rank", 1) if keys.maybe("q_lora_rank", int) is not None else None,
        "rope_head_dim": keys.size("qk_rope_head_dim", 64),
        "rotary": False,
    }
    mixers: list[MixerSpec] = [kda if kind == _LINEAR else latent for kind in types]
    model = ModelConfig(
        layout="decoder-only",
        vocab_size=keys.size("vocab_size", 163840),
        d_model=keys.size("hidden_size", 2304),
        d_ff=keys.size("intermediate_size", 9216),
        num_layers=layers,
        num_heads=heads,
        mixer=mixers,
        norm="rmsnorm",
        norm_epsilon=epsilon,
        activation="swiglu",
        bias=False,
        positions="none",
        max_length=keys.size("model_max_length", keys.size("max_position_embeddings", 1048576)),
        embedding_scale=False,
        tie_embeddings=False,
        dropout=0.0,
    )
    rules = decoder_rules(model)
    for i, kind in enumerate(types):
        ours, theirs = f"stack.blocks.{i}.parts.0.part", f"model.layers.{i}.self_attn"
        rules += _kda_rules(ours, theirs, kda) if kind == _LINEAR else _latent_rules(ours, theirs, heads, latent)
    return Blueprint(model, "language-model", rules, prefix="model.", endings=_ENDINGS)


def _refuse_experts(keys: Keys, layers: int) -> None:
    """Raises ConfigError where a layer's feed-forward part is a mixture of experts."""
    first = keys.take("first_k_dense_replace", 1)
    types = keys.take("mlp_layer_types", [_DENSE if i < first else _SPARSE for i in range(layers)])
    if len(types) != layers:
        raise ConfigError(f"{keys.where}: mlp_layer_types: {len(types)} entries for {layers} layers")
    others = [i for i, kind in enumerate(types) if kind != _DENSE]
    if others:
        raise ConfigError(
            f'{keys.where}: mlp_layer_types: layer {others[0]} is "{types[others[0]]}" ({len(others)} layers in all), '
            "and there are no mixtures of experts here; only models whose layers all have a dense mlp can be imported: "
            f'mlp_layer_types all "{_DENSE}", or first_k_dense_replace {layers}'
        )


def _types(keys: Keys, linear: Keys, layers: int) -> list[str]:
    """The kind of each layer: from `layer_types`, or from published files' lists, which count from 1."""
    full, delta = linear.maybe("full_attn_layers", list), linear.maybe("kda_layers", list)
    types = keys.maybe("layer_types", list)
    if types is None and full is not None and delta is not None:
        if sorted(map(str, (*full, *delta))) != sorted(map(str, range(1, layers + 1))):
            raise ConfigError(
                f"{linear.where}: full_attn_layers and kda_layers must name each of the layers 1 to {layers} once"
            )
        types = [_FULL if i in full else _LINEAR for i in range(1, layers + 1)]
    if types is None:
        types = [_FULL if i and i % 4 == 0 else _LINEAR for i in range(layers)]
    check_layer_types(keys, types, layers, _LINEAR, _FULL)
    return types


def _kda_rules(ours: str, theirs: str, options: dict[str, Any]) -> list[Rule]:
    """Our gate's second projection has a bias, theirs none."""
    heads, head_dim = options["num_heads"], options["head_dim"]
    inner = heads * head_dim
    projections = tuple(f"{theirs}.{name}_proj.weight" for name in ("q", "k", "v", "f_a", "g_a", "b"))
    filters = tuple(f"{theirs}.{name}_conv1d.weight" for name in "qkv")
    return [
        Weight(f"{ours}.project.weight", projections, sizes=(inner, inner, inner, head_dim, head_dim, heads)),
        Weight(f"{ours}.convolution.weight", filters, sizes=(inner,) * 3, transposed=True, ones=(1,)),
        Weight(f"{ours}.decay.weight", f"{theirs}.f_b_proj.weight"),
        Weight(f"{ours}.decay_bias", f"{theirs}.dt_bias"),
        Weight(f"{ours}.log_rate", f"{theirs}.A_log", ones=(0, 1, 3)),
        Weight(f"{ours}.gate.weight", f"{theirs}.g_b_proj.weight"),
        Zeros(f"{ours}.gate.bias"),
        Weight(f"{ours}.norm.weight", f"{theirs}.o_norm.weight"),
        Weight(f"{ours}.out.weight", f"{theirs}.o_proj.weight"),
    ]


def _latent_rules(ours: str, theirs: str, heads: int, options: dict[str, Any]) -> list[Rule]:
    rank, shared = options["q_lora_rank"], options["rope_head_dim"]
    queries, first = rank or heads * (options["head_dim"] + shared), "q_a_proj" if rank else "q_proj"
    down = (f"{theirs}.{first}.weight", f"{theirs}.kv_a_proj_with_mqa.weight")
    rules: list[Rule] = [
        Weight(f"{ours}.down.weight", down, sizes=(queries, options["kv_lora_rank"] + shared)),
        Weight(f"{ours}.latent_norm.weight", f"{theirs}.kv_a_layernorm.weight"),
        Weight(f"{ours}.up.weight", f"{theirs}.kv_b_proj.weight"),
        Weight(f"{ours}.out.weight", f"{theirs}.o_proj.weight"),
    ]
    if rank:
        rules.append(Weight(f"{ours}.query_norm.weight", f"{theirs}.q_a_layernorm.weight"))
        rules.append(Weight(f"{ours}.query_up.weight", f"{theirs}.q_b_proj.weight"))
    return rules


def _write(model: SequenceModel, run: RunConfig) -> dict[str, Any]:
    config, family = model.config, "kimi_linear"
    require(config, family, layout="decoder-only", norm="rmsnorm", norm_position="pre", positions="none")
    require(config, family, embedding_scale=False, embedding_norm=False, logit_bias=False, prefix=False, token_types=0)
    require(config, family, feed_forward=True, bias=False, activation="swiglu", tie_embeddings=False)
    deltas = [mixer for mixer in model.mixers() if isinstance(mixer, KimiDeltaAttention)]
    latents = [mixer for mixer in model.mixers() if isinstance(mixer, LatentAttention)]
    if not deltas or not latents or len(deltas) + len(latents) < config.num_layers:
        raise CapabilityError(f"{family}: mixers must be kda and latent_attention, at least one of each")
    if any(mixer.beta_range != 1 or mixer.norm.epsilon != config.norm_epsilon for mixer in deltas):
        raise CapabilityError(
            f"{family}: kda needs epsilon {config.norm_epsilon} (model.norm_epsilon), and no negative_eigenvalues"
        )
    if any(mixer.rotary or mixer.rope_head_dim == 0 for mixer in latents):
        raise CapabilityError(f"{family}: latent_attention needs rotary false, and a rope_head_dim of 1 or more")
    if len({_delta_shape(mixer) for mixer in deltas}) > 1 or len({_latent_shape(mixer) for mixer in latents}) > 1:
        raise CapabilityError(f"{family}: all layers of kda must be alike, and all of latent_attention")
    delta, latent = deltas[0], latents[0]
    return {
        "model_type": "kimi_linear",
        "architectures": ["KimiLinearForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff or 4 * config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": latent.num_heads,
        "num_key_value_heads": latent.num_heads,
        "qk_nope_head_dim": latent.head_dim,
        "qk_rope_head_dim": latent.rope_head_dim,
        "v_head_dim": latent.value_dim,
        "kv_lora_rank": latent.kv_lora_rank,
        "q_lora_rank": latent.widths[0] if latent.query_up is not None else None,
        "linear_head_dim": delta.head_dim,
        "linear_num_heads": delta.num_heads,
        "linear_conv_kernel_dim": delta.convolution.taps,
        "layer_types": [_LINEAR if isinstance(mixer, KimiDeltaAttention) else _FULL for mixer in model.mixers()],
        "mlp_layer_types": [_DENSE] * config.num_layers,
        "first_k_dense_replace": config.num_layers,
        "hidden_act": "silu",
        "model_max_length": config.max_length or run.data.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": False,
    }


def _delta_shape(mixer: KimiDeltaAttention) -> tuple[int, ...]:
    return mixer.num_heads, mixer.head_dim, mixer.convolution.taps


def _latent_shape(mixer: LatentAttention) -> tuple[int, ...]:
    sizes = (mixer.num_heads, mixer.head_dim, mixer.value_dim, mixer.kv_lora_rank, mixer.rope_head_dim)
    return (*sizes, 0 if mixer.query_up is None else mixer.widths[0])


KIMI_LINEAR = Family("kimi_linear", ("kimi_linear",), _read, _write)
