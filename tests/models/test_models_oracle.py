"""Whole models against Transformers that other people wrote (torch.nn.Transformer), with the same weights."""

from __future__ import annotations

import pytest
import torch
from model_cases import build, close, tokens
from torch import Tensor, nn

from trilemma.models import SequenceModel
from trilemma.models.stack import Block
from trilemma.nn.positions import sinusoid

WIDTH, HEADS, HIDDEN = 8, 2, 12
PLAIN = {"positions": "sinusoidal", "logit_bias": False, "num_heads": HEADS}
ACTIVATIONS = ("relu", "gelu")


def copy_attention(theirs: nn.MultiheadAttention, ours: nn.Module) -> None:
    """Our fused or split projections into torch's one."""
    weights = dict(ours.named_parameters())
    if "qkv.weight" in weights:
        weight, bias = weights["qkv.weight"], weights["qkv.bias"]
    else:
        weight = torch.cat([weights["query.weight"], weights["key_value.weight"]])
        bias = torch.cat([weights["query.bias"], weights["key_value.bias"]])
    theirs.in_proj_weight.copy_(weight)
    theirs.in_proj_bias.copy_(bias)
    theirs.out_proj.weight.copy_(weights["out.weight"])
    theirs.out_proj.bias.copy_(weights["out.bias"])


def copy_layer(theirs: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, block: Block) -> None:
    """A block into torch's layer of the same shape."""
    parts = block.contents()
    attentions = [theirs.self_attn]
    norms = [theirs.norm1, theirs.norm2]
    if isinstance(theirs, nn.TransformerDecoderLayer):
        attentions.append(theirs.multihead_attn)
        norms.append(theirs.norm3)
    for attention, part in zip(attentions, parts[:-1], strict=True):
        copy_attention(attention, part)
    theirs.linear1.load_state_dict(parts[-1].up.state_dict())
    theirs.linear2.load_state_dict(parts[-1].down.state_dict())
    for norm, layer in zip(norms, block.parts, strict=True):
        norm.load_state_dict(layer.norm.state_dict())


def torch_transformer(model: SequenceModel, norm_first: bool, activation: str) -> nn.Transformer:
    """torch's encoder-decoder with the model's weights."""
    stacks = model.stacks()
    theirs = nn.Transformer(
        WIDTH, HEADS, len(stacks[0].blocks), len(stacks[1].blocks), HIDDEN, 0.0, activation,
        batch_first=True, norm_first=norm_first,
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for side, stack in ((theirs.encoder, stacks[0]), (theirs.decoder, stacks[1])):
            for layer, block in zip(side.layers, stack.blocks, strict=True):
                copy_layer(layer, block)
            if stack.norm is None:
                side.norm = None  # torch adds a last norm even to post-norm stacks; the paper has none
            else:
                side.norm.load_state_dict(stack.norm.state_dict())
    return theirs


def embedded(model: SequenceModel, ids: Tensor) -> Tensor:
    """The paper's section 3.4 and 3.5, written out."""
    table = model.embedding.tokens.weight
    return table[ids] * WIDTH**0.5 + sinusoid(torch.arange(ids.shape[1]), WIDTH, "paper", torch.float64)


def both(position: str, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ours, torch's, and where target tokens are valid; ragged on both sides."""
    model = build("encoder-decoder", "attention", **PLAIN, norm_position=position, activation=activation)
    theirs = torch_transformer(model, position == "pre", activation)
    source, target = tokens(3, 6), tokens(3, 5)
    source_lengths, lengths = torch.tensor([6, 2, 4]), torch.tensor([5, 3, 1])
    source_padding = torch.arange(6) >= source_lengths[:, None]
    target_padding = torch.arange(5) >= lengths[:, None]
    ours = model(target, lengths, source=source, source_lengths=source_lengths)
    expected = theirs(
        embedded(model, source),
        embedded(model, target),
        tgt_mask=torch.ones(5, 5, dtype=torch.bool).triu(1),
        src_key_padding_mask=source_padding,
        tgt_key_padding_mask=target_padding,
        memory_key_padding_mask=source_padding,
    )
    return ours, expected, ~target_padding


@pytest.mark.filterwarnings("ignore:.*nested.tensor.*:UserWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("position", ["post", "pre"])
def test_encoder_decoder_equals_torch_transformer(position: str, activation: str) -> None:
    ours, expected, valid = both(position, activation)
    close(ours[valid], expected[valid])


@pytest.mark.filterwarnings("ignore:.*nested.tensor.*:UserWarning")
@pytest.mark.parametrize("position", ["post", "pre"])
def test_decoder_only_equals_torch_encoder_with_a_causal_mask(position: str) -> None:
    model = build("decoder-only", "attention", **PLAIN, norm_position=position)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=position == "pre")
    last = nn.LayerNorm(WIDTH) if position == "pre" else None
    theirs = nn.TransformerEncoder(layer, 4, last, enable_nested_tensor=False).double().eval()
    with torch.no_grad():
        for their_layer, block in zip(theirs.layers, model.stack.blocks, strict=True):
            copy_layer(their_layer, block)
        if last is not None:
            theirs.norm.load_state_dict(model.stack.norm.state_dict())
    ids = tokens(2, 7)
    expected = theirs(embedded(model, ids), mask=torch.ones(7, 7, dtype=torch.bool).triu(1))
    close(model(ids), expected)
    close(model.head(model(ids)), expected @ model.embedding.tokens.weight.T)


def test_pre_and_post_norm_are_the_equations() -> None:
    """Post: Norm(x + part(x)), section 3.1. Pre: x + part(Norm(x)), with one norm after the last layer."""
    ids = tokens(2, 4)
    for position in ("post", "pre"):
        model = build("decoder-only", "attention", **PLAIN, norm_position=position)
        x = embedded(model, ids)
        for block in model.stack.blocks:
            for layer in block.parts:
                part, norm = layer.part, layer.norm
                x = norm(x + part(x)[0]) if position == "post" else x + part(norm(x))[0]
        assert (model.stack.norm is None) == (position == "post")
        close(model(ids), x if model.stack.norm is None else model.stack.norm(x))


def test_the_oracle_can_fail() -> None:
    """The planted defect: one bias of one layer differs."""
    model = build("encoder-decoder", "attention", **PLAIN, norm_position="post")
    theirs = torch_transformer(model, False, "relu")
    source, target = tokens(2, 4), tokens(2, 3)
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    with torch.no_grad():
        model.encoder.blocks[0].parts[0].part.out.bias.add_(1e-6 * torch.randn(WIDTH))
        expected = theirs(embedded(model, source), embedded(model, target), tgt_mask=mask)
        difference = model(target, source=source) - expected
    assert float(difference.abs().max()) > 1e-9
