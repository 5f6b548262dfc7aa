"""`trilemma embed`: a vector for each line."""

from __future__ import annotations

import itertools
import json as jsons
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from trilemma.cli.common import Device, Json, print_json

WINDOW = 1024


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")],
    pooling: Annotated[
        str, typer.Option("--pooling", help="mean, cls (encoder-only: the first token) or last (decoder-only)")
    ] = "mean",
    normalise: Annotated[bool, typer.Option("--normalise", "--normalize", help="vectors of length 1")] = False,
    window: Annotated[int, typer.Option("--window", min=1, help="lines read together")] = WINDOW,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float64, int8 or int4")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Reads lines from stdin and writes for each, in order, one JSON line: {"embedding": [...]}.

    The vector is the last layer's, pooled over the line's tokens, special ones included; an empty line's is that of the
    special tokens alone. Nine digits are written: a float32 comes back exactly.
    """
    from trilemma.cli.generate import read_lines
    from trilemma.measure.vectors import Pooling
    from trilemma.predictor import load

    predictor = load(run, device=device, dtype=dtype)
    kind = cast("Pooling", pooling)
    predictor.embed([], kind)  # what cannot be done is said before input is waited for
    lines = read_lines(sys.stdin.buffer, "stdin")
    first = 0
    while held := list(itertools.islice(lines, window)):
        for vector in predictor.embed(held, kind, normalise, first + 1):
            text = jsons.dumps({"embedding": [float(f"{value:.9g}") for value in vector]}, allow_nan=False)
            sys.stdout.buffer.write(f"{text}\n".encode())
        sys.stdout.buffer.flush()
        first += len(held)
    if json:
        print_json({"lines": first, "pooling": pooling, "normalised": normalise})
