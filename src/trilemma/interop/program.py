"""One decoding step of a model as a function of tensors alone: what torch-export and ONNX write down.

    logits, state = step(tokens, state)              # decoder-only
    memory = encoder(source, source_lengths)         # encoder-decoder
    logits, state = step(tokens, state, memory)

`state` and `memory` are dictionaries of tensors by the dotted names of our State; axis 0 of each is the sequence. What
our States know in Python, the bound of a cache, is fixed: a cache has static room and is read whole, masked by its
lengths.

Legend: B rows, S source length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.config import RunConfig
from trilemma.errors import CapabilityError, ConfigError, LawError
from trilemma.interop.target import ExportOptions, tokenizer_file
from trilemma.mixers.cross_attention import Memory
from trilemma.models import ModelState, SequenceModel
from trilemma.models.layouts import EncoderDecoder
from trilemma.nn.cache import KVCache
from trilemma.nn.embedding import PositionState
from trilemma.runs.load import LoadedRun
from trilemma.state import State

Tensors = dict[str, Tensor]

# Largest difference of logits from ours, of the largest logit: rounding in another order of operations.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_CHECKED_STEPS = 4


@dataclass(frozen=True)
class Sizes:
    """Static sizes of the programs.

    Attributes:
        rows: B, or None for any. context: tokens that growing States hold; None: nothing in the model grows.
        source: S, or None for a model without an encoder.
    """

    rows: int | None
    context: int | None
    source: int | None


class Step(nn.Module):
    """One token for each row."""

    def __init__(self, model: SequenceModel, template: ModelState, memory_names: frozenset[str]) -> None:
        super().__init__()
        self.model, self.template = model, template
        self.state_names = [name for name in template.tensors() if name not in memory_names]

    def forward(self, tokens: Tensor, state: Tensors, memory: Tensors | None = None) -> tuple[Tensor, Tensors]:
        """tokens [B, 1] -> logits [B, V], and the State after them."""
        logits, after = self.model.step(tokens, _filled(self.template, {**state, **(memory or {})}))
        tensors = after.tensors()
        return logits[:, -1], {name: tensors[name] for name in self.state_names}


class Encoder(nn.Module):
    """Keys and values of a source, for every layer that reads it."""

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, source_lengths: Tensor) -> Tensors:
        """source [B, S], source_lengths [B] -> the memory."""
        encoded = self.model.encode(source, source_lengths)
        tensors = self.model.stack.memories(encoded, source_lengths).tensors()
        return {f"layers.{name}": tensor for name, tensor in tensors.items() if not name.endswith(_SOURCE_INDEX)}


_SOURCE_INDEX = ".source"  # which memory a row reads: here always its own


@dataclass(frozen=True)
class Programs:
    """Everything that a writer needs.

    Attributes:
        step, encoder: what to trace; no encoder for decoder-only models.
        step_inputs, encoder_inputs: examples, of two rows where any number is allowed.
        start: the State before the first token, of one row.
        sizes: what is static.
    """

    step: Step
    encoder: Encoder | None
    step_inputs: tuple[Any, ...]
    encoder_inputs: tuple[Tensor, Tensor] | None
    start: Tensors
    sizes: Sizes


def make_programs(run: LoadedRun, options: ExportOptions) -> Programs:
    """The functions of a run's model, with example inputs.

    Raises:
        CapabilityError: an encoder-only model, one that reads a prefix, a State that keeps books in Python, a tokenizer
            of several files.
        ConfigError: a size beyond the model's positions, or one that this model does not have.
    """
    model, config = run.model, run.config
    if config.model.layout == "encoder-only":
        raise CapabilityError("an encoder-only model has no decoding step to export")
    if config.model.prefix:
        raise CapabilityError("model.prefix: the prompt is read whole, in both directions; a step reads one token")
    tokenizer_file(run.tokenizer)  # refused now, not after minutes of tracing
    model.requires_grad_(False)  # with autograd on but nothing to differentiate, no State is written in place
    sizes = _sizes(run, options)
    rows = sizes.rows or 2
    template = _empty(model, rows, sizes)
    memory: Tensors = {}
    encoder, encoder_inputs = None, None
    if isinstance(model, EncoderDecoder) and sizes.source is not None:
        encoder = Encoder(model)
        encoder_inputs = _source(rows, sizes.source)
        memory = encoder(*encoder_inputs)
    every = frozenset(template.tensors())
    read_only = frozenset(name for name in every if name in memory or name.endswith(_SOURCE_INDEX))
    step = Step(model, template, read_only)
    state = {name: template.tensors()[name] for name in step.state_names}
    tokens = torch.zeros(rows, 1, dtype=torch.int64)
    _check_books(model, template, tokens)
    start = _empty(model, 1, sizes).tensors()
    inputs = (tokens, state, memory) if memory else (tokens, state)
    return Programs(step, encoder, inputs, encoder_inputs, {name: start[name] for name in step.state_names}, sizes)


def default_context(config: RunConfig) -> int:
    """Tokens that the longest training example puts into the decoder's State."""
    data, special = config.data, 2  # bos, and the separator of a decoder-only model or the end of a text
    if data.task == "language-model":
        return data.context_length
    if config.model.layout == "encoder-decoder":
        return data.max_target_length + special
    return data.max_source_length + data.max_target_length + special


def _sizes(run: LoadedRun, options: ExportOptions) -> Sizes:
    config, positions = run.config, run.config.model.max_length
    encoder = config.model.layout == "encoder-decoder"
    if options.source_length is not None and not encoder:
        raise ConfigError("--source-length: this model has no encoder")
    limit = positions or 1 << 40
    context = options.context or min(default_context(config), limit)
    source = (options.source_length or min(config.data.max_source_length + 1, limit)) if encoder else None
    for name, value in (("--context", context), ("--source-length", source)):
        if value is not None and value > limit:
            raise ConfigError(f"{name} {value}: the model has positions for {positions} tokens only (model.max_length)")
    sizes = Sizes(options.rows, context, source)
    shapes, wider = (
        [tensor.shape for tensor in _empty(run.model, 1, replace(sizes, context=room)).tensors().values()]
        for room in (context, 2 * context + 64)
    )
    if shapes != wider:
        return sizes
    if options.context is not None:
        raise ConfigError("--context: the model's State has a constant size; it holds any number of tokens")
    return replace(sizes, context=None)


def _source(rows: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, length, dtype=torch.int64), torch.full((rows,), length)


def _empty(model: SequenceModel, rows: int, sizes: Sizes) -> ModelState:
    """A State without tokens, whose numbers hold at every step."""
    source, lengths = (None, None) if sizes.source is None else _source(rows, sizes.source)
    state: ModelState = _steady(model.begin(rows, source=source, source_lengths=lengths, capacity=sizes.context))
    return state


def _steady(state: Any) -> Any:
    """The State with bounds in Python that stay true: caches are read whole, up to their lengths in tensors."""
    if isinstance(state, tuple):
        return tuple(_steady(item) for item in state)
    if not isinstance(state, State):
        return state
    if isinstance(state, KVCache):
        return replace(state, bound=max(state.keys.shape[2] - 1, 0), uniform=False)
    if isinstance(state, PositionState):
        return replace(state, bound=0)
    if isinstance(state, Memory):
        assert isinstance(state.cache, KVCache), "a run is exported as it was trained"
        return replace(state, cache=replace(state.cache, bound=state.cache.capacity, uniform=False))
    return replace(state, **{item.name: _steady(getattr(state, item.name)) for item in fields(state)})


def _filled(state: State, tensors: Tensors, prefix: str = "") -> Any:
    """`state` with the tensors of these names, others as they are."""

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return tensors.get(name, value)
        if isinstance(value, State):
            return _filled(value, tensors, f"{name}.")
        if isinstance(value, tuple):
            return tuple(convert(f"{name}.{index}", item) for index, item in enumerate(value))
        return value

    found = {item.name: convert(f"{prefix}{item.name}", getattr(state, item.name)) for item in fields(state)}
    return replace(state, **found)


def _check_books(model: SequenceModel, template: ModelState, tokens: Tensor) -> None:
    """A program holds tensors only: a number that a step changes in Python would be frozen in it."""
    _, after = model.step(tokens, template)
    before, numbers = template.numbers(), _steady(after).numbers()
    changed = [name for name in before if before[name] != numbers.get(name)]
    if changed:
        raise CapabilityError(f"the State counts in Python, which a program cannot: {', '.join(changed)}")


@torch.no_grad()
def largest_difference(programs: Programs, step: Any, encoder: Any) -> float:
    """Runs written programs beside the model and compares logits.

    Args:
        step, encoder: callables with the arguments of `Step` and `Encoder`.

    Returns:
        the largest difference of a logit, as a share of the largest logit.

    Raises:
        LawError: it is more than rounding.
    """
    model, sizes = programs.step.model, programs.sizes
    rows = sizes.rows or 3
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size or 1
    count = min(_CHECKED_STEPS, sizes.context or _CHECKED_STEPS, model.config.max_length or _CHECKED_STEPS)
    tokens = torch.randint(0, vocabulary, (rows, count), generator=generator)
    source, lengths, memory = None, None, []
    if sizes.source is not None:
        lengths = torch.randint(1, sizes.source + 1, (rows,), generator=generator)
        source = torch.randint(0, vocabulary, (rows, sizes.source), generator=generator)
        memory.append(encoder(source, lengths))
    state = {name: tensor.repeat(rows, *[1] * (tensor.ndim - 1)) for name, tensor in programs.start.items()}
    own, error, scale = model.begin(rows, source=source, source_lengths=lengths), 0.0, 0.0
    for token in tokens.split(1, dim=1):
        wanted, own = model.step(token, own)
        logits, state = step(token, state, *memory)
        error = max(error, float((logits - wanted[:, -1]).abs().max()))
        scale = max(scale, float(wanted.abs().max()))
    share = error / max(scale, 1e-30)
    if not share <= TOLERANCE[wanted.dtype]:
        raise LawError(f"the exported program gives other logits than the model: they differ by {share:.1e}")
    return share
