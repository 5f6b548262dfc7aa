"""What is measured on a finished run: its test result with all that the bootstrap needs, and its inference cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trilemma import machine
from trilemma.compare.metrics import METRICS
from trilemma.compare.records import Documents, Inference, InferencePoint, SampleOutput
from trilemma.config import DataConfig
from trilemma.data import prepare
from trilemma.errors import ConfigError, DataError, nearest
from trilemma.laws.admission import admit
from trilemma.measure.cost import measure_decode
from trilemma.measure.evaluation import METRICS as TASK_METRICS
from trilemma.measure.evaluation import Evaluation, score_model
from trilemma.ops import backends
from trilemma.runs.load import LoadedRun, load_run
from trilemma.study import StudyConfig

_CELL_SECONDS = 6.0  # for one context and batch size
_MAX_SAMPLE_CHARACTERS = 2000


def metric_of(study: StudyConfig) -> str:
    """The study's metric, or the one that its task calls for.

    Raises:
        ConfigError: the task has no such metric, or it cannot be resampled.
    """
    data = study.base.data
    if study.metric is None:
        by_task = {"language-model": "bits_per_byte", "masked-language-model": "loss"}
        by_task |= {"classification": "accuracy", "probe": "accuracy", "question-answering": "f1"}
        return by_task.get(data.task, "exact_match" if _is_generated(data) else "bleu")
    known = [name for name in TASK_METRICS[data.task] if name in METRICS]
    if study.metric not in known:
        raise ConfigError(f'metric: "{study.metric}" cannot be compared on {data.task}{nearest(study.metric, known)}')
    return study.metric


def _is_generated(data: DataConfig) -> bool:
    sources = data.train if isinstance(data.train, list) else [data.train]
    return all(source.generated is not None for source in sources)


def score_run(path: Path, metric: str, samples: int, say: Callable[[str], None] = print) -> Documents:
    """Scores a finished run on its test split (on valid, where there is no test) and keeps scores.json in it.

    Raises:
        DataError: the data hold neither split. LawError: the path that it would run on breaks the law.
    """
    run = load_run(path)
    device = run.config.training.device
    dataset, _ = prepare(run.config, run.tokenizer)
    split: Literal["test", "valid"] = "test" if dataset.sizes.get("test") else "valid"
    if not dataset.sizes.get(split):
        raise DataError("a comparison needs test or validation data: set data.test in base")
    with _lawful(run, say):
        evaluation = score_model(run.model.to(device), dataset, split, metrics=[metric], device=device)
    outputs = {str(split): evaluation.hypotheses} if evaluation.hypotheses else {}
    run.directory.write_scores(evaluation.to_json(), outputs)
    score = evaluation[metric]
    assert score.segments is not None, "only metrics with sufficient statistics are compared"
    return Documents(metric, score.signature, split, score.segments, _samples(evaluation, samples), samples)


def _samples(evaluation: Evaluation, wanted: int) -> list[SampleOutput]:
    """Examples evenly spread over the split, the same for every run; very long texts are shown with an ellipsis."""
    size = len(evaluation.hypotheses)
    if not size or not wanted:
        return []
    indices = np.unique(np.linspace(0, size - 1, min(wanted, size)).round().astype(int))
    return [
        SampleOutput(
            int(index),
            *(_short(texts[index]) for texts in (evaluation.sources, evaluation.references, evaluation.hypotheses)),
        )
        for index in indices
    ]


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SAMPLE_CHARACTERS else text[: _MAX_SAMPLE_CHARACTERS - 1] + "…"


@contextmanager
def _lawful(run: LoadedRun, say: Callable[[str], None]) -> Iterator[str]:
    """Within it the run's operators take the path that is given: the one it was trained on, where that can serve."""
    training = run.config.training
    backend = "plain" if training.backend == "plain" else "auto"
    try:
        yield admit(run.model.mixers(), backend, device=training.device, dtype=run.model.dtype, say=say)
    finally:
        backends.reset()


def measure_run(
    path: Path, contexts: Sequence[int], batch_sizes: Sequence[int], say: Callable[[str], None] = print
) -> Inference:
    """Inference cost of a finished run at each context and batch size, 1 among them.

    Raises:
        LawError: the path that it would run on breaks the law.
    """
    run = load_run(path)
    device = run.config.training.device
    sizes = sorted({1, *batch_sizes})
    with _lawful(run, say) as used:
        rows = measure_decode(run.model.to(device), sorted(set(contexts)), sizes, max_seconds=_CELL_SECONDS)
    environment = machine.environment(device, str(run.model.dtype).removeprefix("torch."))
    points, unmeasured = _points(rows)
    return Inference(points, unmeasured, sizes, used, environment, datetime.now(UTC).isoformat(timespec="seconds"))


def _points(rows: Sequence[dict[str, Any]]) -> tuple[list[InferencePoint], dict[int, str]]:
    """The measured rows. An encoder has no steps: its time to read a context is divided by the context's tokens."""
    points, unmeasured = [], {}
    for row in rows:
        if row["reason"]:
            unmeasured[row["context"]] = row["reason"]
            continue
        ms = row["ms_per_token"]
        if ms is None:
            ms = row["prefill_ms"] / row["context"]
        points.append(InferencePoint(row["context"], row["batch"], ms, row["state_bytes"] / row["batch"]))
    return points, unmeasured
