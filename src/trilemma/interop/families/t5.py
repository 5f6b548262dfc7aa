"""T5, T5 1.1, Flan-T5 and mT5: no absolute positions, a bias by relative position that all layers share, no biases."""

from __future__ import annotations

from typing import Any

from trilemma.config import ModelConfig, RunConfig
from trilemma.errors import CapabilityError, ConfigError
from trilemma.interop.families.base import Blueprint, Family, named, require
from trilemma.interop.keys import Keys
from trilemma.interop.weights import LeftOut, Rule, Weight
from trilemma.mixers.attention import Attention
from trilemma.mixers.cross_attention import CrossAttention
from trilemma.models import SequenceModel

_CLASSES = ("", "T5ForConditionalGeneration", "MT5ForConditionalGeneration")
_PROJECTIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "silu": "silu",
    "gated-gelu": "geglu-tanh",
    "gated-silu": "swiglu",
}
_SELF, _CROSS = "SelfAttention", "EncDecAttention"


def _read(keys: Keys) -> Blueprint:
    if keys.architecture not in _CLASSES:
        wanted = " or ".join(_CLASSES[1:])
        raise ConfigError(f"{keys.where}: architectures: {keys.architecture} cannot be imported, only {wanted}")
    newer = keys.need("model_type", str) == "mt5"
    keys.only("is_decoder", False)
    keys.only("relative_attention_num_buckets", 32)
    keys.only("relative_attention_max_distance", 128)
    keys.skip("dense_act_fn", "is_gated_act", "n_positions")  # they repeat feed_forward_proj; no table has that size
    heads, head_dim = keys.size("num_heads", 6 if newer else 8), keys.size("d_kv", 64)
    layers = keys.size("num_layers", 8 if newer else 6)
    tied = keys.take("tie_word_embeddings", True)
    own: dict[str, Any] = {"head_dim": head_dim, "scale": 1.0, "bias": False}
    model = ModelConfig(
        layout="encoder-decoder",
        vocab_size=keys.size("vocab_size", 250112 if newer else 32128),
        d_model=keys.size("d_model", 512),
        d_ff=keys.size("d_ff", 1024 if newer else 2048),
        num_layers=keys.size("num_decoder_layers", layers),
        encoder_layers=layers,
        num_heads=heads,
        mixer={"name": "attention", "position": "t5-shared", **own},
        cross_mixer={"name": "cross_attention", **own},
        norm="rmsnorm",
        norm_epsilon=keys.take("layer_norm_epsilon", 1e-6),
        activation=keys.choose("feed_forward_proj", _PROJECTIONS, "gated-gelu" if newer else "relu"),
        bias=False,
        positions="none",
        embedding_scale=False,
        tie_embeddings=tied,
        dropout=keys.take("dropout_rate", 0.1),
    )
    scaled = keys.take("scale_decoder_outputs", tied and not newer)  # mT5 never scales, whatever its file says of ties
    return Blueprint(model, "seq2seq", _rules(model, head_dim, scaled))


def _rules(model: ModelConfig, head_dim: int, scaled: bool) -> list[Rule]:
    tables = [f"{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    tied = ["lm_head.weight"] if model.tie_embeddings else []
    # Logits of a tied model are those of hidden / sqrt(d_model): the last norm takes the factor up.
    factor = model.d_model**-0.5 if scaled else 1.0
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rules: list[Rule] = [
        Weight("embedding.tokens.weight", "shared.weight", aliases=(*tables, *tied)),
        Weight("encoder.shared.t5_bias", f"encoder.{bias}"),
        Weight("stack.shared.t5_bias", f"decoder.{bias}"),
        Weight("encoder.norm.weight", "encoder.final_layer_norm.weight"),
        Weight("stack.norm.weight", "decoder.final_layer_norm.weight", factor=factor),
        LeftOut(rf"decoder\.block\.0\.layer\.1\.{_CROSS}\.relative_attention_bias\.weight", "never used"),
    ]
    if not model.tie_embeddings:
        rules.append(Weight("output.weight", "lm_head.weight"))
    for i in range(model.encoder_layers or model.num_layers):
        rules += _layer(model, head_dim, f"encoder.blocks.{i}.parts", f"encoder.block.{i}.layer", cross=False)
    for i in range(model.num_layers):
        rules += _layer(model, head_dim, f"stack.blocks.{i}.parts", f"decoder.block.{i}.layer", cross=True)
    return rules


def _layer(model: ModelConfig, head_dim: int, ours: str, theirs: str, cross: bool) -> list[Rule]:
    inner, last, width = model.num_heads * head_dim, (2 if cross else 1), model.d_ff or 0
    own, feed = f"{theirs}.0.{_SELF}", f"{theirs}.{last}.DenseReluDense"
    gated = model.activation in ("geglu-tanh", "swiglu")
    rules: list[Rule] = [
        Weight(f"{ours}.0.part.qkv.weight", (f"{own}.q.weight", f"{own}.k.weight", f"{own}.v.weight"), (inner,) * 3),
        Weight(f"{ours}.0.part.out.weight", f"{own}.o.weight"),
        Weight(f"{ours}.{last}.part.down.weight", f"{feed}.wo.weight"),
    ]
    rules += [Weight(f"{ours}.{part}.norm.weight", f"{theirs}.{part}.layer_norm.weight") for part in range(last + 1)]
    if gated:
        rules.append(
            Weight(f"{ours}.{last}.part.up.weight", (f"{feed}.wi_0.weight", f"{feed}.wi_1.weight"), (width,) * 2)
        )
    else:
        rules.append(Weight(f"{ours}.{last}.part.up.weight", f"{feed}.wi.weight"))
    if cross:
        other = f"{theirs}.1.{_CROSS}"
        rules += [
            Weight(f"{ours}.1.part.query.weight", f"{other}.q.weight"),
            Weight(f"{ours}.1.part.key_value.weight", (f"{other}.k.weight", f"{other}.v.weight"), (inner,) * 2),
            Weight(f"{ours}.1.part.out.weight", f"{other}.o.weight"),
        ]
    return rules


def _write(model: SequenceModel, run: RunConfig) -> dict[str, Any]:
    config, family = model.config, "t5"
    require(config, family, layout="encoder-decoder", norm="rmsnorm", norm_position="pre", positions="none")
    require(config, family, embedding_scale=False, embedding_norm=False, logit_bias=False, token_types=0)
    require(config, family, feed_forward=True, bias=False, share_embeddings=True)
    dims: set[int] = set()
    for mixer in model.mixers():
        if not isinstance(mixer, (Attention, CrossAttention)):
            raise CapabilityError(f"{family}: every mixer must be attention, found {mixer.name}")
        placed = isinstance(mixer, CrossAttention) or (
            mixer.position == "t5-shared" and mixer.window is None and not mixer.gate_width
        )
        whole = mixer.num_kv_heads == mixer.num_heads == config.num_heads
        if not placed or not whole or mixer.scale != 1.0 or mixer.out.bias is not None:
            raise CapabilityError(f"{family}: {mixer.name} needs scale 1, no bias, whole heads, position t5-shared")
        dims.add(mixer.head_dim)
    if len(dims) > 1:
        raise CapabilityError(f"{family}: all parts need one head_dim, found {sorted(dims)}")
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": dims.pop(),
        "d_ff": config.d_ff or 4 * config.d_model,
        "num_layers": config.encoder_layers or config.num_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "layer_norm_epsilon": config.norm_epsilon,
        "feed_forward_proj": named(_PROJECTIONS, config.activation, family),
        "dropout_rate": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


T5 = Family("t5", ("t5", "mt5"), _read, _write)
