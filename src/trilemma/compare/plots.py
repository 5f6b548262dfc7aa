"""The report's figures: PNG and SVG by matplotlib's own canvases; no display, no browser, no global state."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from trilemma.compare.looks import GREY, STYLE, Look, label, looks_of, name_the_ends
from trilemma.compare.results import CandidateResult, Report
from trilemma.compare.tables import size
from trilemma.compare.triangle import draw_triangle
from trilemma.compare.words import amount


@dataclass(frozen=True)
class Plot:
    """A figure of the report: `name` is its file's stem, `caption` says how to read it."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: bytes


def all_plots(report: Report) -> list[Plot]:
    """Every figure for which the report has data, in reading order."""
    drawings: list[tuple[str, str, str, Callable[[Report], Figure | None]]] = [
        (
            "triangle",
            "The triangle",
            f"Each corner on a logarithmic scale against the reference ({report.reference}, grey): outward is better, "
            "the rings are equal factors. Raw values stand beside.",
            draw_triangle,
        ),
        ("quality", "Quality", "Mean over seeds with its 95 % interval; small marks are single seeds.", draw_quality),
        (
            "curves",
            "Quality against cost",
            f"{report.judged.heading}, against tokens, FLOPs and seconds; bands are the range over seeds.",
            draw_curves,
        ),
        (
            "inference",
            "Inference",
            "Time and state of one sequence after so many tokens of context.",
            draw_inference,
        ),
        (
            "stability",
            "Rank stability",
            f"Rank by {report.judged.label} along the budget; 1 is best.",
            draw_stability,
        ),
        (
            "learning_rates",
            "Learning rates",
            f"Best {report.criterion} at each learning rate tried; the filled mark was chosen.",
            draw_sweep,
        ),
    ]
    plots = []
    with style():
        for name, title, caption, draw in drawings:
            figure = draw(report)
            if figure is not None:
                plots.append(Plot(name, title, caption, image(figure, "png"), image(figure, "svg")))
    return plots


@contextmanager
def style() -> Iterator[None]:
    """How every figure looks, while it is drawn."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # Names in scripts that the bundled font lacks are drawn as boxes; the tables show them as they are.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def image(figure: Figure, kind: str) -> bytes:
    """A figure as "png" or "svg"; the same figure gives the same bytes."""
    stream = io.BytesIO()
    metadata = {"Date": None, "Creator": "trilemma"} if kind == "svg" else {"Software": "trilemma"}
    figure.savefig(stream, format=kind, dpi=150, metadata=metadata, bbox_inches="tight", facecolor="white")
    return stream.getvalue()


def draw_quality(report: Report) -> Figure | None:
    """Means with intervals, best on top."""
    rows = sorted(report.candidates, key=lambda r: r.quality.interval.mean, reverse=report.metric.higher_is_better)
    rows = [*rows, *report.controls]
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    looks = looks_of(report)
    for at, row in enumerate(rows):
        look = looks.get(row.name, Look(GREY, "o", "-"))
        found = row.quality.interval
        axes.plot([found.low, found.high], [at, at], color=look.color, lw=2.2, solid_capstyle="butt")
        for _, value in row.quality.values:
            axes.plot([value], [at + 0.22], marker="|", color=look.color, markersize=6, alpha=0.7)
        axes.plot([found.mean], [at], marker=look.marker, color=look.color, markersize=7)
        axes.annotate(
            report.metric.format(found.mean), (found.mean, at), (0, 7), textcoords="offset points",
            ha="center", color=look.color, fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([label(row.name) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.7)
    axes.grid(axis="y", visible=False)
    better = "higher is better" if report.metric.higher_is_better else "lower is better"
    axes.set_xlabel(f"{report.metric.title} ({better})")
    return figure


def draw_curves(report: Report) -> Figure | None:
    """Quality on validation data against the three costs of training."""
    rows = [row for row in report.candidates if row.curve.points]
    if not rows:
        return None
    figure = Figure(figsize=(11, 3.6))
    figure.subplots_adjust(left=0.06, right=0.84, wspace=0.12, bottom=0.16, top=0.92)
    looks = looks_of(report)
    titles = {"tokens": "scored tokens", "flops": "training FLOPs", "seconds": "seconds of training"}
    for at, (axis, title) in enumerate(titles.items()):
        axes = figure.add_subplot(1, 3, at + 1)
        ends = []
        for row in rows:
            look, points = looks[row.name], row.curve.points
            xs = [float({"tokens": p.tokens, "flops": p.flops, "seconds": p.seconds}[axis]) for p in points]
            axes.fill_between(xs, [p.low for p in points], [p.high for p in points], color=look.color, alpha=0.15, lw=0)
            values = [p.value for p in points]
            axes.plot(xs, values, color=look.color, ls=look.dash, marker=look.marker, markevery=[-1])
            ends.append((row.name, xs[-1], values[-1], look.color))
        if not report.judged.higher_is_better and _spans(rows):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value) if value else "0"))
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(title)
        if at == 0:
            axes.set_ylabel(report.judged.title)
        else:
            axes.tick_params(labelleft=False)
        if at == 2:
            figure.draw_without_rendering()
            name_the_ends(axes, ends)
    return figure


def _spans(rows: Sequence[CandidateResult]) -> bool:
    """Whether losses span so much that a logarithmic axis reads better."""
    losses = [point.value for row in rows for point in row.curve.points]
    return min(losses) > 0 and max(losses) / min(losses) > 8


def draw_inference(report: Report) -> Figure | None:
    """ms per token and state bytes against context."""
    rows = [row for row in report.candidates if row.inference and row.inference.ms_per_token]
    if not rows:
        return None
    figure = Figure(figsize=(10, 3.8))
    figure.subplots_adjust(left=0.07, right=0.82, wspace=0.62, bottom=0.15, top=0.9)
    looks = looks_of(report)
    for at, title in enumerate(("ms per token", "state of one sequence")):
        axes = figure.add_subplot(1, 2, at + 1)
        ends = []
        for row in rows:
            assert row.inference is not None
            curve = row.inference.ms_per_token if at == 0 else row.inference.state_bytes
            xs, ys = list(curve), [float(value) for value in curve.values()]
            look = looks[row.name]
            axes.plot(xs, ys, color=look.color, ls=look.dash, marker=look.marker)
            ends.append((row.name, float(xs[-1]), ys[-1], look.color))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if at == 1:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.set_xlabel("tokens of context")
        figure.draw_without_rendering()
        name_the_ends(axes, ends)
    return figure


def draw_stability(report: Report) -> Figure | None:
    """Ranks along the budget, as lines that cross where the order flips."""
    rankings = report.stability.rankings
    if len(rankings) < 2 or len(report.candidates) < 2:
        return None
    figure = Figure(figsize=(6.4, 0.9 + 0.4 * len(report.candidates)), layout="constrained")
    axes = figure.add_subplot()
    looks = looks_of(report)
    shares = list(rankings)
    for row in report.candidates:
        look = looks[row.name]
        ranks = [rankings[share].index(row.name) + 1 for share in shares]
        axes.plot(range(len(shares)), ranks, color=look.color, marker=look.marker, ls=look.dash, markersize=7)
        axes.annotate(
            label(row.name), (len(shares) - 1, ranks[-1]), (10, 0), textcoords="offset points",
            color=look.color, va="center", annotation_clip=False,
        )  # fmt: skip
    axes.set_xticks(range(len(shares)))
    names = {"quarter": "a quarter", "half": "half", "full": "full budget"}
    axes.set_xticklabels([names[share] for share in shares])
    axes.set_yticks(range(1, len(report.candidates) + 1))
    axes.set_ylim(len(report.candidates) + 0.4, 0.6)
    axes.set_xlim(-0.15, len(shares) - 0.85)
    axes.set_ylabel("rank")
    axes.grid(axis="x", visible=False)
    return figure


def draw_sweep(report: Report) -> Figure | None:
    """Loss against learning rate."""
    if not report.sweep:
        return None
    figure = Figure(figsize=(6.6, 3.6))
    figure.subplots_adjust(left=0.11, right=0.74, bottom=0.15, top=0.95)
    axes = figure.add_subplot()
    looks = looks_of(report)
    ends = []
    for row in report.candidates:
        points = [point for point in report.sweep if point.candidate == row.name]
        if not points:
            continue
        look = looks[row.name]
        xs, ys = [point.learning_rate for point in points], [point.loss for point in points]
        axes.plot(xs, ys, color=look.color, ls=look.dash, marker=look.marker, markerfacecolor="white")
        for point in points:
            if point.chosen:
                axes.plot([point.learning_rate], [point.loss], color=look.color, marker=look.marker, markersize=8)
        ends.append((row.name, xs[-1], ys[-1], look.color))
    axes.set_xscale("log")
    rates = sorted({point.learning_rate for point in report.sweep})
    axes.set_xticks(rates)
    axes.set_xticklabels([f"{rate:g}" for rate in rates])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"best {report.criterion}")
    figure.draw_without_rendering()
    name_the_ends(axes, ends)
    return figure
