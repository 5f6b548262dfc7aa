"""`trilemma generate`: a filter, one line in, one line out."""

from __future__ import annotations

import codecs
import json as jsons
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from trilemma.cli.common import Average, BackendOption, CacheOption, Device, Json, With, print_json, say
from trilemma.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from trilemma.decode import Generated, Line, Output
    from trilemma.predictor import Predictor

# What is said of a rule that acted.
_ACTED = {
    "no_repeat_ngram": "a repetition was prevented (decoding.no_repeat_ngram)",
    "unknown": "an unknown token was banned or replaced (decoding.unknown)",
    "banned": "a forbidden token was avoided (decoding.banned)",
    "phrases": "the end waited for a phrase",
    "unmet": "an output lacks a phrase: length limit or other rules left it no way",
}
# A line without an end must not fill the memory.
LINE_BYTES = 1 << 20


@dataclass
class Totals:
    """What went through the filter."""

    lines: int = 0
    empty: int = 0
    skipped: int = 0
    cut: int = 0
    unknown: int = 0
    tokens: int = 0
    seconds: float = 0.0
    acted: dict[str, int] = field(default_factory=dict)

    def add(self, line: Generated) -> None:
        """Counts one line."""
        self.lines += 1
        self.skipped += line.skipped is not None
        self.empty += line.skipped is None and line.outputs[0].tokens == 0
        self.cut += line.skipped is None and not line.outputs[0].finished
        self.unknown += line.unknown > 0
        self.tokens += sum(output.tokens for output in line.outputs)
        for key in {key for output in line.outputs for key in output.acted}:
            self.acted[key] = self.acted.get(key, 0) + 1


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[decoding.KEY=VALUE]...", help="how text is produced", show_default=False),
    ] = None,
    n_best: Annotated[
        int | None, typer.Option("--n-best", min=1, help="this many outputs a line: index, score, text by tabs")
    ] = None,
    scores: Annotated[bool, typer.Option("--scores", help="score and text, separated by a tab")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="one JSON object a line, with all outputs")] = False,
    alignments: Annotated[
        str | None, typer.Option("--alignments", help="words or tokens: a column of source-output links, from 0")
    ] = None,
    prefixes: Annotated[
        Path | None, typer.Option("--prefixes", help="a file: what the output of each line begins with")
    ] = None,
    phrases: Annotated[
        Path | None, typer.Option("--phrases", help="a file: what the output of each line contains, divided by tabs")
    ] = None,
    ensemble: With = None,
    average: Average = None,
    over_length: Annotated[
        str, typer.Option("--over-length", help="lines that are too long: error, or skip (an empty line)")
    ] = "error",
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="lines decoded together; default 1024, 1 on a terminal")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float64, int8 or int4")] = None,
    cache: CacheOption = None,
    device: Device = "auto",
    backend: BackendOption = "auto",
    json: Json = False,
) -> None:
    """Reads lines from stdin and writes one line for each to stdout, in order; empty lines stay empty.

    Translation, sampling (decoding.method=sample), n-best, ensembles, constraints, alignments; a language model writes
    what follows the line, without the line. A score is the log-probability over the length penalty. Outputs appear
    window by window; a line break inside an output is written as a space.
    """
    from trilemma import laws
    from trilemma.models import cache_kind, cache_notes
    from trilemma.predictor import DEFAULT_WINDOW, load

    if over_length not in ("error", "skip"):
        raise ConfigError(f'--over-length: unknown value "{over_length}"{nearest(over_length, ("error", "skip"))}')
    if scores and jsonl:
        raise ConfigError("--scores and --jsonl exclude each other: the JSON objects hold the scores")
    settings = decoding_settings(overrides or [], n_best)
    if alignments is not None:
        settings["alignments"] = alignments
    kind = cache_kind(cache)
    predictor = load(run, device=device, dtype=dtype, ensemble=ensemble or (), average=average, cache=kind)
    several = predictor.decoding(**settings).n_best > 1 or n_best is not None  # names wrong keys before laws may run
    for note in cache_notes(predictor.whole.mixers()) if kind is not None else ():
        say(f"note: {note}")
    laws.admit(predictor.whole.mixers(), backend, device=predictor.device, dtype=predictor.dtype, say=say)
    size = window or (1 if sys.stdin.isatty() else DEFAULT_WINDOW)
    style = "jsonl" if jsonl else "n-best" if several else "scores" if scores else "text"
    lines = demanding(read_lines(sys.stdin.buffer, "stdin"), prefixes, phrases)
    totals = Totals()
    try:
        _filter(predictor, lines, sys.stdout.buffer, totals, style, over_length == "skip", size, settings)
    finally:
        _report(totals, predictor.path)
    if json:
        print_json({**asdict(totals), "path": predictor.path})


def decoding_settings(overrides: list[str], n_best: int | None) -> dict[str, Any]:
    """The `decoding` keys that are asked for."""
    from trilemma.config import apply_overrides

    values = apply_overrides({}, overrides)
    for key in values:
        if key != "decoding" or not isinstance(values[key], dict):
            raise ConfigError(f'override "{key}": only decoding.KEY=VALUE can be changed here: decoding.beam_size=8')
    settings: dict[str, Any] = values.get("decoding", {})
    return settings if n_best is None else {**settings, "n_best": n_best}


def _filter(
    predictor: Predictor,
    lines: Iterator[str | Line],
    stdout: IO[bytes],
    totals: Totals,
    style: str,
    skip: bool,
    window: int,
    settings: dict[str, Any],
) -> None:
    """Everything from `lines` to `stdout`, flushed window by window."""
    start = time.monotonic()
    for results in predictor.windows(lines, "skip" if skip else "error", window, **settings):
        for line in results:
            totals.add(line)
            if line.skipped is not None:
                say(f"trilemma: skipped {line.skipped}")
            stdout.write(shown(line, style).encode())
        stdout.flush()
        totals.seconds = time.monotonic() - start


def demanding(lines: Iterator[str], prefixes: Path | None, phrases: Path | None) -> Iterator[str | Line]:
    """The lines with what their outputs must hold, line by line from the files.

    Raises:
        DataError: a file ends before the lines do, or after them.
    """
    from trilemma.data.readers import text_lines
    from trilemma.decode import Line

    given = {path: text_lines(path) for path in (prefixes, phrases) if path is not None}
    if not given:
        yield from lines
        return
    count = 0
    for count, line in enumerate(lines, start=1):
        beside = {}
        for path, rest in given.items():
            if (found := next(rest, None)) is None:
                raise DataError(f"{path} ends after {count - 1} lines, stdin goes on: they must go line by line")
            beside[path] = found[1]
        wanted = beside[phrases] if phrases is not None else ""
        begin = beside[prefixes] if prefixes is not None else ""
        yield Line(line, begin, tuple(phrase for phrase in wanted.split("\t") if phrase.strip()))
    for path, rest in given.items():
        if next(rest, None) is not None:
            raise DataError(f"{path} goes on after the {count} lines of stdin: they must go line by line")


def read_lines(stream: IO[bytes], name: str, limit: int = LINE_BYTES) -> Iterator[str]:
    """Lines without their ends ("\\n" or "\\r\\n"), as they arrive.

    Raises:
        DataError: a line is not valid UTF-8 or longer than `limit` bytes; names the line.
    """
    number = 0
    while raw := stream.readline(limit + 2):
        number += 1
        text = raw.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            text = text.removeprefix(codecs.BOM_UTF8)  # as in files
        if len(text) > limit:
            raise DataError(f"{name}: line {number} is longer than {limit:,} bytes; one input a line is expected")
        try:
            yield text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: line {number}: invalid UTF-8 at byte {error.start + 1}") from None


def shown(line: Generated, style: str) -> str:
    """The output lines of one input line. Tabs in a text become spaces where tabs separate columns."""
    if style == "jsonl":
        value = {"index": line.index, "outputs": [asdict(output) for output in line.outputs], "skipped": line.skipped}
        return jsons.dumps(value, ensure_ascii=False) + "\n"
    if style == "n-best":
        rows = (f"{line.index}\t{output.score:.6f}\t{_columns(output)}\n" for output in line.outputs)
        return "".join(rows)
    best = line.outputs[0]
    if style == "scores":
        return f"{best.score:.6f}\t{_columns(best)}\n"
    return (line.text if best.alignment is None else _columns(best)) + "\n"


def _columns(output: Output) -> str:
    """The text, and the links in Pharaoh's form."""
    text = output.text.replace("\t", " ")
    if output.alignment is None:
        return text
    return text + "\t" + " ".join(f"{source}-{target}" for source, target in output.alignment)


def _report(totals: Totals, path: str) -> None:
    rate = f", {totals.tokens / totals.seconds:,.0f} tokens/s" if totals.seconds > 0 else ""
    parts = [f"{totals.lines:,} lines in {totals.seconds:.1f} s{rate} (path {path})"]
    if totals.skipped:
        parts.append(f"{totals.skipped:,} too long and left empty")
    if totals.cut:
        parts.append(f"{totals.cut:,} outputs cut at the length limit (decoding.max_length, max_ratio, max_extra)")
    if totals.unknown:
        parts.append(f"{totals.unknown:,} held characters or words that the tokenizer does not know, read as unknown")
    parts += [f"{_ACTED[key]} on {count:,} lines" for key, count in sorted(totals.acted.items())]
    say("; ".join(parts))
