"""What the two benchmarks of training steps share: how a system is trained and timed, and against whom.

A step is: forward, loss, backward, gradient clipping, fused AdamW, gradients dropped, under bf16 autocast over float32
weights, on the same random batch again and again. A system whose loss does not fall is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common import WorkerError, among, duel, options, provenance, run_worker, same_size, say, store
from trilemma.machine import synchronize
from trilemma.measure.memory import PeakMemory

MODES = ("eager", "compiled")

# A system: its module, and a function of a batch that runs forward, loss and backward and returns the mean loss.
Step = Callable[..., Tensor]
System = tuple[nn.Module, Step]


@dataclass(frozen=True)
class Benchmark:
    """One study.

    Attributes:
        name: of the stored result. script: the file that is run as a worker. description: of its options.
        gate, tiny: sizes, dataclasses.
        systems: name -> a function of size, compiled or not, and device.
        pairs: that are compared: ours, peer.
        batch: size, generator -> the tensors that `Step` takes.
        tokens: size -> tokens of a batch that count. flops: our model, size -> forward FLOPs of a batch.
        packages: whose versions are stored.
    """

    name: str
    script: str
    description: str | None
    gate: Any
    tiny: Any
    systems: Mapping[str, Callable[[Any, bool, str], System]]
    pairs: Sequence[tuple[str, str]]
    batch: Callable[[Any, torch.Generator], tuple[Tensor, ...]]
    tokens: Callable[[Any], int]
    flops: Callable[[Any, Any], int]
    packages: Sequence[str]


def autocast(device: str) -> torch.autocast:
    """bf16 over float32 weights."""
    return torch.autocast(device, dtype=torch.bfloat16)


def work(benchmark: Benchmark, name: str, mode: str, size: Any, steps: int, warm_up: int) -> dict[str, Any]:
    """One process: builds the system, trains it, and times whole steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model, step = benchmark.systems[name](size, mode == "compiled", device)
    model.train()
    batch = [part.to(device) for part in benchmark.batch(size, torch.Generator().manual_seed(1))]
    result = {
        "system": name,
        "mode": mode,
        **timed_steps(model, step, batch, steps, warm_up, device),
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "threads": torch.get_num_threads(),
    }
    result["tokens_per_second"] = benchmark.tokens(size) / result["step_ms"] * 1e3
    if name.startswith("ours"):
        result["flops"] = 3 * benchmark.flops(model, size)  # backward counts twice
    return result


def timed_steps(
    model: nn.Module, step: Step, batch: Sequence[Tensor], steps: int, warm_up: int, device: str
) -> dict[str, Any]:
    """Trains on one batch again and again.

    Returns:
        step_ms (median), memory, first and last loss, and the time of the first step, which compiles.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times, losses = [], []
    with PeakMemory(device) as memory:
        for _ in range(warm_up + steps):
            start = time.perf_counter()
            losses.append(step(*batch))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronize(device)
            times.append(time.perf_counter() - start)
    first, last = float(losses[0]), float(losses[-1])
    # it really trains: random weights start near ln(vocabulary), and the same batch again is learned
    assert last < first, f"the loss went from {first:.3f} to {last:.3f}"
    return {
        "step_ms": statistics.median(times[warm_up:]) * 1e3,
        "memory_growth_bytes": memory.growth_bytes,  # beyond the model: gradients, optimizer, activations
        "peak_memory_bytes": memory.peak_bytes,
        "first_loss": first,
        "last_loss": last,
        "first_step_s": times[0],
    }


@contextlib.contextmanager
def empty_compile_cache() -> Iterator[None]:
    """The workers started within share a cache of compiled code that is empty at first."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def study(benchmark: Benchmark, arguments: argparse.Namespace, size: Any) -> dict[str, Any]:
    """All pairs, eager against eager and compiled against compiled."""
    base = [sys.executable, benchmark.script, "--steps", str(arguments.steps), "--warm-up", str(arguments.warm_up)]
    base += ["--tiny"] if arguments.tiny else []
    duels = []
    for mode in arguments.modes:
        for own, peer in benchmark.pairs:
            if peer not in arguments.peers:
                continue
            say(f"{own} against {peer}, {mode}")
            commands = [[*base, "--worker", name, "--mode", mode] for name in (own, peer)]
            try:
                with empty_compile_cache():
                    cold = [run_worker([*command, "--steps", "1", "--warm-up", "1"]) for command in commands]
                    same_size(*cold)
                    result = duel(commands[0], commands[1], "step_ms", arguments.rounds)
                result["cold_first_step_s"] = [run["first_step_s"] for run in cold]
            except WorkerError as error:
                say(f"  not measured: {error}")
                result = {"speedup": None, "reason": str(error)}
            duels.append(
                {
                    "ours": own,
                    "peer": peer,
                    "mode": mode,
                    **{f"{k}_runs" if k in ("ours", "peer") else k: v for k, v in result.items()},
                }
            )
    return {"benchmark": benchmark.name, "size": asdict(size), "duels": duels, **provenance(benchmark.packages)}


def table(result: dict[str, Any]) -> str:
    """The medians as a Markdown table."""
    lines = ["| ours | peer | mode | ours ms | peer ms | speed-up |", "|---|---|---|---|---|---|"]
    for item in result["duels"]:
        if item["speedup"] is None:
            numbers = f"- | - | not measured: {item['reason'].splitlines()[-1]}"
        else:
            numbers = f"{item['ours_median']:.1f} | {item['peer_median']:.1f} | {item['speedup']:.2f}x"
        lines.append(f"| {item['ours']} | {item['peer']} | {item['mode']} | {numbers} |")
    return "\n".join(lines)


def main(benchmark: Benchmark) -> None:
    """Worker or study."""
    parser = options(benchmark.description, benchmark.systems, benchmark.name)
    parser.add_argument("--mode", choices=MODES, default="eager")
    peers = dict.fromkeys(peer for _, peer in benchmark.pairs)
    parser.add_argument("--modes", type=among(MODES), default=",".join(MODES))
    parser.add_argument("--peers", type=among(peers), default=",".join(peers), help="only these, separated by commas")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2)
    arguments = parser.parse_args()
    size = benchmark.tiny if arguments.tiny else benchmark.gate
    if arguments.worker:
        found = work(benchmark, arguments.worker, arguments.mode, size, arguments.steps, arguments.warm_up)
        print(json.dumps(found))
        return
    result = study(benchmark, arguments, size)
    print(table(result))
    if not arguments.tiny:
        store(arguments.name, result)
