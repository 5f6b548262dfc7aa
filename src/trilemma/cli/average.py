"""`trilemma average`: saved checkpoints averaged into a run that every verb opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli.common import Json, print_json
from trilemma.errors import ConfigError


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="one run, or several of the same model")],
    last: Annotated[int | None, typer.Option("--last", help="the newest checkpoints of each run; default: 5")] = None,
    steps: Annotated[str | None, typer.Option("--steps", help="those of these steps instead, such as 900,1000")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="the new run's folder; default: RUN-average")] = None,
    json: Json = False,
) -> None:
    """Average saved checkpoints into a new run (Attention Is All You Need: the last 5, for big models 20).

    Training does the same at its end with training.average_last.
    """
    if last is not None and steps is not None:
        raise ConfigError("--last and --steps both choose the checkpoints; give one of them")
    if last is not None and last < 1:
        raise ConfigError(f"--last: at least 1, found {last}")
    chosen = [] if steps is None else _numbers(steps)
    from trilemma.train.average import average

    first = runs[0].resolve()  # "." has no name
    folder = out or first.with_name(f"{first.name}-average")
    summary = average(runs, folder, last or 5, chosen)
    if json:
        print_json({"run": str(folder), **summary})
    else:
        print(f"{folder}: {summary['weights']}")


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f'--steps: "{text}" is not a list of steps such as 900,1000')
    return [int(part) for part in parts]
