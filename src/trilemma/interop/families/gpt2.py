"""GPT-2: learned positions, layer norms before each part, projections stored [in, out]."""

from __future__ import annotations

from typing import Any

from trilemma.config import ModelConfig, RunConfig
from trilemma.interop.families.base import ACTIVATIONS, Blueprint, Family, named, plain_attention, require
from trilemma.interop.keys import Keys
from trilemma.interop.weights import LeftOut, Rule, Weight
from trilemma.models import SequenceModel


def _read(keys: Keys) -> Blueprint:
    keys.only("scale_attn_weights", True)
    keys.only("scale_attn_by_inverse_layer_idx", False)
    keys.only("add_cross_attention", False)
    keys.skip("reorder_and_upcast_attn", "n_ctx")  # rounding alone; an older name of n_positions
    d_model, layers = keys.size("n_embd", 768), keys.size("n_layer", 12)
    model = ModelConfig(
        layout="decoder-only",
        vocab_size=keys.size("vocab_size", 50257),
        d_model=d_model,
        d_ff=keys.size("n_inner", 4 * d_model),
        num_layers=layers,
        num_heads=keys.size("n_head", 12),
        norm_epsilon=keys.take("layer_norm_epsilon", 1e-5),
        activation=keys.choose("activation_function", ACTIVATIONS, "gelu_new"),
        positions="learned",
        max_length=keys.size("n_positions", 1024),
        embedding_scale=False,
        tie_embeddings=keys.take("tie_word_embeddings", True),
        dropout=keys.take("resid_pdrop", 0.1),
    )
    return Blueprint(model, "language-model", _rules(model), prefix="transformer.")


def _rules(model: ModelConfig) -> list[Rule]:
    base = "transformer"
    rules: list[Rule] = [
        Weight(
            "embedding.tokens.weight",
            f"{base}.wte.weight",
            aliases=("lm_head.weight",) if model.tie_embeddings else (),
        ),
        Weight("embedding.learned.weight", f"{base}.wpe.weight"),
        LeftOut(rf"{base}\.h\.\d+\.attn\.(bias|masked_bias)", "the causal mask"),
    ]
    if not model.tie_embeddings:
        rules.append(Weight("output.weight", "lm_head.weight"))
    for end in ("weight", "bias"):
        rules.append(Weight(f"stack.norm.{end}", f"{base}.ln_f.{end}"))
        for i in range(model.num_layers):
            ours, theirs, matrix = f"stack.blocks.{i}.parts", f"{base}.h.{i}", end == "weight"
            rules += [
                Weight(f"{ours}.0.norm.{end}", f"{theirs}.ln_1.{end}"),
                Weight(f"{ours}.0.part.qkv.{end}", f"{theirs}.attn.c_attn.{end}", transposed=matrix),
                Weight(f"{ours}.0.part.out.{end}", f"{theirs}.attn.c_proj.{end}", transposed=matrix),
                Weight(f"{ours}.1.norm.{end}", f"{theirs}.ln_2.{end}"),
                Weight(f"{ours}.1.part.up.{end}", f"{theirs}.mlp.c_fc.{end}", transposed=matrix),
                Weight(f"{ours}.1.part.down.{end}", f"{theirs}.mlp.c_proj.{end}", transposed=matrix),
            ]
    return rules


def _write(model: SequenceModel, run: RunConfig) -> dict[str, Any]:
    config, family = model.config, "gpt2"
    require(config, family, layout="decoder-only", norm="layernorm", norm_position="pre", positions="learned")
    require(config, family, embedding_scale=False, embedding_norm=False, logit_bias=False, prefix=False, token_types=0)
    require(config, family, feed_forward=True, bias=True)
    plain_attention(model, family)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff or 4 * config.d_model,
        "n_positions": config.max_length,
        "activation_function": named(ACTIVATIONS, config.activation, family),
        "layer_norm_epsilon": config.norm_epsilon,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


GPT2 = Family("gpt2", ("gpt2",), _read, _write)
