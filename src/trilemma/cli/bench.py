"""`trilemma bench`: cost curves of a run, or of a config with random weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilemma.cli.common import BackendOption, CacheOption, Device, Json, Overrides, is_run, print_json, say
from trilemma.errors import ConfigError, nearest

if TYPE_CHECKING:
    from trilemma.models import SequenceModel

PRECISIONS = ("auto", "float32", "bfloat16", "float64")


def command(
    subject: Annotated[Path, typer.Argument(metavar="RUN|CONFIG", help="a run directory, or a YAML config")],
    overrides: Overrides = None,
    contexts: Annotated[
        str, typer.Option("--contexts", help="tokens read before the measured steps")
    ] = "128,512,2048,8192",
    batch: Annotated[str, typer.Option("--batch", help="rows decoded together")] = "1,16",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="steps timed in a repeat")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="medians are taken over these")] = 5,
    max_seconds: Annotated[float, typer.Option("--max-seconds", help="for each cell, about")] = 20.0,
    source_length: Annotated[
        int | None,
        typer.Option(
            "--source-length", min=1, help="tokens of source, out of the context (encoder-decoder); default: half"
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="type of weights and state; auto: the weights' own")
    ] = "auto",
    train: Annotated[bool, typer.Option("--train", help="also time a training step")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for bench.csv, bench.json, bench.png, bench.svg")
    ] = None,
    cache: CacheOption = None,
    device: Device = "auto",
    backend: BackendOption = "auto",
    json: Json = False,
) -> None:
    """Cost curves: prefill, first token, ms per token, state bytes against context and batch.

    An encoder-decoder reads half of the context as source. Numbers stand beside this machine's measured ceilings
    (`trilemma doctor`).
    """
    import torch

    from trilemma import laws, machine
    from trilemma.measure import cost, cost_report
    from trilemma.models import cache_kind, cache_notes, hold_cache
    from trilemma.ops import backends

    sizes, rows_together = _numbers(contexts, "--contexts"), _numbers(batch, "--batch")
    if precision not in PRECISIONS:
        raise ConfigError(f'--precision: unknown value "{precision}"{nearest(precision, PRECISIONS)}')
    if not 0 < max_seconds < math.inf:
        raise ConfigError(f"--max-seconds: {max_seconds} is no number of seconds above 0")
    if source_length is not None and source_length >= min(sizes):
        raise ConfigError(f"--source-length: {source_length} leaves nothing of a context of {min(sizes)} tokens")
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file; name a folder")
    place, place_reason = machine.choose_device(device)
    model, name = _model(subject, overrides or [], place)
    if train:
        cost.check_trainable(model)
    if (kind := cache_kind(cache)) is not None:
        if train:
            raise ConfigError(f"--train: nothing is trained through a cache in {kind}; leave out --train or --cache")
        hold_cache(model, kind)
        for note in cache_notes(model.mixers()):
            say(f"note: {note}")
    dtype = None if precision == "auto" else getattr(torch, precision)
    used = dtype or model.dtype
    path = laws.admit(model.mixers(), backend, device=place, dtype=used, say=say)
    cells = len(sizes) * len(rows_together)
    say(f"device {place}: {place_reason}; path {path}; {cells} cells of about {max_seconds:.0f} s each at most")
    if not machine.ceilings_are_cached(place):
        say("measuring this machine's ceilings first (three to ten seconds)")
    rows = cost.measure_decode(
        model, sizes, rows_together,
        new_tokens=new_tokens, repeats=repeats, dtype=dtype, source_length=source_length, max_seconds=max_seconds,
        on_row=lambda row: say(_progress(row)),
    )  # fmt: skip
    result: dict[str, Any] = {
        "name": name,
        "parameters": model.parameter_counts(),
        "rows": rows,
        "ceilings": vars(machine.ceilings(place)),
        "environment": machine.environment(place, str(used).removeprefix("torch.")),
        "backends": [str(choice) for choice in backends.running()],
    }
    if train:
        length = min(sizes)
        result["training"] = cost.measure_training(
            model,
            length=length,
            batch=max(rows_together),
            precision=None if precision == "auto" else precision,
            repeats=repeats,
        )
    text = cost_report.table(rows)
    if json:
        say(text)
    else:
        print(text)
        if train:
            print(f"training step: {result['training']['tokens_per_second']:,.0f} tokens/s")
    if out is not None:
        result["files"] = _write(out, name, result)
    if json:
        print_json(result)


def _model(subject: Path, overrides: list[str], device: str) -> tuple[SequenceModel, str]:
    """The run's model, or one with random weights from a config."""
    from trilemma.config import load_config
    from trilemma.measure.plan import resolved_model
    from trilemma.models import build_model
    from trilemma.runs.load import load_run

    if is_run(subject):
        if overrides:
            raise ConfigError(f"{subject}: a run's config is fixed; overrides go with a config file")
        return load_run(subject, device=device).model.eval(), subject.name
    config = load_config(subject, overrides)
    assumptions: list[str] = []
    model = build_model(resolved_model(config, assumptions))
    for assumption in assumptions:
        say(f"assumed: {assumption}")
    return model.to(device).eval(), f"{config.name} (random weights)"


def _numbers(text: str, option: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise ConfigError(f'{option}: "{text}" is not a list of positive numbers such as 128,512')
    return values


def _progress(row: dict[str, Any]) -> str:
    cell = f"context {row['context']}, batch {row['batch']}"
    if row["reason"]:
        return f"{cell}: not measured: {row['reason']}"
    shown = row["ms_per_token"] if row["ms_per_token"] is not None else row["prefill_ms"]
    return f"{cell}: {shown:.3f} ms {'per token' if row['ms_per_token'] is not None else 'to read'}"


def _write(folder: Path, name: str, result: dict[str, Any]) -> list[str]:
    import json

    from trilemma.measure import cost_report

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.csv").write_text(cost_report.csv_text(result["rows"]), encoding="utf-8")
    (folder / "bench.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    environment = result["environment"]
    hardware = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    title = f"{name}: {hardware}, {environment['precision']}"
    figures = cost_report.write_figure(cost_report.draw({"": result["rows"]}, title), folder, "bench")
    return [str(folder / "bench.csv"), str(folder / "bench.json"), *map(str, figures)]
