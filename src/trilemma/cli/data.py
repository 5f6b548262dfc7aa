"""`trilemma data check`: encoding, alignment, duplicates, overlap, lengths, limits, tokens and time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilemma.cli.common import Json, print_json, say
from trilemma.errors import CapabilityError, ConfigError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from trilemma.config import Source
    from trilemma.data.check import CheckReport, Finding, SplitReport

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)

EXIT_FOUND_ERRORS = 1
QUANTILES_SHOWN = ("min", "median", "p95", "p99", "max")


@app.callback()
def _group() -> None:
    """Looks at data before anything is trained on them."""


@app.command()
def check(
    files: Annotated[
        list[Path],
        typer.Argument(help="two aligned text files, or .txt, .tsv, .jsonl, .parquet files, or a config .yaml"),
    ],
    valid: Annotated[list[Path] | None, typer.Option("--valid", help="validation file; twice for two sides")] = None,
    test: Annotated[list[Path] | None, typer.Option("--test", help="test file; twice for two sides")] = None,
    task: Annotated[str | None, typer.Option("--task", help="seq2seq, language-model, classification, ...")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="tokenizer.json or SentencePiece model: exact token counts")
    ] = None,
    max_source_length: Annotated[int, typer.Option(min=1, help="tokens; longer ones are counted")] = 256,
    max_target_length: Annotated[int, typer.Option(min=1, help="tokens; longer ones are counted")] = 256,
    tokens_per_second: Annotated[
        float | None, typer.Option("--tokens-per-second", help="speed of training, for the time estimate")
    ] = None,
    json: Json = False,
) -> None:
    """Reports encoding errors by line, alignment, empty and repeated lines, train/test overlap, lengths and tokens.

    Exit code 0: training would read everything; 1: it would stop at some lines; 2: a file cannot be read at all.
    """
    from trilemma.data.check import check_data
    from trilemma.data.readers import FIELDS
    from trilemma.data.tokenizer import Tokenizer

    if tokens_per_second is not None and tokens_per_second <= 0:
        raise ConfigError(f"--tokens-per-second: a positive number is needed, found {tokens_per_second}")
    if len(files) == 1 and files[0].suffix in (".yaml", ".yml"):
        if valid or test or task:
            raise ConfigError(f"{files[0]} names its own files and task: leave out --valid, --test and --task")
        splits, task, limits = _from_config(files[0])
    else:
        task = task or _guess_task(files)
        if task not in FIELDS:
            raise ConfigError(f'--task: unknown task "{task}"{nearest(task, FIELDS)}')
        given = {"train": files, "valid": valid or [], "test": test or []}
        splits = {name: _sources(paths, task) for name, paths in given.items() if paths}
        limits = {"source": max_source_length, "target": max_target_length}
        if task == "classification":
            limits = {"text": max_source_length}
    if FIELDS[task] == ("tokens", "labels"):
        raise CapabilityError(
            f"data check reads lines of text; {task} has none: trilemma train checks its examples before it begins"
        )
    loaded = Tokenizer.load(tokenizer) if tokenizer else None
    report = check_data(splits, task, loaded, limits, tokens_per_second)
    if json:
        print_json(report.as_dict())
    else:
        _show(report)
    if report.errors:
        raise typer.Exit(EXIT_FOUND_ERRORS)


def _guess_task(files: list[Path]) -> str:
    """Two text files or tables are pairs; one text is for language models."""
    from trilemma.data.readers import file_format

    formats = {file_format(path) for path in files}
    if formats == {".txt"}:
        if len(files) > 2:
            raise ConfigError(
                f"{len(files)} text files: say --task language-model, or give the two sides of the training data only, "
                "and each side of the others by an option of its own (--valid val.en --valid val.de)"
            )
        return "seq2seq" if len(files) == 2 else "language-model"
    return "seq2seq"


def _sources(files: list[Path], task: str) -> list[Source]:
    """Two plain text files are the two sides of pairs; any other file stands for itself."""
    from trilemma.config import Source
    from trilemma.data.readers import file_format

    if task == "seq2seq" and len(files) == 2 and all(file_format(path) == ".txt" for path in files):
        return [Source.model_validate({"source": str(files[0]), "target": str(files[1])})]
    return [Source.model_validate({"path": str(path)}) for path in files]


def _from_config(path: Path) -> tuple[dict[str, list[Source]], str, dict[str, int]]:
    from trilemma.config import load_config

    data = load_config(path).data
    train = data.train if isinstance(data.train, list) else [data.train]
    if data.split is not None:
        say("data.split: what is checked is the whole of data.train, before it is divided")
    optional = {"valid": data.valid, "test": data.test}
    splits = {"train": train, **{name: [source] for name, source in optional.items() if source is not None}}
    if any(source.generated for sources in splits.values() for source in sources):
        raise ConfigError(f"{path}: data.train is generated: there are no files to check")
    limits = {"source": data.max_source_length, "target": data.max_target_length, "text": data.max_source_length}
    return splits, data.task, limits if data.task in ("seq2seq", "classification") else {}


def _show(report: CheckReport) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for split in report.splits:
        _show_split(console, split)
    for overlap in report.overlaps:
        if not overlap.examples.count:
            console.print(f"  {overlap.split} examples in train  none")
        _row(console, f"{overlap.split} examples in train", overlap.examples)
        for side, finding in overlap.sides.items():
            _row(console, f"{overlap.split} {side} lines in train", finding)
    console.print(f"[bold]tokens of one epoch[/]  {report.tokens_per_epoch:,} ({report.tokenizer})")
    if report.seconds_per_epoch is not None:
        console.print(f"[bold]time of one epoch[/]  {_duration(report.seconds_per_epoch)}")
    if report.errors:
        console.print(f"[bold red]training would stop: {report.errors:,} unreadable line(s)[/]")


def _show_split(console: Console, split: SplitReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]{split.name}[/]  {escape(', '.join(split.files))}: {split.examples:,} examples")
    _row(console, "unreadable", split.unreadable, bad=True)
    for name, finding in split.empty.items():
        _row(console, f"empty {name}", finding)
    _row(console, "U+FFFD (lost characters)", split.replacement_characters)
    _row(console, "repeated examples", split.duplicates)
    _row(console, "repeated sources", split.duplicate_sources)
    _row(console, "both sides identical", split.identical_sides)
    if split.median_ratio is not None:
        _row(console, f"length ratio far from {split.median_ratio:.2f}", split.ratio_outliers)
    for name, field in split.fields.items():
        if field.limit:
            _row(console, f"{name} over {field.limit} tokens", field.over_limit)
        _row(console, f"unknown to the tokenizer, {name}", field.unknown, bad=True)
    if split.labels:
        shown = ", ".join(f"{label}: {count:,}" for label, count in list(split.labels.items())[:20])
        console.print(f"  labels  {escape(shown)}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("  lengths", "total", "mean", *QUANTILES_SHOWN, "0 to p99"):
        table.add_column(column, justify="left" if column in ("  lengths", "0 to p99") else "right", no_wrap=True)
    for name, field in split.fields.items():
        for unit, lengths in (("words", field.words), ("bytes", field.bytes), ("tokens", field.tokens)):
            values = [f"{lengths.quantiles[quantile]:,.0f}" for quantile in QUANTILES_SHOWN]
            bars = _bars(lengths.counts)
            table.add_row(f"  {name} {unit}", f"{lengths.total:,}", f"{lengths.mean:.1f}", *values, bars)
    console.print(table)


def _row(console: Console, name: str, finding: Finding, bad: bool = False) -> None:
    if not finding.count:
        return
    from rich.markup import escape

    where = escape(", ".join(finding.lines)) + (", ..." if finding.count > len(finding.lines) else "")
    colour = "red" if bad else "yellow"
    console.print(f"  [{colour}]{name}[/]  {finding.count:,}  (line {where})")
    for message in finding.messages:
        console.print(f"    {escape(message)}")


def _bars(counts: list[Any]) -> str:
    """A histogram of eighths of a line."""
    top = max(counts) or 1
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // top)] for count in counts)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
