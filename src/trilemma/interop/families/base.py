"""What a family of models declares: how its config.json and its weights correspond to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from trilemma.config import ModelConfig, RunConfig
from trilemma.errors import CapabilityError, ConfigError
from trilemma.interop.keys import Keys
from trilemma.interop.weights import Rule, Weight
from trilemma.mixers.attention import Attention
from trilemma.mixers.cross_attention import CrossAttention
from trilemma.models import SequenceModel
from trilemma.runs.tensors import model_tensors

Task = Literal["seq2seq", "language-model", "classification", "masked-language-model"]


@dataclass(frozen=True)
class Blueprint:
    """What a config.json comes to.

    Attributes:
        model: the architecture.
        task: what the run will be for.
        rules: the map of weights.
        prefix, endings: as for `Renamed`.
        labels: class names of a classifier.
        begins: every text begins with the beginning's id, on either side.
        notes: what the user should know.
    """

    model: ModelConfig
    task: Task
    rules: list[Rule]
    prefix: str = ""
    endings: Mapping[str, str] = field(default_factory=dict)
    labels: list[str] | None = None
    begins: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Family:
    """A family of architectures.

    Attributes:
        name: of the family.
        model_types: values of `model_type` in config.json that it reads.
        read: a config.json to a blueprint; refuses by name what cannot be honoured.
        write: a model of ours to the config.json that describes it; `CapabilityError` names the setting that the family
            lacks. `read` of it gives the same architecture.
        tensors: a model's tensors as an import would make them.
    """

    name: str
    model_types: tuple[str, ...]
    read: Callable[[Keys], Blueprint]
    write: Callable[[SequenceModel, RunConfig], dict[str, Any]]
    tensors: Callable[[SequenceModel], dict[str, Tensor]] = model_tensors


# Names of activations in config.json files.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "silu": "silu",
    "swish": "silu",
}
GATED_ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_new": "geglu-tanh",
    "gelu_pytorch_tanh": "geglu-tanh",
}


def decoder_rules(model: ModelConfig, base: str = "model", centred: bool = False) -> list[Rule]:
    """The map of what the decoders built like Llama have in common: all but their mixers, without the mlp's biases.

    Args:
        model: the architecture.
        base: what their names begin with.
        centred: the norms' weights are stored less 1.
    """
    width, offset = model.d_ff or 0, 1.0 if centred else 0.0
    tied = ("lm_head.weight",) if model.tie_embeddings else ()
    rules: list[Rule] = [
        Weight("embedding.tokens.weight", f"{base}.embed_tokens.weight", aliases=tied),
        Weight("stack.norm.weight", f"{base}.norm.weight", offset=offset),
    ]
    if not model.tie_embeddings:
        rules.append(Weight("output.weight", "lm_head.weight"))
    for i in range(model.num_layers):
        ours, theirs = f"stack.blocks.{i}.parts", f"{base}.layers.{i}"
        gate_up = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
        rules += [
            Weight(f"{ours}.0.norm.weight", f"{theirs}.input_layernorm.weight", offset=offset),
            Weight(f"{ours}.1.norm.weight", f"{theirs}.post_attention_layernorm.weight", offset=offset),
            Weight(f"{ours}.1.part.up.weight", gate_up, sizes=(width, width)),
            Weight(f"{ours}.1.part.down.weight", f"{theirs}.mlp.down_proj.weight"),
        ]
    return rules


def check_layer_types(keys: Keys, types: Sequence[object], layers: int, *known: str) -> None:
    """Refuses `layer_types` of which there is not one for each layer, or one is not known."""
    unknown = [kind for kind in types if kind not in known]
    if unknown or len(types) != layers:
        shown = f'"{unknown[0]}"' if unknown else f"{len(types)} entries for {layers} layers"
        raise ConfigError(f"{keys.where}: layer_types: {shown} cannot be honoured")


def named(choices: Mapping[str, str], ours: str, family: str) -> str:
    """The name that a choice of ours has there; the first that means it.

    Raises:
        CapabilityError: the family has no such choice.
    """
    for theirs, meaning in choices.items():
        if meaning == ours:
            return theirs
    raise CapabilityError(f"{family}: there is no {ours}; it has {', '.join(dict.fromkeys(choices.values()))}")


def require(config: ModelConfig, family: str, **wanted: object) -> None:
    """Refuses a model of ours whose settings the family lacks.

    Raises:
        CapabilityError: names the first setting that does not fit, its value and what is needed.
    """
    for name, value in wanted.items():
        found = getattr(config, name)
        if found != value:
            raise CapabilityError(f"{family}: model.{name} is {found!r}, needed {value!r}")


def plain_attention(model: SequenceModel, family: str) -> None:
    """Refuses a model with any mixer but whole, unplaced attention with biases, as in the Transformer of 2017.

    Raises:
        CapabilityError: names the mixer.
    """
    width = model.config.d_model
    for mixer in model.mixers():
        usual = isinstance(mixer, (Attention, CrossAttention))
        if isinstance(mixer, (Attention, CrossAttention)):
            heads = mixer.num_heads == mixer.num_kv_heads == model.config.num_heads
            usual = heads and mixer.num_heads * mixer.head_dim == width and mixer.out.bias is not None
            usual = usual and mixer.scale is None
        if isinstance(mixer, Attention):
            usual = usual and mixer.position == "none" and mixer.window is None and mixer.query_norm is None
            usual = usual and not mixer.gate_width
        if not usual:
            raise CapabilityError(
                f"{family}: every mixer must be attention with model.num_heads whole heads and biases, without window, "
                f"rotations or scale of its own; found {mixer.name}"
            )
