"""The report's tables, each once: HTML, Markdown, the terminal and CSV all show the same rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from trilemma.compare.results import CandidateResult, Corner, Report
from trilemma.compare.words import amount

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table for people (`rows`, formatted) and for machines (`data`, raw values)."""

    name: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    data_header: list[str]
    data: list[list[Cell]]

    def csv(self) -> str:
        """Raw values. Text that a spreadsheet would take for a formula is quoted with an apostrophe."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(self.data_header)
        for row in self.data:
            writer.writerow([_csv_cell(cell) for cell in row])
        return stream.getvalue()


def _csv_cell(cell: Cell) -> str:
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return ""
    if isinstance(cell, str):
        return f"'{cell}" if cell.lstrip()[:1] in ("=", "+", "-", "@") or cell[:1] in ("\t", "\r") else cell
    return repr(cell)


def all_tables(report: Report) -> list[Table]:
    """Every table of the report, in reading order; one without rows is left out."""
    tables = [
        result_table(report),
        triangle_table(report),
        pair_table(report),
        training_table(report),
        inference_table(report),
        stability_table(report),
        sweep_table(report),
        curve_table(report),
        sample_table(report),
    ]
    return [table for table in tables if table.data]


def duration(seconds: float) -> str:
    """Seconds for people: "48 s", "12 min 30 s", "3 h 05 min"."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: float) -> str:
    """Bytes for people."""
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def times(corner: Corner | None) -> str:
    """How many times as good as the reference."""
    return "-" if corner is None or not math.isfinite(corner.log2_ratio) else f"×{corner.times:.2f}"


def shown(value: float | None, digits: int = 3) -> str:
    """A number to `digits` significant digits, or a dash."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def _all_rows(report: Report) -> list[CandidateResult]:
    return [*report.candidates, *report.controls]


def best_first(report: Report) -> list[CandidateResult]:
    """Candidates by quality, then the controls."""
    ranked = sorted(
        report.candidates, key=lambda row: row.quality.interval.mean, reverse=report.metric.higher_is_better
    )
    return [*ranked, *report.controls]


def summary_table(report: Report) -> str:
    """The results as the terminal shows them: what fits in about a hundred columns."""
    metric = report.metric
    header = [
        "candidate",
        "parameters",
        f"{metric.title} (95 % interval)",
        "seeds",
        "training",
        "ms per token",
        "state",
    ]
    rows = []
    for row in best_first(report):
        found = row.quality.interval
        cost, state = _cost_and_state(row, report.context)
        mark = " *" if row.name == report.reference else ""
        quality = f"{metric.format(found.mean)} ({metric.format(found.low)} to {metric.format(found.high)})"
        rows.append(
            [
                *(f"{row.name}{mark}", amount(row.parameters["total"]), quality, str(found.seeds)),
                *(duration(row.training.seconds), shown(cost), "-" if state is None else size(state)),
            ]
        )
    note = "* reference"
    if report.context is not None:
        note += f"; ms per token and state after {report.context:,} tokens"
    return f"{text_table(header, rows)}\n{note}"


def _cost_and_state(row: CandidateResult, context: int | None) -> tuple[float | None, float | None]:
    """ms per token and state bytes after `context` tokens; None where they were not measured."""
    if context is None or row.inference is None:
        return None, None
    return row.inference.ms_per_token[context], row.inference.state_bytes[context]


def result_table(report: Report) -> Table:
    """The table that answers the question: best quality first, with intervals and both costs."""
    metric = report.metric
    header = ["candidate", "mixer", "layout", "parameters (non-embedding)", metric.title, "95 % interval", "seeds"]
    header += ["training", "tokens/s", "ms per token", "state"]
    data_header = ["candidate", "role", "mixer", "layout", "parameters", "non_embedding_parameters", metric.name]
    data_header += ["low", "high", "seeds", "training_seconds", "tokens_per_second", "context", "ms_per_token"]
    data_header += ["state_bytes"]
    if report.price_per_hour is not None:
        header += ["to train", "per M tokens"]
        data_header += ["price_train", "price_per_million_tokens"]
    rows: list[list[str]] = []
    data: list[list[Cell]] = []
    for row in best_first(report):
        found = row.quality.interval
        ms, state = _cost_and_state(row, report.context)
        label = f"{row.name} (reference)" if row.name == report.reference else row.name
        label = label if row.role == "candidate" else f"{row.name} (control)"
        cells = [label, row.mixer, row.layout]
        cells += [f"{amount(row.parameters['total'])} ({amount(row.parameters['non_embedding'])})"]
        cells += [metric.format(found.mean), f"{metric.format(found.low)} to {metric.format(found.high)}"]
        cells += [str(found.seeds), duration(row.training.seconds), f"{row.training.tokens_per_second:,.0f}"]
        cells += [shown(ms), size(state) if state is not None else "-"]
        values: list[Cell] = [row.name, row.role, row.mixer, row.layout, row.parameters["total"]]
        values += [row.parameters["non_embedding"], found.mean, found.low, found.high, found.seeds]
        values += [row.training.seconds, row.training.tokens_per_second]
        values += [None if ms is None else report.context, ms, state]
        if report.price_per_hour is not None:
            train, per_million = row.price.get("train"), row.price.get("per_million_tokens")
            cells += [shown(train), shown(per_million)]
            values += [train, per_million]
        rows.append(cells)
        data.append(values)
    caption = (
        f"{metric.label[:1].upper()}{metric.title[1:]} on {report.documents:,} {report.split} examples, "
        f"{'higher' if metric.higher_is_better else 'lower'} is better. Training time is the median over seeds. "
        f"{_where_costs(report)}"
    )
    if not all(row.quality.interval.seeds_counted for row in report.candidates):
        caption += " With one seed, the interval speaks about the choice of test examples only."
    return Table("results", caption, header, rows, data_header, data)


def _where_costs(report: Report) -> str:
    """At which context costs of inference are compared."""
    if report.context is not None:
        return f"Time and state are of one sequence after {report.context:,} tokens, the most measured for all."
    if any(row.inference is not None for row in report.candidates):
        return "No context was measured for all candidates: ms per token and state are not compared here."
    return "Inference cost was not measured."


def triangle_table(report: Report) -> Table:
    """The three corners, raw and against the reference."""
    header = ["candidate", f"quality: {report.metric.title}", "against reference"]
    after = "" if report.context is None else f" after {report.context:,}"
    header += ["training: s per M tokens", "against reference", f"inference: ms per token{after}", "against reference"]
    data_header = ["candidate", "quality", "quality_log2", "training_seconds_per_million", "training_log2"]
    data_header += ["ms_per_token", "inference_log2"]
    rows: list[list[str]] = []
    data: list[list[Cell]] = []
    for row in report.candidates:
        inference = row.corners.get("inference")
        quality, training = row.corners["quality"], row.corners["training"]
        rows.append(
            [
                *(
                    row.name,
                    report.metric.format(quality.value),
                    times(quality),
                    shown(training.value),
                    times(training),
                ),
                *(shown(inference.value) if inference else "-", times(inference)),
            ]
        )
        data.append(
            [
                *(row.name, quality.value, quality.log2_ratio, training.value, training.log2_ratio),
                *((inference.value, inference.log2_ratio) if inference else (None, None)),
            ]
        )
    caption = f"×1 is the reference, {report.reference}; above 1 is better in every corner (for costs: cheaper)."
    return Table("triangle", caption, header, rows, data_header, data)


def pair_table(report: Report) -> Table:
    """Every pair of candidates."""
    width = report.metric.decimals
    header = ["pair", "difference", "95 % interval", "p (Holm)", "told apart"]
    rows = [
        [
            f"{test.first} - {test.second}",
            f"{test.difference:+.{width}f}",
            f"{test.low:+.{width}f} to {test.high:+.{width}f}",
            shown(test.adjusted, 2),
            "no verdict" if test.adjusted is None or report.withheld else "yes" if test.separated else "no",
        ]
        for test in report.pairs
    ]
    data: list[list[Cell]] = [
        [test.first, test.second, test.difference, test.low, test.high, test.p, test.adjusted, test.seeds]
        for test in report.pairs
    ]
    data_header = ["first", "second", "difference", "low", "high", "p", "p_holm", "seeds"]
    caption = (
        f"Differences in {report.metric.title}. The interval is for the pair alone; "
        "Holm's correction over all pairs decides what is told apart."
    )
    return Table("pairs", caption, header, rows, data_header, data)


def training_table(report: Report) -> Table:
    """What training cost."""
    header = ["candidate", "learning rate", "steps", "tokens", "training FLOPs", "time", "tokens/s", "peak memory"]
    rows, data = [], []
    for row in _all_rows(report):
        cost = row.training
        rows.append(
            [
                *(row.name, f"{cost.learning_rate:g}", f"{cost.steps:,.0f}", amount(cost.tokens), amount(cost.flops)),
                *(duration(cost.seconds), f"{cost.tokens_per_second:,.0f}", size(cost.peak_memory_bytes)),
            ]
        )
        values: list[Cell] = [row.name, cost.learning_rate, cost.steps, cost.tokens, cost.flops, cost.seconds]
        data.append([*values, cost.tokens_per_second, cost.peak_memory_bytes])
    data_header = ["candidate", "learning_rate", "steps", "tokens", "flops", "seconds", "tokens_per_second"]
    caption = "Medians over the full-budget runs. Tokens are scored target tokens; FLOPs are counted from formulas."
    return Table("training", caption, header, rows, [*data_header, "peak_memory_bytes"], data)


def inference_table(report: Report) -> Table:
    """Cost of a token by context: a column for each context to read, a row for each cell in the data."""
    measured = [row.inference for row in report.candidates if row.inference is not None]
    contexts = sorted({context for curve in measured for context in curve.ms_per_token})
    rows: list[list[str]] = []
    data: list[list[Cell]] = []
    for curve in measured:
        for batch, costs in {1: curve.ms_per_token, **curve.batched}.items():
            states = curve.state_bytes if batch == 1 else {}
            cells = [_cost_cell(costs.get(context), states.get(context)) for context in contexts]
            rows.append([curve.name, str(batch), *cells])
            data += [[curve.name, context, batch, cost, states.get(context)] for context, cost in costs.items()]
    caption = "ms of one decoding step after so many tokens, and the state that one sequence then keeps."
    header = ["candidate", "batch", *(f"{context:,} tokens" for context in contexts)]
    return Table("inference", caption, header, rows, ["candidate", "context", "batch", "ms", "state_bytes"], data)


def _cost_cell(cost: float | None, state: float | None) -> str:
    return shown(cost) if state is None else f"{shown(cost)} ms, {size(state)}"


def stability_table(report: Report) -> Table:
    """Quality on validation data at a quarter, half and the full budget, with ranks."""
    header = ["candidate", "at a quarter", "at half", "at the full budget"]
    rows: list[list[str]] = []
    data: list[list[Cell]] = []
    for row in report.candidates:
        cells: list[str] = [row.name]
        values: list[Cell] = [row.name]
        for share, value in row.curve.at_share.items():
            ranking = report.stability.rankings.get(share)
            rank = ranking.index(row.name) + 1 if ranking else None
            cells.append("-" if value is None else f"{value:.4f}" + (f" (rank {rank})" if rank else ""))
            values += [value, rank]
        rows.append(cells)
        data.append(values)
    data_header = ["candidate"]
    for share in ("quarter", "half", "full"):
        data_header += [f"{report.judged.key}_{share}", f"rank_{share}"]
    better = "higher" if report.judged.higher_is_better else "lower"
    caption = f"{report.judged.heading}; mean over seeds; {better} is better."
    return Table("stability", caption, header, rows, data_header, data)


def sweep_table(report: Report) -> Table:
    """The learning rates that were tried."""
    rows = [
        [point.candidate, f"{point.learning_rate:g}", f"{point.loss:.4f}", "chosen" if point.chosen else ""]
        for point in report.sweep
    ]
    data: list[list[Cell]] = [
        [point.candidate, point.learning_rate, point.loss, int(point.chosen)] for point in report.sweep
    ]
    caption = f"Best {report.criterion} at each learning rate; every candidate had the same allowance."
    header = ["candidate", "learning rate", report.criterion, ""]
    data_header = ["candidate", "learning_rate", report.criterion.replace("validation ", "valid_"), "chosen"]
    return Table("learning_rates", caption, header, rows, data_header, data)


def curve_table(report: Report) -> Table:
    """The data of the quality curves: for CSV, too long to print."""
    data: list[list[Cell]] = [
        [
            row.name,
            point.step,
            point.tokens,
            point.flops,
            point.seconds,
            point.value,
            point.low,
            point.high,
            point.seeds,
        ]
        for row in _all_rows(report)
        for point in row.curve.points
    ]
    data_header = ["candidate", "step", "tokens", "flops", "seconds", report.judged.key, "low", "high", "seeds"]
    return Table("curves", "Quality on validation data along training.", [], [], data_header, data)


def sample_table(report: Report) -> Table:
    """Outputs side by side: for CSV; the pages lay them out themselves."""
    names = [row.name for row in report.candidates]
    data: list[list[Cell]] = [
        [sample.index, sample.source, sample.reference, *[sample.outputs.get(name) for name in names]]
        for sample in report.samples
    ]
    return Table("samples", "Outputs of the first seed.", [], [], ["index", "source", "reference", *names], data)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal; control characters in cells are shown escaped."""
    cells = [[printable(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def printable(text: str) -> str:
    """Text without control, line-breaking or direction-changing characters: each is shown as its escape."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
