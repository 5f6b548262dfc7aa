"""What a study writes beside its runs, and how all of it is read back.

    OUT/study.yaml                        the study, as it was asked for
    OUT/plan.json                         every run that was planned, what could not be made equal, the command
    OUT/configs/<run>.yaml                the resolved configuration of each run: `trilemma train` takes it as it is
    OUT/runs/<run>/                       a run directory (see `trilemma.runs`), and in it:
        documents.json                    the metric's sufficient statistics per test document, and sample outputs
        inference.json                    ms per token and state bytes by context

All of it is JSON or YAML text; nothing that is read can run code. Files of a run are read through its manifest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trilemma.compare.metrics import Array
from trilemma.config import RunConfig, StudyConfig, dump, parse, read_yaml
from trilemma.errors import CheckpointError, ConfigError
from trilemma.runs import RunDirectory, files
from trilemma.runs.directory import SUMMARY, to_json

DOCUMENTS = "documents.json"
INFERENCE = "inference.json"
_TEXT_LIMIT = 1 << 28

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
class Inference:
    """A run's inference cost; `unmeasured`: context -> why there is no point for it."""

    points: list[InferencePoint] = field(default_factory=list)
    unmeasured: dict[int, str] = field(default_factory=dict)

    @property
    def contexts(self) -> set[int]:
        """Contexts that were measured, or tried."""
        return {point.context for point in self.points} | self.unmeasured.keys()


@dataclass(frozen=True)
class RunRecord:
    """A finished run, read from its directory. `summary` and `metrics` are the trainer's."""

    planned: PlannedRun
    config: RunConfig
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    documents: Documents | None
    inference: Inference


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

    def config_path(self, name: str) -> Path:
        """File of the configuration of the run called `name`."""
        return self.path / "configs" / f"{name}.yaml"

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

    def claim_config(self, name: str, config: RunConfig) -> Path:
        """Keeps the configuration of a run; the path of its file.

        Raises:
            ConfigError: this study holds a run of that name with other settings; the first that differs is named.
        """
        file = self.config_path(name)
        if file.is_file():
            kept = parse(RunConfig, read_yaml(file), str(file))
            for key, value in flatten(config.model_dump(mode="json")).items():
                if key.split(".")[0] not in ("notes", "name") and flatten(kept.model_dump(mode="json"))[key] != value:
                    was = flatten(kept.model_dump(mode="json"))[key]
                    raise ConfigError(
                        f"{self.run_path(name)}: was run with {key}={was}, the study now says {value}; "
                        "choose another --out, or put the old value back"
                    )
        else:
            write_text(file, dump(config))
        return file

    def write_documents(self, name: str, documents: Documents) -> None:
        """Keeps a run's test result."""
        values = dataclasses.asdict(documents)
        values["statistics"] = documents.statistics.tolist()
        RunDirectory.open(self.run_path(name)).publish({DOCUMENTS: to_json(values)})

    def read_documents(self, name: str) -> Documents | None:
        """A run's test result, or None where it has not been scored."""
        values = self._read_extra(name, DOCUMENTS)
        if values is None:
            return None
        try:
            return Documents(
                metric=str(values["metric"]),
                signature=str(values["signature"]),
                split=str(values["split"]),
                statistics=np.array(values["statistics"], dtype=np.float64),
                samples=[SampleOutput(**sample) for sample in values["samples"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.run_path(name) / DOCUMENTS}: not a test result: {error}") from None

    def write_inference(self, name: str, inference: Inference) -> None:
        """Keeps a run's inference cost."""
        RunDirectory.open(self.run_path(name)).publish({INFERENCE: to_json(dataclasses.asdict(inference))})

    def read_inference(self, name: str) -> Inference:
        """A run's inference cost; empty where it was not measured."""
        values = self._read_extra(name, INFERENCE)
        if values is None:
            return Inference()
        if isinstance(values, list):  # the first form of this file: points alone
            values = {"points": values, "unmeasured": {}}
        try:
            points = [InferencePoint(**point) for point in values["points"]]
            return Inference(points, {int(context): str(why) for context, why in values["unmeasured"].items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.run_path(name) / INFERENCE}: not an inference cost: {error}") from None

    def _read_extra(self, name: str, file: str) -> Any:
        run = RunDirectory.open(self.run_path(name))
        return json.loads(run.read_text(file)) if run.has(file) else None

    def finished(self, name: str) -> bool:
        """Whether the run's training has ended (its summary is the last thing that training publishes)."""
        run = RunDirectory(self.run_path(name))
        return run.exists() and run.has(SUMMARY)

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
        run = RunDirectory.open(self.run_path(planned.name))
        return RunRecord(
            planned=planned,
            config=run.read_config(),
            summary=run.read_summary(),
            metrics=run.read_metrics(),
            documents=self.read_documents(planned.name),
            inference=self.read_inference(planned.name),
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; a mixer's mapping is one value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and not key.endswith("mixer"):
            result.update(flatten(value, f"{path}."))
        else:
            result[path] = value
    return result


def read_json(file: Path) -> Any:
    """Parsed JSON; `CheckpointError` names the file where it is missing or damaged."""
    try:
        return json.loads(files.read_file(file, _TEXT_LIMIT))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None


def write_json(file: Path, values: Any) -> None:
    """Writes JSON whole or not at all."""
    write_bytes(file, to_json(values))


def write_text(file: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, data: bytes) -> None:
    """Writes a file whole or not at all; after a crash it is the old one or the new one."""
    files.make_folder(file.parent)
    files.replace_file(file, data)
