"""Studies written by hand: run directories with chosen numbers, so that the report can be tested without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trilemma.compare.records import (
    Documents,
    Inequality,
    Inference,
    InferencePoint,
    Plan,
    PlannedRun,
    SampleOutput,
    StudyDirectory,
)
from trilemma.config import parse
from trilemma.runs import RunDirectory
from trilemma.sections import QualityConfig
from trilemma.study import StudyConfig

AMOUNT = 1_000_000


@dataclass(frozen=True)
class Fake:
    """What a made-up candidate is like."""

    accuracy: float = 0.9
    seeds: tuple[int, ...] = (1, 2, 3)
    model: Mapping[str, Any] = field(default_factory=dict)
    fitted: Mapping[str, Any] = field(default_factory=dict)  # of the model, set by parameter matching
    embedding: int = 200_000  # parameters
    seconds: float = 100.0
    slope: float = 0.0  # ms per token and per token of context
    base_ms: float = 2.0
    state_per_token: float = 0.0
    state: float = 4096.0
    losses: tuple[float, ...] = (3.0, 2.0, 1.5, 1.2)  # at a quarter, half, three quarters, full
    quality: tuple[float, ...] = ()  # chrF at the same places, where `training.quality` asks for it
    output: str = "zwei"
    contexts: tuple[int, ...] = (128, 512, 2048)  # where inference cost was measured
    unmeasured: Mapping[int, str] = field(default_factory=dict)


def write_study(
    path: Path,
    fakes: Mapping[str, Fake],
    *,
    study: Mapping[str, Any] | None = None,
    roles: Mapping[str, str] | None = None,
    documents: int = 200,
    plan: Mapping[str, Any] | None = None,
    source: str = "two",
) -> StudyDirectory:
    """A finished study in `path`. `roles` marks controls (same-twice, known-gap)."""
    roles = roles or {}
    values: dict[str, Any] = {
        "name": "synthetic",
        "candidates": [
            {"name": name, "overrides": {"model": dict(fake.model)}}
            for name, fake in fakes.items()
            if name not in roles
        ],
        "budget": {"lock": "tokens", "amount": AMOUNT},
        "seeds": [1, 2, 3],
        "metric": "exact_match",
        "base": {"data": {"train": {"generated": "numbers", "size": 5000}}},
        **(study or {}),
    }
    config = parse(StudyConfig, values)
    directory = StudyDirectory(path)
    runs = []
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 1, documents)  # the same test set for all
    for name, fake in fakes.items():
        for seed in fake.seeds:
            role = roles.get(name, "candidate")
            run = PlannedRun(f"{len(runs):02d}-seed{seed}", name, role, "final", 1e-3, seed)  # type: ignore[arg-type]
            runs.append(run)
            _write_run(directory, config, run, fake, difficulty, generator, source)
    directory.write_study(config)
    directory.write_plan(
        Plan(
            runs,
            [Inequality("all", "nothing of note")],
            command="trilemma compare study.yaml --out out",
            contexts=[128, 512, 2048],
            **(plan or {}),
        )
    )
    return directory


def _write_run(
    directory: StudyDirectory,
    study: StudyConfig,
    run: PlannedRun,
    fake: Fake,
    difficulty: np.ndarray,
    generator: np.random.Generator,
    source: str,
) -> None:
    model = study.base.model.model_copy(update={"vocab_size": 100, **fake.model, **fake.fitted})
    training = study.base.training
    if fake.quality:
        training = training.model_copy(update={"quality": QualityConfig(metric="chrf")})
    config = study.base.model_copy(update={"model": model, "seed": run.seed, "training": training})
    made = RunDirectory.create(directory.run_path(run.name), config, b"{}")
    made.write_summary(_summary(run, fake))
    for at, loss in enumerate(fake.losses, start=1):
        share = at / len(fake.losses)
        line = {"step": int(400 * share), "tokens": AMOUNT * share, "flops": 1e12 * share}
        jitter = float(generator.normal(0, 0.01))
        found = {"valid_loss": loss + jitter}
        if fake.quality:
            found["valid_chrf"] = fake.quality[at - 1]
        made.append_metrics({**line, "seconds": fake.seconds * share, **found})
    threshold = float(np.quantile(difficulty, fake.accuracy)) if fake.accuracy < 1 else np.inf
    right = difficulty + generator.normal(0, 0.3, len(difficulty)) < threshold + generator.normal(0, 0.01)
    statistics = np.stack([right.astype(float), np.ones(len(right))], axis=1)
    sample = SampleOutput(0, source, "zwei", fake.output)
    directory.write_documents(run.name, Documents("exact_match", "exact|v:1", "test", statistics, [sample]))
    points = [
        InferencePoint(c, 1, fake.base_ms + fake.slope * c, fake.state + fake.state_per_token * c)
        for c in fake.contexts
    ]
    directory.write_inference(run.name, Inference(points, dict(fake.unmeasured)))


def _summary(run: PlannedRun, fake: Fake) -> dict[str, Any]:
    return {
        "steps": 400,
        "tokens": AMOUNT,
        "flops": 1e12,
        "seconds": fake.seconds,
        "peak_memory_bytes": 300 << 20,
        "parameters": {
            "total": 1_000_000 + fake.embedding,
            "embedding": fake.embedding,
            "non_embedding": 1_000_000,
        },
        "best_step": 400,
        "data_hash": "d" * 64,
        "order_hash": f"{run.seed}" * 64,
        "environment": {"python": "3.13.1", "torch": "2.13.0", "cpu": "a CPU", "threads": 2, "precision": "float32"},
    }


def edit_summary(directory: StudyDirectory, run: str, **changes: Any) -> None:
    """Changes a run's summary in place."""
    made = RunDirectory.open(directory.run_path(run))
    made.write_summary({**made.read_summary(), **changes})


def replace_plan(directory: StudyDirectory, **changes: Any) -> None:
    """Changes the plan in place."""
    directory.write_plan(dataclasses.replace(directory.read_plan(), **changes))
