"""What the verbs share: option types, the JSON line, messages to stderr."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="overrides of the config", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="print one machine-readable last line on stdout")]
Out = Annotated[Path, typer.Option("--out", help="folder to write to", show_default=False)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps")]

With = Annotated[
    list[Path] | None,
    typer.Option("--with", metavar="RUN", help="another run of an ensemble; may be repeated", show_default=False),
]
Average = Annotated[
    str | None,
    typer.Option("--average", help="of an ensemble: log-probability (the default) or probability", show_default=False),
]

BackendOption = Annotated[
    str, typer.Option("--backend", help="who runs the operators: auto, plain (our own form) or fla (GPU)")
]

CacheOption = Annotated[
    str | None,
    typer.Option("--cache", help="int8: keys and values in 8 bits; default: as activations are", show_default=False),
]


def change(before: float, after: float) -> str:
    """A score of two ways to run one model."""
    return f"{before:.4f} -> {after:.4f} ({after - before:+.4f})"


def print_json(value: Any) -> None:
    """One line of strict JSON on stdout: no NaN, keys in the given order. Not-a-number becomes null."""
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False), flush=True)


def say(message: str) -> None:
    """A message for the person who watches: to stderr, so that stdout holds results only."""
    print(message, file=sys.stderr, flush=True)


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory rather than a config file."""
    return path.is_dir()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
