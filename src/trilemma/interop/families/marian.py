"""Marian and BART: the encoder-decoder of 2017 with norms after each part."""

from __future__ import annotations

from typing import Any

import torch

from trilemma.config import ModelConfig, RunConfig
from trilemma.errors import ConfigError
from trilemma.interop.families.base import ACTIVATIONS, Blueprint, Family, named, plain_attention, require
from trilemma.interop.keys import Keys
from trilemma.interop.weights import LeftOut, Rule, Weight
from trilemma.models import SequenceModel
from trilemma.nn.embedding import Embedding

# With the bias of the logits, and the bare model without it.
_CLASSES = {"marian": ("MarianMTModel", "MarianModel"), "bart": ("BartForConditionalGeneration", "BartModel")}
_BART_OFFSET = 2  # the first rows of BART's position tables are never read


def _read(keys: Keys) -> Blueprint:
    kind = keys.need("model_type", str)
    if keys.architecture not in ("", *_CLASSES[kind]):
        wanted = " and ".join(_CLASSES[kind])
        raise ConfigError(f"{keys.where}: architectures: {keys.architecture} cannot be imported, only {wanted}")
    keys.only("is_decoder", False)
    keys.only("share_encoder_decoder_embeddings", True)
    keys.only("normalize_before", False)
    keys.only("add_final_layer_norm", False)
    keys.only("add_bias_logits", False)
    keys.only("normalize_embedding", kind == "bart")
    keys.only("static_position_embeddings", kind == "marian")
    keys.skip("num_hidden_layers", "force_bos_token_to_be_generated", "extra_pos_embeddings")
    for side, default in (("ffn_dim", 4096), ("attention_heads", 16)):
        encoder, decoder = (keys.size(f"{part}_{side}", default) for part in ("encoder", "decoder"))
        if encoder != decoder:
            raise ConfigError(
                f"{keys.where}: decoder_{side} is {decoder}, encoder_{side} {encoder}; they must be equal"
            )
    vocab_size = keys.size("vocab_size", 58101 if kind == "marian" else 50265)
    keys.only("decoder_vocab_size", None, vocab_size)
    model = ModelConfig(
        layout="encoder-decoder",
        vocab_size=vocab_size,
        d_model=keys.size("d_model", 1024),
        d_ff=keys.size("encoder_ffn_dim", 4096),
        num_layers=keys.size("decoder_layers", 12),
        encoder_layers=keys.size("encoder_layers", 12),
        num_heads=keys.size("encoder_attention_heads", 16),
        norm_position="post",
        activation=keys.choose("activation_function", ACTIVATIONS, "gelu"),
        positions="sinusoidal-halves" if kind == "marian" else "learned",
        max_length=keys.size("max_position_embeddings", 1024),
        embedding_scale=keys.take("scale_embedding", False),
        embedding_norm=kind == "bart",
        tie_embeddings=keys.take("tie_word_embeddings", True),
        share_embeddings=True if kind == "marian" else "tokens",
        logit_bias=keys.architecture != _CLASSES[kind][1],
        dropout=keys.take("dropout", 0.1),
    )
    return Blueprint(model, "seq2seq", _rules(model, kind), prefix="model.", begins=kind == "bart")


def _rules(model: ModelConfig, kind: str) -> list[Rule]:
    tables = [f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    tied = ["lm_head.weight"] if model.tie_embeddings else []
    rules: list[Rule] = [
        Weight("embedding.tokens.weight", "model.shared.weight", aliases=(*tables, *tied)),
    ]
    if model.logit_bias:
        rules.append(Weight("logit_bias", "final_logits_bias", ones=(0,)))
    if not model.tie_embeddings:
        rules.append(Weight("output.weight", "lm_head.weight"))
    if kind == "marian":
        rules.append(
            LeftOut(r"model\.(encoder|decoder)\.embed_positions\.weight", "computed positions", _positions(model))
        )
    else:
        for ours, side in (("embedding", "decoder"), ("source_embedding", "encoder")):
            table = f"model.{side}.embed_positions.weight"
            rules.append(Weight(f"{ours}.learned.weight", table, skipped=_BART_OFFSET))
            rules += [
                Weight(f"{ours}.norm.{end}", f"model.{side}.layernorm_embedding.{end}") for end in ("weight", "bias")
            ]
    for i in range(model.encoder_layers or model.num_layers):
        rules += _layer(model, f"encoder.blocks.{i}.parts", f"model.encoder.layers.{i}", cross=False)
    for i in range(model.num_layers):
        rules += _layer(model, f"stack.blocks.{i}.parts", f"model.decoder.layers.{i}", cross=True)
    return rules


def _layer(model: ModelConfig, ours: str, theirs: str, cross: bool) -> list[Rule]:
    rules: list[Rule] = []
    last, d_model = (2 if cross else 1), model.d_model
    for end in ("weight", "bias"):
        own = [f"{theirs}.self_attn.{name}.{end}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
        rules += [
            Weight(f"{ours}.0.part.qkv.{end}", tuple(own[:3]), sizes=(d_model,) * 3),
            Weight(f"{ours}.0.part.out.{end}", own[3]),
            Weight(f"{ours}.0.norm.{end}", f"{theirs}.self_attn_layer_norm.{end}"),
            Weight(f"{ours}.{last}.part.up.{end}", f"{theirs}.fc1.{end}"),
            Weight(f"{ours}.{last}.part.down.{end}", f"{theirs}.fc2.{end}"),
            Weight(f"{ours}.{last}.norm.{end}", f"{theirs}.final_layer_norm.{end}"),
        ]
        if cross:
            other = [f"{theirs}.encoder_attn.{name}.{end}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
            rules += [
                Weight(f"{ours}.1.part.query.{end}", other[0]),
                Weight(f"{ours}.1.part.key_value.{end}", tuple(other[1:3]), sizes=(d_model,) * 2),
                Weight(f"{ours}.1.part.out.{end}", other[3]),
                Weight(f"{ours}.1.norm.{end}", f"{theirs}.encoder_attn_layer_norm.{end}"),
            ]
    return rules


def _positions(model: ModelConfig) -> torch.Tensor:
    """The table [max_length, d_model] that our embedding computes."""
    assert model.max_length is not None
    embedding = Embedding(1, model.d_model, model.positions, model.max_length, scale=False)
    with torch.no_grad():
        ids = torch.zeros(1, model.max_length, dtype=torch.int64)
        table: torch.Tensor = embedding(ids)[0][0] - embedding.tokens.weight[0]
    return table


def _write(model: SequenceModel, run: RunConfig) -> dict[str, Any]:
    config = model.config
    kind = "bart" if config.positions == "learned" else "marian"
    require(config, kind, layout="encoder-decoder", norm="layernorm", norm_position="post", norm_epsilon=1e-5)
    require(config, kind, token_types=0, feed_forward=True, bias=True)
    require(config, kind, tie_embeddings=True)  # else transformers fills both sides' own tables anew
    if kind == "marian":
        require(config, kind, positions="sinusoidal-halves", embedding_norm=False, share_embeddings=True)
    else:
        require(config, kind, embedding_norm=True, share_embeddings="tokens")
    plain_attention(model, kind)
    sides = ("encoder", "decoder")
    own = {"decoder_vocab_size": config.vocab_size} if kind == "marian" else {}
    return {
        "model_type": kind,
        "architectures": [_CLASSES[kind][not config.logit_bias]],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        **own,
        "d_model": config.d_model,
        **{f"{side}_ffn_dim": config.d_ff or 4 * config.d_model for side in sides},
        **{f"{side}_attention_heads": config.num_heads for side in sides},
        "encoder_layers": config.encoder_layers or config.num_layers,
        "decoder_layers": config.num_layers,
        "activation_function": named(ACTIVATIONS, config.activation, kind),
        "max_position_embeddings": config.max_length or run.data.max_source_length + 2,
        "scale_embedding": config.embedding_scale,
        "tie_word_embeddings": config.tie_embeddings,
        "dropout": config.dropout,
        "forced_eos_token_id": None,
    }


MARIAN = Family("marian", ("marian", "bart"), _read, _write)
