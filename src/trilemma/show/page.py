"""Maps as PNGs, and all of them on one page: self-contained, no script, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trilemma import __version__
from trilemma.show.maps import Map
from trilemma.show.reading import Reading

_PANELS = 8  # heads drawn; the mean of all of them comes first
_TICKS = 48  # tokens named along an axis
_BLUE, _ORANGE = "#0072B2", "#D55E00"
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.family": ["DejaVu Sans"],
    "axes.titlesize": 8,
    "axes.edgecolor": "#999999",
    "svg.hashsalt": "trilemma",
    "svg.fonttype": "none",  # the reader's own fonts know more scripts
    "text.parse_math": False,
}
_POSITIVE = LinearSegmentedColormap.from_list("weights", ["white", _BLUE, "#00263d"])
_SIGNED = LinearSegmentedColormap.from_list("signed", ["#4d2100", _ORANGE, "white", _BLUE, "#00263d"])


def write_page(folder: Path, name: str, text: str, reading: Reading, maps: Sequence[Map]) -> list[Path]:
    """Writes `show.html` and a PNG of every map.

    Args:
        folder: made if need be.
        name: the run's.
        text: what was asked about.

    Returns:
        The files, the page first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, files, images = folder / "show.html", [], {}
    for number, shown in enumerate(maps):
        if shown.matrix is not None:
            png, svg = _drawn(shown, reading)
            files.append(folder / f"{shown.file}.png")
            files[-1].write_bytes(png)
            images[number] = base64.b64encode(svg).decode("ascii")
    environment = Environment(
        loader=PackageLoader("trilemma.show"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    style = Path(__file__).with_name("templates").joinpath("show.css").read_text(encoding="utf-8")
    html = environment.get_template("show.html.j2").render(
        name=name, text=text, reading=reading, maps=list(enumerate(maps)), images=images, drawn=_PANELS, style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii"),
        version=__version__,
    )  # fmt: skip
    page.write_text(html, encoding="utf-8")
    return [page, *files]


def shares(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """[H, L, K] each row divided by the sum of its absolute values; rows of zeros stay."""
    total = np.abs(matrix).sum(axis=-1, keepdims=True)
    return matrix / np.where(total > 0, total, 1)


def _drawn(shown: Map, reading: Reading) -> tuple[bytes, bytes]:
    """PNG and SVG of one map."""
    assert shown.matrix is not None
    weights = shares(shown.matrix.double().numpy())
    own = reading.source_labels if shown.stack == "encoder" and reading.source_labels else reading.labels
    columns = {"inputs": own, "source": reading.source_labels, "blocks": []}[shown.columns]
    with _style():
        figure = draw(weights, own, columns, shown.title)
        png = _bytes(figure, "png")
        figure.suptitle("")  # the page has headings of its own
        figure.set_layout_engine("none")  # it is laid out
        return png, _bytes(figure, "svg")


def draw(weights: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], title: str) -> Figure:
    """The mean over heads with its tokens named, and single heads beside it.

    Args:
        weights: [H, L, K] of `shares`.
        rows, columns: the tokens' names; columns may be empty.
        title: above all.
    """
    heads, length, wide = weights.shape
    chosen = np.unique(np.linspace(0, heads - 1, min(heads, _PANELS)).round().astype(int))
    signed = bool(weights.min() < -1e-6)
    norm = FuncNorm((_root, _square), vmin=-1.0 if signed else 0.0, vmax=1.0)
    look: dict[str, Any] = {"cmap": _SIGNED if signed else _POSITIVE, "norm": norm, "interpolation": "nearest"}
    look["aspect"] = "equal" if min(length, wide) > 0.25 * max(length, wide) else "auto"
    across = -(-len(chosen) // 2)
    edge = min(max(2.6, 0.17 * max(length, wide)), 6.5)  # inches
    small = max(1.4, 0.38 * edge)
    high = edge * length / max(length, wide)
    figure = Figure(figsize=(edge + 1.6 + across * (small + 0.1), max(high + 1.5, 3.4)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    grid = figure.add_gridspec(2, 1 + across, width_ratios=[edge + 0.8] + [small] * across)
    mean = figure.add_subplot(grid[:, 0])
    size = "mean size" if signed else "mean"  # signs would cancel
    mean.imshow(np.abs(weights).mean(axis=0) if heads > 1 else weights[0], **look)
    mean.set_title(f"{size} of {heads} heads" if heads > 1 else "one head")
    # A mixer that works through its queries in parts has a map for each, whose rows are some of the tokens.
    _name(mean, rows if len(rows) == length else [], columns)
    for at, head in enumerate(chosen if heads > 1 else []):
        axes = figure.add_subplot(grid[at // across, 1 + at % across])
        axes.imshow(weights[head], **look)
        axes.set_title(f"head {head + 1}")
        axes.set_xticks([])
        axes.set_yticks([])
    bar = figure.colorbar(ScalarMappable(norm, look["cmap"]), ax=figure.axes, fraction=0.02, pad=0.01)
    bar.set_ticks([-1, -0.25, 0, 0.25, 1] if signed else [0, 0.04, 0.25, 0.5, 1])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    return figure


def _name(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Tokens along the axes, or their numbers where there are too many."""
    axes.tick_params(length=0, labelsize=7)
    for axis, names, turned in ((axes.xaxis, columns, 90), (axes.yaxis, rows, 0)):
        if 0 < len(names) <= _TICKS:
            axis.set_ticks(range(len(names)), names, rotation=turned)


def _root(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Small weights are seen, too."""
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sign(values) * np.square(values)


@contextmanager
def _style() -> Iterator[None]:
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # Scripts that the bundled font lacks are boxes in the PNG; the page is drawn with the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _bytes(figure: Figure, kind: str) -> bytes:
    stream = io.BytesIO()
    metadata = {"Date": None, "Creator": "trilemma"} if kind == "svg" else {"Software": "trilemma"}
    figure.savefig(stream, format=kind, dpi=150, metadata=metadata, facecolor="white")
    return stream.getvalue()
