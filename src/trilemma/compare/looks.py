"""How every figure of the report looks: colours, marks, and names written beside curves instead of in a legend.

Colours are Okabe and Ito's palette (told apart with any colour vision); markers and dashes differ too, so that the
figures survive a black-and-white printer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from trilemma.compare.results import Report
from trilemma.compare.tables import printable

# Okabe & Ito (2008), black first: the reference is black in every figure; yellow is too light for paper.
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)))
GREY = "#767676"

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#333333",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.hashsalt": "trilemma",  # the same report gives the same bytes
    "svg.fonttype": "path",
    "text.parse_math": False,  # a name with dollar signs is a name
    "text.usetex": False,
}


@dataclass(frozen=True)
class Look:
    """How one candidate is drawn, in every figure."""

    color: str
    marker: str
    dash: str | tuple[int, tuple[float, ...]]


def looks_of(report: Report) -> dict[str, Look]:
    """The reference is black; the others take the palette in the study's order."""
    names = [row.name for row in report.candidates]
    ordered = [report.reference, *[name for name in names if name != report.reference]]
    return {
        name: Look(PALETTE[at % len(PALETTE)], MARKERS[at % len(MARKERS)], DASHES[at % len(DASHES)])
        for at, name in enumerate(ordered)
    }


def label(name: str, width: int = 26) -> str:
    """A name as it is drawn: printable and not too long."""
    text = printable(name)
    return text if len(text) <= width else text[: width - 1] + "…"


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Positions near `values` (any order), at least `gap` apart, moved as little as a simple pass allows."""
    order = sorted(range(len(values)), key=lambda at: values[at])
    placed = [values[at] for at in order]
    for _ in range(100):
        moved = False
        for at in range(1, len(placed)):
            lack = gap - (placed[at] - placed[at - 1])
            if lack > 1e-9:
                placed[at - 1] -= lack / 2
                placed[at] += lack / 2
                moved = True
        if not moved:
            break
    result = [0.0] * len(values)
    for at, position in zip(order, placed, strict=True):
        result[at] = position
    return result


def name_the_ends(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Writes each curve's name right of its last point (name, x, y, colour); names are moved apart vertically."""
    if not ends:
        return
    figure = axes.get_figure()
    assert figure is not None
    height = axes.get_window_extent().height
    points = [axes.transData.transform((x, y))[1] - axes.get_window_extent().y0 for _, x, y, _ in ends]
    line = 12.0 * figure.dpi / 72.0
    for (name, x, y, color), place in zip(ends, spread(points, line), strict=True):
        axes.annotate(
            label(name),
            xy=(x, y),
            xytext=(1.03, place / height),
            textcoords="axes fraction",
            color=color,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 2},
        )
