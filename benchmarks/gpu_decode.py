"""One token of a large language model on a GPU: attention with all heads and with eight, against retention.

    python benchmarks/gpu_decode.py                               # everything that is missing
    python benchmarks/gpu_decode.py --only size=6.7b --only batch=1
    python benchmarks/gpu_decode.py --tiny                        # does everything run? On a CPU too

Random weights, drawn in bfloat16 on the GPU. A row reads the context and is copied to the batch; then tokens follow,
each the most likely after the last, without the host waiting in between. Three paths:

    plain        as `model.step` runs from Python
    graph        one CUDA graph for all positions up to the reserved capacity: lengths are read from the State, so that
                 attention reads all that is reserved, masked. A recurrence has no positions in its graph
    graph-here   attention's graph at this position alone, with torch's unmasked kernel: what it would reach with a
                 kernel that reads its length from memory. No decoder could use it for the next token

A graph is timed only after its logits were those of plain steps on the same tokens, within the tolerance of the laws.
The floor is gpu_models.py's `step_bytes` over the bandwidth measured in the same run. Cases are stored one by one and a
second call goes on with the rest: gpu_cases.py.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu_cases import Case, Row, Study, main, release
from gpu_models import SHAPES, decoder, of_bandwidth, parameters, step_bytes
from torch import Tensor

from trilemma.laws.case import TOLERANCE
from trilemma.machine import synchronize
from trilemma.measure.memory import PeakMemory
from trilemma.models import SequenceModel
from trilemma.models.model import ModelState
from trilemma.nn.cache import KVCache
from trilemma.state import State, TupleState

MIXERS = ("attention", "attention-gqa8", "retention")
PATHS = ("plain", "graph", "graph-here")
BLOCKS, STEPS = 3, 16  # timed blocks, and tokens of each
CHECKED, WARM_UP = 4, 3
ROOM = 64  # tokens beyond the context: WARM_UP or CHECKED, and all blocks
assert max(CHECKED, WARM_UP) + BLOCKS * STEPS <= ROOM

# The State of one row that has read the context, and the time that took; of the last model and context.
Read = tuple[ModelState, float]


def cases(tiny: bool) -> list[Case]:
    """Those of one model and context are neighbours: they share it."""
    sizes, contexts, batches = ("1.3b", "6.7b"), (2048, 8192, 32768), (1, 8, 64)
    if tiny:
        sizes, contexts, batches = ("tiny",), (32,), (1, 3)
    return [
        {"size": size, "mixer": mixer, "context": context, "batch": batch, "path": path}
        for size in sizes
        for mixer in MIXERS
        for context in contexts
        for batch in batches
        for path in PATHS
        if mixer.startswith("attention") or path != "graph-here"
    ]


@functools.lru_cache(maxsize=1)
def model_of(size: str, mixer: str, device: str) -> SequenceModel:
    """bfloat16 on a GPU; processors without it are tried in float32."""
    torch.manual_seed(0)
    return decoder(size, mixer, device, torch.bfloat16 if device == "cuda" else torch.float32)


@functools.lru_cache(maxsize=1)
def read(size: str, mixer: str, context: int, device: str) -> Read:
    """One row reads the context twice: the second time counts."""
    model = model_of(size, mixer, device)
    prompt = torch.randint(0, SHAPES[size].vocab_size, (1, context), device=device)
    model.prefill(prompt, capacity=context + ROOM)
    release()
    synchronize(device)
    start = time.perf_counter()
    _, state = model.prefill(prompt, capacity=context + ROOM)
    synchronize(device)
    return state, (time.perf_counter() - start) * 1e3


@torch.no_grad()
def measure(case: Case, device: str) -> Row:
    """One cell on one path."""
    size, mixer, context, rows = (case[name] for name in ("size", "mixer", "context", "batch"))
    model = model_of(size, mixer, device)
    must_fit(model, context, rows, device)
    one, prefill_ms = read(size, mixer, context, device)
    first = torch.randint(0, SHAPES[size].vocab_size, (rows, 1), device=device)
    found: Row = {}
    with PeakMemory(device) as memory:
        if case["path"] == "plain":
            found = {"ms": plain(model, copies(one, rows), first, device), "prefill_ms": prefill_ms}
        else:
            found = graphed(model, one, first, device, here=case["path"] == "graph-here")
    if "ms" in found:
        found["tokens_per_second"] = rows / found["ms"] * 1e3
    return {
        **found,
        **step_bytes(model, context, rows),
        "capacity_bytes": rows * one.capacity_nbytes,
        "peak_memory_bytes": memory.peak_bytes,
        "parameters": parameters(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def must_fit(model: SequenceModel, context: int, rows: int, device: str) -> None:
    """`MemoryError` where weights, one State and those of the batch cannot fit: trying would take long."""
    if device != "cuda":
        return
    held = sum(parameter.nbytes for parameter in model.parameters())
    needed = held + (rows + 1) * model.state_bytes(context + ROOM, dtype=model.dtype)
    there = torch.cuda.get_device_properties(0).total_memory
    if needed > 0.97 * there:
        raise MemoryError(f"weights and State need {needed / 1e9:,.0f} GB, the card has {there / 1e9:,.0f}")


def copies(one: ModelState, rows: int) -> ModelState:
    """The State of `rows` rows that have read the same."""
    return one.select(torch.zeros(rows, dtype=torch.int64, device=one.positions.lengths.device))


def plain(model: SequenceModel, state: ModelState, tokens: Tensor, device: str) -> float:
    """Milliseconds a token."""

    def run() -> None:
        nonlocal state, tokens
        logits, state = model.step(tokens, state)
        tokens = logits[:, -1:].argmax(-1)

    for _ in range(WARM_UP):
        run()
    return median_ms(run, device)


def median_ms(run: Callable[[], None], device: str) -> float:
    """Of the blocks, for one call."""
    times = []
    for _ in range(BLOCKS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(STEPS):
            run()
        synchronize(device)
        times.append((time.perf_counter() - start) / STEPS * 1e3)
    return statistics.median(times)


class FixedStep:
    """Reads a token of each row and chooses the next, all at fixed addresses: what a graph can repeat.

    Args:
        one: the State of a row that has read the context; it stays as it is.
        tokens: [B, 1] the first to be read.
        here: the graph belongs to this position.
    """

    def __init__(self, model: SequenceModel, one: ModelState, tokens: Tensor, here: bool) -> None:
        self._model, self._one, self._first = model, one, tokens
        state = copies(one, len(tokens))
        self._state = state if here else at_any_length(state)
        self.tokens = tokens.clone()
        self.logits = model.head(torch.zeros(len(tokens), model.config.d_model, dtype=model.dtype, device=model.device))

    def run(self) -> None:
        """One token; also what is captured."""
        logits, _ = self._model.step(self.tokens, self._state)
        self.logits.copy_(logits[:, -1])
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))

    def restart(self) -> None:
        """The context again, and the first tokens."""
        known = self._one.tensors()
        for name, tensor in self._state.tensors().items():
            tensor.copy_(known[name].expand_as(tensor))
        self.tokens.copy_(self._first)


def at_any_length(state: Any) -> Any:
    """The same State, whose caches are read up to their reserved capacity, by the lengths in their tensors."""
    if isinstance(state, KVCache):
        return replace(state, uniform=False, bound=state.keys.shape[2] - 1)
    if isinstance(state, TupleState):
        return TupleState(tuple(at_any_length(part) for part in state.parts))
    if isinstance(state, ModelState):
        return replace(state, layers=at_any_length(state.layers))
    assert state is None or isinstance(state, State)
    return state


def graphed(model: SequenceModel, one: ModelState, first: Tensor, device: str, here: bool) -> Row:
    """Captures a step, compares it with plain ones, and times it."""
    wanted = plain_logits(model, copies(one, len(first)), first, 1 if here else CHECKED)
    step = FixedStep(model, one, first, here)
    replay = captured(step.run, device)
    step.restart()
    errors = []
    for tokens, logits in wanted:
        step.tokens.copy_(tokens)
        replay()
        errors.append(float((step.logits - logits).abs().max() / logits.abs().max()))
    error, allowed = max(errors), TOLERANCE[model.dtype]
    if not error <= allowed:
        return {"reason": f"its logits differ by {error:.2g} of the largest, {allowed} is allowed", "error": error}
    if device != "cuda":
        return {"reason": f"no CUDA graphs on {device}; what one would repeat differs by {error:.1e}", "error": error}
    step.restart()
    return {"ms": median_ms(replay, device), "error": error}


def plain_logits(model: SequenceModel, state: ModelState, tokens: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens that were read, and the logits after them."""
    found = []
    for _ in range(count):
        logits, state = model.step(tokens, state)
        found.append((tokens, logits[:, -1]))
        tokens = logits[:, -1:].argmax(-1)
    return found


def captured(run: Callable[[], None], device: str) -> Callable[[], None]:
    """A CUDA graph's replay; elsewhere `run` itself, after the same warm-up."""
    if device != "cuda":
        for _ in range(WARM_UP):
            run()
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| case | ms a token | tokens/s | of the bandwidth | State, MB |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        name = ", ".join(map(str, row["case"].values()))
        if row["reason"]:
            lines.append(f"| {name} | not measured: {row['reason']} | | | |")
            continue
        moved = row["weight_bytes"] + row["state_bytes"]
        share = of_bandwidth(moved, row["ms"], result["runs"][row["run"]]["ceilings"])
        numbers = f"{row['ms']:.3f} | {row['tokens_per_second']:,.0f} | {share:.1%} | {row['state_bytes'] / 1e6:,.1f}"
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


STUDY = Study("gpu_decode", __file__, __doc__, cases, measure, table)

if __name__ == "__main__":
    main(STUDY)
