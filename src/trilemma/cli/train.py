"""`trilemma train CONFIG.yaml --out RUN [--from RUN] [--resume] [section.key=value ...]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli.common import Json, Overrides, is_run, print_json


def command(
    config: Annotated[Path, typer.Argument(help="a YAML config, or with --resume a run", show_default=False)],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="the run's folder; default: runs/NAME")] = None,
    start_from: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="begin with this run's weights and tokenizer")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on after the last checkpoint")] = False,
    json: Json = False,
) -> None:
    """Train one model; it can be killed at any instant and goes on with --resume.

    Under torchrun, micro-batches (training.accumulate of them make a step) are dealt over the processes:
    torchrun --nproc-per-node 2 -m trilemma train CONFIG.yaml --out RUN
    """
    from trilemma.config import RunConfig, apply_overrides, load_config, parse
    from trilemma.runs import RunDirectory
    from trilemma.train.api import train
    from trilemma.train.processes import is_first

    if is_run(config):
        stored = RunDirectory.open(config).read_config()
        values = apply_overrides(stored.model_dump(mode="json"), overrides or [])
        chosen, folder = parse(RunConfig, values, str(config)), out or config
    else:
        chosen = load_config(config, overrides)
        folder = out or Path("runs") / chosen.name
    if start_from is not None:
        chosen = chosen.model_copy(update={"start_from": str(start_from)})
    run = train(chosen, out=folder, resume=resume)
    if json and is_first():
        print_json({"run": str(run.directory.path), **run.directory.read_summary()})
