"""How training grows with the length: attention, and every mixer whose State does not grow.

    python benchmarks/growth.py                              # all mixers; hours on two cores
    python benchmarks/growth.py --mixers attention,retention # only these, separated by commas
    python benchmarks/growth.py --tiny                       # does everything run?
    python benchmarks/growth.py --worker retention --length 256     # one process

One layer, 512 wide, 8 heads, forward and backward under bf16 autocast. Every step reads the same number of tokens, 64
rows of 256 or one row of 16,384, as batches by token budget do; so a mixer that is linear in the length has the
exponent 0 in time per token and in memory, and one that compares all pairs tends to 1 in time. An exponent is the slope
of a straight line through the logarithms, over all lengths and over the longer half of them. Each point is a process of
its own; in each round all lengths stand side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, replace
from typing import Any

import torch
from mixers_speed import GATE, TINY, Size, ours, train_times

from common import WorkerError, among, options, provenance, run_worker, say, store
from trilemma import machine
from trilemma.measure.memory import PeakMemory
from trilemma.registry import available_mixers, mixer_class

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
TINY_LENGTHS = (32, 64, 128)
PACKAGES = ("torch", "trilemma")
FIELDS = ("us_per_token", "memory_growth_bytes")


def linear_mixers() -> list[str]:
    """Those that read causally with a State of constant size."""
    abilities = {name: mixer_class(name).capabilities for name in available_mixers()}
    return [name for name, able in abilities.items() if able.causal and able.constant_state and not able.reads_memory]


def work(mixer: str, size: Size, repeats: int) -> dict[str, Any]:
    """One process: one layer at one length."""
    machine.keep_freed_memory()
    torch.manual_seed(0)
    system = ours(size, {"name": mixer})
    train_times(system, replace(size, length=16, batch=1), 1)  # what libraries take once is not counted
    with PeakMemory("cpu") as memory:
        seconds = statistics.median(train_times(system, size, repeats))
    return {
        "mixer": mixer,
        "length": size.length,
        "batch": size.batch,
        "us_per_token": seconds * 1e6 / (size.batch * size.length),
        "memory_growth_bytes": memory.growth_bytes,  # beyond the layer: input, activations, gradients, optimizer
        "threads": torch.get_num_threads(),
    }


def exponent(lengths: list[int], values: list[float]) -> float:
    """Slope of the least-squares line through (log length, log value)."""
    return statistics.linear_regression([math.log(x) for x in lengths], [math.log(y) for y in values]).slope


def row(mixer: str, lengths: tuple[int, ...], arguments: argparse.Namespace) -> dict[str, Any]:
    """All lengths of one mixer, round by round; medians and exponents."""
    command = [sys.executable, __file__, "--worker", mixer, "--repeats", str(arguments.repeats)]
    command += ["--tiny"] * arguments.tiny
    found: dict[int, list[dict[str, Any]]] = {length: [] for length in lengths}
    for at in range(arguments.rounds):
        for length in lengths:
            result = run_worker([*command, "--length", str(length)])
            found[length].append(result)
            say(f"{mixer}, round {at + 1}/{arguments.rounds}: {result['us_per_token']:.2f} us a token at {length:,}")
    points = [
        {"length": length, **{field: statistics.median(run[field] for run in runs) for field in FIELDS}}
        for length, runs in found.items()
    ]
    half = len(points) // 2
    exponents = {
        field: {
            part: exponent([point["length"] for point in chosen], [point[field] for point in chosen])
            for part, chosen in (("all", points), ("longer half", points[half:]))
        }
        for field in FIELDS
    }
    return {"mixer": mixer, "points": points, "exponents": exponents, "processes": list(found.values())}


def study(arguments: argparse.Namespace, size: Size, lengths: tuple[int, ...]) -> dict[str, Any]:
    """All mixers."""
    rows = []
    for mixer in arguments.mixers:
        try:
            rows.append(row(mixer, lengths, arguments))
        except WorkerError as error:
            say(f"  not measured: {error}")
            rows.append({"mixer": mixer, "points": [], "reason": str(error)})
    return {
        "benchmark": "growth",
        "size": asdict(size),
        "tokens": lengths[-1],
        "rounds": arguments.rounds,
        "rows": rows,
        **provenance(PACKAGES),
    }


def table(result: dict[str, Any]) -> str:
    """Exponents over all lengths and, in brackets, over the longer half, as a Markdown table."""
    lines = ["| mixer | us a token, shortest to longest | its exponent | memory's exponent |", "|---|---|---|---|"]
    for item in result["rows"]:
        if not item["points"]:
            lines.append(f"| {item['mixer']} | not measured | | |")
            continue
        ends = " to ".join(f"{item['points'][at]['us_per_token']:.3g}" for at in (0, -1))
        slopes = (
            f"{item['exponents'][field]['all']:.2f} ({item['exponents'][field]['longer half']:.2f})" for field in FIELDS
        )
        lines.append(f"| {item['mixer']} | {ends} | {' | '.join(slopes)} |")
    return "\n".join(lines)


def main() -> None:
    """Worker or study."""
    mixers = ["attention", *linear_mixers()]
    parser = options(__doc__, mixers, "growth")
    parser.add_argument(
        "--mixers", type=among(mixers), default=",".join(mixers), help="only these, separated by commas"
    )
    parser.add_argument("--length", type=int, help="of the worker")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a process")
    arguments = parser.parse_args()
    lengths = TINY_LENGTHS if arguments.tiny else LENGTHS
    length = arguments.length or lengths[-1]
    size = Size(**{**(TINY if arguments.tiny else GATE), "length": length, "batch": lengths[-1] // length})
    if arguments.worker:
        print(json.dumps(work(arguments.worker, size, arguments.repeats)))
        return
    result = study(arguments, size, lengths)
    print(table(result))
    if not arguments.tiny:
        store(arguments.name, result)


if __name__ == "__main__":
    main()
