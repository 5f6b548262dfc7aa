"""The matrix of a study with tasks: for each candidate and task what was found, and what is published.

Like a report, it is a pure function of what lies on disk. A cell has a verdict against its expectation:

    agrees       it solves what is published as solved, or fails where failure is published and the control passed
    disagrees    the other way round
    mixed        some seeds solve it, others do not
    not judged   it failed, but so did the positive control of the task: nothing follows
    not stated   nothing is published, or that it depends on size

A run has solved a task whose test accuracy is at least `solved`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trilemma.compare.analysis import analyse, environment
from trilemma.compare.expand import slug
from trilemma.compare.matching import skeleton
from trilemma.compare.records import StudyDirectory, StudyRecord
from trilemma.compare.results import CandidateResult, Report
from trilemma.data import probe_of
from trilemma.errors import CheckpointError
from trilemma.study import StudyConfig, StudyTask

Outcome = Literal["solved", "unsolved", "mixed", "missing"]
Verdict = Literal["agrees", "disagrees", "mixed", "not judged", "not stated", "missing"]


@dataclass(frozen=True)
class Cell:
    """One candidate on one task. Accuracies are percentages of labels on the test split.

    Attributes:
        mean, low, high: over seeds, with the 95 % interval; None where nothing has finished.
        values: (seed, accuracy). losses: (seed, training loss at the end), nats per label.
        learning_rate: the best by validation. at_edge: it is the lowest or highest tried, and the task was not solved:
            a better one may lie beyond.
        rates: learning rate -> best validation accuracy, the mean over seeds.
        state_bytes: of one sequence after `context` tokens; parameters: without embeddings.
        expected: what is published; verdict: see above.
    """

    task: str
    candidate: str
    mixer: str
    mean: float | None
    low: float | None
    high: float | None
    values: list[tuple[int, float]]
    losses: list[tuple[int, float]]
    learning_rate: float | None
    at_edge: bool
    rates: dict[float, float]
    state_bytes: int | None
    context: int
    parameters: int | None
    seconds: float | None
    outcome: Outcome
    expected: str | None
    verdict: Verdict

    def shown(self) -> str:
        """The accuracy with its interval, for people."""
        if self.mean is None or self.low is None or self.high is None:
            return "-"
        return f"{self.mean:.1f} % ({self.low:.1f} to {self.high:.1f})"


@dataclass(frozen=True)
class Column:
    """One task: its cells in the candidates' order, its control, what guessing gives, the source of expectations."""

    name: str
    description: str
    control: str | None
    control_passed: bool | None
    solved: float
    chance: float
    source: str
    documents: int
    cells: list[Cell]
    data_hash: str


@dataclass(frozen=True)
class Matrix:
    """All columns, and what the runs were made with."""

    name: str
    candidates: list[str]
    columns: list[Column]
    seeds: list[int]
    learning_rates: list[float]
    missing: int  # planned runs that have not finished
    environment: dict[str, Any]  # JSON values; a list of values where runs differ
    command: str

    def cell(self, task: str, candidate: str) -> Cell:
        """The cell of a task and a candidate."""
        column = next(column for column in self.columns if column.name == task)
        return next(cell for cell in column.cells if cell.candidate == candidate)


def read_matrix(out: Path) -> Matrix:
    """The matrix of the study in `out`, as far as it has been run.

    Raises:
        CheckpointError: no study with tasks lies there, or a file of it is damaged.
    """
    study = StudyDirectory(out).read_study()
    if not study.tasks:
        raise CheckpointError(f"{out}: this study has no tasks: there is no matrix")
    columns, reports, records = [], [], []
    for task in study.tasks:
        directory = StudyDirectory(out / "tasks" / slug(task.name))
        record = directory.read() if (directory.path / "plan.json").is_file() else None
        report = _report(record)
        columns.append(_column(study, task, record, report))
        reports += [report] if report else []
        records += [record] if record else []
    runs = [run for record in records for run in record.runs]
    return Matrix(
        name=study.name,
        candidates=[candidate.name for candidate in study.candidates],
        columns=columns,
        seeds=study.seeds,
        learning_rates=sorted(study.learning_rates),
        missing=sum(len(record.missing) for record in records),
        environment=environment(runs),
        command=reports[0].command if reports else "",
    )


def _report(record: StudyRecord | None) -> Report | None:
    if record is None or not any(run.planned.stage == "final" and run.documents is not None for run in record.runs):
        return None
    return analyse(record)


def _column(study: StudyConfig, task: StudyTask, record: StudyRecord | None, report: Report | None) -> Column:
    found = {row.name: row for row in report.candidates} if report else {}
    cells = [
        _cell(study, task, candidate.name, found.get(candidate.name), record, report) for candidate in study.candidates
    ]
    control = next((cell for cell in cells if cell.candidate == task.control), None)
    passed = None if control is None or control.outcome == "missing" else control.outcome == "solved"
    cells = [dataclasses.replace(cell, verdict=verdict(cell.outcome, cell.expected, passed)) for cell in cells]
    chance, description = _data(record)
    return Column(
        name=task.name,
        description=description,
        control=task.control,
        control_passed=passed,
        solved=100.0 * task.solved,
        chance=chance,
        source=task.source,
        documents=report.documents if report else 0,
        cells=cells,
        data_hash=report.data_hash if report else "",
    )


def _data(record: StudyRecord | None) -> tuple[float, str]:
    """What guessing gives on the test rows, in percent, and what they are."""
    if record is None:
        return 0.0, ""
    data = record.study.base.data
    first = data.train[0] if isinstance(data.train, list) else data.train
    source = data.test or first
    if data.task != "probe":
        return 0.0, data.task
    options = ", ".join(f"{key} {value}" for key, value in source.options.items() if key != "seed")
    return 100.0 * probe_of(source).chance(), f"{source.generated} ({options})" if options else str(source.generated)


def _cell(
    study: StudyConfig,
    task: StudyTask,
    name: str,
    row: CandidateResult | None,
    record: StudyRecord | None,
    report: Report | None,
) -> Cell:
    context = max(study.contexts, default=0)
    expected = task.expected.get(name)
    if row is None or record is None or report is None:
        return Cell(
            task.name, name, "", None, None, None, [], [], None, False, {}, None, context, None, None, "missing",
            expected, "missing",
        )  # fmt: skip
    runs = [run for run in record.runs if run.planned.name in row.runs]
    values = row.quality.values
    solved = [value >= 100.0 * task.solved for _, value in values]
    outcome: Outcome = "solved" if all(solved) else "mixed" if any(solved) else "unsolved"
    rates = {point.learning_rate: 100.0 * (1.0 - point.loss) for point in report.sweep if point.candidate == name}
    edge = len(rates) > 1 and row.training.learning_rate in (min(rates), max(rates))
    model = runs[0].config.model
    return Cell(
        task=task.name,
        candidate=name,
        mixer=row.mixer,
        mean=row.quality.interval.mean,
        low=row.quality.interval.low,
        high=row.quality.interval.high,
        values=values,
        losses=[(run.planned.seed, _last_loss(run.metrics)) for run in runs],
        learning_rate=row.training.learning_rate,
        at_edge=edge and outcome != "solved",
        rates=rates,
        state_bytes=skeleton(model).state_bytes(context) if model.layout == "decoder-only" else None,
        context=context,
        parameters=row.parameters["non_embedding"],
        seconds=row.training.seconds,
        outcome=outcome,
        expected=expected,
        verdict="missing",
    )


def _last_loss(metrics: list[dict[str, Any]]) -> float:
    return next((float(line["loss"]) for line in reversed(metrics) if "loss" in line), float("nan"))


def verdict(outcome: Outcome, expected: str | None, control_passed: bool | None) -> Verdict:
    """What a cell says against its expectation; `control_passed` None: no control, or it has not finished."""
    if outcome == "missing":
        return "missing"
    if expected not in ("solves", "fails"):
        return "not stated"
    if outcome == "mixed":
        return "mixed"
    if outcome == "solved":
        return "agrees" if expected == "solves" else "disagrees"
    if not control_passed:
        return "not judged"
    return "agrees" if expected == "fails" else "disagrees"
