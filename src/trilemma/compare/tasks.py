"""A study with tasks: one study for each task, all with the same candidates, and a matrix over them.

    OUT/study.yaml          the study, as it was asked for
    OUT/tasks/<task>/       the study of one task (see `trilemma.compare.records`), with its own report
    OUT/matrix.*            see `trilemma.compare.matrix`

Every task is first run for its positive control alone, so that a probe that nothing can solve is seen early.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trilemma.compare.execute import Progress, Say, Train, check_folder, check_same_study, prepared, run_study
from trilemma.compare.expand import slug
from trilemma.compare.matrix import Cell, read_matrix
from trilemma.compare.measuring import metric_of
from trilemma.compare.records import StudyDirectory
from trilemma.compare.report import write_report
from trilemma.config import RunConfig, merge, parse
from trilemma.errors import ConfigError, nearest
from trilemma.runs import files
from trilemma.runs.lock import RunLock
from trilemma.study import StudyConfig, StudyTask


def task_study(study: StudyConfig, task: StudyTask) -> StudyConfig:
    """The study of one task."""
    where = f'task "{task.name}"'
    base = parse(RunConfig, merge(study.base.model_dump(mode="json"), task.overrides), where)
    budget = study.budget.model_copy(update={"amount": task.amount or study.budget.amount})
    changes = {"name": f"{study.name}: {task.name}", "base": base, "budget": budget, "tasks": []}
    return study.model_copy(update=changes)


def task_directory(out: Path, task: StudyTask) -> StudyDirectory:
    """Where the study of a task lies."""
    return StudyDirectory(out / "tasks" / slug(task.name))


def run_tasks(
    study: StudyConfig, out: Path, command: str = "", say: Say = print, train: Train | None = None
) -> StudyDirectory:
    """Runs what is left of a study with tasks; arguments and errors as for `run_study`."""
    check_tasks(study)
    directory = StudyDirectory(out)
    check_folder(directory.path)
    files.make_folder(directory.path)
    lock = RunLock(directory.path)
    lock.acquire()
    try:
        if (directory.path / "study.yaml").is_file():
            check_same_study(directory.read_study(), study, directory.path)
        _check_each(study)
        directory.write_study(study)
        _run(study, out, command, say, train)
    finally:
        lock.release()
    return directory


def check_tasks(study: StudyConfig) -> None:
    """Raises `ConfigError` for two tasks of one name, and for candidates that do not exist."""
    names = [candidate.name for candidate in study.candidates]
    folders = [slug(task.name) for task in study.tasks]
    for task in study.tasks:
        if folders.count(slug(task.name)) > 1:
            raise ConfigError(f'tasks: two are called "{task.name}", or nearly so')
        for name in [*task.expected, *([task.control] if task.control else [])]:
            if name not in names:
                raise ConfigError(f'task "{task.name}": no candidate is called "{name}"{nearest(name, names)}')


def _check_each(study: StudyConfig) -> None:
    """Prepares every task once: what is wrong with the last is said before the first is trained."""
    for task in study.tasks:
        one = task_study(study, task)
        try:
            metric_of(one)
            prepared(one)
        except ConfigError as error:
            raise ConfigError(f'task "{task.name}": {error}') from None


def _run(study: StudyConfig, out: Path, command: str, say: Say, train: Train | None) -> None:
    progress = Progress(total=_planned(study))
    progress.done = sum(
        task_directory(out, task).ended(run.name)
        for task in study.tasks
        for run in (out / "tasks" / slug(task.name) / "runs").glob("*/")
    )

    def go(at: int, task: StudyTask, only: list[str] | None) -> StudyDirectory:
        progress.where = f"{task.name} ({at} of {len(study.tasks)}), "
        folder = task_directory(out, task).path
        one = task_study(study, task)
        return run_study(one, folder, command, say, train, only=only, progress=progress, inference=False)

    for at, task in enumerate(study.tasks, start=1):
        if task.control is not None:
            go(at, task, [task.control])
            _say_control(out, task, say)
    for at, task in enumerate(study.tasks, start=1):
        _write_report(task, go(at, task, None), None, say)


def write_reports(study: StudyConfig, out: Path, price_per_hour: float | None, say: Say) -> None:
    """Draws the report of each task again, as far as it has been run."""
    for task in study.tasks:
        directory = task_directory(out, task)
        if (directory.path / "plan.json").is_file():
            _write_report(task, directory, price_per_hour, say)


def _write_report(task: StudyTask, directory: StudyDirectory, price_per_hour: float | None, say: Say) -> None:
    runs = [run.planned for run in directory.read().runs if run.documents is not None]
    if any(run.role == "candidate" and run.stage == "final" for run in runs):
        write_report(directory, price_per_hour)
    else:
        say(f"{task.name}: no run has finished, so there is no report of it")


def _planned(study: StudyConfig) -> int:
    """Runs of all tasks, but for rates that widening may add."""
    rates = len(set(study.learning_rates))
    runs = 0
    for candidate in study.candidates:
        seeds = len(candidate.seeds or study.seeds)
        swept = min(seeds, study.sweep_seeds)
        again = swept if study.sweep_share == 1.0 else 0  # the chosen rate's runs of the sweep are final ones
        runs += seeds if not rates else rates * swept + seeds - again
    return runs * len(study.tasks)


def _say_control(out: Path, task: StudyTask, say: Callable[[str], None]) -> None:
    cell: Cell = read_matrix(out).cell(task.name, str(task.control))
    result = "passed" if cell.outcome == "solved" else "did NOT pass: failures of others will not count"
    say(f"positive control of {task.name}: {task.control} has {cell.shown()}; {result}")
