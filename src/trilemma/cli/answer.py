"""`trilemma answer`: questions about passages, answered by a part of the passage."""

from __future__ import annotations

import itertools
import json as jsons
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli.common import Device, Json, print_json
from trilemma.errors import DataError, nearest

WINDOW = 64


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory of task question-answering")],
    passage: Annotated[
        Path | None, typer.Option("--passage", help="a text file: each line of stdin is a question about it")
    ] = None,
    longest: Annotated[int | None, typer.Option("--longest", min=1, help="tokens of an answer; default 30")] = None,
    window: Annotated[int, typer.Option("--window", min=1, help="lines read together")] = WINDOW,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float64, int8 or int4")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Reads {"question": ..., "context": ...} lines from stdin (with --passage plain questions) and answers each.

    One JSON line for each: {"text", "start", "end", "probability"}; the text is context[start:end], in characters. A
    passage may be longer than the model reads at once: it is read in overlapping windows.
    """
    from trilemma.cli.generate import read_lines
    from trilemma.predictor import load

    predictor = load(run, device=device, dtype=dtype)
    predictor.answer([])  # a run that answers no questions says so before it waits for input
    text = _read(passage) if passage is not None else None
    lines = read_lines(sys.stdin.buffer, "stdin")
    first = 0
    while held := list(itertools.islice(lines, window)):
        pairs = [(line, text) if text is not None else _pair(line, first + i) for i, line in enumerate(held, start=1)]
        for found in predictor.answer(pairs, longest, first + 1):
            sys.stdout.buffer.write(f"{jsons.dumps(asdict(found), ensure_ascii=False)}\n".encode())
        sys.stdout.buffer.flush()
        first += len(held)
    if json:
        print_json({"lines": first})


def _read(path: Path) -> str:
    from trilemma.data.readers import decode_line, raw_lines

    return "".join(decode_line(raw, path, number) for number, raw in raw_lines(path))


def _pair(line: str, number: int) -> tuple[str, str]:
    try:
        values = jsons.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"stdin: line {number}: not a JSON object: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f'stdin: line {number}: an object with "question" and "context" is needed')
    for key in ("question", "context"):
        if not isinstance(values.get(key), str):
            hint = "" if key in values else nearest(key, map(str, values))
            raise DataError(f'stdin: line {number}: the key "{key}" must hold text{hint}')
    return values["question"], values["context"]
