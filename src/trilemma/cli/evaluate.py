"""`trilemma evaluate`: signed scores of a run on its own split or on files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from trilemma.cli.common import Average, CacheOption, Device, Json, With, change, print_json, say
from trilemma.errors import ConfigError, nearest

if TYPE_CHECKING:
    from trilemma.measure.evaluation import Evaluation
    from trilemma.predictor import Predictor


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILES]... [decoding.KEY=VALUE]...",
            help="one file of examples, or a source and a target file; default: the run's own split",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="test or valid")] = "test",
    metrics: Annotated[
        str | None, typer.Option("--metrics", help="separated by commas; default: all that the task has")
    ] = None,
    ensemble: With = None,
    average: Average = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float64, int8 or int4")] = None,
    cache: CacheOption = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Signed scores: BLEU and chrF (sacrebleu), exact match, accuracy, perplexity per token, bits per byte.

    Scores of the run's own splits are kept in RUN: scores.json, and the outputs in outputs.SPLIT.txt; not those of an
    ensemble, which is no single run, nor of another --dtype, --cache or decoding. With --cache each score
    stands beside that without.
    """
    from trilemma.cli.generate import decoding_settings
    from trilemma.models import cache_kind
    from trilemma.predictor import load

    if split not in ("test", "valid"):
        raise ConfigError(f'--split: unknown value "{split}"{nearest(split, ("test", "valid"))}')
    given = arguments or []
    files = [Path(argument) for argument in given if not argument.startswith("decoding.")]
    settings = decoding_settings([argument for argument in given if argument.startswith("decoding.")], None)
    wanted = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    kind = cache_kind(cache)

    def measured(held: Literal["int8"] | None) -> tuple[Predictor, Evaluation]:
        predictor = load(run, device=device, dtype=dtype, ensemble=ensemble or (), average=average, cache=held)
        part = cast('Literal["valid", "test"]', split)
        return predictor, predictor.evaluate(files, part, metrics=wanted, **settings)

    plain = measured(None)[1] if kind is not None else None
    predictor, evaluation = measured(kind)
    result = {"split": evaluation.split, "scores": evaluation.to_json(), "notes": evaluation.notes}
    if plain is None:
        show_scores(evaluation, json)
    else:
        _show_loss(predictor, plain, evaluation, json)
        result |= {"path": predictor.path, "without_cache": plain.to_json()}
    if not files and not ensemble and dtype is None and plain is None:
        if settings:
            say("not kept: these are not the run's own decoding settings")
        else:
            keep_scores(predictor, evaluation)
    if json:
        print_json(result)


def show_scores(evaluation: Evaluation, json: bool) -> None:
    """Prints scores and notes; with --json stdout holds one line, and they go to stderr."""
    for note in evaluation.notes:
        say(f"note: {note}")
    for score in evaluation.scores:
        (say if json else print)(f"{evaluation.split}\t{score}")


def _show_loss(predictor: Predictor, plain: Evaluation, coded: Evaluation, json: bool) -> None:
    """What keys and values in 8 bits cost, score by score."""
    from trilemma.models import cache_notes

    for note in [*coded.notes, *cache_notes(predictor.whole.mixers())]:
        say(f"note: {note}")
    for score in coded.scores:
        words = change(plain[score.metric].value, score.value)
        (say if json else print)(f"{coded.split}\t{score.metric}\t{words}")
    say(f"path {predictor.path}")


def keep_scores(predictor: Predictor, evaluation: Evaluation) -> None:
    """Replaces this split's entries in the run's scores.json, metric by metric, and its outputs."""
    directory = predictor.require_directory()
    measured = {score.metric for score in evaluation.scores}
    kept = [
        entry
        for entry in directory.read_scores()
        if entry.get("split") != evaluation.split or entry.get("metric") not in measured
    ]
    outputs = {evaluation.split: evaluation.hypotheses} if evaluation.hypotheses else {}
    directory.write_scores([*kept, *evaluation.to_json()], outputs)
    say(f"kept in {directory.path}/scores.json")
