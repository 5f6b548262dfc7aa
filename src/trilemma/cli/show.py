"""`trilemma show`: what the layers of a run look at, as pictures and one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli.common import Device, Json, Out, print_json, say
from trilemma.errors import ConfigError


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="what the model reads; the source, where there is one")],
    out: Out,
    target: Annotated[
        str | None, typer.Option("--target", help="the other side; default: what the model writes, greedily")
    ] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="numbers from 1, such as 1,6; default: all")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Attention maps by layer and head, alignments of cross-attention, and the mixing matrices of linear mixers.

    Writes show.html, which opens offline, and a PNG of every map.
    """
    from trilemma import laws
    from trilemma.predictor import load
    from trilemma.show import collect, read, write_page

    predictor = load(run, device=device)
    model = predictor.model
    chosen = _layers(layers, max(len(stack.blocks) for stack in model.stacks()))
    laws.require(model.mixers(), "plain", device=predictor.device, say=say)
    reading = read(predictor, text, target)
    maps = collect(model, reading, chosen)
    files = write_page(out, run.name, text, reading, maps)
    without = [shown.title for shown in maps if shown.matrix is None]
    for title in without:
        say(f"{title}: no mixing matrix")
    if json:
        print_json(
            {
                "report": files[0],
                "tokens": reading.labels,
                "source_tokens": reading.source_labels,
                "target": reading.target,
                "maps": [
                    {
                        "stack": shown.stack,
                        "layer": shown.layer,
                        "mixer": shown.mixer,
                        "operator": shown.operator,
                        "columns": shown.columns,
                        "shape": list(shown.matrix.shape),
                        "error": shown.error,
                        "file": out / f"{shown.file}.png",
                    }
                    for shown in maps
                    if shown.matrix is not None
                ],
                "without": without,
            }
        )
    else:
        print(f"{len(files) - 1} maps: {files[0]}")


def _layers(text: str | None, count: int) -> set[int] | None:
    if text is None:
        return None
    try:
        chosen = {int(part) for part in text.split(",")}
    except ValueError:
        raise ConfigError(f'--layers: "{text}" is not a list of numbers such as 1,6') from None
    for number in sorted(chosen):
        if not 1 <= number <= count:
            raise ConfigError(f"--layers: this model has layers 1 to {count}; {number} is none of them")
    return chosen
