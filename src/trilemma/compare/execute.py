"""Runs a study: sweeps learning rates, trains every run, scores it, measures inference; then the report is drawn.

Everything that is done is on disk and is not done again: a finished run is kept, a killed one is resumed, and the same
command goes on from any point.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from trilemma.compare.expand import Choice, Expansion, Job, choose_rate, expand, final_jobs, rate_jobs, sweep_jobs
from trilemma.compare.matching import skeleton
from trilemma.compare.measuring import measure_run, metric_of, score_run
from trilemma.compare.records import Inequality, Plan, PlannedRun, StudyDirectory, flatten
from trilemma.compare.training import in_parallel, train_in_process
from trilemma.data import Dataset, prepare
from trilemma.errors import ConfigError, TrainingError
from trilemma.laws.records import require
from trilemma.ops import backends
from trilemma.runs import RunDirectory, files
from trilemma.runs.lock import RunLock
from trilemma.study import StudyConfig
from trilemma.train.choices import choose
from trilemma.train.progress import clock

Train = Callable[[Path, Path], None]  # the file of a configuration, the run directory
Say = Callable[[str], None]


@dataclass
class Progress:
    """How far a study is, or all studies of a matrix together.

    Attributes:
        total: runs planned. done: of them, those that have ended. seconds: of each run that ended in this process.
        where: what stands before each message.
    """

    total: int = 0
    done: int = 0
    seconds: list[float] = field(default_factory=list)
    where: str = ""

    def line(self, item: Job, workers: int) -> str:
        """What is begun now, and how long all that is left may take."""
        left = ""
        if self.seconds:
            mean = sum(self.seconds) / len(self.seconds)
            left = f", about {clock(mean * (self.total - self.done) / workers)} left"
        planned = item.planned
        return (
            f"run {self.done + 1} of {self.total}: {self.where}{planned.candidate}, learning rate "
            f"{planned.learning_rate:g}, seed {planned.seed}{left}"
        )


def run_study(
    study: StudyConfig,
    out: Path,
    command: str = "",
    say: Say = print,
    train: Train | None = None,
    *,
    only: Collection[str] | None = None,
    progress: Progress | None = None,
    inference: bool = True,
) -> StudyDirectory:
    """Runs what is left of a study.

    Args:
        study: the study. out: its folder; one that holds the same study goes on where it was.
        command: what reproduces it, for the report.
        say: takes progress messages.
        train: trains one run; None: the public verb in a process of its own.
        only: candidates to run now; None: all.
        progress: counted on, where the study is one of several; its total is then the caller's.
        inference: whether inference cost is measured.

    Raises:
        ConfigError: the study cannot be run, or `out` holds another one.
        RunInUseError: another process runs it.
        Interrupted: a signal came; the same command goes on.
    """
    directory = StudyDirectory(out)
    check_folder(directory.path)
    files.make_folder(directory.path)
    lock = RunLock(directory.path)
    lock.acquire()
    try:
        _Execution(directory, study, command, say, train, only, progress, inference).run()
    finally:
        lock.release()
    return directory


class _Execution:
    def __init__(
        self,
        directory: StudyDirectory,
        study: StudyConfig,
        command: str,
        say: Say,
        train: Train | None,
        only: Collection[str] | None,
        progress: Progress | None,
        inference: bool,
    ) -> None:
        self.directory, self.command, self.say, self.inference = directory, command, say, inference
        self.train = train or functools.partial(train_in_process, share=study.workers)
        self.only, self.progress, self.alone = only, progress or Progress(), progress is None
        self.metric = metric_of(study)
        self.study, self.dataset, expansion = prepared(study)
        _require_laws(expansion, self.dataset, self.study.base.training.device, say)
        self.expansion = _equal_compile(expansion, self.dataset)
        self.inequalities = list(self.expansion.inequalities)
        self.notes: dict[str, str] = {}
        self.jobs: dict[str, Job] = {}  # by run name; a sweep's run that is also a final one is kept as final
        self.before: dict[str, PlannedRun] = {}  # the plan of an earlier call

    def run(self) -> None:
        if (self.directory.path / "study.yaml").is_file():
            check_same_study(self.directory.read_study(), self.study, self.directory.path)
            if (self.directory.path / "plan.json").is_file():
                self.before = {run.name: run for run in self.directory.read_plan().runs}
        self.directory.write_study(self.study)
        chosen = self._sweep()
        finals = self._wanted(final_jobs(self.expansion, self.study, chosen))
        self._plan(finals)
        for item, error in self._trained(finals):
            if error is None:
                self._score(item)
            else:
                self._pass_over(error)
        if self.inference:
            self._measure(finals)
        self.before = {}
        self._plan(finals)

    def _wanted(self, jobs: Sequence[Job]) -> list[Job]:
        return [item for item in jobs if self.only is None or item.planned.candidate in self.only]

    # --- the sweep ---

    def _sweep(self) -> dict[str, float]:
        """The learning rate of each candidate that has one."""
        rates = {
            variant.name: variant.config.training.learning_rate
            for variant in self.expansion.variants
            if variant.role == "candidate"
        }
        if not self.study.learning_rates:
            return rates
        jobs = self._wanted(sweep_jobs(self.expansion, self.study, self.dataset))
        self._plan(jobs)
        losses = self._sweep_losses(jobs)
        for name, found in losses.items():
            choice = self._chosen(name, found)
            if choice is None:
                del rates[name]
            else:
                rates[name] = choice.learning_rate
        return rates

    def _chosen(self, name: str, losses: dict[float, float]) -> Choice | None:
        """Chooses; widens the grid by one where the optimum is at its edge. None where no rate can be survived."""
        if all(math.isnan(loss) for loss in losses.values()):
            rates = ", ".join(f"{rate:g}" for rate in sorted(losses))
            text = f"training failed at every learning rate of the sweep ({rates}); not counted"
            self.inequalities.append(Inequality(name, text))
            self.notes[name] = text
            self.say(f"{name}: {text}")
            return None
        choice = choose_rate(losses, self.study.widen)
        if choice.widen is not None:
            variant = next(variant for variant in self.expansion.variants if variant.name == name)
            extra = rate_jobs(variant, self.study, choice.widen, self.dataset)
            self._plan(extra)
            losses |= self._sweep_losses(extra)[name]
            self.inequalities.append(Inequality(name, f"one learning rate more was tried: {choice.widen:g}"))
            choice = choose_rate(losses, widen=False)
        self.notes[name] = choice.text
        return choice

    def _sweep_losses(self, jobs: Sequence[Job]) -> dict[str, dict[float, float]]:
        """For each candidate and learning rate the best validation loss (of a probe: error), the mean over seeds; not a
        number where a run failed, since a learning rate may be too high to survive."""
        found: dict[str, dict[float, list[float]]] = {}
        for item, error in self._trained(jobs):
            if error is not None:
                self._pass_over(error)
            planned = item.planned
            rates = found.setdefault(planned.candidate, {})
            rates.setdefault(planned.learning_rate, []).append(float("nan") if error else self._sweep_loss(item))
        return {
            name: {rate: sum(losses) / len(losses) for rate, losses in rates.items()} for name, rates in found.items()
        }

    def _sweep_loss(self, item: Job) -> float:
        summary = RunDirectory.open(self.directory.run_path(item.planned.name)).read_summary()
        accuracy, loss = summary.get("best_valid_accuracy"), summary["best_valid_loss"]
        if loss is None:
            return math.nan
        return float(loss) if accuracy is None else 1.0 - float(accuracy)

    # --- runs ---

    def _trained(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Exception | None]]:
        """Trains those that have not been, `workers` at a time; every one is given back as it ends, with its error.

        One that failed in an earlier call is not tried again: it would fail in the same step.
        """
        fresh = []
        for item in jobs:
            self.directory.claim_config(item.planned.name, item.config)
            if self.directory.finished(item.planned.name):
                yield item, None
            elif (failure := self.directory.read_failure(item.planned.name)) is not None:
                yield item, failure
            else:
                fresh.append(item)
        with closing(in_parallel([functools.partial(self._train, item) for item in fresh], self.study.workers)) as ends:
            for at, error in ends:
                yield fresh[at], error

    def _pass_over(self, error: Exception) -> None:
        """Goes on without a run whose loss is not a number; raises every other error."""
        if not isinstance(error, TrainingError):
            raise error
        self.say(f"{error}. The study goes on without this run")

    def _train(self, item: Job) -> None:
        progress, name = self.progress, item.planned.name
        self.say(progress.line(item, self.study.workers))
        started = time.monotonic()
        try:
            self.train(self.directory.config_path(name), self.directory.run_path(name))
        finally:
            progress.done += 1
        progress.seconds.append(time.monotonic() - started)

    def _score(self, item: Job) -> None:
        name = item.planned.name
        kept = self.directory.read_documents(name)
        if kept is None or not kept.shows(self.study.samples):
            documents = score_run(self.directory.run_path(name), self.metric, self.study.samples, self.say)
            self.directory.write_documents(name, documents)

    def _measure(self, finals: Sequence[Job]) -> None:
        """Inference cost of each candidate, all in one stretch, on its first run that finished."""
        seen = set()
        for item in finals:
            planned = item.planned
            if planned.role != "candidate" or planned.candidate in seen or not self.directory.finished(planned.name):
                continue
            seen.add(planned.candidate)
            kept = self.directory.read_inference(planned.name)
            contexts, batch_sizes = self.study.contexts, self.study.batch_sizes
            if not kept.covers(contexts, batch_sizes):
                self.say(f"measuring inference: {planned.candidate}")
                measured = measure_run(self.directory.run_path(planned.name), contexts, batch_sizes, self.say)
                self.directory.write_inference(planned.name, measured)

    def _plan(self, jobs: Sequence[Job]) -> None:
        """Adds runs to the plan and keeps it. What an earlier call found stands until this one is through."""
        self.jobs.update({item.planned.name: item for item in jobs})
        if self.alone:
            self.progress.total = len(self.jobs)
            self.progress.done = sum(self.directory.ended(name) for name in self.jobs)
        runs = {name: item.planned for name, item in self.jobs.items()}
        runs |= {name: run for name, run in self.before.items() if name not in runs or run.stage == "final"}
        self.directory.write_plan(
            Plan(list(runs.values()), self.inequalities, self.notes, self.command, self.study.contexts)
        )


def prepared(study: StudyConfig) -> tuple[StudyConfig, Dataset, Expansion]:
    """The study with its automatic choices made, its data, and what it expands to: all that is known before training.

    Raises:
        ConfigError: the study cannot be run. DataError: its data cannot be read.
    """
    if study.workers > 1 and study.budget.lock == "seconds":
        raise ConfigError("workers: runs that share the machine cannot be given a budget of seconds; set workers=1")
    study = _decided(study)
    dataset, _ = prepare(study.base)
    _check_splits(study, dataset)
    return study, dataset, expand(study, dataset)


def _check_splits(study: StudyConfig, dataset: Dataset) -> None:
    """Raises `ConfigError` where nothing could be compared, or chosen by, once all runs are trained."""
    if study.learning_rates and not dataset.sizes.get("valid"):
        raise ConfigError(
            "learning_rates: a sweep needs validation data to choose by; set data.valid or data.split in base"
        )
    if not dataset.sizes.get("test") and not dataset.sizes.get("valid"):
        raise ConfigError("a comparison needs test or validation data: set data.test or data.split in base")


def check_folder(out: Path) -> None:
    """Raises `ConfigError` where a run lies in the study's folder: the two would be mixed up."""
    if RunDirectory(out).exists():
        raise ConfigError(f"{out}: holds a run, not a study; choose another --out")


def _decided(study: StudyConfig) -> StudyConfig:
    """The study with its base's device and precision decided: once, for all candidates."""
    training = study.base.training
    base = study.base.model_copy(update={"training": training.model_copy(update={"steps": training.steps or 1})})
    base = choose(base)
    base = base.model_copy(update={"training": base.training.model_copy(update={"steps": training.steps})})
    return study.model_copy(update={"base": base})


def _equal_compile(expansion: Expansion, dataset: Dataset) -> Expansion:
    """Compiled training is used by all candidates or by none."""
    decided = {}
    for variant in expansion.variants:
        resolved = dataset.resolved(variant.config)
        decided[variant.name] = choose(resolved, skeleton(resolved.model)).training.compile
    backends.reset()  # each run chooses its own
    common = "on" if set(decided.values()) == {"on"} else "off"
    return expansion.with_training(compile=common)


def _require_laws(expansion: Expansion, dataset: Dataset, device: str, say: Say) -> None:
    """Raises `LawError` before a run is trained that could be neither scored nor measured after it."""
    models = [skeleton(dataset.resolved(variant.config).model) for variant in expansion.variants]
    require([mixer for model in models for mixer in model.mixers()], device=device, say=say)


def failed(directory: StudyDirectory) -> list[str]:
    """What of a study that was run to its end could not be trained: a line for each run, or candidate."""
    plan = directory.read_plan()
    lines = [f"{failure.planned.candidate}, {failure.text}" for failure in directory.failures(plan)]
    counted = {run.candidate for run in plan.runs if run.stage == "final"}
    swept = dict.fromkeys(run.candidate for run in plan.runs)
    return lines + [f"{name}: {plan.sweep_notes.get(name, 'not trained')}" for name in swept if name not in counted]


def check_shown_study(kept: StudyConfig, study: StudyConfig, out: Path) -> None:
    """As `check_same_study`, of a study that is not run now: what it leaves to be decided was decided when it was."""
    old, new = kept.base.training, study.base.training
    decided = {key: getattr(old, key) for key in ("device", "precision") if getattr(new, key) == "auto"}
    base = study.base.model_copy(update={"training": new.model_copy(update=decided)})
    check_same_study(kept, study.model_copy(update={"base": base}), out)


def check_same_study(kept: StudyConfig, study: StudyConfig, out: Path) -> None:
    """A folder holds one study. What only adds to it may change: candidates, tasks, seeds, contexts, the price."""
    free = {"name", "candidates", "seeds", "contexts", "batch_sizes", "samples", "price_per_hour", "learning_rates"}
    free |= {"tasks", "workers", "sweep_seeds"}
    old, new = flatten(kept.model_dump(mode="json")), flatten(study.model_dump(mode="json"))
    for key, value in new.items():
        if key.split(".")[0] not in free and not key.startswith("base.notes") and old.get(key) != value:
            raise ConfigError(
                f"{out}: holds a study with {key}={old.get(key)}, this one says {value}; choose another --out"
            )
