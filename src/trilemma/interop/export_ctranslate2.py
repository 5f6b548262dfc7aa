"""`trilemma export --to ctranslate2`: Transformers of the shapes that CTranslate2 knows, by its own specifications.

Weights are handed over by name; what its runtime would compute otherwise than we do is refused by name. Written against
version 4.8 of the package (https://opennmt.net/CTranslate2).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tokenizers
import torch
from torch import Tensor, nn

from trilemma import __version__
from trilemma.config import ModelConfig, RunConfig
from trilemma.data import Tokenizer
from trilemma.errors import CapabilityError, ConfigError, DataError, LawError, nearest
from trilemma.interop.target import ExportOptions, optional_package, text_begin, tokenizer_file
from trilemma.mixers.attention import Attention
from trilemma.mixers.cross_attention import CrossAttention
from trilemma.models import SequenceModel
from trilemma.models.layouts import EncoderDecoder
from trilemma.models.stack import Block, Stack
from trilemma.nn.embedding import Embedding
from trilemma.nn.feedforward import GATED, FeedForward
from trilemma.runs import files
from trilemma.runs.load import LoadedRun

QUANTIZATIONS = ("int8", "int16", "float16", "bfloat16")
_ACTIVATIONS = {"relu": "RELU", "gelu": "GELU", "gelu-tanh": "GELUTanh", "silu": "SWISH"}
_POSITIONS = 2048  # rows of the table of sinusoids, where the model sets no limit
_PAGE = "trilemma.json"
_TOLERANCE = 1e-3  # of a token's log-probability in float32


@dataclass(frozen=True)
class Shape:
    """What all layers of a stack must have in common."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_base: float | None
    rotary_interleaved: bool


def write(run: LoadedRun, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """Writes model.bin, config.json, vocabularies, the tokenizer, and trilemma.json with how to decode; returns that.

    Raises:
        BackendError: the package is not installed.
        CapabilityError: a layout, mixer or option that CTranslate2 cannot run; names it.
        ConfigError: an unknown quantization.
        LawError: in float32, CTranslate2 computes something else.
    """
    if options.quantization is not None and options.quantization not in QUANTIZATIONS:
        known = nearest(options.quantization, QUANTIZATIONS)
        raise ConfigError(f'--quantization: unknown type "{options.quantization}"{known}')
    model, tokenizer, config = run.model.float(), run.tokenizer, run.config
    _check_model(config)
    optional_package("ctranslate2", "ctranslate2", "ctranslate2")
    import ctranslate2
    from ctranslate2.specs import transformer_spec

    decoder = _decoder(transformer_spec.TransformerDecoderSpec, model)
    words, begin = vocabulary(tokenizer), text_begin(tokenizer)
    if isinstance(model, EncoderDecoder):
        encoder = _encoder(transformer_spec.TransformerEncoderSpec, model)
        spec = transformer_spec.TransformerSpec(encoder, decoder)
        spec.register_source_vocabulary(words)
        spec.register_target_vocabulary(words)
        spec.config.decoder_start_token = words[tokenizer.bos]
        spec.config.add_source_bos, spec.config.add_source_eos = bool(begin), True
    else:
        spec = transformer_spec.TransformerDecoderModelSpec(decoder)
        spec.register_vocabulary(words)
    first = begin[0] if begin else tokenizer.bos  # where it adds one to sources, it is this
    spec.config.bos_token, spec.config.eos_token = words[first], words[tokenizer.eos]
    spec.config.unk_token, spec.config.layer_norm_epsilon = words[tokenizer.unk], config.model.norm_epsilon
    spec.validate()
    spec.optimize(quantization=options.quantization)
    spec.save(str(folder))
    name, content = tokenizer_file(tokenizer)
    files.write_file(folder / name, content)
    difference = _difference(run, words, folder)
    if options.quantization is None and not difference <= _TOLERANCE:
        raise LawError(f"CTranslate2 computes other log-probabilities than the model: they differ by {difference:.1e}")
    page = _page(run, words, name, options.quantization)
    page |= {"difference": difference, "made_with": {"trilemma": __version__, "ctranslate2": ctranslate2.__version__}}
    files.write_file(folder / _PAGE, (json.dumps(page, ensure_ascii=False, indent=1) + "\n").encode())
    return page


def vocabulary(tokenizer: Tokenizer) -> list[str]:
    """The name of every id, in order; ids without a token are named after their number.

    Raises:
        DataError: two ids have one name.
    """
    name, content = tokenizer_file(tokenizer)
    if name.endswith(".json"):
        brought = tokenizers.Tokenizer.from_str(content.decode())
        size, piece = brought.get_vocab_size(with_added_tokens=True), cast(Callable[[int], Any], brought.id_to_token)
    else:
        sentencepiece = optional_package("sentencepiece", "ctranslate2", "sentencepiece")
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        size, piece = processor.get_piece_size(), processor.id_to_piece
    words = [(piece(index) if index < size else None) or f"< {index} >" for index in range(tokenizer.vocab_size)]
    if len(set(words)) < len(words):
        twice = next(word for word in words if words.count(word) > 1)
        raise DataError(f'the tokenizer has two entries "{twice}", which a CTranslate2 vocabulary cannot hold')
    return words


def _page(run: LoadedRun, words: Sequence[str], name: str, quantization: str | None) -> dict[str, Any]:
    """How to decode as we do."""
    tokenizer, decoding = run.tokenizer, run.config.decoding
    encoder = run.model.layout == "encoder-decoder"
    begin = text_begin(tokenizer)
    ends = encoder or run.config.data.task == "language-model"
    return {
        "format": "trilemma-ctranslate2",
        "version": 1,
        "layout": run.model.layout,
        "class": "ctranslate2.Translator" if encoder else "ctranslate2.Generator",
        "source_begin": [words[index] for index in begin] if encoder else None,  # it is added there
        "prompt_begin": [] if encoder else [words[index] for index in (tokenizer.bos, *begin)],
        "prompt_end": [] if ends else [words[tokenizer.sep]],
        "quantization": quantization,
        "length_penalty": decoding.length_penalty,
        "lowercase": run.config.data.lowercase,
        "tokenizer": name,
    }


@torch.no_grad()
def _difference(run: LoadedRun, words: Sequence[str], folder: Path) -> float:
    """The largest difference of a token's log-probability between the written model and ours, on random tokens."""
    import ctranslate2

    tokenizer, generator = run.tokenizer, torch.Generator().manual_seed(1)
    text = torch.tensor([index for index in range(tokenizer.vocab_size) if index not in tokenizer.special_ids])
    length = min(5, (run.model.config.max_length or 6) - 1)  # and end-of-sequence
    tokens = text[torch.randint(len(text), (3, length), generator=generator)]
    inputs = torch.cat([torch.full((3, 1), tokenizer.bos), tokens[:, :-1]], dim=1)
    spoken = [[words[index] for index in row] for row in tokens.tolist()]
    if run.model.layout == "encoder-decoder":
        begin = torch.tensor([text_begin(tokenizer)] * 3, dtype=torch.long)
        source = torch.cat([begin, tokens, torch.full((3, 1), tokenizer.eos)], dim=1)
        hidden = run.model(inputs, source=source)
        scored = ctranslate2.Translator(str(folder)).score_batch(spoken, spoken)
    else:
        hidden = run.model(inputs)
        scored = ctranslate2.Generator(str(folder)).score_batch([[words[tokenizer.bos], *row] for row in spoken])
    wanted = run.model.head(hidden).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    found = torch.tensor([list(result.log_probs)[:length] for result in scored])
    return float((found - wanted).abs().max())


# What cannot be run


def _refuse(what: str) -> None:
    raise CapabilityError(f"CTranslate2 cannot run this model: {what}")


def _check_model(config: RunConfig) -> None:
    model = config.model
    if model.layout == "encoder-only":
        _refuse("layout encoder-only; export it with --to hf")
    if config.data.task == "probe":
        _refuse("a probe's run generates no text")
    if model.prefix:
        _refuse("model.prefix: its decoders read a prompt in one direction")
    if not model.feed_forward:
        _refuse("model.feed_forward: false; its layers always have one")
    if model.token_types:
        _refuse("model.token_types")
    if model.embedding_norm and model.norm == "rmsnorm":
        _refuse("model.embedding_norm is a layernorm, and all its norms would be of model.norm: rmsnorm")


def _shape(stack: Stack, where: str) -> Shape:
    """The one shape of all layers' attention."""
    shapes = set()
    for mixer in stack.mixers():
        if isinstance(mixer, CrossAttention):
            if mixer.num_kv_heads != mixer.num_heads:
                _refuse(f"{where}: cross-attention with num_kv_heads {mixer.num_kv_heads}")
            continue
        if not isinstance(mixer, Attention):
            _refuse(f'{where}: mixer "{mixer.name}"; it knows attention alone')
        else:
            shapes.add(_attention_shape(mixer, where))
    if len(shapes) > 1:
        _refuse(f"{where}: layers whose attention differs")
    return shapes.pop()


def _attention_shape(mixer: Attention, where: str) -> Shape:
    if mixer.position not in ("none", "rotary"):
        _refuse(f'{where}: attention with position "{mixer.position}"; it gets none or rotary')
    unknown = {
        "window": mixer.window is not None,
        "qk_norm": mixer.query_norm is not None,
        "rotary_scaling": mixer.rotary_scaling is not None,
        "rotary_dim": mixer.rotary_dim != mixer.head_dim,
        "output_gate": mixer.gate_width > 0,
    }
    for option, value in unknown.items():
        if value:
            _refuse(f"{where}: attention with {option}")
    rotary = mixer.position == "rotary"
    return Shape(
        mixer.num_heads,
        mixer.num_kv_heads,
        mixer.head_dim,
        mixer.rotary_base if rotary else None,
        mixer.rotary_interleaved if rotary else True,
    )


# Weights


def _common(config: ModelConfig, shape: Shape) -> dict[str, Any]:
    """Arguments that both kinds of stack take."""
    from ctranslate2.specs import common_spec

    name = _ACTIVATIONS[GATED.get(config.activation, config.activation)]
    rotary = shape.rotary_base is not None
    if rotary and config.positions != "none":
        _refuse(f"model.positions: {config.positions} beside rotary attention")
    own_width = shape.num_heads * shape.head_dim != config.d_model
    return {
        "pre_norm": config.norm_position == "pre",
        "activation": common_spec.Activation[name],
        "ffn_glu": config.activation in GATED,
        "rms_norm": config.norm == "rmsnorm",
        "layernorm_embedding": config.embedding_norm,
        "num_heads_kv": shape.num_kv_heads if shape.num_kv_heads != shape.num_heads else None,
        "head_dim": shape.head_dim if own_width else None,
        "rotary_dim": 0 if rotary else None,
        "rotary_interleave": shape.rotary_interleaved,
        "rotary_base": shape.rotary_base or 10000.0,
    }


def _encoder(kind: Callable[..., Any], model: EncoderDecoder) -> Any:
    shape = _shape(model.encoder, "encoder")
    if shape.num_kv_heads != shape.num_heads:
        _refuse(f"encoder: attention with num_kv_heads {shape.num_kv_heads}")
    spec = kind(len(model.encoder.blocks), shape.num_heads, **_common(model.config, shape))
    _fill_stack(spec, model.encoder, model.source_embedding, spec.embeddings[0], model.config)
    return spec


def _decoder(kind: Callable[..., Any], model: SequenceModel) -> Any:
    shape = _shape(model.stack, "decoder")
    crossed = isinstance(model, EncoderDecoder)
    if crossed and shape.num_kv_heads != shape.num_heads:
        _refuse(f"decoder: attention with num_kv_heads {shape.num_kv_heads} beside cross-attention")
    heads = shape.num_heads
    for mixer in model.stack.mixers():
        if isinstance(mixer, CrossAttention) and (mixer.num_heads, mixer.head_dim) != (heads, shape.head_dim):
            _refuse(f"decoder: cross-attention of {mixer.num_heads} heads beside attention of {heads}")
    spec = kind(len(model.stack.blocks), heads, with_encoder_attention=crossed, **_common(model.config, shape))
    _fill_stack(spec, model.stack, model.embedding, spec.embeddings, model.config)
    table = model.embedding.tokens if model.output is None else model.output
    _fill_linear(spec.projection, table.weight, model.logit_bias)
    return spec


def _fill_stack(spec: Any, stack: Stack, embedding: Embedding, table: Any, config: ModelConfig) -> None:
    table.weight = _copied(embedding.tokens.weight)
    spec.scale_embeddings = config.embedding_scale
    if _shape(stack, "model").rotary_base is None:
        spec.position_encodings.encodings = _positions(embedding, config)
    if embedding.norm is not None:
        _fill_norm(spec.layernorm_embedding, embedding.norm)
    if stack.norm is not None:
        _fill_norm(spec.layer_norm, stack.norm)
    for layer, block in zip(spec.layer, stack.blocks, strict=True):
        assert isinstance(block, Block)
        _fill_layer(layer, block)


def _fill_layer(spec: Any, block: Block) -> None:
    for layer in block.parts:
        part, norm = cast(nn.Module, layer.part), cast(nn.Module, layer.norm)
        if isinstance(part, FeedForward):
            place = spec.ffn
            _fill_feed_forward(place, part)
        elif isinstance(part, CrossAttention):
            place = spec.attention
            _fill_linears(place.linear, (part.query, part.key_value, part.out))
            place.queries_scale = _scale(part.scale)
        else:
            assert isinstance(part, Attention)
            place = spec.self_attention
            _fill_linears(place.linear, (part.qkv, part.out))
            place.queries_scale = _scale(part.scale)
        _fill_norm(place.layer_norm, norm)


def _scale(scale: float | None) -> Any:
    from ctranslate2.specs import model_spec

    if scale is None:
        return model_spec.OPTIONAL
    return torch.tensor(scale).numpy()


def _fill_linears(specs: Sequence[Any], layers: Sequence[nn.Linear]) -> None:
    for spec, layer in zip(specs, layers, strict=True):
        _fill_linear(spec, layer.weight, layer.bias)


def _fill_feed_forward(spec: Any, part: FeedForward) -> None:
    parts = 2 if part.gated else 1  # the gate and what it weighs
    weights = part.up.weight.chunk(parts)
    biases = (None,) * parts if part.up.bias is None else part.up.bias.chunk(parts)
    _fill_linear(spec.linear_0, weights[0], biases[0])
    if part.gated:
        _fill_linear(spec.linear_0_noact, weights[1], biases[1])
    _fill_linear(spec.linear_1, part.down.weight, part.down.bias)


def _fill_linear(spec: Any, weight: Tensor, bias: Tensor | None) -> None:
    spec.weight = _copied(weight)
    if bias is not None:
        spec.bias = _copied(bias)


def _fill_norm(spec: Any, norm: nn.Module) -> None:
    weight = cast(Tensor, norm.weight)
    spec.gamma = _copied(weight)
    if isinstance(norm, nn.LayerNorm):
        spec.beta = torch.zeros_like(weight) if norm.bias is None else _copied(norm.bias)


def _copied(tensor: Tensor) -> Tensor:
    """Quantization works in place: on a tensor of its own, not on the model's."""
    return tensor.detach().clone()


def _positions(embedding: Embedding, config: ModelConfig) -> Tensor:
    """[positions, d_model] what is added at each position; zeros, since it would add sinusoids of its own."""
    if embedding.learned is not None:
        return _copied(embedding.learned.weight)
    places = torch.arange(config.max_length or _POSITIONS)
    if config.positions == "none":
        return torch.zeros(len(places), config.d_model)
    return embedding._encoding(places, torch.float32)
