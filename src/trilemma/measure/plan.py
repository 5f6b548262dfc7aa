"""What a training will cost, before it starts: parameters, FLOPs, memory and time, from formulas.

Parameters, FLOPs and sizes of files are exact for the lengths that are assumed; memory and time hold within the bands
that `docs/plan.md` states and `tests/measure/test_plan.py` measures. Nothing here reads data or allocates weights; of a
probe, a few rows are drawn.

Legend: B rows of a micro-batch, L tokens of a row, S source tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trilemma.config import ModelConfig, RunConfig
from trilemma.data import IGNORE
from trilemma.data.dataset import check_layout
from trilemma.data.generated import DEFAULT_SIZES
from trilemma.data.plan import as_padded, whole_rows
from trilemma.data.probes import Probe
from trilemma.data.probes.prepare import probes_of
from trilemma.data.tokenizer import SPECIALS
from trilemma.errors import ConfigError
from trilemma.measure.cost import measure_training
from trilemma.measure.hardware import Hardware
from trilemma.models import SequenceModel, build_model
from trilemma.runs.tensors import model_tensors

# Tokens of a sentence where nothing says more: about what WMT's sentences have in subwords.
SENTENCE = 25
_DRAWN = 256  # rows of a probe, from which their lengths and labels are estimated
# The loss is computed over chunks of logits of this size (trilemma.train.objective), of which three are held at once:
# logits, their normalised form and their gradient.
_LOGIT_BYTES = {True: 8 << 20, False: 512 << 20}  # on a CPU, on a GPU
# Temporary tensors of one layer, and what the allocator keeps, as a share of the activations. On a CPU 0.5 to 0.8 was
# measured, most of it held by the C library; a GPU's caching allocator wastes less (assumed, not measured).
_WORKSPACE = {True: 0.65, False: 0.25}
_CONTEXTS = (128, 2048)  # for the State's size


@dataclass(frozen=True)
class Rows:
    """The micro-batch that a plan assumes: `rows` rows of `length` tokens, with `source` tokens each for the encoder.

    `targets`: scored tokens of a row.
    """

    rows: int
    length: int
    source: int
    targets: float


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a training step. `total` is what must fit."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """One training, planned. FLOPs count a multiply-add as 2.

    Attributes:
        parameters: total, embedding, non_embedding, and those in matrices (papers seldom count vectors).
        steps: optimizer steps; tokens: scored target tokens of all of them.
        step_flops, flops: model FLOPs of a step and of the run: three times the forward pass, look-ups free.
        machine_flops: `seconds` x devices x peak, as "Attention Is All You Need" counts its Table 2; never model FLOPs.
        fraction: model FLOPs over machine FLOPs. fraction_from: "assumed", "given", "measured" or "step time".
        checkpoint_bytes: weights and optimizer; published_bytes: the weights alone.
        state_bytes: what one sequence keeps at inference (float32), by tokens read; an encoder-decoder's source
            counts half of them. Empty for an encoder.
        step_read_bytes: weights that decoding one token reads.
        token_ms: that and the State after the last of `state_bytes`, over the bandwidth: no step is faster.
        price: of the run, or None.
        assumptions: what the numbers rest on.
    """

    name: str
    hardware: Hardware
    devices: int
    precision: str
    parameters: dict[str, int]
    rows: Rows
    micro_batches: int
    steps: int
    tokens: int
    step_flops: int
    flops: int
    memory: Memory
    step_seconds: float
    seconds: float
    fraction: float
    fraction_from: str
    machine_flops: float
    checkpoint_bytes: int
    published_bytes: int
    state_bytes: dict[int, int]
    step_read_bytes: int
    token_ms: float | None
    price: float | None
    assumptions: list[str]


def plan_training(
    config: RunConfig,
    hardware: Hardware,
    *,
    devices: int = 1,
    length: int | None = None,
    source_length: int | None = None,
    step_seconds: float | None = None,
    price_per_hour: float | None = None,
    fraction_from: str = "assumed",
    flops_budget: float | None = None,
) -> Plan:
    """Plans one run.

    Args:
        config: as loaded; what only data can tell (vocabulary, classes) is assumed, and said.
        devices: micro-batches of a step are dealt over them.
        length, source_length: tokens of a row (with an encoder: of its target) and of its source; None: as assumed.
        step_seconds: a known time of one step, instead of a fraction of peak.
        price_per_hour: of one device.
        flops_budget: FLOPs that end the run, instead of the config's limits (a study's `budget.lock: flops`).

    Raises:
        ConfigError: nothing ends the run, micro-batches cannot be dealt evenly, or a precision the device has not.
    """
    training = config.training
    if training.accumulate % devices:
        raise ConfigError(
            f"training.accumulate: {training.accumulate} micro-batches cannot be dealt evenly over {devices} devices"
        )
    precision = hardware.best_precision if training.precision == "auto" else training.precision
    assumptions: list[str] = []
    resolved = resolved_model(config, assumptions)
    rows = _rows(config, length, source_length, assumptions)
    with torch.device("meta"):
        model = build_model(resolved)
    rows_run = training.accumulate * rows.rows * training.forward_passes
    step_flops = 3 * rows_run * model.flops(rows.length, rows.source)
    peak = hardware.peak(precision) * devices
    fraction = hardware.fractions[precision]
    if step_seconds is None:
        step_seconds = step_flops / (peak * fraction)
        if fraction_from == "assumed":
            assumptions.append(f"training reaches {fraction:g} of the peak of matrix products")
    else:
        fraction, fraction_from = step_flops / (peak * step_seconds), "step time"
    targets = training.accumulate * rows.rows * rows.targets
    steps = _steps(config, targets, step_seconds, step_flops, flops_budget)
    memory = _memory(config, resolved, model, rows, precision, hardware.on_cpu)
    assumptions.append("memory beside the process itself; activations are counted, workspace is estimated")
    states = _state_bytes(model)
    read = _step_read_bytes(model)
    seconds = steps * step_seconds
    return Plan(
        name=config.name,
        hardware=hardware,
        devices=devices,
        precision=precision,
        parameters=_parameters(model),
        rows=rows,
        micro_batches=training.accumulate,
        steps=steps,
        tokens=round(steps * targets),
        step_flops=step_flops,
        flops=steps * step_flops,
        memory=memory,
        step_seconds=step_seconds,
        seconds=seconds,
        fraction=fraction,
        fraction_from=fraction_from,
        machine_flops=seconds * peak,
        checkpoint_bytes=memory.weights + memory.optimizer + memory.average,
        published_bytes=memory.weights,
        state_bytes=states,
        step_read_bytes=read,
        token_ms=(read + max(states.values())) / hardware.bandwidth * 1e3 if states else None,
        price=None if price_per_hour is None else price_per_hour * devices * seconds / 3600,
        assumptions=assumptions,
    )


def measured_here(
    config: RunConfig, hardware: Hardware, device: str, length: int | None = None, source_length: int | None = None
) -> Hardware:
    """`hardware` with the fraction of peak that real steps of one such micro-batch reach on `device`."""
    precision = hardware.best_precision if config.training.precision == "auto" else config.training.precision
    rows = _rows(config, length, source_length, [])
    batch = rows.rows * config.training.forward_passes
    model = build_model(resolved_model(config, [])).to(device)
    if precision == "float64":
        model = model.double()
    found = measure_training(
        model, batch=batch, length=rows.length, source_length=rows.source, precision=precision, repeats=3
    )
    fraction = found["flops"] / (found["step_ms"] / 1e3) / hardware.peak(precision)
    return replace(hardware, fractions={**hardware.fractions, precision: fraction})


def saved_bytes(config: ModelConfig, rows: Rows, precision: str) -> int:
    """Bytes of activations that a forward pass of one micro-batch keeps for the backward pass.

    Counted by running the model on tensors without memory (torch's fake tensors), so for every mixer; tensors that
    share memory count once, the model's own weights not at all.
    """
    held: dict[int, tuple[int, object]] = {}  # the storages are kept: a freed one's address may come again
    with FakeTensorMode(allow_non_fake_inputs=True), _traced():
        model = build_model(config).train()
        if precision == "float64":
            model = model.double()
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                held[storage._cdata] = storage.nbytes(), storage
            return tensor

        inputs = torch.ones(rows.rows, rows.length, dtype=torch.long)
        source = torch.ones(rows.rows, rows.source, dtype=torch.long) if rows.source else None
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            hidden = model(inputs, source=source)  # noqa: F841 - its graph holds what is counted
        return sum(size for size, _ in held.values())


@contextmanager
def _traced() -> Iterator[None]:
    """Says to the code below that it is traced, as torch.export does: tables without memory must not be kept for later
    calls."""
    with mock.patch.object(torch.compiler, "_is_compiling_flag", True):
        yield


def resolved_model(config: RunConfig, assumptions: list[str]) -> ModelConfig:
    """The architecture with the vocabulary and the classes that only data will decide."""
    model = config.model
    changes: dict[str, int] = {}
    if config.data.task == "probe":
        needed = len(SPECIALS) + len(_probes(config)[0].symbols())
        if model.vocab_size is not None and model.vocab_size < needed:
            raise ConfigError(f"model.vocab_size: {model.vocab_size} is below the probe's {needed}; leave it out")
        changes["vocab_size"] = model.vocab_size or needed
    elif model.vocab_size is None:
        kind = config.tokenizer.kind
        changes["vocab_size"] = 262 if kind == "byte" else config.tokenizer.vocab_size
        if kind not in ("byte", "bpe", "unigram"):
            assumptions.append(
                f"{changes['vocab_size']:,} entries of the vocabulary: the data decide it (set model.vocab_size)"
            )
    if config.data.task == "classification" and model.num_labels is None:
        changes["num_labels"] = len(config.data.labels or ("no", "yes"))
        if config.data.labels is None:
            assumptions.append("2 classes: the data decide it (set model.num_labels)")
    if config.data.task == "question-answering":
        changes["num_labels"] = 2  # as its dataset sets it
    return model.model_copy(update=changes)


def _rows(config: RunConfig, length: int | None, source_length: int | None, assumptions: list[str]) -> Rows:
    data, budget = config.data, config.training.batch_tokens
    streamed = data.task in ("language-model", "masked-language-model", "question-answering")
    encoder = config.model.layout == "encoder-decoder"
    if source_length is not None and data.task != "seq2seq":
        raise ConfigError(f"--source-length: rows of task {data.task} have no source")
    if data.task == "probe":
        if length is not None:
            raise ConfigError("--length: a probe's rows are as long as its options say; leave it out")
        return _probe_rows(config, assumptions)
    tokens = length or (data.context_length if streamed else SENTENCE)
    source = (source_length or SENTENCE) if data.task == "seq2seq" else 0
    if tokens + source > budget:
        raise ConfigError(f"training.batch_tokens: {budget} is below one row of {tokens + source} tokens")
    sides = f"{source} source and {tokens} target tokens" if source else f"{tokens} tokens"
    assumptions.append(f"rows of {sides}, no padding (other lengths: --length, --source-length)")
    targets: float = tokens
    if data.task == "masked-language-model":
        targets = config.training.mask_fraction * tokens
    elif data.task in ("classification", "question-answering"):
        targets = 1
    if encoder:
        return Rows(budget // (tokens + source), tokens, source, targets)
    return Rows(budget // (tokens + source), tokens + source, 0, targets)


def _probes(config: RunConfig) -> list[Probe]:
    """The probes that are trained on, checked as `prepare` checks them."""
    data = config.data
    sources = {"train": data.train if isinstance(data.train, list) else [data.train]}
    if not sources["train"]:
        raise ConfigError("data.train: at least one source is needed")
    sources |= {split: [source] for split, source in (("valid", data.valid), ("test", data.test)) if source is not None}
    return probes_of(config, sources)["train"]


def _probe_rows(config: RunConfig, assumptions: list[str]) -> Rows:
    """The mean micro-batch of a probe, from the first rows that training will see. Rows of similar length share one."""
    check_layout(config)
    data, budget = config.data, config.training.batch_tokens
    sources = data.train if isinstance(data.train, list) else [data.train]
    lengths: list[int] = []
    labels: list[int] = []
    shares: list[float] = []
    for source, probe in zip(sources, _probes(config), strict=True):
        size = source.size or DEFAULT_SIZES["train"]
        drawn = list(probe.examples("train", min(size, _DRAWN)))
        lengths += [len(row.tokens) for row in drawn]
        labels += [int((row.labels != IGNORE).sum()) for row in drawn]
        shares += [source.weight * size / len(drawn)] * len(drawn)
    used = np.array(lengths) <= data.max_source_length
    if not used.all() and (data.over_length == "error" or not used.any()):
        raise ConfigError(
            f"data.max_source_length: {data.max_source_length} is below a row of {max(lengths)} tokens: raise it"
        )
    lengths_used, weights = np.array(lengths)[used], np.array(shares)[used]
    padded = as_padded(lengths_used)
    if (longest := int(lengths_used.max())) > budget:
        raise ConfigError(f"training.batch_tokens: {budget} is below one row of {longest} tokens")
    fitting = np.array([max(1, whole_rows(budget // int(size))) for size in padded])
    batches = max(1.0, float((weights / fitting).sum()))  # of an epoch
    tokens = float((weights * padded).sum())
    length = max(1, round(tokens / float(weights.sum())))
    rows = max(1, round(tokens / batches / length))
    targets = float((weights * np.array(labels)[used]).sum()) / batches / rows
    assumptions.append(f"rows of {length} tokens, {targets:.3g} of them scored: the mean of {len(padded):,} rows drawn")
    return Rows(rows, length, 0, targets)


def _steps(config: RunConfig, targets: float, step_seconds: float, step_flops: int, budget: float | None) -> int:
    """Steps until the first limit is reached."""
    training = config.training
    limits = [float(training.steps)] if training.steps is not None else []
    if training.max_tokens is not None:
        limits.append(training.max_tokens / targets)
    if training.max_seconds is not None:
        limits.append(training.max_seconds / step_seconds)
    if budget is not None:
        limits = [budget / step_flops]
    if not limits:
        raise ConfigError("training: nothing ends this run; set training.steps, max_tokens or max_seconds")
    return max(1, round(min(limits)))


def _parameters(model: SequenceModel) -> dict[str, int]:
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim >= 2)
    return {**model.parameter_counts(), "matrices": matrices}


def _memory(
    config: RunConfig, resolved: ModelConfig, model: SequenceModel, rows: Rows, precision: str, on_cpu: bool
) -> Memory:
    scale = 2 if precision == "float64" else 1
    weights = scale * sum(tensor.nbytes for tensor in model_tensors(model).values())
    trained = scale * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    rows = replace(rows, rows=rows.rows * config.training.forward_passes)
    activations = saved_bytes(resolved, rows, precision)
    classes = resolved.num_labels or resolved.vocab_size or 1
    logits = min(round(rows.rows * rows.targets) * classes * 4 * scale, _LOGIT_BYTES[on_cpu])
    return Memory(
        weights=weights,
        gradients=trained,
        optimizer=2 * trained,
        average=weights if config.training.ema is not None else 0,
        activations=activations,
        logits=3 * logits,
        workspace=round(_WORKSPACE[on_cpu] * activations),
    )


def _state_bytes(model: SequenceModel) -> dict[int, int]:
    if model.layout == "encoder-only":
        return {}
    half = model.layout == "encoder-decoder"
    return {
        tokens: model.state_bytes(tokens - tokens // 2, tokens // 2) if half else model.state_bytes(tokens)
        for tokens in _CONTEXTS
    }


def _step_read_bytes(model: SequenceModel) -> int:
    """Float32 weights of the decoder and the output; of an embedding that is only looked up, nothing."""
    head = model.embedding.tokens.weight if model.output is None else model.output.weight
    return head.nbytes + sum(parameter.nbytes for parameter in model.stack.parameters())
