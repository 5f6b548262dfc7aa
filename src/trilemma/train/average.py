"""`trilemma average`: checkpoints averaged into a run of their own (Vaswani et al. 2017, section 6.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trilemma import machine
from trilemma.config import RunConfig
from trilemma.errors import CheckpointError, ConfigError
from trilemma.models import SequenceModel, build_model
from trilemma.runs import RunDirectory
from trilemma.runs.directory import CARD, SUMMARY, to_json
from trilemma.runs.tensors import model_tensors
from trilemma.train.finish import average_checkpoints, model_card

NOTE = "average"  # of a run's notes: what it is the average of


def average(runs: Sequence[str | Path], out: str | Path, last: int = 5, steps: Sequence[int] = ()) -> dict[str, Any]:
    """Writes a run whose weights are the mean of checkpoints; returns its summary.

    Each checkpoint is checked against its manifest, and all count alike. Averaged are the raw weights, not their moving
    average.

    Args:
        runs: run directories of one architecture, tokenizer and precision, finished or not.
        out: a new run directory.
        last: the newest checkpoints of each run. steps: those of these steps instead.

    Raises:
        CheckpointError: no such run or checkpoint, a damaged one, models that differ, or `out` holds something.
        ConfigError: a step is given twice.
    """
    if len(set(steps)) != len(steps):
        raise ConfigError(f"--steps: each may be given once, found {', '.join(map(str, steps))}")
    directories = [RunDirectory.open(path) for path in runs]
    first, config = directories[0], directories[0].read_config()
    for other in directories[1:]:
        _check_alike(first, config, other)
    chosen = [_chosen(directory, last, steps) for directory in directories]
    model = build_model(config.model)
    model = model.double() if config.training.precision == "float64" else model
    checkpoints = [(directory, step) for directory, at in zip(directories, chosen, strict=True) for step in at]
    weights = average_checkpoints(checkpoints, model_tensors(model))
    shown = "; ".join(
        f"{', '.join(map(str, at))} of {directory.path}" for directory, at in zip(directories, chosen, strict=True)
    )
    note = f"checkpoints {shown}"
    config = config.model_copy(update={"notes": {**config.notes, NOTE: note}})
    summary = _summary(first.load_trainer(chosen[0][-1]), config, model, f"average of {note}")
    made = RunDirectory.create(out, config, first.read_tokenizer())
    card = model_card(config, summary)
    made.publish_model(weights, {CARD: card.encode(), SUMMARY: to_json(summary)})
    return summary


def _check_alike(first: RunDirectory, config: RunConfig, other: RunDirectory) -> None:
    """Weights can be averaged where every one of them means the same."""
    found = other.read_config()
    ours, theirs = config.model.model_dump(mode="json"), found.model.model_dump(mode="json")
    for key in ours:
        if ours[key] != theirs[key]:
            raise CheckpointError(
                f"{other.path}: another model than {first.path}: model.{key} is {theirs[key]!r}, not {ours[key]!r}"
            )
    for key in ("task", "labels", "lowercase"):
        one, two = getattr(config.data, key), getattr(found.data, key)
        if one != two:
            raise CheckpointError(f"{other.path}: another task than {first.path}: data.{key} is {two!r}, not {one!r}")
    if (config.start_from or config.seed) != (found.start_from or found.seed):
        raise CheckpointError(
            f"{other.path}: begun from other weights than {first.path}; their mean would be neither. "
            "Runs of one seed can be averaged, and runs that start from the same run"
        )
    if (config.training.precision == "float64") != (found.training.precision == "float64"):
        raise CheckpointError(f"{other.path}: another model than {first.path}: one of them is float64")
    if first.read_tokenizer() != other.read_tokenizer():
        raise CheckpointError(f"{other.path}: another tokenizer than {first.path}: the same ids mean other text")


def _chosen(directory: RunDirectory, last: int, steps: Sequence[int]) -> list[int]:
    known = directory.checkpoints()
    there = f"{directory.path}: there are checkpoints at {', '.join(map(str, known)) or 'no step yet'}"
    for step in steps:
        if step not in known:
            raise CheckpointError(f"{there}; none at {step}")
    if not steps and len(known) < last:
        raise CheckpointError(
            f"{there}; {last} are asked for. Take fewer, or train with training.keep_checkpoints={last}"
        )
    return sorted(steps) if steps else known[-last:]


def _summary(record: Mapping[str, Any], config: RunConfig, model: SequenceModel, weights: str) -> dict[str, Any]:
    """What the newest checkpoint's run had cost by then; losses of an average nobody has measured yet."""
    measured = record["measured"]
    seconds = measured["seconds"]
    return {
        "steps": record["step"],
        "tokens": record["tokens"],
        "input_tokens": record["input_tokens"],
        "flops": record["flops"],
        "seconds": seconds,
        "tokens_per_second": record["tokens"] / seconds if seconds else None,
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "parameters": model.parameter_counts(),
        "ended_by": NOTE,
        "weights": weights,
        "valid_loss": None,
        "data_hash": record["data_hash"],
        "environment": machine.environment(config.training.device, config.training.precision),
    }
