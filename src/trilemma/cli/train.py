"""`trilemma train CONFIG.yaml --out RUN [--from RUN] [--resume] [section.key=value ...]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilemma.cli.common import Json, Overrides, is_run, print_json
from trilemma.errors import ConfigError

if TYPE_CHECKING:
    from trilemma.config import RunConfig


def command(
    config: Annotated[Path, typer.Argument(help="a YAML config, or with --resume a run", show_default=False)],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="the run's folder; default: runs/NAME")] = None,
    start_from: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="begin with this run's weights and tokenizer")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on after the last checkpoint")] = False,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="at the end, score the test split; kept in RUN")] = False,
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
    if evaluate:
        _require_test(chosen)
    run = train(chosen, out=folder, resume=resume)
    if not is_first():
        return
    scores = {"scores": _evaluate(folder, json)} if evaluate else {}
    if json:
        print_json({"run": str(run.directory.path), **run.directory.read_summary(), **scores})


def _require_test(config: RunConfig) -> None:
    """Better said before the training than after it."""
    data = config.data
    sources = data.train if isinstance(data.train, list) else [data.train]
    divided = data.split is not None and data.split.test
    if data.test is None and not divided and not any(source.generated for source in sources):
        raise ConfigError("--evaluate scores the test split, and there is none: set data.test or data.split.test")


def _evaluate(folder: Path, json: bool) -> list[dict[str, Any]]:
    """The entries of scores.json."""
    from trilemma.cli.evaluate import keep_scores, show_scores
    from trilemma.predictor import load

    predictor = load(folder)
    evaluation = predictor.evaluate()
    show_scores(evaluation, json)
    keep_scores(predictor, evaluation)
    return evaluation.to_json()
