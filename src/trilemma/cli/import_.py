"""`trilemma import PATH --out RUN`: a model of another library becomes a run."""

from __future__ import annotations

from typing import Annotated

import typer

from trilemma.cli.common import Json, Out, print_json, say


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="a folder in the Hugging Face layout, or a hub name")],
    out: Out,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", metavar="KEY", help="a key of config.json that changes nothing")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="fetch a hub name (org/name) over the network")] = False,
    json: Json = False,
) -> None:
    """Read config.json, safetensors and the tokenizer of a local folder, and make an ordinary run of them.

    Every weight and every key of config.json is accounted for, or named. Nothing is run that the folder contains, and
    pickle files are refused.
    """
    from trilemma.interop import import_model

    run = import_model(path, out, ignore or (), download, say)
    summary = run.read_summary()
    if json:
        print_json({"run": str(run.path), **summary})
    else:
        print(f"{run.path}: {summary['parameters']['total']:,} parameters, {summary['weights']}")
