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
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trilemma.compare.metrics import Array
from trilemma.config import RunConfig, dump, parse, read_yaml
from trilemma.errors import CheckpointError, ConfigError, TrainingError
from trilemma.runs import RunDirectory, files
from trilemma.runs.directory import SUMMARY, to_json
from trilemma.study import StudyConfig

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
    """A run's test result, kept so that it can be resampled: `statistics` is [documents, metric.width].

    Attributes:
        asked: how many samples were; None: not kept (an older file).
    """

    metric: str
    signature: str
    split: str
    statistics: Array
    samples: list[SampleOutput]
    asked: int | None = None

    def shows(self, wanted: int) -> bool:
        """Whether scoring again would show no other number of samples."""
        if not self.samples and self.asked != 0:
            return True  # a task without outputs
        size = len(self.statistics)
        return min(wanted, size) == (len(self.samples) if self.asked is None else min(self.asked, size))


@dataclass(frozen=True)
class InferencePoint:
    """Cost of producing one token after `context` tokens, `batch` rows at once."""

    context: int
    batch: int
    ms_per_token: float
    state_bytes: float


@dataclass(frozen=True)
class Inference:
    """A run's inference cost.

    Attributes:
        unmeasured: context -> why there is no point for it.
        batch_sizes: that were tried at every context.
        path: that the operators took, one with a law record. environment: as `machine.environment` says, when it was
            measured. measured: when, in UTC. All three are empty in an older file.
    """

    points: list[InferencePoint] = field(default_factory=list)
    unmeasured: dict[int, str] = field(default_factory=dict)
    batch_sizes: list[int] = field(default_factory=list)
    path: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    measured: str = ""

    @property
    def contexts(self) -> set[int]:
        """Contexts that were measured, or tried."""
        return {point.context for point in self.points} | self.unmeasured.keys()

    def covers(self, contexts: Collection[int], batch_sizes: Collection[int]) -> bool:
        """Whether all of these were measured, or tried."""
        batches = {point.batch for point in self.points} | set(self.batch_sizes)
        return set(contexts) <= self.contexts and (not contexts or set(batch_sizes) <= batches)


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
class Failure:
    """A run that could not be trained to its end: it is not counted, and not tried again with the same settings."""

    planned: PlannedRun
    step: int | None
    message: str

    @property
    def text(self) -> str:
        """What the report says of it."""
        at = "" if self.step is None else f" at step {self.step}"
        why = self.message.partition(";")[0].removeprefix(f"step {self.step}: ")
        return f"seed {self.planned.seed}: training failed{at} ({why}); not counted"


@dataclass(frozen=True)
class StudyRecord:
    """A whole study, read from disk. `missing` are planned runs that have neither finished nor failed."""

    study: StudyConfig
    plan: Plan
    runs: list[RunRecord]
    missing: list[PlannedRun]
    failures: list[Failure] = field(default_factory=list)  # of full-budget runs


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
            change = _first_change(parse(RunConfig, read_yaml(file), str(file)), config)
            if change is None:
                return file
            if self.read_failure(name) is None:
                key, was, value = change
                raise ConfigError(
                    f"{self.run_path(name)}: was run with {key}={was}, the study now says {value}; "
                    "choose another --out, or put the old value back"
                )
            self._set_aside(name)
        write_text(file, dump(config))
        return file

    def read_failure(self, name: str) -> TrainingError | None:
        """Why the run called `name` could not be trained; None where it did not fail."""
        return RunDirectory(self.run_path(name)).read_failure()

    def _set_aside(self, name: str) -> None:
        """Makes room for another attempt at a run that failed; what is left of the first stays under another name."""
        at = 1
        while (aside := self.run_path(f"{name}.failed-{at}")).exists():
            at += 1
        files.rename(self.run_path(name), aside)

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
                asked=values.get("asked"),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
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
            return Inference(
                points,
                unmeasured={int(context): str(why) for context, why in values["unmeasured"].items()},
                batch_sizes=[int(size) for size in values.get("batch_sizes", [])],
                path=str(values.get("path", "")),
                environment=dict(values.get("environment", {})),
                measured=str(values.get("measured", "")),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.run_path(name) / INFERENCE}: not an inference cost: {error}") from None

    def _read_extra(self, name: str, file: str) -> Any:
        run = RunDirectory.open(self.run_path(name))
        return json.loads(run.read_text(file)) if run.has(file) else None

    def finished(self, name: str) -> bool:
        """Whether the run's training has ended (its summary is the last thing that training publishes)."""
        run = RunDirectory(self.run_path(name))
        return run.exists() and run.has(SUMMARY)

    def ended(self, name: str) -> bool:
        """Whether the run is not to be trained any more: it has finished, or failed."""
        return self.finished(name) or self.read_failure(name) is not None

    def read(self) -> StudyRecord:
        """Everything on disk, for the report."""
        study, plan = self.read_study(), self.read_plan()
        runs = [self._read_run(planned) for planned in plan.runs if self.finished(planned.name)]
        missing = [planned for planned in plan.runs if not self.ended(planned.name)]
        return StudyRecord(study, plan, runs, missing, self.failures(plan))

    def failures(self, plan: Plan) -> list[Failure]:
        """Full-budget runs that could not be trained to their end."""
        found = []
        for planned in plan.runs:
            if planned.stage == "final" and not self.finished(planned.name):
                error = self.read_failure(planned.name)
                found += [Failure(planned, error.step, str(error))] if error is not None else []
        return found

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


def _first_change(kept: RunConfig, config: RunConfig) -> tuple[str, Any, Any] | None:
    """The first key that differs, with both values."""
    old = flatten(kept.model_dump(mode="json"))
    for key, value in flatten(config.model_dump(mode="json")).items():
        if key.split(".")[0] not in ("notes", "name") and old.get(key) != value:
            return key, old.get(key), value
    return None


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
