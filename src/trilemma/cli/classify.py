"""`trilemma classify`: labels and probabilities, line by line."""

from __future__ import annotations

import itertools
import json as jsons
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli.common import Device, Json, print_json, say

WINDOW = 1024


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory of a classifier")],
    jsonl: Annotated[bool, typer.Option("--jsonl", help="one JSON object a line, with all probabilities")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="the model's own probabilities, not the calibrated ones")] = False,
    window: Annotated[int, typer.Option("--window", min=1, help="lines read together")] = WINDOW,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float64, int8 or int4")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Reads lines from stdin and writes for each the label, its probability and all classes' probabilities, by tabs.

    The columns after the second are `class=probability`, in the order of the class ids. Probabilities are those at the
    temperature that was fitted on the run's validation data when its training ended.
    """
    from trilemma.cli.generate import read_lines
    from trilemma.predictor import load

    predictor = load(run, device=device, dtype=dtype)
    predictor.classify([])  # a run that is no classifier says so before it waits for input
    if predictor.temperature is None and not raw:
        say("note: the probabilities are the model's own; this run was not calibrated on validation data")
    counts: Counter[str] = Counter()
    lines = read_lines(sys.stdin.buffer, "stdin")
    first = unknown = 0
    while held := list(itertools.islice(lines, window)):
        for index, result in enumerate(predictor.classify(held, first + 1, raw), start=first):
            counts[result.label] += 1
            unknown += result.unknown > 0
            if jsonl:
                value = {"index": index, "label": result.label, "probabilities": result.probabilities}
                text = jsons.dumps(value, ensure_ascii=False)
            else:
                columns = [f"{name}={share:.6f}" for name, share in result.probabilities.items()]
                text = "\t".join([result.label, f"{result.probabilities[result.label]:.6f}", *columns])
            sys.stdout.buffer.write(f"{text}\n".encode())
        sys.stdout.buffer.flush()
        first += len(held)
    if unknown:
        say(f"note: {unknown:,} lines held characters or words that the tokenizer does not know")
    if json:
        print_json({"lines": first, "unknown": unknown, "labels": dict(sorted(counts.items()))})
