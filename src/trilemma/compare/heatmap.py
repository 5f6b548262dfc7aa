"""The matrix as a picture, a table and files: `matrix.png`, `.svg`, `.csv`, `.json` and `.md` in the study's folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from trilemma import __version__
from trilemma.compare.looks import GREY, label
from trilemma.compare.matrix import Cell, Column, Matrix, read_matrix
from trilemma.compare.plots import image, style
from trilemma.compare.records import write_bytes, write_json, write_text
from trilemma.compare.report import markdown_text
from trilemma.compare.tables import Table, duration, size, text_table
from trilemma.compare.words import setting

MATRIX_VERSION = 1
_MARKS = {"solves": "✓", "fails": "✗", "depends": "d"}
_COLORS = "cividis"  # even for those who see red and green alike, and on grey paper
_FRAMES = {"disagrees": "#D55E00", "mixed": "#E69F00"}


def write_matrix(out: Path) -> Matrix:
    """Draws the matrix of the study in `out` from its files and writes it beside them."""
    matrix = read_matrix(out)
    with style():
        figure = draw_matrix(matrix)
        for kind in ("png", "svg"):
            write_bytes(out / f"matrix.{kind}", image(figure, kind))
    write_text(out / "matrix.csv", matrix_table(matrix).csv())
    write_json(out / "matrix.json", as_json(matrix))
    write_text(out / "matrix.md", as_markdown(matrix))
    return matrix


# --- the picture ------------------------------------------------------------------------------------------------------


def draw_matrix(matrix: Matrix) -> Figure:
    """Accuracy as colour, from guessing to 100 %; in each cell its value, its interval, and what is published."""
    rows, columns = len(matrix.candidates), len(matrix.columns)
    figure = Figure(figsize=(2.2 + 1.5 * columns + 1.0, 1.5 + 0.78 * rows), layout="constrained")
    axes = figure.add_subplot()
    for x, column in enumerate(matrix.columns):
        for y, cell in enumerate(column.cells):
            _draw_cell(axes, x, y, cell, column)
    for y, name in enumerate(matrix.candidates):
        axes.text(columns - 0.4, y, _state(matrix, name), va="center", color="#333333")
    axes.text(columns - 0.4, -0.58, _state_title(matrix), va="bottom", color="#333333", fontsize=8)
    axes.set_xlim(-0.5, columns + 0.25)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks(range(columns), [_head(column) for column in matrix.columns])
    axes.set_yticks(range(rows), [label(name) for name in matrix.candidates])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel(
        "test accuracy, % (95 % interval over seeds and rows); published: ✓ solves, ✗ fails, d depends on size;\n"
        "framed: disagrees with what is published (red), or some seeds only (yellow);\n"
        "* best learning rate at the edge of those tried; (✗) does not count, the control failed",
        fontsize=8,
        color=GREY,
    )
    return figure


def _draw_cell(axes: Axes, x: int, y: int, cell: Cell, column: Column) -> None:
    if cell.mean is None:
        axes.text(x, y, "not run", ha="center", va="center", color=GREY, fontsize=8)
        return
    share = (cell.mean - column.chance) / max(100.0 - column.chance, 1e-9)
    shade = mpl.colormaps[_COLORS](min(1.0, max(0.0, share)))
    ink = "black" if sum(shade[:3]) > 1.5 else "white"
    frame = _FRAMES.get(cell.verdict)
    axes.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, facecolor=shade, edgecolor="none"))
    if frame:
        axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, facecolor="none", edgecolor=frame, linewidth=2.4))
    axes.text(
        x, y - 0.2, f"{cell.mean:.1f}{'*' if cell.at_edge else ''}", ha="center", va="center", color=ink, fontsize=11
    )
    axes.text(x, y + 0.06, f"{cell.low:.0f} to {cell.high:.0f}", ha="center", va="center", color=ink, fontsize=7)
    mark = _MARKS.get(cell.expected or "", "")
    if cell.verdict == "not judged":
        mark = f"({mark})"
    axes.text(x, y + 0.29, f"{mark}  {cell.learning_rate:g}", ha="center", va="center", color=ink, fontsize=7)


def _head(column: Column) -> str:
    control = {True: "control passed", False: "CONTROL FAILED", None: "no control"}[column.control_passed]
    return f"{label(column.name, 20)}\n(guessing {column.chance:.0f} %)\n{control}"


def _state(matrix: Matrix, name: str) -> str:
    """State bytes of a candidate, a range where the tasks' models differ."""
    found = sorted({cell.state_bytes for column in matrix.columns for cell in column.cells
                    if cell.candidate == name and cell.state_bytes is not None})  # fmt: skip
    return " to ".join(size(value) for value in dict.fromkeys(found[:1] + found[-1:])) or "-"


def _state_title(matrix: Matrix) -> str:
    contexts = {cell.context for column in matrix.columns for cell in column.cells}
    return f"state after\n{max(contexts, default=0):,} tokens"


# --- tables and files -------------------------------------------------------------------------------------------------


def matrix_table(matrix: Matrix) -> Table:
    """One row a cell: for people what matters, for machines everything."""
    header = [
        "task",
        "candidate",
        "accuracy, % (95 % interval)",
        "solved",
        "published",
        "verdict",
        "learning rate",
        "state",
    ]
    data_header = [
        "task", "candidate", "mixer", "accuracy", "low", "high", "seeds", "seeds_solved", "guessing", "solved_at",
        "published", "verdict", "control", "control_passed", "learning_rate", "at_edge", "state_bytes", "context",
        "parameters", "training_seconds", "training_loss",
    ]  # fmt: skip
    table = Table("matrix", _caption(matrix), header, [], data_header, [])
    for column in matrix.columns:
        for cell in column.cells:
            passed = sum(value >= column.solved for _, value in cell.values)
            losses = [loss for _, loss in cell.losses]
            table.rows.append(
                [
                    *(column.name, cell.candidate, cell.shown(), f"{passed} of {len(cell.values)}"),
                    *(cell.expected or "-", cell.verdict, _rate(cell)),
                    "-" if cell.state_bytes is None else size(cell.state_bytes),
                ]
            )
            table.data.append(
                [
                    *(
                        column.name,
                        cell.candidate,
                        cell.mixer,
                        cell.mean,
                        cell.low,
                        cell.high,
                        len(cell.values),
                        passed,
                    ),
                    *(column.chance, column.solved, cell.expected, cell.verdict, column.control),
                    *(_yes(column.control_passed), cell.learning_rate, _yes(cell.at_edge), cell.state_bytes),
                    *(cell.context, cell.parameters, cell.seconds, sum(losses) / len(losses) if losses else None),
                ]
            )
    return table


def _yes(value: bool | None) -> int | None:
    return None if value is None else int(value)


def _rate(cell: Cell) -> str:
    if cell.learning_rate is None:
        return "-"
    return f"{cell.learning_rate:g}{' (edge)' if cell.at_edge else ''}"


def _caption(matrix: Matrix) -> str:
    rates = ", ".join(f"{rate:g}" for rate in matrix.learning_rates) or "as configured"
    return f"Test accuracy on labelled positions; seeds {', '.join(map(str, matrix.seeds))}; learning rates {rates}."


def as_text(matrix: Matrix) -> str:
    """The matrix for a terminal: a row a candidate, with the verdict's mark where it is not in line."""
    header = ["", *(column.name for column in matrix.columns), "state"]
    rows = [
        [name, *(_short(column.cells[at]) for column in matrix.columns), _state(matrix, name)]
        for at, name in enumerate(matrix.candidates)
    ]
    rows.append(["guessing", *(f"{column.chance:.1f}" for column in matrix.columns), ""])
    return text_table(header, rows)


def _short(cell: Cell) -> str:
    if cell.mean is None:
        return "-"
    return f"{cell.mean:.1f} {cell.verdict}" if cell.verdict != "not stated" else f"{cell.mean:.1f}"


def as_json(matrix: Matrix) -> dict[str, Any]:
    """The content of `matrix.json`; numbers that are not finite become null."""
    values = dataclasses.asdict(matrix)
    for column in values["columns"]:
        for cell in column["cells"]:
            cell["values"] = {str(seed): value for seed, value in cell["values"]}
            cell["losses"] = {str(seed): value if math.isfinite(value) else None for seed, value in cell["losses"]}
            cell["rates"] = {
                f"{rate:g}": value if math.isfinite(value) else None for rate, value in cell["rates"].items()
            }
    return {"version": MATRIX_VERSION, "trilemma": __version__, **values}


def as_markdown(matrix: Matrix) -> str:
    """The matrix with its picture, what each task is, and what did not come out as published."""
    lines = [f"# {markdown_text(matrix.name)}", "", "![The matrix](matrix.png)", ""]
    if matrix.missing:
        lines += [f"**Incomplete:** {matrix.missing} planned runs have not finished.", ""]
    lines += [*_wrong(matrix), "## Tasks", "", *_rows(["task", "rows", "guessing", "solved from", "control", "source"])]
    for column in matrix.columns:
        passed = {True: "passed", False: "failed", None: "not run"}[column.control_passed]
        control = f"{column.control}: {passed}" if column.control else "none: failures are not judged"
        cells = [
            column.name,
            column.description,
            f"{column.chance:.1f} %",
            f"{column.solved:.0f} %",
            control,
            column.source,
        ]
        lines += _row(cells)
    table = matrix_table(matrix)
    lines += ["", "## Cells", "", *_rows(table.header), *(line for row in table.rows for line in _row(row)), ""]
    seconds = sum(cell.seconds or 0.0 for column in matrix.columns for cell in column.cells)
    lines += [
        f"{markdown_text(table.caption)} Everything, by learning rate and seed too, stands in `matrix.json`; each task "
        "has a report of its own under `tasks/`.",
        "",
        f"Made by `{matrix.command}`; a run of every cell takes {duration(seconds)} in all. "
        + markdown_text("; ".join(f"{key}: {setting(value)}" for key, value in matrix.environment.items())),
        "",
    ]
    return "\n".join(lines)


def _wrong(matrix: Matrix) -> list[str]:
    """What a reader must know before the numbers."""
    lines = []
    for column in matrix.columns:
        if column.control_passed is False:
            cell = next(cell for cell in column.cells if cell.candidate == column.control)
            lines.append(
                f"- **{markdown_text(column.name)}: the positive control failed** ({markdown_text(column.control)}: "
                f"{cell.shown()}). Failures of others on this task say nothing."
            )
        for cell in column.cells:
            if cell.verdict in ("disagrees", "mixed"):
                text = f"published: {cell.expected}; found {cell.shown()} at learning rate {_rate(cell)}"
                name = f"{markdown_text(column.name)}, {markdown_text(cell.candidate)}"
                lines.append(f"- {name}: {cell.verdict}. {markdown_text(text)}.")
    return [*lines, ""] if lines else []


def _rows(header: Sequence[str]) -> list[str]:
    return [*_row(header), "|" + " --- |" * len(header)]


def _row(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(markdown_text(cell) for cell in cells) + " |"]
