"""`trilemma export`: a run in a format that others load."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli.common import Json, print_json
from trilemma.errors import CapabilityError, ConfigError, nearest


@dataclass(frozen=True)
class Target:
    """A format: the module whose `write(run, folder, options)` makes it, and the options that it reads."""

    module: str
    options: frozenset[str] = frozenset()


_STEP = frozenset({"rows", "context", "source_length"})

TARGETS: dict[str, Target] = {
    "ctranslate2": Target("trilemma.interop.export_ctranslate2", frozenset({"quantization"})),
    "hf": Target("trilemma.interop.export_hf"),
    "onnx": Target("trilemma.interop.export_onnx", _STEP),
    "torch-export": Target("trilemma.interop.export_torch", _STEP),
}


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")],
    to: Annotated[str, typer.Option("--to", help=f"the format: {', '.join(TARGETS)}", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="folder to write; it must not exist", show_default=False)],
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="torch-export, onnx: sequences read at once; default: any")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="torch-export, onnx: tokens that a growing state holds")
    ] = None,
    source_length: Annotated[
        int | None, typer.Option("--source-length", min=1, help="torch-export, onnx: tokens that the encoder reads")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="ctranslate2: int8, int16, float16 or bfloat16 weights")
    ] = None,
    json: Json = False,
) -> None:
    """Writes a run for another program; what it cannot run is refused by name. See docs/export.md."""
    from trilemma.interop.target import ExportOptions, new_folder
    from trilemma.runs.load import load_run

    if to not in TARGETS:
        raise ConfigError(f'--to: unknown target "{to}"{nearest(to, TARGETS)}')
    options = ExportOptions(rows, context, source_length, quantization)
    for name, value in asdict(options).items():
        if value is not None and name not in TARGETS[to].options:
            raise ConfigError(f"--{name.replace('_', '-')}: --to {to} has no such option")
    writer = importlib.import_module(TARGETS[to].module)
    loaded = load_run(run)
    if (coded := loaded.config.model.quantization) is not None:
        raise CapabilityError(f"{run}: its weights are in {coded}; export the run that it was made from")
    with new_folder(out) as folder:
        description = writer.write(loaded, folder, options)
    if json:
        print_json({"out": out, "target": to, **description})
    else:
        print(f"{out}: {to} of {run}")
