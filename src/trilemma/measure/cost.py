"""What a model costs: decoding by context and batch, and a training step, beside what this machine can reach.

Inputs are random tokens, never zeros; everything runs once to warm up, is repeated, and medians are reported. Contexts
that a model cannot read are reported with the reason, not measured and not left out.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trilemma.errors import CapabilityError, ConfigError, LengthError
from trilemma.machine import Ceilings, ceilings, synchronize
from trilemma.measure.memory import PeakMemory
from trilemma.models import ModelState, SequenceModel, pack, path_of, products
from trilemma.ops import backends

# Random tokens are drawn above the special ids (pad 0 ... mask 5), so that nothing ends early or is masked.
_FIRST_ORDINARY = 6
_BOS = 1

# How torch says, on a CPU, that memory is short: no error of its own.
_NO_MEMORY = "can't allocate memory"

# Below both of these fractions neither memory nor arithmetic explains the time: what is left is the cost of calls.
_OVERHEAD_BOUND = 0.2


@dataclass(frozen=True)
class DecodeCost:
    """One cell of the cost table: `batch` rows that have read `context` tokens each. Times in ms, sizes in bytes.

    Attributes:
        path: how it was executed: form, device and type, such as "plain/cpu/float32".
        context: tokens read before the measured steps; for an encoder-decoder the source is counted in.
        source_length: the part of `context` that the encoder read; 0 without an encoder.
        reason: why nothing was measured; empty if it was.
        prefill_ms: reading the context.
        first_token_ms: reading the context and choosing the first token.
        ms_per_token: median time of one step of the whole batch.
        tokens_per_second: new tokens of all rows (an encoder: tokens read).
        state_bytes: payload that the State holds for all rows; `capacity_bytes`: that it reserves.
        peak_memory_bytes: growth of memory over its level before, weights not counted.
        step_bytes: weights and State that one step reads. step_flops: its arithmetic.
        bandwidth_fraction: step_bytes per second over this machine's measured bandwidth at that footprint.
        compute_fraction: step_flops per second over its measured matrix-product rate.
        bound: what explains the time: "memory", "compute", or "overhead" where neither does.
        repeats: timed repeats; fewer than asked where one took too long.
    """

    path: str
    context: int
    batch: int
    source_length: int = 0
    reason: str = ""
    prefill_ms: float | None = None
    first_token_ms: float | None = None
    ms_per_token: float | None = None
    tokens_per_second: float | None = None
    state_bytes: int | None = None
    capacity_bytes: int | None = None
    peak_memory_bytes: int | None = None
    step_bytes: int | None = None
    step_flops: int | None = None
    bandwidth_fraction: float | None = None
    compute_fraction: float | None = None
    bound: str | None = None
    repeats: int = 0


def measure_decode(
    model: SequenceModel,
    contexts: Sequence[int],
    batch_sizes: Sequence[int] = (1,),
    *,
    new_tokens: int = 16,
    repeats: int = 5,
    dtype: torch.dtype | None = None,
    source_length: int | None = None,
    max_seconds: float = 20.0,
    seed: int = 0,
    limits: Ceilings | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Decoding cost at each context and batch size.

    Args:
        model: on the device to be measured; it is left as it was.
        contexts: tokens read before the measured steps. An encoder-decoder reads half of them as source, unless
            `source_length` says how many. An encoder is measured on one reading; it has no steps.
        batch_sizes: rows decoded together.
        new_tokens: steps timed in each repeat.
        repeats: medians are taken over these.
        dtype: of the copy that is measured; None: the weights' own.
        source_length: tokens of source, at most the context less one.
        max_seconds: for each cell about; a cell that takes longer is repeated less often, and says so.
        seed: of the random tokens.
        limits: this machine's ceilings; None: `machine.ceilings`.
        on_row: called with each row as soon as it is measured.

    Returns:
        One dictionary for each cell with the fields of `DecodeCost`, in the order contexts, batch sizes.

    Raises:
        ConfigError: a context or batch size below 1.
        CapabilityError: another `dtype` for coded or packed weights.
    """
    if min([*contexts, *batch_sizes, new_tokens, repeats], default=0) < 1:
        raise ConfigError("contexts, batch sizes, new tokens and repeats are numbers of at least 1")
    subject = _prepared(model, dtype)
    bench = _Bench(subject, new_tokens, repeats, max_seconds, seed, limits)
    rows = []
    for context in contexts:
        for batch in batch_sizes:
            row = asdict(bench.cell(context, batch, source_length))
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return rows


def measure_training(
    model: SequenceModel,
    *,
    batch: int = 8,
    length: int = 256,
    source_length: int = 0,
    precision: str | None = None,
    repeats: int = 5,
    seed: int = 0,
    limits: Ceilings | None = None,
) -> dict[str, Any]:
    """One training step (forward, backward, AdamW) on random tokens, on a copy of the model.

    Args:
        model: on the device to be measured; it is left as it was.
        batch: rows. length: tokens of each row (the target's, with an encoder). source_length: 0: `length`.
        precision: "float32" or "float64", the type of the copy's weights; "bfloat16": autocast; None: the weights' own.

    Returns:
        step_ms (median), tokens_per_second (target tokens), flops (3 x forward), compute_fraction, peak_memory_bytes
        (growth), path, batch, length, source_length, repeats.

    Raises:
        CapabilityError: weights that cannot be trained.
    """
    check_trainable(model)
    own = str(model.dtype).removeprefix("torch.")
    precision = precision or own
    subject = copy.deepcopy(model).train()
    if precision != "bfloat16":
        subject = subject.to(getattr(torch, precision))
    device = subject.device
    source_length = (source_length or length) if subject.layout == "encoder-decoder" else 0
    inputs = _random_tokens(subject, batch, length, seed)
    source = _random_tokens(subject, batch, source_length, seed + 1) if source_length else None
    labels = _random_labels(subject, inputs, seed + 2)
    optimizer = torch.optim.AdamW(subject.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            logits = subject.head(subject(inputs, source=source))
        nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten()).backward()
        optimizer.step()

    with torch.enable_grad(), PeakMemory(device) as memory:
        step()
        seconds = statistics.median(_seconds(step, device) for _ in range(repeats))
    flops = 3 * batch * subject.flops(length, source_length)
    weights = subject.dtype
    ceiling = (limits or ceilings(device.type)).matmul_gflops(torch.bfloat16 if precision == "bfloat16" else weights)
    return {
        "path": f"{backends.path()}/{device.type}/{precision}",
        "batch": batch,
        "length": length,
        "source_length": source_length,
        "step_ms": seconds * 1e3,
        "tokens_per_second": batch * length / seconds,
        "flops": flops,
        "compute_fraction": flops / seconds / (ceiling * 1e9),
        "peak_memory_bytes": memory.growth_bytes,
        "repeats": repeats,
    }


def check_trainable(model: SequenceModel) -> None:
    """Raises `CapabilityError` for coded or packed weights."""
    if products(model) != str(model.dtype).removeprefix("torch."):
        raise CapabilityError(f"the weights are {products(model)}, for inference only: their training has no cost")


def parameter_bytes_read(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of weights that `run` reads, each tensor counted once and rows that are looked up not at all.

    Counted from the operations that are executed, so that an encoder whose output is already known, or an embedding
    that is only looked up, costs a step nothing.
    """
    reads = _ParameterReads(model)
    with torch.no_grad(), reads:
        run()
    return sum(reads.found.values())


class _ParameterReads(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        TorchDispatchMode.__init__(self)
        self._sizes = {_place(parameter): parameter.nbytes for parameter in model.parameters()}
        self.found: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # a view or a look-up moves no weight
        if not func.is_view and func.overloadpacket is not torch.ops.aten.embedding:
            for argument in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(argument, Tensor):
                    address = _place(argument)
                    if address in self._sizes:
                        self.found[address] = self._sizes[address]
        return func(*args, **(kwargs or {}))


def _place(tensor: Tensor) -> int:
    """What tells memory apart; packed weights do not show theirs."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class _Bench:
    """The measuring of one model; `cell` is one row of the table."""

    def __init__(
        self,
        model: SequenceModel,
        new_tokens: int,
        repeats: int,
        max_seconds: float,
        seed: int,
        limits: Ceilings | None,
    ) -> None:
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.new_tokens, self.repeats, self.max_seconds, self.seed = new_tokens, repeats, max_seconds, seed
        self.limits = limits or ceilings(self.device.type)
        self.path = path_of(model)
        self.has_encoder = model.layout == "encoder-decoder"

    def cell(self, context: int, batch: int, source_length: int | None) -> DecodeCost:
        source = min(context - 1, context // 2 if source_length is None else source_length) if self.has_encoder else 0
        if self.has_encoder and source < 1:
            return DecodeCost(self.path, context, batch, reason="an encoder-decoder needs a context of 2 or more")
        try:
            with torch.no_grad():
                if self.model.layout == "encoder-only":
                    return self._encoder_cell(context, batch)
                return self._decoder_cell(context, batch, source)
        except (LengthError, CapabilityError) as error:
            return DecodeCost(self.path, context, batch, source, reason=str(error))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if type(error) is RuntimeError and _NO_MEMORY not in str(error):
                raise
            return DecodeCost(self.path, context, batch, source, reason=f"out of memory: {str(error)[:200]}")

    def _encoder_cell(self, context: int, batch: int) -> DecodeCost:
        inputs = _random_tokens(self.model, batch, context, self.seed)

        def read() -> None:
            self.model.head(self.model(inputs))

        with PeakMemory(self.device) as memory:
            times = self._repeat(read)
        seconds = statistics.median(times)
        flops = batch * self.model.flops(context)
        return DecodeCost(
            self.path,
            context,
            batch,
            prefill_ms=seconds * 1e3,
            tokens_per_second=batch * context / seconds,
            state_bytes=0,
            capacity_bytes=0,
            peak_memory_bytes=memory.growth_bytes,
            compute_fraction=flops / seconds / (self.limits.matmul_gflops(self.dtype) * 1e9),
            repeats=len(times),
        )

    def _decoder_cell(self, context: int, batch: int, source: int) -> DecodeCost:
        prompt = _random_tokens(self.model, batch, context - source, self.seed)
        prompt[:, 0] = _BOS
        memory_tokens = _random_tokens(self.model, batch, source, self.seed + 1) if source else None
        steps = _random_tokens(self.model, batch, self.new_tokens + 1, self.seed + 2)
        capacity = context - source + self.new_tokens + 1

        def prefill() -> tuple[Tensor, ModelState]:
            return self.model.prefill(prompt, source=memory_tokens, capacity=capacity)

        def first_token() -> Tensor:
            return prefill()[0].argmax(dim=-1)

        with PeakMemory(self.device) as memory:
            prefills = self._repeat(prefill)
            firsts = [_seconds(first_token, self.device) for _ in prefills]
            _, state = prefill()
            held, reserved = state.nbytes, state.capacity_nbytes
            step_times = self._step_times(steps, state)
        weight_bytes = parameter_bytes_read(self.model, lambda: self.model.step(steps[:, :1], state.clone()))
        step_seconds = statistics.median(step_times)
        row = DecodeCost(
            self.path,
            context,
            batch,
            source_length=source,
            prefill_ms=statistics.median(prefills) * 1e3,
            first_token_ms=statistics.median(firsts) * 1e3,
            ms_per_token=step_seconds * 1e3,
            tokens_per_second=batch / step_seconds,
            state_bytes=held,
            capacity_bytes=reserved,
            peak_memory_bytes=memory.growth_bytes,
            repeats=len(prefills),
        )
        flops = batch * self.model.step_flops(context - source, source)
        return self._with_fractions(row, weight_bytes + held, flops, step_seconds)

    def _step_times(self, tokens: Tensor, state: ModelState) -> list[float]:
        """Medians over the steps of each repeat. Each repeat starts from a copy of the same State."""
        medians = []
        start = time.perf_counter()
        for _ in range(self.repeats):
            current, times = state.clone(), []
            for at in range(tokens.shape[1]):
                synchronize(self.device)
                begin = time.perf_counter()
                _, current = self.model.step(tokens[:, at : at + 1], current)
                synchronize(self.device)
                times.append(time.perf_counter() - begin)
            medians.append(statistics.median(times[1:]))  # the first one warms up
            if time.perf_counter() - start > self.max_seconds / 2:
                break
        return medians

    def _repeat(self, run: Callable[[], object]) -> list[float]:
        """Times after one warm-up; fewer than asked where they would exceed `max_seconds`, at least one."""
        warm_up = _seconds(run, self.device)
        affordable = int(self.max_seconds / 4 / max(warm_up, 1e-9))
        return [_seconds(run, self.device) for _ in range(max(1, min(self.repeats, affordable)))]

    def _with_fractions(self, row: DecodeCost, step_bytes: int, flops: int, seconds: float) -> DecodeCost:
        bandwidth = step_bytes / seconds / (self.limits.bandwidth_gbps(step_bytes) * 1e9)
        compute = flops / seconds / (self.limits.matmul_gflops(self.dtype) * 1e9)
        bound = "memory" if bandwidth >= compute else "compute"
        if max(bandwidth, compute) < _OVERHEAD_BOUND:
            bound = "overhead"
        values = {"step_bytes": step_bytes, "step_flops": flops, "bound": bound}
        return DecodeCost(
            **{**asdict(row), **values, "bandwidth_fraction": bandwidth, "compute_fraction": compute},
        )


def _prepared(model: SequenceModel, dtype: torch.dtype | None) -> SequenceModel:
    """A copy that decodes as `trilemma generate` does: in evaluation mode, and packed where this machine packs.

    A model that is ready for inference may hold weights that cannot be copied: it is taken as it is.
    """
    kind = products(model)
    if dtype not in (None, model.dtype) and ("packed" in kind or "int" in kind):
        raise CapabilityError(f"the weights are {kind}: they cannot be measured as {dtype}")
    if "packed" in kind or kind.endswith("-in-float32"):
        return model.eval()
    return pack(copy.deepcopy(model).to(dtype=dtype).eval())


def _random_tokens(model: SequenceModel, batch: int, length: int, seed: int) -> Tensor:
    device = model.device
    vocab_size = model.config.vocab_size
    assert vocab_size is not None, "a built model knows its vocabulary"
    first = min(_FIRST_ORDINARY, vocab_size - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(first, vocab_size, (batch, length), generator=generator).to(device)


def _random_labels(model: SequenceModel, inputs: Tensor, seed: int) -> Tensor:
    """[batch, length] next tokens or classes of tokens, or [batch] classes."""
    if model.config.num_labels is None:
        return _random_tokens(model, inputs.shape[0], inputs.shape[1], seed)
    generator = torch.Generator().manual_seed(seed)
    shape = inputs.shape if model.config.pooling == "none" else inputs.shape[:1]
    return torch.randint(model.config.num_labels, shape, generator=generator).to(inputs.device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start
