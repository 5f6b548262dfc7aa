"""What the benchmarks share: whole processes run in turns, ratios of neighbours, results that can be repeated.

A worker is a process that prints one JSON object as its last line. Two systems are never compared through numbers of
different hours: they run in turns (ours, peer, ours, peer, ...), each pair gives one ratio, and the median of the pairs
counts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from trilemma import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SKIPPED = 77  # exit code of a benchmark that this machine cannot run


class WorkerError(RuntimeError):
    """A worker failed; the text holds the end of what it printed."""


def options(
    description: str | None, workers: Iterable[str], name: str, rounds: int | None = 5
) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take.

    Args:
        workers: the systems that `--worker` can run. name: of the stored result. rounds: None where nothing is paired.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=list(workers), help="run one system in this process")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="pairs of processes")
    parser.add_argument("--tiny", action="store_true", help="a size that runs in seconds; its numbers mean nothing")
    parser.add_argument("--name", default=name, help="of the stored result")
    return parser


def among(names: Iterable[str]) -> Callable[[str], list[str]]:
    """The `type` of an option that takes some of `names`, separated by commas."""
    known = list(names)

    def parse(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"not among {', '.join(known)}: {', '.join(unknown)}")
        return given

    return parse


def same_size(own: dict[str, Any], peer: dict[str, Any]) -> None:
    """Refuses, by `WorkerError`, to compare systems whose numbers of weights differ by more than 1 %."""
    if abs(own["parameters"] / peer["parameters"] - 1) > 0.01:
        raise WorkerError(f"sizes differ: ours {own['parameters']:,}, peer {peer['parameters']:,} weights")


def stand_in(*names: str) -> None:
    """Empty modules for what a peer imports and the measured path never calls; only in the process of that peer."""
    sys.modules.update({name: MagicMock() for name in names})


def without_timm() -> None:
    """torchscale takes one function of timm, for stochastic depth, which is off here; timm itself needs torchvision."""
    stand_in("timm", "timm.models", "timm.models.layers")


def run_worker(command: Sequence[str], timeout: float = 1800.0) -> dict[str, Any]:
    """Runs one whole process and returns the JSON object on its last line.

    Raises:
        WorkerError: it ended with an error, took longer than `timeout` seconds, or printed no JSON.
    """
    shown = without_folders(shlex.join(command))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise WorkerError(f"{shown}: longer than {timeout:.0f} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        end = without_folders((done.stderr or done.stdout)[-2000:])
        raise WorkerError(f"{shown}: exit code {done.returncode}\n{end}")
    try:
        result = json.loads(lines[-1])
    except ValueError:
        raise WorkerError(f"{shown}: the last line is no JSON: {lines[-1][:200]}") from None
    assert isinstance(result, dict)
    return result


def without_folders(text: str) -> str:
    """Files of this checkout are named from its root: reasons are stored with the results."""
    return text.replace(f"{ROOT}{os.sep}", "")


def duel(ours: Sequence[str], peer: Sequence[str], field: str, rounds: int = 5) -> dict[str, Any]:
    """Ours and peer in turns.

    Args:
        ours, peer: commands of the two workers.
        field: the number in a worker's result that is compared; lower is better (a time).
        rounds: pairs of processes.

    Returns:
        speedup (median over the pairs of peer / ours: above 1, ours is faster), speedups, the medians of both, and all
        results.
    """
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for at in range(rounds):
        pair = run_worker(ours), run_worker(peer)
        pairs.append(pair)
        own, other = (f"{result[field]:.4g}" for result in pair)
        say(f"  round {at + 1}/{rounds}: {field} ours {own}, peer {other}, {_ratio(pair, field):.3f}x")
    speedups = [_ratio(pair, field) for pair in pairs]
    return {
        "speedup": statistics.median(speedups),
        "speedups": speedups,
        "ours_median": statistics.median(pair[0][field] for pair in pairs),
        "peer_median": statistics.median(pair[1][field] for pair in pairs),
        "field": field,
        "ours": [pair[0] for pair in pairs],
        "peer": [pair[1] for pair in pairs],
    }


def _ratio(pair: tuple[dict[str, Any], dict[str, Any]], field: str) -> float:
    return float(pair[1][field]) / float(pair[0][field])


def provenance(packages: Sequence[str] = (), quick: bool = False) -> dict[str, Any]:
    """Hardware, versions, commit, command, date, and this machine's ceilings measured now; stands in every result.

    With `quick` the ceilings mean nothing: for trials.
    """
    device, _ = machine.choose_device("auto")
    return {
        "environment": machine.environment(device),
        "ceilings": vars(machine.measure_ceilings(device, quick=quick)),
        "packages": {name: installed_version(name) for name in packages},
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "variables": {
            name: os.environ[name] for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES") if name in os.environ
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def installed_version(name: str) -> str | None:
    """Version of an installed distribution; None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def store(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """As `write`, and says so."""
    file = write(name, result, folder)
    say(f"stored in {file}")
    return file


def write(name: str, result: dict[str, Any], folder: Path) -> Path:
    """Writes `folder`/`name`.json whole and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)
    return file


def say(message: str) -> None:
    """Progress, to stderr."""
    print(message, file=sys.stderr, flush=True)
