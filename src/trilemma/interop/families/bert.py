"""BERT and RoBERTa: encoders with norms after each part, and their heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trilemma.config import ModelConfig, RunConfig
from trilemma.errors import CapabilityError, ConfigError
from trilemma.interop.families.base import ACTIVATIONS, Blueprint, Family, Task, named, plain_attention, require
from trilemma.interop.keys import Keys
from trilemma.interop.weights import LeftOut, Rule, Weight
from trilemma.models import SequenceModel

_OLD_ENDINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class _Names:
    """What the two call their heads' parts."""

    base: str
    dense: str
    norm: str
    bias: str
    decoder: str
    pooler: str
    classifier: str


_NAMES = {
    "bert": _Names(
        "bert",
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
        "cls.predictions.decoder",
        "bert.pooler.dense",
        "classifier",
    ),
    "roberta": _Names(
        "roberta",
        "lm_head.dense",
        "lm_head.layer_norm",
        "lm_head.bias",
        "lm_head.decoder",
        "classifier.dense",
        "classifier.out_proj",
    ),
}
_CLASSES = {"bert": "Bert", "roberta": "Roberta"}
_HEADS = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "Model")


def _read(keys: Keys) -> Blueprint:
    kind = keys.need("model_type", str)
    head = keys.architecture.removeprefix(_CLASSES[kind]) or "Model"
    if head not in _HEADS:
        known = ", ".join(_CLASSES[kind] + name for name in _HEADS)
        raise ConfigError(f"{keys.where}: architectures: {keys.architecture} cannot be imported, only {known}")
    for name in ("is_decoder", "add_cross_attention"):
        keys.only(name, False)
    keys.only("position_embedding_type", "absolute")
    keys.only("directionality", "bidi")
    keys.skip(
        *(f"pooler_{name}" for name in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type"))
    )
    labels = None
    if head == "ForSequenceClassification":
        keys.only("problem_type", None, "single_label_classification")
        labels = keys.labels()
        if len(labels) < 2:
            raise ConfigError(f"{keys.where}: id2label: {len(labels)} class; a regression cannot be imported")
    # RoBERTa counts positions from the padding id + 1: the first rows of its table are never read.
    skipped = keys.take("pad_token_id", 1) + 1 if kind == "roberta" else 0
    with_head = head in ("ForMaskedLM", "ForPreTraining")
    model = ModelConfig(
        layout="encoder-only",
        vocab_size=keys.size("vocab_size", 30522 if kind == "bert" else 50265),
        d_model=keys.size("hidden_size", 768),
        d_ff=keys.size("intermediate_size", 3072),
        num_layers=keys.size("num_hidden_layers", 12),
        num_heads=keys.size("num_attention_heads", 12),
        norm_position="post",
        norm_epsilon=keys.take("layer_norm_eps", 1e-12),
        activation=keys.choose("hidden_act", ACTIVATIONS, "gelu"),
        positions="learned",
        max_length=keys.size("max_position_embeddings", 512) - skipped,
        embedding_scale=False,
        embedding_norm=True,
        token_types=keys.take("type_vocab_size", 2),
        tie_embeddings=keys.take("tie_word_embeddings", True) or not with_head,
        logit_bias=with_head,
        dropout=keys.take("hidden_dropout_prob", 0.1),
        num_labels=len(labels) if labels is not None else None,
        pooling="first",
        head_transform=with_head or labels is not None,
    )
    if kind == "roberta" and with_head and model.activation != "gelu":
        raise ConfigError(f"{keys.where}: hidden_act: with another than gelu the head's activation cannot be honoured")
    rules = _body(model, _NAMES[kind], skipped) + _head(model, _NAMES[kind], with_head)
    notes = [] if with_head or labels else ["the checkpoint has no head: its logits are those of the tied embedding"]
    task: Task = "masked-language-model" if labels is None else "classification"
    return Blueprint(
        model, task, rules, prefix=f"{_NAMES[kind].base}.", endings=_OLD_ENDINGS, labels=labels, notes=notes
    )


def _body(model: ModelConfig, names: _Names, skipped: int) -> list[Rule]:
    table, tied = f"{names.base}.embeddings", (f"{names.decoder}.weight",) if model.tie_embeddings else ()
    rules: list[Rule] = [
        Weight("embedding.tokens.weight", f"{table}.word_embeddings.weight", aliases=tied),
        Weight("embedding.learned.weight", f"{table}.position_embeddings.weight", skipped=skipped),
        Weight("embedding.types.weight", f"{table}.token_type_embeddings.weight"),
        LeftOut(rf"{names.base}\.embeddings\.(position_ids|token_type_ids)", "0, 1, 2, ..."),
    ]
    size = (model.d_model,) * 3
    for end in ("weight", "bias"):
        rules.append(Weight(f"embedding.norm.{end}", f"{table}.LayerNorm.{end}"))
        for i in range(model.num_layers):
            ours, theirs = f"stack.blocks.{i}.parts", f"{names.base}.encoder.layer.{i}"
            qkv = tuple(f"{theirs}.attention.self.{name}.{end}" for name in ("query", "key", "value"))
            rules += [
                Weight(f"{ours}.0.part.qkv.{end}", qkv, sizes=size),
                Weight(f"{ours}.0.part.out.{end}", f"{theirs}.attention.output.dense.{end}"),
                Weight(f"{ours}.0.norm.{end}", f"{theirs}.attention.output.LayerNorm.{end}"),
                Weight(f"{ours}.1.part.up.{end}", f"{theirs}.intermediate.dense.{end}"),
                Weight(f"{ours}.1.part.down.{end}", f"{theirs}.output.dense.{end}"),
                Weight(f"{ours}.1.norm.{end}", f"{theirs}.output.LayerNorm.{end}"),
            ]
    return rules


def _head(model: ModelConfig, names: _Names, with_head: bool) -> list[Rule]:
    rules: list[Rule] = []
    unused = rf"{names.base}\.pooler\.dense\.(weight|bias)"
    if model.num_labels is not None:
        if not names.pooler.startswith(names.base):  # RoBERTa's classifier has a layer of its own instead
            rules.append(LeftOut(unused, "the classifier does not read it"))
        for end in ("weight", "bias"):
            rules.append(Weight(f"head_transform.dense.{end}", f"{names.pooler}.{end}"))
            rules.append(Weight(f"output.{end}", f"{names.classifier}.{end}"))
        return rules
    rules.append(LeftOut(unused, "embeddings of texts are pooled without it"))
    if with_head:
        for end in ("weight", "bias"):
            rules.append(Weight(f"head_transform.dense.{end}", f"{names.dense}.{end}"))
            rules.append(Weight(f"head_transform.norm.{end}", f"{names.norm}.{end}"))
        rules.append(Weight("logit_bias", names.bias, aliases=(f"{names.decoder}.bias",)))
        rules.append(LeftOut(r"cls\.seq_relationship\.(weight|bias)", "next-sentence prediction"))
        if not model.tie_embeddings:
            rules.append(Weight("output.weight", f"{names.decoder}.weight"))
    return rules


def _write(model: SequenceModel, run: RunConfig) -> dict[str, Any]:
    config, family = model.config, "bert"
    require(config, family, layout="encoder-only", norm="layernorm", norm_position="post", positions="learned")
    require(config, family, embedding_scale=False, embedding_norm=True, feed_forward=True, bias=True)
    classifier = config.num_labels is not None
    if classifier:
        require(config, family, head_transform=True, pooling="first")
    elif config.head_transform:
        require(config, family, logit_bias=True)
    else:
        require(config, family, logit_bias=False, tie_embeddings=True)
    if not config.token_types:
        raise CapabilityError(f"{family}: model.token_types is 0, at least 1 is needed")
    plain_attention(model, family)
    head = "ForSequenceClassification" if classifier else "ForMaskedLM" if config.head_transform else "Model"
    labels = run.data.labels or []
    more: dict[str, Any] = {"id2label": {str(i): name for i, name in enumerate(labels)}} if classifier else {}
    return {
        "model_type": "bert",
        "architectures": [f"Bert{head}"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff or 4 * config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": named(ACTIVATIONS, config.activation, family),
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        **more,
    }


BERT = Family("bert", ("bert", "roberta"), _read, _write)
