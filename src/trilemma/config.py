"""Typed configuration: YAML plus `section.key=value` overrides, resolved once and written to the run.

Every key is known: an unknown one is an error that names the nearest. `load_config` and, for comparisons,
`trilemma.study.load_study` are the only readers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from trilemma.errors import ConfigError, nearest
from trilemma.sections import QualityConfig, Section, SplitConfig
from trilemma.settings import DEFAULT_MIXERS, Origin, yaml_text
from trilemma.settings import apply_overrides as apply_overrides
from trilemma.settings import merge as merge
from trilemma.settings import read_yaml as read_yaml
from trilemma.settings import set_key as set_key

CONFIG_VERSION = 1

# A mixer is a name, or a mapping with "name" and the mixer's own options; a list is a pattern repeated over the layers.
MixerSpec = str | dict[str, Any]
Quantization = Literal["int8", "int4"]
Location = list[str | int]
Details = Mapping[str, Any]  # one mistake, as pydantic tells it


class ModelConfig(Section):
    """The architecture. `None` means: derived, and written out when the config is resolved."""

    layout: Literal["encoder-decoder", "decoder-only", "encoder-only"] = "encoder-decoder"
    vocab_size: int | None = Field(None, ge=1, description="entries of the vocabulary; None: from the tokenizer")
    d_model: int = Field(256, ge=1)
    d_ff: int | None = Field(None, ge=1, description="width of the feed-forward layer; None: 4 * d_model")
    num_layers: int = Field(4, ge=1, description="layers of the decoder, or of the only stack")
    encoder_layers: int | None = Field(None, ge=1, description="layers of the encoder; None: num_layers")
    num_heads: int = Field(4, ge=1)
    mixer: MixerSpec | list[MixerSpec] = DEFAULT_MIXERS["mixer"]
    encoder_mixer: MixerSpec | list[MixerSpec] | None = None
    cross_mixer: MixerSpec = DEFAULT_MIXERS["cross_mixer"]
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_epsilon: float = Field(1e-5, ge=0)
    activation: Literal["relu", "gelu", "gelu-tanh", "silu", "swiglu", "geglu", "geglu-tanh"] = "relu"
    feed_forward: bool = Field(True, description="layers have a feed-forward part; Mamba's have none")
    bias: bool = True
    positions: Literal["none", "sinusoidal", "sinusoidal-t2t", "sinusoidal-halves", "learned"] = "sinusoidal"
    max_length: int | None = Field(None, ge=1, description="longest sequence that positions allow; needed by learned")
    embedding_scale: bool = Field(True, description="multiply embeddings by sqrt(d_model)")
    embedding_norm: bool = False
    token_types: int = Field(0, ge=0)
    tie_embeddings: bool = Field(True, description="the output projection is the input embedding")
    share_embeddings: bool | Literal["tokens"] = Field(
        True, description="encoder and decoder use one embedding; tokens: only its table of tokens (BART)"
    )
    logit_bias: bool = False
    dropout: float = Field(0.1, ge=0, lt=1)
    quantization: Quantization | None = Field(None, description="of a trained model's weights (trilemma quantize)")
    prefix: bool = Field(False, description="decoder-only: the source part is read in both directions")
    num_labels: int | None = Field(None, ge=2, description="encoder-only: classes; None: a masked language model")
    pooling: Literal["first", "mean", "none"] = Field(
        "mean", description="none: labels for every token, not for the row"
    )
    head_transform: bool = Field(
        False, description="encoder-only: one more layer before the output, with tanh for a classifier (BERT)"
    )

    @field_validator("mixer", "encoder_mixer", "cross_mixer")
    @classmethod
    def _named(cls, value: MixerSpec | list[MixerSpec] | None) -> MixerSpec | list[MixerSpec] | None:
        if value == []:
            raise ValueError("the pattern is empty; name at least one mixer")
        for spec in value if isinstance(value, list) else [value]:
            if isinstance(spec, dict) and not isinstance(spec.get("name"), str):
                raise ValueError(f'a mixer with options needs the key "name", found {", ".join(map(str, spec))}')
        return value


class Source(Section):
    """Where examples come from: files, or a generated task.

    `path`: .txt, .tsv, .jsonl, .parquet (each also .gz/.zst); `source`+`target`: aligned text files;
    `generated`: the name of an embedded task, with `size` examples and further `options`.
    """

    path: str | None = None
    source: str | None = None
    target: str | None = None
    generated: str | None = None
    size: int | None = Field(None, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)
    weight: float = Field(1.0, gt=0, description="how often an epoch sees each example of this source")

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        kinds = [self.path is not None, self.source is not None or self.target is not None, self.generated is not None]
        if sum(kinds) != 1:
            raise ValueError("give exactly one of: path, source with target, generated")
        if (self.source is None) != (self.target is None):
            raise ValueError("source and target go together")
        return self


class DataConfig(Section):
    """What is learned, and from which text."""

    task: Literal[
        "seq2seq", "language-model", "classification", "masked-language-model", "question-answering", "probe"
    ] = "seq2seq"
    train: Source | list[Source] = Source(generated="numbers")
    valid: Source | None = None
    test: Source | None = None
    split: SplitConfig | None = Field(None, description="valid and test taken out of train, without leaks")
    overlap: Literal["keep", "drop"] = Field("keep", description="training examples with a side in valid or test")
    source_language: str | None = None
    target_language: str | None = None
    bleu_tokenizer: Literal["auto", "none", "13a", "intl", "zh", "char"] = Field(
        "auto", description="sacrebleu's tokenizer; auto: by the target language; none: the text is tokenised already"
    )
    lowercase: bool = False
    max_source_length: int = Field(256, ge=1, description="tokens of a text, without special ids")
    max_target_length: int = Field(256, ge=1, description="tokens of a text, without special ids")
    context_length: int = Field(
        256, ge=1, description="tokens of a language-model row, or of a question with a window of its passage"
    )
    window_overlap: int = Field(64, ge=0, description="question answering: tokens that neighbouring windows share")
    over_length: Literal["error", "drop"] = Field("error", description="training examples over the limits")
    packing: bool = Field(True, description="language models: several documents in one row, with boundaries")
    labels: list[str] | None = Field(
        None, description="classes in the order of their ids; None: from the training data"
    )


class TokenizerConfig(Section):
    """Trained in the same command, or brought along with kind: file; a probe has its own, kind: task."""

    kind: Literal["bpe", "unigram", "byte", "character", "word", "file", "task"] = "bpe"
    vocab_size: int = Field(8000, ge=8)
    path: str | None = Field(None, description="a tokenizer.json or a SentencePiece .model")
    pretokenized: bool = Field(False, description="text is already tokenised: words are split at spaces only")


class TrainingConfig(Section):
    """The loop. At least one of steps, max_tokens, max_seconds ends it."""

    steps: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="scored target tokens over the whole run")
    max_seconds: float | None = Field(None, gt=0, description="seconds of training, summed over resumes")
    batch_tokens: int = Field(4096, ge=1, description="padded tokens of one micro-batch, source and target counted")
    accumulate: int = Field(1, ge=1, description="micro-batches of one optimizer step, over all processes")
    learning_rate: float = Field(1e-3, gt=0, description="peak; for noam the factor, 1.0 in the paper")
    schedule: Literal["noam", "inverse-sqrt", "cosine", "warmup-stable-decay", "constant"] = "inverse-sqrt"
    warmup_steps: int = Field(400, ge=0)
    decay_fraction: float = Field(0.2, ge=0, le=1, description="warmup-stable-decay: last part of the steps")
    final_ratio: float = Field(0.1, ge=0, le=1, description="cosine, warmup-stable-decay: last rate over peak")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    epsilon: float = Field(1e-9, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float | None = Field(1.0, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    r_drop: float | None = Field(
        None, gt=0, description="alpha of R-Drop: each row runs twice, and its two predictions are drawn together"
    )
    subword_dropout: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of BPE merges left out of the training text, drawn anew for each copy of it",
    )
    subword_copies: int = Field(8, ge=1, description="of the training text, with subword_dropout; epochs take turns")
    mask_fraction: float = Field(0.15, gt=0, lt=1, description="masked language model: text tokens that are predicted")
    masking: Literal["bert", "all"] = Field(
        "bert", description="of these, 80 % become the mask, 10 % another token, 10 % stay; or all become the mask"
    )
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the exponential moving average")
    average_last: int = Field(1, ge=1, description="checkpoints averaged into the final model, and so kept")
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    backend: Literal["auto", "plain", "fla"] = Field("auto", description="who runs the operators")
    checkpoint_every: int = Field(500, ge=1, description="steps")
    keep_checkpoints: int = Field(3, ge=1)
    validate_every: int | None = Field(None, ge=1, description="steps; None: at every checkpoint")
    validate_tokens: int | None = Field(
        None, ge=1, description="of each validation, a fixed sample in whole batches; None: all validation data"
    )
    patience: int | None = Field(None, ge=1, description="validations without a better one before stopping")
    quality: QualityConfig | None = Field(None, description="None: the best checkpoint is that of the lowest loss")
    target_accuracy: float | None = Field(None, gt=0, le=1, description="probes: validation accuracy that ends the run")
    log_every: int = Field(20, ge=1, description="steps")
    tensorboard: Literal["auto", "on", "off"] = Field("auto", description="auto: where the package is installed")

    @property
    def forward_passes(self) -> int:
        """How often a step runs each of its rows."""
        return 1 if self.r_drop is None else 2


class DecodingConfig(Section):
    """How text is produced."""

    method: Literal["greedy", "beam", "sample"] = "beam"
    beam_size: int = Field(4, ge=1)
    length_penalty: float = Field(0.6, description="alpha of ((5 + length) / 6) ** alpha")
    coverage_penalty: float = Field(0.0, ge=0, description="beam: beta of GNMT's penalty for source left unattended")
    beam_groups: int = Field(1, ge=1, description="beam: groups of a diverse beam; the beam is divided among them")
    diversity_penalty: float = Field(0.5, ge=0, description="beam groups: for a token that an earlier group chose")
    n_best: int = Field(1, ge=1, description="outputs an input: of the beam, or independent samples")
    max_length: int | None = Field(
        None, ge=1, description="new tokens; None: max_ratio * source + max_extra; of an answer's span, None: 30"
    )
    max_ratio: float = Field(1.0, ge=0, description="of the source's tokens (a language model's: of the prompt's)")
    max_extra: int = Field(50, ge=0)
    no_repeat_ngram: int | None = Field(None, ge=1, description="no n-gram of this many tokens twice in an output")
    banned: list[int] = Field(default_factory=list, description="ids of tokens that no output holds")
    unknown: Literal["keep", "ban", "replace"] = Field(
        "keep", description="the unknown token in outputs; replace: by the source token it is aligned with"
    )
    mbr: int | None = Field(None, ge=2, description="candidates of which the one with the best expected chrF is chosen")
    alignments: Literal["words", "tokens"] | None = Field(None, description="links from source to output")
    alignment_layer: int | None = Field(None, ge=1, description="of the decoder, from 1; None: the last but one")
    alignment_head: int | None = Field(None, ge=1, description="from 1; None: the mean over all heads")
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = Field(None, ge=1, description="sampling: only the k likeliest tokens")
    top_p: float | None = Field(None, gt=0, le=1, description="sampling: the fewest tokens with this probability")
    seed: int = Field(0, description="of sampling; draws depend on it, the input's number and the position alone")
    batch_tokens: int = Field(4096, ge=1, description="padded input tokens decoded together, once per hypothesis")


class RunConfig(Section):
    """One model: everything that `trilemma train` needs, and all that a run's config.yaml holds."""

    version: int = CONFIG_VERSION
    name: str = "run"
    seed: int = Field(1, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    training: TrainingConfig = TrainingConfig()
    decoding: DecodingConfig = DecodingConfig()
    start_from: str | None = Field(None, description="a run whose architecture, tokenizer and weights this one takes")
    notes: dict[str, str] = Field(default_factory=dict, description="automatic choices and their reasons")


ConfigType = TypeVar("ConfigType", bound=Section)


def parse(
    cls: type[ConfigType], values: dict[str, Any], where: str = "config", origin: Origin | None = None
) -> ConfigType:
    """Validates `values` as a section of type `cls`; one `ConfigError` lists every mistake.

    Args:
        cls: RunConfig, `trilemma.study.StudyConfig`, or a section of them.
        values: nested mappings.
        where: what the messages name as the place.
        origin: names file and line, or override, instead.
    """
    version = values.get("version", CONFIG_VERSION)
    if isinstance(version, int) and version > CONFIG_VERSION:
        raise ConfigError(f"{where}: version {version} is newer than this trilemma ({CONFIG_VERSION}); upgrade")
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        found = _mistakes(cls, error, values)
        lines = [f"{where if origin is None else origin.of(location)}: {text}" for location, text in found]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """A run's configuration from YAML and overrides.

    Raises:
        ConfigError: unknown key (nearest named), wrong type, missing or unreadable file.
    """
    return load_as(RunConfig, path, overrides or [])


def load_as(cls: type[ConfigType], path: str | Path, overrides: list[str]) -> ConfigType:
    """A configuration of any kind from YAML and overrides; errors as in `load_config`."""
    values = apply_overrides(read_yaml(path), overrides)
    if cls is RunConfig and "candidates" in values:
        raise ConfigError(f"{path}: this is a study, not one model; run it with: trilemma compare {path} --out DIR")
    return parse(cls, values, str(path), Origin(path, overrides))


def dump(config: Section) -> str:
    """YAML that `parse` reads back to an equal value."""
    return yaml_text(config.model_dump(mode="json"))


# What the members of a union say when a value is of another kind: told once, together.
_KINDS = {"string_type": "text", "dict_type": "a mapping", "model_type": "a mapping", "list_type": "a list"}


def _mistakes(cls: type[Section], error: ValidationError, values: dict[str, Any]) -> list[tuple[Location, str]]:
    """Where each mistake stands, and what it is; the members of a union speak with one voice."""
    told: dict[tuple[str | int, ...], list[tuple[Location, Details]]] = {}
    for details in error.errors():
        location, root = _real_location(details, values)
        told.setdefault(tuple(root), []).append((location, details))
    mistakes = []
    for items in told.values():
        precise = [pair for pair in items if pair[1]["type"] not in _KINDS]
        if precise or len(items) == 1:
            mistakes += [(location, _sentence(cls, location, item)) for location, item in precise or items]
        else:
            location, item = items[0]
            kinds = list(dict.fromkeys(_KINDS[other["type"]] for _, other in items))
            wanted = ", ".join(kinds[:-1]) + f" or {kinds[-1]}" if len(kinds) > 1 else kinds[0]
            mistakes.append((location, f"{_path(location)}: {wanted} is needed, found {_shown(item)}"))
    return mistakes


def _real_location(item: Details, values: Any) -> tuple[Location, Location]:
    """The location without pydantic's names for the members of unions, and what of it lies before the first such."""
    location: Location = []
    root: Location | None = None
    for part in item["loc"]:
        index = isinstance(values, list) and isinstance(part, int)
        if index or (isinstance(values, dict) and part in values):
            values = values[part]
            location.append(part)
        elif root is None:
            root = list(location)
    if item["type"] == "missing":  # the key that is not there is the mistake
        return [*location, item["loc"][-1]], root if root is not None and len(root) < len(location) else location
    return location, location if root is None else root


def _sentence(cls: type[Section], location: Location, item: Details) -> str:
    path, kind = _path(location), item["type"]
    if kind == "extra_forbidden":
        return f'unknown key "{path}"{nearest(str(location[-1]), _keys_at(cls, location[:-1]))}'
    if kind == "missing":
        return f'the key "{path}" is missing'
    if kind == "value_error":
        return f"{path}: {item['ctx']['error']}"
    text = f"{path}: a mapping is needed" if kind == "model_type" else f"{path}: {item['msg']}"
    close = ""
    if kind == "literal_error" and isinstance(item["input"], str):
        close = nearest(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    return f"{text}, found {_shown(item)}{close if 'did you mean' in close else ''}"


def _path(location: Location) -> str:
    return ".".join(str(part) for part in location) or "value"


def _shown(item: Details) -> str:
    return repr(item["input"])[:80]


def _keys_at(cls: type[BaseModel], location: Location) -> list[str]:
    """Valid keys of the section that `location` leads to."""
    for part in location:
        field = cls.model_fields.get(str(part))
        if field is None:
            continue  # an index
        child = _section_in(field.annotation)
        if child is None:
            return []
        cls = child
    return list(cls.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_in(inner)
        if found is not None:
            return found
    return None
