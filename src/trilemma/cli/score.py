"""`trilemma score`: forced decoding, what a run thinks of texts that are there already."""

from __future__ import annotations

import itertools
import json as jsons
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli.common import Average, BackendOption, Device, Json, With, print_json, say
from trilemma.errors import ConfigError, DataError

if TYPE_CHECKING:
    from trilemma.measure.forced import ForcedScore

WINDOW = 1024


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[decoding.KEY=VALUE]...", help="decoding.length_penalty is read", show_default=False),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--source", help="a file of sources, one a line", show_default=False)
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--target", help="the texts to score, line by line", show_default=False)
    ] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="one JSON object a line, with every token")] = False,
    ensemble: With = None,
    average: Average = None,
    window: Annotated[int, typer.Option("--window", min=1, help="lines scored together")] = WINDOW,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float64, int8 or int4")] = None,
    device: Device = "auto",
    backend: BackendOption = "auto",
    json: Json = False,
) -> None:
    """Writes score, log-probability and number of tokens for each pair, by tabs; end-of-sequence is counted.

    Pairs come from --source and --target, or from stdin: source, tab, target. A language model scores texts alone,
    from --target or stdin. The score is the log-probability over the length penalty, as of a generated text.
    """
    from trilemma import laws
    from trilemma.cli.generate import decoding_settings
    from trilemma.predictor import load

    settings = decoding_settings(overrides or [], None)
    predictor = load(run, device=device, dtype=dtype, ensemble=ensemble or (), average=average)
    alone = predictor.config.data.task == "language-model"
    predictor.score([], None if alone else [], **settings)  # what cannot be done is said before input is waited for
    laws.admit(predictor.whole.mixers(), backend, device=predictor.device, dtype=predictor.dtype, say=say)
    texts = ((text, None) for text in _one_side(source, target)) if alone else _pairs(source, target)
    lines = tokens = unknown = 0
    total = 0.0
    while held := list(itertools.islice(texts, window)):
        sources, targets = [first for first, _ in held], [second for _, second in held if second is not None]
        scores = predictor.score(sources, None if alone else targets, first_line=lines + 1, **settings)
        for index, score in enumerate(scores, start=lines):
            sys.stdout.buffer.write(shown(index, score, jsonl).encode())
        sys.stdout.buffer.flush()
        lines += len(held)
        tokens += sum(score.tokens for score in scores)
        unknown += sum(score.unknown for score in scores)
        total += sum(score.log_probability for score in scores)
    if unknown:
        say(f"note: {unknown:,} of the scored tokens stand for text that the tokenizer does not know")
    say(f"{lines:,} lines, {tokens:,} tokens, log-probability {total:.4f} (path {predictor.path})")
    if json:
        print_json(
            {"lines": lines, "tokens": tokens, "unknown": unknown, "log_probability": total, "path": predictor.path}
        )


def shown(index: int, score: ForcedScore, jsonl: bool) -> str:
    """The output line of one text."""
    if jsonl:
        return jsons.dumps({"index": index, **asdict(score)}, ensure_ascii=False) + "\n"
    return f"{score.score:.6f}\t{score.log_probability:.6f}\t{score.tokens}\n"


def _one_side(source: Path | None, target: Path | None) -> Iterator[str]:
    if source is not None:
        raise ConfigError("--source: a language model scores texts alone; give them as --target or on stdin")
    return _lines(target)


def _pairs(source: Path | None, target: Path | None) -> Iterator[tuple[str, str]]:
    if (source is None) != (target is None):
        raise ConfigError("--source and --target go together; without them pairs are read from stdin, divided by a tab")
    if source is None:
        for number, line in enumerate(_lines(None), start=1):
            if line.count("\t") != 1:
                raise DataError(
                    f"stdin: line {number}: a source and a target divided by one tab are needed, "
                    f"found {line.count(chr(9))} tabs"
                )
            first, _, second = line.partition("\t")
            yield first, second
        return
    for number, (first, second) in enumerate(itertools.zip_longest(_lines(source), _lines(target)), start=1):
        if first is None or second is None:
            short, long = (source, target) if first is None else (target, source)
            raise DataError(f"{short} ends after {number - 1} lines, {long} goes on: the sides differ in length")
        yield first, second


def _lines(path: Path | None) -> Iterator[str]:
    from trilemma.cli.generate import read_lines
    from trilemma.data.readers import text_lines

    if path is None:
        yield from read_lines(sys.stdin.buffer, "stdin")
    else:
        yield from (text for _, text in text_lines(path))
