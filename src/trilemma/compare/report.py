"""Writes the report: `report.html`, `report.md`, `report.json`, a CSV of every table, PNG and SVG of every figure.

The page is self-contained and holds no script; its content-security policy forbids every request and every style but
its own. Names and model outputs are data: they are escaped in HTML and Markdown, and inert in CSV and SVG.
"""

from __future__ import annotations

import base64
import hashlib
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trilemma import __version__
from trilemma.compare import words
from trilemma.compare.analysis import analyse
from trilemma.compare.plots import Plot, all_plots
from trilemma.compare.records import StudyDirectory, write_bytes, write_json, write_text
from trilemma.compare.results import CandidateResult, Report
from trilemma.compare.tables import Table, all_tables, duration, printable, size

REPORT_VERSION = 1
_LONG_TABLES = ("curves", "samples")  # CSV only: the pages draw the curves and lay the samples out


def write_report(directory: StudyDirectory, price_per_hour: float | None = None) -> Report:
    """Draws the report of a study from its files and writes it beside them.

    Raises:
        CheckpointError: nothing has been trained and scored yet, or a file of the study is missing or damaged.
    """
    report = analyse(directory.read(), price_per_hour)
    tables, plots = all_tables(report), all_plots(report)
    for table in tables:
        write_text(directory.path / "tables" / f"{table.name}.csv", table.csv())
    for plot in plots:
        write_bytes(directory.path / "plots" / f"{plot.name}.png", plot.png)
        write_bytes(directory.path / "plots" / f"{plot.name}.svg", plot.svg)
    write_json(directory.path / "report.json", as_json(report))
    write_text(directory.path / "report.md", render("report.md.j2", report, tables, plots))
    write_text(directory.path / "report.html", render("report.html.j2", report, tables, plots))
    return report


def render(template: str, report: Report, tables: list[Table], plots: list[Plot]) -> str:
    """One page from a template of this package."""
    html = template.endswith(".html.j2")
    environment = Environment(
        loader=PackageLoader("trilemma.compare"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        md=markdown_text, duration=duration, amount=words.amount, size=size, setting=words.setting
    )
    style = Path(__file__).with_name("templates").joinpath("report.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(
        report=report,
        tables={table.name: table for table in tables if table.name not in _LONG_TABLES},
        plots={plot.name: plot for plot in plots},
        images={plot.name: base64.b64encode(plot.svg).decode("ascii") for plot in plots},
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii"),
        budget=words.budget(str(report.budget["lock"]), float(report.budget["amount"])),
        version=__version__,
    )


_MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]()#|!~$"})


def markdown_text(text: object) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no line break, no control character."""
    plain = printable(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return plain.translate(_MARKDOWN)


def as_json(report: Report) -> dict[str, Any]:
    """The content of `report.json`; numbers that are not finite become null."""
    values = {
        "version": REPORT_VERSION,
        "trilemma": __version__,
        "name": report.name,
        "task": report.task,
        "budget": report.budget,
        "data_hash": report.data_hash,
        "order_hashes": {str(seed): digest for seed, digest in report.order_hashes.items()},
        "environment": report.environment,
        "command": report.command,
        "reference": report.reference,
        "metric": {"name": report.metric.name, "higher_is_better": report.metric.higher_is_better},
        "test": {"split": report.split, "documents": report.documents},
        "verdicts": report.verdicts,
        "verdicts_withheld": report.withheld or None,
        "inference_context": report.context,
        "candidates": [_candidate(row, report) for row in report.candidates],
        "controls": {
            "runs": [_candidate(row, report) for row in report.controls],
            "outcomes": [{"name": item.name, "passed": item.passed, "text": item.text} for item in report.outcomes],
        },
        "pairs": [
            {
                "first": test.first,
                "second": test.second,
                "difference": test.difference,
                "low": test.low,
                "high": test.high,
                "p": test.p,
                "p_holm": test.adjusted,
                "separated": None if test.adjusted is None or report.withheld else test.separated,
            }
            for test in report.pairs
        ],
        "rank_stability": {
            "judged_by": report.judged.key,
            "text": report.stability.text,
            "stable": not report.stability.flips,
            "rankings": report.stability.rankings,
        },
        "crossovers": [
            {"candidate": item.candidate, "quantity": item.quantity, "context": item.context, "text": item.text}
            for item in report.crossovers
        ],
        "learning_rates": [
            {
                "candidate": point.candidate,
                "learning_rate": point.learning_rate,
                report.criterion.replace("validation ", "valid_"): point.loss,
                "chosen": point.chosen,
            }
            for point in report.sweep
        ],
        "learning_rate_notes": report.sweep_notes,
        "inequalities": [{"candidate": item.candidate, "text": item.text} for item in report.inequalities],
        "limits": report.limits,
        "missing_runs": [planned.name for planned in report.missing],
        "price_per_hour": report.price_per_hour,
    }
    finite: dict[str, Any] = _finite(values)
    return finite


def _candidate(row: CandidateResult, report: Report) -> dict[str, Any]:
    found, cost = row.quality.interval, row.training
    inference = row.inference
    return {
        "name": row.name,
        "mixer": row.mixer,
        "layout": row.layout,
        "parameters": row.parameters,
        "quality": {
            "metric": report.metric.name,
            "signature": row.quality.signature,
            "mean": found.mean,
            "low": found.low,
            "high": found.high,
            "seeds": found.seeds,
            "interval_counts_seeds": found.seeds_counted,
            "by_seed": {str(seed): value for seed, value in row.quality.values},
        },
        "training": {
            "tokens_per_second": cost.tokens_per_second,
            "seconds": cost.seconds,
            "flops": cost.flops,
            "peak_memory_bytes": cost.peak_memory_bytes,
            "steps": cost.steps,
            "tokens": cost.tokens,
            "learning_rate": cost.learning_rate,
        },
        "inference": {
            "ms_per_token": {str(k): v for k, v in inference.ms_per_token.items()} if inference else {},
            "state_bytes": {str(k): v for k, v in inference.state_bytes.items()} if inference else {},
        },
        "triangle": {
            name: {"value": corner.value, "log2_ratio": corner.log2_ratio} for name, corner in row.corners.items()
        },
        f"{report.judged.key}_at_share": row.curve.at_share,
        "price": {**row.price, "context": report.context} if row.price else None,
        "runs": [f"runs/{name}" for name in row.runs],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def json_line(report: Report, directory: Path) -> dict[str, Any]:
    """What `--json` prints: the report, and where its pages lie."""
    return {**as_json(report), "report": str(directory / "report.html")}
