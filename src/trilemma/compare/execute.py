"""Runs a study: sweeps learning rates, trains every run, scores it, measures inference; then the report is drawn.

Everything that is done is on disk and is not done again: a finished run is kept, a killed one is resumed, and the same
command goes on from any point.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trilemma.compare.expand import Choice, Expansion, Job, choose_rate, expand, final_jobs, job, sweep_jobs
from trilemma.compare.matching import skeleton
from trilemma.compare.measuring import measure_run, measured_inference, metric_of, score_run
from trilemma.compare.records import Inequality, Plan, StudyDirectory, flatten
from trilemma.compare.training import train_in_process
from trilemma.config import StudyConfig
from trilemma.data import Dataset, prepare
from trilemma.errors import ConfigError, TrainingError
from trilemma.runs import RunDirectory, files
from trilemma.runs.lock import RunLock
from trilemma.train.choices import choose
from trilemma.train.progress import clock

Train = Callable[[Path, Path], None]  # the file of a configuration, the run directory
Say = Callable[[str], None]


def run_study(
    study: StudyConfig, out: Path, command: str = "", say: Say = print, train: Train = train_in_process
) -> StudyDirectory:
    """Runs what is left of a study.

    Args:
        study: the study. out: its folder; one that holds the same study goes on where it was.
        command: what reproduces it, for the report.
        say: takes progress messages.
        train: trains one run; the public verb in a process of its own.

    Raises:
        ConfigError: the study cannot be run, or `out` holds another one.
        RunInUseError: another process runs it.
        TrainingError: a full-budget run failed. Interrupted: a signal came; the same command goes on.
    """
    directory = StudyDirectory(out)
    files.make_folder(directory.path)
    lock = RunLock(directory.path)
    lock.acquire()
    try:
        _Execution(directory, study, command, say, train).run()
    finally:
        lock.release()
    return directory


class _Execution:
    def __init__(self, directory: StudyDirectory, study: StudyConfig, command: str, say: Say, train: Train) -> None:
        self.directory, self.command, self.say, self.train = directory, command, say, train
        self.metric = metric_of(study)
        self.study = _decided(study)
        self.dataset, _ = prepare(self.study.base)
        self.expansion = _equal_compile(expand(self.study, self.dataset), self.dataset)
        self.inequalities = list(self.expansion.inequalities)
        self.notes: dict[str, str] = {}
        self.jobs: dict[str, Job] = {}  # by run name; a sweep's run that is also a final one is kept as final
        self.durations: list[float] = []
        self.done = 0

    def run(self) -> None:
        if (self.directory.path / "study.yaml").is_file():
            _check_same_study(self.directory.read_study(), self.study, self.directory.path)
        self.directory.write_study(self.study)
        chosen = self._sweep()
        finals = final_jobs(self.expansion, self.study, chosen)
        self._plan(finals)
        for item in finals:
            self._train(item)
            self._score(item)
        self._measure(finals)
        self._plan(finals)

    # --- the sweep ---

    def _sweep(self) -> dict[str, float]:
        """The learning rate of each candidate."""
        rates = {
            variant.name: variant.config.training.learning_rate
            for variant in self.expansion.variants
            if variant.role == "candidate"
        }
        if not self.study.learning_rates:
            return rates
        jobs = sweep_jobs(self.expansion, self.study, self.dataset)
        self._plan(jobs)
        losses: dict[str, dict[float, float]] = {name: {} for name in rates}
        for item in jobs:
            losses[item.planned.candidate][item.planned.learning_rate] = self._sweep_loss(item)
        return {name: self._chosen(name, found).learning_rate for name, found in losses.items()}

    def _chosen(self, name: str, losses: dict[float, float]) -> Choice:
        """Chooses; widens the grid by one where the optimum is at its edge."""
        choice = choose_rate(losses, self.study.widen)
        if choice.widen is not None:
            variant = next(variant for variant in self.expansion.variants if variant.name == name)
            extra = job(variant, self.study, choice.widen, variant.seeds[0], "sweep", self.dataset)
            self._plan([extra])
            losses[choice.widen] = self._sweep_loss(extra)
            choice = choose_rate(losses, widen=False)
            self.inequalities.append(
                Inequality(name, f"one learning rate more was tried: {extra.planned.learning_rate:g}")
            )
        self.notes[name] = choice.text
        return choice

    def _sweep_loss(self, item: Job) -> float:
        """Best validation loss; not a number where the run failed (a learning rate may be too high to survive)."""
        try:
            self._train(item)
        except TrainingError as error:
            self.say(f"{error}. The sweep goes on without it")
            return float("nan")
        summary = RunDirectory.open(self.directory.run_path(item.planned.name)).read_summary()
        loss = summary["best_valid_loss"]
        if loss is None:
            raise ConfigError("learning_rates: a sweep needs validation data to choose by; set data.valid in base")
        return float(loss)

    # --- one run ---

    def _train(self, item: Job) -> None:
        name, planned = item.planned.name, item.planned
        config = self.directory.claim_config(name, item.config)
        if self.directory.finished(name):
            self.done += 1
            return
        total = len(self.jobs)
        left = ""
        if self.durations:
            seconds = sum(self.durations) / len(self.durations) * (total - self.done)
            left = f", about {clock(seconds)} left"
        self.say(
            f"run {self.done + 1} of {total}: {planned.candidate}, learning rate {planned.learning_rate:g}, "
            f"seed {planned.seed}{left}"
        )
        started = time.monotonic()
        self.train(config, self.directory.run_path(name))
        self.durations.append(time.monotonic() - started)
        self.done += 1

    def _score(self, item: Job) -> None:
        name = item.planned.name
        if self.directory.read_documents(name) is None:
            documents = score_run(self.directory.run_path(name), self.metric, self.study.samples)
            self.directory.write_documents(name, documents)

    def _measure(self, finals: Sequence[Job]) -> None:
        """Inference cost of each candidate, all in one stretch, on its first run."""
        seen = set()
        for item in finals:
            planned = item.planned
            if planned.role != "candidate" or planned.candidate in seen:
                continue
            seen.add(planned.candidate)
            kept = self.directory.read_inference(planned.name)
            if not set(self.study.contexts) <= kept.contexts:
                self.say(f"measuring inference: {planned.candidate}")
                rows = measure_run(self.directory.run_path(planned.name), self.study.contexts, self.study.batch_sizes)
                self.directory.write_inference(planned.name, measured_inference(rows))

    def _plan(self, jobs: Sequence[Job]) -> None:
        """Adds runs to the plan and keeps it."""
        self.jobs.update({item.planned.name: item for item in jobs})
        runs = [item.planned for item in self.jobs.values()]
        self.directory.write_plan(Plan(runs, self.inequalities, self.notes, self.command, self.study.contexts))


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
    common = "on" if set(decided.values()) == {"on"} else "off"
    return expansion.with_training(compile=common)


def _check_same_study(kept: StudyConfig, study: StudyConfig, out: Path) -> None:
    """A folder holds one study. What only adds to it may change: candidates, seeds, contexts, samples, the price."""
    free = {"name", "candidates", "seeds", "contexts", "batch_sizes", "samples", "price_per_hour", "learning_rates"}
    old, new = flatten(kept.model_dump(mode="json")), flatten(study.model_dump(mode="json"))
    for key, value in new.items():
        if key.split(".")[0] not in free and not key.startswith("base.notes") and old.get(key) != value:
            raise ConfigError(
                f"{out}: holds a study with {key}={old.get(key)}, this one says {value}; choose another --out"
            )
