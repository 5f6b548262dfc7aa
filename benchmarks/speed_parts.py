"""What docs/speed.md is made of: promises, tables, words for a result's origin, and pictures. See speed_page.py."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from trilemma.compare.looks import DASHES, GREY, MARKERS, PALETTE

NOT_MEASURED = "not measured"

Result = dict[str, Any]
Promise = tuple[str, str, str, str]  # gate or goal, what is promised, what is reached, whether that is met


@dataclass
class Section:
    """A part of the page.

    Attributes:
        about: what is measured, and in which size.
        promises: rows of the first table. table: the measurements, in Markdown.
        bars: what is compared -> the ratios of its pairs. curves: of the growth: mixer -> (length, us a token, bytes).
        origin: hardware, ceilings, commit and command.
    """

    title: str
    about: str
    promises: list[Promise]
    table: str = ""
    bars: dict[str, list[float]] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)
    origin: str = ""


def promise(kind: str, text: str, values: Sequence[float | None] = (), least: float = 0, most: float = 0) -> Promise:
    """Holds when every value is at least `least`, or at most `most`; None is one that was not measured."""
    known = [value for value in values if value is not None]
    if not known:
        return kind, text, NOT_MEASURED, NOT_MEASURED
    broken = any(value > most if most else value < least for value in known)
    met = "no" if broken else "yes" if len(known) == len(values) else "yes, as far as measured"
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    return kind, text, low if low == high else f"{low} to {high}", met


# --- words and Markdown


def median(runs: Sequence[Result], name: str) -> float | None:
    """None for results that are older than this number."""
    return statistics.median(run[name] for run in runs) if all(name in run for run in runs) else None


def megabytes(size: float | None) -> str:
    return NOT_MEASURED if size is None else f"{size / 1e6:,.0f}"


def spread(ratios: Sequence[float]) -> str:
    """Median and range of the pairs."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def reason(row: Result) -> str:
    """Why there is no number: the last line of what failed."""
    return f"{NOT_MEASURED}: {row['reason'].splitlines()[-1][:160]}".replace("|", "\\|")


def origin(result: Result) -> str:
    """Hardware, ceilings, commit, date and command."""
    machine = result["environment"]
    name = machine["cpu"] if machine["gpu"] in (None, "None") else machine["gpu"]  # a report stores it as text
    cores, threads = counted(machine["cores"], "core"), counted(machine["threads"], "thread")
    commits = machine["commit"] if isinstance(machine["commit"], list) else [machine["commit"]]  # runs may differ
    text = f"{name}, {cores}, {threads}, torch {machine['torch']}, commit {', '.join(map(str, commits))}"
    if (ceilings := result.get("ceilings")) is not None:
        text += (
            f", {result['date'][:10]}; ceilings: {ceilings['bfloat16_gflops']:.0f} GFLOP/s in bfloat16, "
            f"{ceilings['float32_gflops']:.0f} in float32, {ceilings['bandwidth'][-1][1]:.0f} GB/s from memory, a tiny "
            f"operation {ceilings['overhead_us']:.1f} us"
        )
    return textwrap.fill(f"Measured on {text}:", 120) + f"\n\n    {result['command']}"


def counted(count: int | str, noun: str) -> str:
    return f"{count} {noun}{'' if int(count) == 1 else 's'}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- pictures


def bars(section: Section) -> Figure:
    """Medians of the ratios with the range of their pairs; the line at 1 is the peer."""
    figure = Figure(figsize=(7.2, 0.9 + 0.3 * len(section.bars)), layout="constrained")
    axes = figure.add_subplot()
    for at, values in enumerate(section.bars.values()):
        middle = statistics.median(values)
        ends = [[middle - min(values)], [max(values) - middle]]
        color = PALETTE[3] if middle >= 1 else PALETTE[2]
        axes.barh(at, middle, height=0.6, color=color, xerr=ends, ecolor=GREY, capsize=2)
    axes.axvline(1, color=PALETTE[0], linewidth=1)
    axes.set_yticks(range(len(section.bars)), list(section.bars))
    axes.set_ylim(len(section.bars) - 0.5, -0.5)
    axes.set_xlabel("peer's time / ours")
    axes.set_title(section.title)
    return figure


def curves(section: Section) -> Figure:
    """Time and memory against the length, both logarithmic."""
    figure = Figure(figsize=(7.2, 7.2), layout="constrained")
    panels = figure.subplots(2, 1)
    for axes, place, label, scale in ((panels[0], 1, "us a token", 1.0), (panels[1], 2, "MB", 1e-6)):
        for at, (mixer, points) in enumerate(section.curves.items()):
            lengths, values = [point[0] for point in points], [point[place] * scale for point in points]
            dash, color = divmod(at, len(PALETTE))
            look = {"color": PALETTE[color], "marker": MARKERS[color], "linestyle": DASHES[dash % len(DASHES)]}
            axes.loglog(lengths, values, label=mixer, **look)
        axes.set_xticks(lengths)
        axes.xaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("length")
        axes.set_ylabel(label)
    panels[0].set_title(section.title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure
