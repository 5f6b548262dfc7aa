"""The triangle: quality, training cost and inference cost of each candidate against the reference, on one log scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trilemma.compare.looks import GREY, Look, label, looks_of
from trilemma.compare.results import CandidateResult, Corner, Report
from trilemma.compare.tables import shown, size

_ANGLES = {"quality": 90.0, "training": 210.0, "inference": 330.0}


def draw_triangle(report: Report) -> Figure | None:
    """One small triangle for each candidate, all on one scale; None without all three corners."""
    rows = report.candidates
    if not all(name in row.corners for row in rows for name in _ANGLES):
        return None
    finite = [abs(c.log2_ratio) for row in rows for c in row.corners.values() if math.isfinite(c.log2_ratio)]
    reach = max(1.0, math.ceil(max(finite, default=1.0)))
    columns = 2 if len(rows) in (2, 4) else min(3, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(3.5 * columns, 3.3 * lines), layout="constrained")
    looks = looks_of(report)
    for at, row in enumerate(rows):
        axes = figure.add_subplot(lines, columns, at + 1)
        _one_triangle(axes, row, report, looks[row.name], reach)
    return figure


def _one_triangle(axes: Axes, row: CandidateResult, report: Report, look: Look, reach: float) -> None:
    """Radius 1 is the rim; the reference's ring (ratio 1) lies in the middle of the drawn range."""
    axes.set_axis_off()
    axes.set_aspect("equal")
    _grid(axes, reach)
    values = [row.corners[name].log2_ratio for name in _ANGLES]
    radii = [_radius(value if math.isfinite(value) else -reach, reach) for value in values]
    xs, ys = _outline(radii)
    axes.fill(xs, ys, color=look.color, alpha=0.12, zorder=2)
    axes.plot(xs, ys, color=look.color, marker=look.marker, zorder=3, clip_on=False)
    title = label(row.name) + (" (reference)" if row.name == report.reference else "")
    axes.set_title(title, color=look.color, loc="center")
    texts = _corner_texts(row, report)
    places = {"quality": (0.0, 1.08, "bottom"), "training": (-0.95, -0.58, "top"), "inference": (0.95, -0.58, "top")}
    for name, (x, y, base) in places.items():
        axes.text(x, y, texts[name], ha="center", va=base, fontsize=8, color="#222222", linespacing=1.25)
    axes.set_xlim(-1.5, 1.5)
    axes.set_ylim(-1.05, 1.4)


def _grid(axes: Axes, reach: float) -> None:
    """Rings at factors of two (of four, sixteen where the range is wide); those above the reference are named."""
    stride = max(1, round(reach / 2))
    steps = sorted({0, *range(stride, int(reach) + 1, stride), *range(-stride, -int(reach) - 1, -stride)})
    for step in steps:
        place = _radius(step, reach)
        xs, ys = _outline([place] * 3)
        axes.plot(xs, ys, color=GREY if step == 0 else "#d4d4d4", lw=1.6 if step == 0 else 0.6, zorder=1)
        if step >= 0:
            axes.text(-0.05, place, f"×{2**step}", fontsize=6, color=GREY, zorder=1.2, ha="right", va="center")
    for angle in _ANGLES.values():
        x, y = _polar(1.0, angle)
        axes.plot([0, x], [0, y], color="#d4d4d4", lw=0.6, zorder=1)


def _radius(log2_ratio: float, reach: float) -> float:
    """-reach lies at 0.15, +reach at the rim."""
    return 0.15 + 0.85 * (log2_ratio + reach) / (2.0 * reach)


def _polar(radius: float, angle: float) -> tuple[float, float]:
    return radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))


def _outline(radii: Sequence[float]) -> tuple[list[float], list[float]]:
    points = [_polar(radius, angle) for radius, angle in zip(radii, _ANGLES.values(), strict=True)]
    points.append(points[0])
    return [x for x, _ in points], [y for _, y in points]


def _corner_texts(row: CandidateResult, report: Report) -> dict[str, str]:
    def against(corner: Corner) -> str:
        if row.name == report.reference:
            return "×1"
        return f"×{corner.times:.2f}" if math.isfinite(corner.log2_ratio) else "ratio undefined"

    quality, training, inference = (row.corners[name] for name in _ANGLES)
    assert row.inference is not None and report.context is not None, "there is an inference corner"
    context = f"{report.context:,} ({size(row.inference.state_bytes[report.context])})"
    return {
        "quality": f"quality {against(quality)}\n{report.metric.label} {report.metric.sentence(quality.value)}",
        "training": f"training {against(training)}\n{shown(training.value)} s per M tokens",
        "inference": f"inference {against(inference)}\n{shown(inference.value)} ms per token\nat {context}",
    }
