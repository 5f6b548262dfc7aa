"""`trilemma compare`: the main job. Candidates x seeds under one budget, and a report of the three corners."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli.common import Json, Out, Overrides, print_json, say
from trilemma.errors import ConfigError


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
    from trilemma.compare.execute import run_study
    from trilemma.compare.records import StudyDirectory
    from trilemma.compare.report import json_line, write_report
    from trilemma.compare.tables import printable, summary_table
    from trilemma.compare.tasks import run_tasks
    from trilemma.config import load_study

    if price_per_hour is not None and price_per_hour <= 0:
        raise ConfigError(f"--price-per-hour: a positive amount is needed, found {price_per_hour:g}")
    if report_only:
        if overrides:
            raise ConfigError(f'--report-only draws the study as it was run: "{overrides[0]}" would change nothing')
        directory = StudyDirectory(out)
        asked = directory.read_study()
    else:
        if study is None:
            raise ConfigError("compare needs a study: trilemma compare STUDY.yaml --out DIR")
        asked = load_study(study, overrides)
        directory = (run_tasks if asked.tasks else run_study)(asked, out, _command(), say)
    if asked.tasks:
        _show_matrix(directory.path, json)
        return
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


def _command() -> str:
    return shlex.join(["trilemma", *sys.argv[1:]])
