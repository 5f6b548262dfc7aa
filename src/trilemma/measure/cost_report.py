"""Cost curves as text, CSV and plots (PNG and SVG, drawn without a display)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = dict[str, Any]

# column title -> how a row's value is written; "-" where nothing was measured
_COLUMNS: dict[str, Callable[[Row], str]] = {
    "context": lambda row: f"{row['context']:,}",
    "batch": lambda row: str(row["batch"]),
    "prefill ms": lambda row: _number(row["prefill_ms"], 1),
    "first token ms": lambda row: _number(row["first_token_ms"], 1),
    "ms/token": lambda row: _number(row["ms_per_token"], 3),
    "tokens/s": lambda row: _number(row["tokens_per_second"], 0),
    "state": lambda row: human_bytes(row["state_bytes"]),
    "reserved": lambda row: human_bytes(row["capacity_bytes"]),
    "peak memory": lambda row: human_bytes(row["peak_memory_bytes"]),
    "of bandwidth": lambda row: _percent(row["bandwidth_fraction"]),
    "of arithmetic": lambda row: _percent(row["compute_fraction"]),
    "bound": lambda row: row["bound"] or "-",
}


def table(rows: Sequence[Row]) -> str:
    """Aligned plain text, one line a cell of the measurement; a cell that was not measured says why."""
    lines = [list(_COLUMNS)] + [[write(row) for write in _COLUMNS.values()] for row in rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(_COLUMNS))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    for at, row in enumerate(rows, start=1):
        if row["reason"]:
            text[at] = f"{text[at][: widths[0] + widths[1] + 2]}  not measured: {row['reason']}"
    return "\n".join(text)


def csv_text(rows: Sequence[Row]) -> str:
    """All fields of all rows; empty where nothing was measured."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def draw(curves: dict[str, Sequence[Row]], title: str) -> Figure:
    """Time per token and state bytes against context, one line for each name and batch size; both axes logarithmic."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[tuple[Axes, str, str]] = [
        (figure.add_subplot(1, 2, 1), "ms_per_token", "ms per token (whole batch)"),
        (figure.add_subplot(1, 2, 2), "state_bytes", "state, bytes (whole batch)"),
    ]
    for axes, field, label in panels:
        for name, rows in curves.items():
            for batch in sorted({row["batch"] for row in rows}):
                points = [(row["context"], row[field]) for row in rows if row["batch"] == batch and row[field]]
                if points:
                    legend = ", ".join(part for part in (name, f"batch {batch}") if part)
                    axes.plot(*zip(*sorted(points), strict=True), marker="o", label=legend)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of context")
        axes.set_ylabel(label)
        axes.grid(True, which="both", alpha=0.25)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def write_figure(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """The figure as PNG and SVG; returns the files."""
    files = [folder / f"{stem}.png", folder / f"{stem}.svg"]
    for file in files:
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def human_bytes(size: int | None) -> str:
    """Bytes with a binary unit, three digits; "-" for None."""
    if size is None:
        return "-"
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
