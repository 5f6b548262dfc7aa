"""`trilemma compare`: the main job. Candidates x seeds under one budget, and a report of the three corners."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli.common import Json, Out, Overrides, print_json, say
from trilemma.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from trilemma.compare.records import StudyDirectory
    from trilemma.study import StudyConfig


def command(
    study: Annotated[
        Path | None, typer.Argument(metavar="STUDY.yaml", help="what is compared, and under which budget")
    ] = None,
    overrides: Overrides = None,
    out: Out = Path("study"),
    report_only: Annotated[
        bool, typer.Option("--report-only", help="train nothing: draw the report again from what lies in --out")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", help="of this machine; costs are then money as well")
    ] = None,
    json: Json = False,
) -> None:
    """Which architecture, and at what price? Trains every candidate under one budget and writes report.html.

    The same command goes on where an interrupted one was; finished runs are never repeated.
    """
    from trilemma.compare.records import StudyDirectory

    if price_per_hour is not None and not 0 < price_per_hour < math.inf:
        raise ConfigError(f"--price-per-hour: a positive amount is needed, found {price_per_hour:g}")
    directory = StudyDirectory(out)
    if report_only:
        asked = _kept(directory, study, overrides or [], price_per_hour)
    else:
        asked = _run(out, study, overrides or [], price_per_hour)
    if asked.tasks:
        _show_matrix(directory.path, json)
    else:
        _show_report(directory, price_per_hour, json)
    if not report_only:
        _raise_failures(directory, asked)


def _run(out: Path, study: Path | None, overrides: list[str], price_per_hour: float | None) -> StudyConfig:
    from trilemma.compare.execute import run_study
    from trilemma.compare.tasks import run_tasks
    from trilemma.study import load_study

    if study is None:
        raise ConfigError("compare needs a study: trilemma compare STUDY.yaml --out DIR")
    asked = load_study(study, overrides)
    if price_per_hour is not None:
        asked = asked.model_copy(update={"price_per_hour": price_per_hour})
    (run_tasks if asked.tasks else run_study)(asked, out, _command(), say)
    return asked


def _kept(
    directory: StudyDirectory, study: Path | None, overrides: list[str], price_per_hour: float | None
) -> StudyConfig:
    """The study as it was run; one that is named must be the same."""
    from trilemma.compare.execute import check_shown_study
    from trilemma.compare.tasks import write_reports
    from trilemma.study import load_study

    if overrides:
        raise ConfigError(f'--report-only draws the study as it was run: "{overrides[0]}" would change nothing')
    kept = directory.read_study()
    if study is not None:
        check_shown_study(kept, load_study(study), directory.path)
    if kept.tasks:
        write_reports(kept, directory.path, price_per_hour, say)
    return kept


def _show_report(directory: StudyDirectory, price_per_hour: float | None, json: bool) -> None:
    from trilemma.compare.report import json_line, write_report
    from trilemma.compare.tables import printable, summary_table

    report = write_report(directory, price_per_hour)
    print(f"{summary_table(report)}\n")
    for line in [report.withheld] if report.withheld else report.verdicts:
        print(printable(line))
    print(f"\nreport: {directory.path / 'report.html'}", flush=True)
    if json:
        print_json(json_line(report, directory.path))


def _show_matrix(out: Path, json: bool) -> None:
    from trilemma.compare.heatmap import as_json, as_text, write_matrix

    matrix = write_matrix(out)
    print(f"{as_text(matrix)}\n\nmatrix: {out / 'matrix.md'}", flush=True)
    if json:
        print_json({**as_json(matrix), "matrix": str(out / "matrix.md")})


def _raise_failures(directory: StudyDirectory, study: StudyConfig) -> None:
    """Ends with an error where a run is missing from the report that could not be trained."""
    from trilemma.compare.execute import failed
    from trilemma.compare.tasks import task_directory

    places = [task_directory(directory.path, task) for task in study.tasks] or [directory]
    if lines := [f"\n  {place.path}: {line}" for place in places for line in failed(place)]:
        raise TrainingError(
            f"the study is complete but for what could not be trained:{''.join(lines)}\n"
            "change its settings and run the same command, or remove failure.json of its run to try it again as it is"
        )


def _command() -> str:
    return shlex.join(["trilemma", *sys.argv[1:]])
