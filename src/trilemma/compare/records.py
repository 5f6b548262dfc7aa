"""What a study writes beside its runs, and how all of it is read back.

    OUT/study.yaml                        the study, as it was asked for
    OUT/plan.json                         every run that was planned, what could not be made equal, the command
    OUT/runs/<run>/                       a run directory (see `trilemma.runs`), and in it:
        documents.json                    the metric's sufficient statistics per test document, and sample outputs
        inference.json                    ms per token and state bytes by context

All of it is JSON or YAML text; nothing that is read can run code.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trilemma.compare.metrics import Array
from trilemma.config import RunConfig, StudyConfig, dump, parse, read_yaml
from trilemma.errors import CheckpointError

Role = Literal["candidate", "same-twice", "known-gap"]
Stage = Literal["sweep", "final"]


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a study. `name` is its directory under `runs/`."""

    name: str
    candidate: str
    role: Role
    stage: Stage
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Inequality:
    """Something that could not be made equal: whose, and what, in words."""

    candidate: str
    text: str


@dataclass(frozen=True)
class Plan:
    """Everything about a study that its runs do not say themselves."""

    runs: list[PlannedRun]
    inequalities: list[Inequality] = field(default_factory=list)
    sweep_notes: dict[str, str] = field(default_factory=dict)  # candidate -> how its learning rate was found
    command: str = ""
    contexts: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class SampleOutput:
    """One test example and what a run made of it."""

    index: int
    source: str
    reference: str
    output: str


@dataclass(frozen=True)
class Documents:
    """A run's test result, kept so that it can be resampled: `statistics` is [documents, metric.width]."""

    metric: str
    signature: str
    split: str
    statistics: Array
    samples: list[SampleOutput]


@dataclass(frozen=True)
class InferencePoint:
    """Cost of producing one token after `context` tokens, `batch` rows at once."""

    context: int
    batch: int
    ms_per_token: float
    state_bytes: float


@dataclass(frozen=True)
class RunRecord:
    """A finished run, read from its directory. `summary` and `metrics` are the trainer's."""

    planned: PlannedRun
    config: RunConfig
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    documents: Documents | None
    inference: list[InferencePoint]


@dataclass(frozen=True)
class StudyRecord:
    """A whole study, read from disk. `missing` are planned runs that have not finished."""

    study: StudyConfig
    plan: Plan
    runs: list[RunRecord]
    missing: list[PlannedRun]


class StudyDirectory:
    """Paths, reading and writing of a study. Every file appears whole or not at all."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def run_path(self, name: str) -> Path:
        """Directory of the run called `name`."""
        return self.path / "runs" / name

    def write_study(self, study: StudyConfig) -> None:
        """Keeps the study's configuration; the report can be drawn again from it."""
        write_text(self.path / "study.yaml", dump(study))

    def read_study(self) -> StudyConfig:
        """The study as it was run."""
        file = self.path / "study.yaml"
        if not file.is_file():
            raise CheckpointError(f"{self.path}: no study here (study.yaml is missing); run `trilemma compare` first")
        return parse(StudyConfig, read_yaml(file), str(file))

    def write_plan(self, plan: Plan) -> None:
        """Keeps what was planned."""
        write_json(self.path / "plan.json", dataclasses.asdict(plan))

    def read_plan(self) -> Plan:
        """What was planned; `CheckpointError` where the file is missing or not a plan."""
        file = self.path / "plan.json"
        values = read_json(file)
        try:
            return Plan(
                runs=[PlannedRun(**run) for run in values["runs"]],
                inequalities=[Inequality(**item) for item in values["inequalities"]],
                sweep_notes=dict(values["sweep_notes"]),
                command=str(values["command"]),
                contexts=[int(context) for context in values["contexts"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: not a study's plan: {error}") from None

    def write_documents(self, name: str, documents: Documents) -> None:
        """Keeps a run's test result."""
        values = dataclasses.asdict(documents)
        values["statistics"] = documents.statistics.tolist()
        write_json(self.run_path(name) / "documents.json", values)

    def read_documents(self, name: str) -> Documents | None:
        """A run's test result, or None where it has not been scored."""
        file = self.run_path(name) / "documents.json"
        if not file.is_file():
            return None
        values = read_json(file)
        try:
            return Documents(
                metric=str(values["metric"]),
                signature=str(values["signature"]),
                split=str(values["split"]),
                statistics=np.array(values["statistics"], dtype=np.float64),
                samples=[SampleOutput(**sample) for sample in values["samples"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: not a test result: {error}") from None

    def write_inference(self, name: str, points: list[InferencePoint]) -> None:
        """Keeps a run's inference cost."""
        write_json(self.run_path(name) / "inference.json", [dataclasses.asdict(point) for point in points])

    def read_inference(self, name: str) -> list[InferencePoint]:
        """A run's inference cost; empty where it was not measured."""
        file = self.run_path(name) / "inference.json"
        if not file.is_file():
            return []
        try:
            return [InferencePoint(**point) for point in read_json(file)]
        except TypeError as error:
            raise CheckpointError(f"{file}: not an inference cost: {error}") from None

    def finished(self, name: str) -> bool:
        """Whether the run's training has ended (its summary is the last thing that training writes)."""
        return (self.run_path(name) / "summary.json").is_file()

    def read(self) -> StudyRecord:
        """Everything on disk, for the report."""
        study, plan = self.read_study(), self.read_plan()
        runs, missing = [], []
        for planned in plan.runs:
            if self.finished(planned.name):
                runs.append(self._read_run(planned))
            else:
                missing.append(planned)
        return StudyRecord(study, plan, runs, missing)

    def _read_run(self, planned: PlannedRun) -> RunRecord:
        path = self.run_path(planned.name)
        return RunRecord(
            planned=planned,
            config=parse(RunConfig, read_yaml(path / "config.yaml"), str(path / "config.yaml")),
            summary=read_json(path / "summary.json"),
            metrics=read_json_lines(path / "metrics.jsonl"),
            documents=self.read_documents(planned.name),
            inference=self.read_inference(planned.name),
        )


def read_json(file: Path) -> Any:
    """Parsed JSON; `CheckpointError` names the file where it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; is the study complete?") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """One object for each line. A torn last line (a killed writer) is left out; one elsewhere is an error."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise CheckpointError(f"{file}:{number}: not JSON") from None
    return rows


def write_json(file: Path, values: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(file, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes a text file whole or not at all: temporary file, fsync, rename."""
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, data: bytes) -> None:
    """Writes a file whole or not at all: temporary file, fsync, rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
