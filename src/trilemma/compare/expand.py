"""A study expands to plain resolved run configurations: nothing about a run is decided anywhere else."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trilemma.compare.matching import count, match_parameters, skeleton
from trilemma.compare.records import Inequality, PlannedRun, Role, Stage, flatten
from trilemma.compare.words import amount
from trilemma.config import ModelConfig, RunConfig, merge, parse
from trilemma.data import Dataset, prepare
from trilemma.errors import ConfigError, nearest
from trilemma.study import Candidate, StudyConfig
from trilemma.train.counters import flops_of

# What all candidates share. A candidate that changed one of these would not be compared but confused.
_SHARED = (
    "version", "seed", "name", "notes", "data", "tokenizer",
    "training.steps", "training.max_tokens", "training.max_seconds", "training.batch_tokens", "training.accumulate",
    "training.precision", "training.device", "training.compile", "training.patience", "training.checkpoint_every",
    "training.validate_every", "training.validate_tokens", "training.log_every", "training.keep_checkpoints",
    "training.target_accuracy", "training.backend", "training.quality",
)  # fmt: skip
_HANDICAP = "{model.positions: none}"
_VALIDATIONS = 12  # of a run, where the base does not say: a quarter and half of the budget are among them
_VALIDATED = 0.75  # tokens that they read together, as a share of those trained on: at most a quarter of the time
_COUNTED_BATCHES = 500  # micro-batches whose FLOPs are counted exactly; the rest follows from their mean


@dataclass(frozen=True)
class Variant:
    """One candidate or control: its configuration but for learning rate and seed."""

    name: str
    role: Role
    config: RunConfig
    seeds: list[int]


@dataclass(frozen=True)
class Expansion:
    """The variants of a study, the reference first among equals, and what is not equal about them."""

    variants: list[Variant]
    reference: str
    inequalities: list[Inequality] = field(default_factory=list)

    def with_training(self, **changes: Any) -> Expansion:
        """The same with keys of `training` changed for every variant alike."""
        variants = [
            dataclasses.replace(
                variant,
                config=variant.config.model_copy(
                    update={"training": variant.config.training.model_copy(update=changes)}
                ),
            )
            for variant in self.variants
        ]
        return dataclasses.replace(self, variants=variants)


def expand(study: StudyConfig, dataset: Dataset | None = None) -> Expansion:
    """Resolves every candidate and control.

    Args:
        study: as asked for; device and precision of its base should be decided, so that all candidates share them.
        dataset: of the base, for the length of a training step in tokens; needed to lock FLOPs.

    Raises:
        ConfigError: an unknown key, a key that candidates must share, an unknown reference, two candidates of one name.
        CapabilityError: a model that cannot be built.
    """
    _check_names(study)
    reference = study.reference or study.candidates[0].name
    configs = {candidate.name: _overridden(study, candidate) for candidate in study.candidates}
    inequalities = [item for candidate in study.candidates for item in _declared(study, candidate)]
    target = count(configs[reference].model)
    for candidate in study.candidates:
        fitted, found = _matched(study, candidate, configs[candidate.name], target, reference)
        configs[candidate.name] = fitted
        inequalities += found
    variants = [
        Variant(candidate.name, "candidate", configs[candidate.name], list(candidate.seeds or study.seeds))
        for candidate in study.candidates
    ]
    variants += _controls(study, reference, configs[reference])
    _check_reserved(variants)
    budgeted = []
    for variant in variants:
        config, text = _budgeted(variant.config, study, dataset, 1.0)
        budgeted.append(Variant(variant.name, variant.role, config, variant.seeds))
        if text:
            inequalities.append(Inequality(variant.name, text))
    return Expansion(budgeted, reference, inequalities)


def _check_names(study: StudyConfig) -> None:
    names = [candidate.name for candidate in study.candidates]
    for at, name in enumerate(names):
        if not name.strip():
            raise ConfigError(f"candidates.{at}.name is empty")
        if name in names[:at]:
            raise ConfigError(f'candidates: two are called "{name}"')
    if study.reference is not None and study.reference not in names:
        raise ConfigError(f'reference: no candidate is called "{study.reference}"{nearest(study.reference, names)}')
    for candidate in study.candidates if study.learning_rates else ():
        seeds = candidate.seeds or study.seeds
        if study.sweep_seeds > len(seeds):
            raise ConfigError(
                f'sweep_seeds: {study.sweep_seeds} are asked for, candidate "{candidate.name}" has the seeds {seeds}; '
                "lower sweep_seeds or add seeds"
            )


def _check_reserved(variants: Sequence[Variant]) -> None:
    names = [variant.name for variant in variants if variant.role == "candidate"]
    for variant in variants:
        if variant.role != "candidate" and variant.name in names:
            raise ConfigError(f'candidates: "{variant.name}" is the name of a control; choose another')


def _overridden(study: StudyConfig, candidate: Candidate) -> RunConfig:
    _check_shared(candidate.overrides, f'candidate "{candidate.name}"')
    for key in flatten(candidate.overrides):
        if key == "training.learning_rate" and study.learning_rates:
            raise ConfigError(
                f'candidate "{candidate.name}": {key} is chosen by the sweep (learning_rates); take one of them away'
            )
    values = merge(study.base.model_dump(mode="json"), candidate.overrides)
    values["name"] = candidate.name
    return parse(RunConfig, values, f'candidate "{candidate.name}"')


def _check_shared(overrides: Mapping[str, Any], where: str) -> None:
    for key in flatten(overrides):
        if any(key == name or key.startswith(f"{name}.") for name in _SHARED):
            raise ConfigError(f"{where}: {key} must be the same for all candidates; set it in base instead")


def _declared(study: StudyConfig, candidate: Candidate) -> list[Inequality]:
    """Overrides outside the model: allowed, and said."""
    base = flatten(study.base.model_dump(mode="json"))
    return [
        Inequality(candidate.name, f"{key} is {value}, the base's is {base.get(key)}")
        for key, value in flatten(candidate.overrides).items()
        if not key.startswith("model.") and value != base.get(key)
    ]


def _matched(
    study: StudyConfig, candidate: Candidate, config: RunConfig, target: int, reference: str
) -> tuple[RunConfig, list[Inequality]]:
    asked, own = config.model, count(config.model)
    tolerance = study.budget.tolerance
    keys = flatten(candidate.overrides)
    if not study.budget.match_parameters or candidate.name == reference or abs(own / target - 1) <= tolerance:
        match, fixed = None, False
    elif "model.d_ff" in keys:
        match, fixed = None, True
    else:
        match, fixed = match_parameters(config.model, target, tolerance), False
        config = config.model_copy(update={"model": match.config})
        own = match.parameters
    found = []
    if config.model.d_model != study.base.model.d_model:
        found.append(f"d_model is {config.model.d_model}, the base's is {study.base.model.d_model}")
    off = own / target - 1
    if abs(off) > tolerance:
        why = " (its d_ff is given, so it was not matched)" if fixed else ""
        found.append(f"{amount(own)} non-embedding parameters, {off:+.1%} against {reference}{why}")
    if match is not None:
        was, now = _layers(asked), _layers(match.config)
        if was != now:
            found.append(f"{now} instead of {was}, to match parameters")
    return config, [Inequality(candidate.name, text) for text in found]


def _layers(model: ModelConfig) -> str:
    if model.layout != "encoder-decoder":
        return f"{model.num_layers} layers"
    return f"{model.encoder_layers or model.num_layers} + {model.num_layers} layers"


def again(reference: str) -> str:
    """The name of the A/A control."""
    return f"{reference} (again)"


def handicapped(reference: str) -> str:
    """The name of the known-gap control."""
    return f"{reference} (handicapped)"


def _controls(study: StudyConfig, reference: str, config: RunConfig) -> list[Variant]:
    controls = []
    used = {seed for candidate in study.candidates for seed in candidate.seeds or study.seeds}
    own = next(candidate.seeds for candidate in study.candidates if candidate.name == reference) or study.seeds
    if study.controls.same_twice:
        first = max(used) + 1
        name = again(reference)
        controls.append(Variant(name, "same-twice", _renamed(config, name), list(range(first, first + len(own)))))
    if study.controls.known_gap is not None:
        name = handicapped(reference)
        controls.append(Variant(name, "known-gap", _handicapped(study.controls.known_gap, config, name), list(own)))
    return controls


def _handicapped(overrides: dict[str, Any], config: RunConfig, name: str) -> RunConfig:
    where = "controls.known_gap"
    _check_shared(overrides, where)
    if "training.learning_rate" in flatten(overrides):
        raise ConfigError(f"{where}: training.learning_rate is the reference's; name another key, such as {_HANDICAP}")
    values = merge(config.model_dump(mode="json"), overrides)
    changed = parse(RunConfig, {**values, "name": config.name}, where)
    if changed == config:
        raise ConfigError(
            f"{where}: changes nothing of the reference; name what must make it worse, such as {_HANDICAP}"
        )
    return _renamed(changed, name)


def _renamed(config: RunConfig, name: str) -> RunConfig:
    return config.model_copy(update={"name": name})


def _budgeted(
    config: RunConfig, study: StudyConfig, dataset: Dataset | None, share: float
) -> tuple[RunConfig, str | None]:
    """The configuration with what ends it; and, for FLOPs, by how much whole steps miss the budget."""
    lock, spend = study.budget.lock, study.budget.amount * share
    if dataset is not None and config.model.layout != dataset.config.model.layout:
        dataset, _ = prepare(config, dataset.tokenizer)  # the same examples, laid out for this model
    changes: dict[str, Any] = {"steps": None, "max_tokens": None, "max_seconds": None}
    text = None
    steps: int | None = None
    if lock == "tokens":
        changes["max_tokens"] = max(1, round(spend))
        steps = None if dataset is None else max(1, round(spend / _targets_per_step(config, dataset)))
    elif lock == "seconds":
        changes["max_seconds"] = spend
    else:
        if dataset is None:
            raise ConfigError("budget.lock flops needs the data: prepare them first")
        steps, spent = _steps_for_flops(config, dataset, spend)
        changes["steps"] = steps
        if abs(spent / spend - 1) > 0.02:
            text = f"{amount(spent)} training FLOPs in whole steps, {spent / spend - 1:+.1%} off the budget"
    if config.training.validate_every is None and steps is not None:
        changes["validate_every"] = max(1, steps // _VALIDATIONS)
        if config.training.validate_tokens is None:
            read = steps * config.training.accumulate * config.training.batch_tokens
            changes["validate_tokens"] = max(1, round(_VALIDATED * read / _VALIDATIONS))
    return config.model_copy(update={"training": config.training.model_copy(update=changes)}), text


def _targets_per_step(config: RunConfig, dataset: Dataset) -> float:
    batches = min(dataset.batches_per_epoch, 50)
    return sum(dataset.micro_batch(k).num_targets for k in range(batches)) / batches * config.training.accumulate


def _steps_for_flops(config: RunConfig, dataset: Dataset, budget: float) -> tuple[int, float]:
    """Steps that come nearest to the budget (training = 3 x forward), and the FLOPs that they take."""
    model = skeleton(dataset.resolved(config).model)
    known: dict[tuple[int, int], int] = {}
    accumulate, factor = config.training.accumulate, 3.0 * config.training.forward_passes
    spent, steps, last = 0.0, 0, 0.0
    while spent < budget and steps * accumulate < _COUNTED_BATCHES:
        first = steps * accumulate
        last = factor * sum(flops_of(model, dataset.micro_batch(first + item), known) for item in range(accumulate))
        spent += last
        steps += 1
    if spent >= budget:
        if spent - budget > budget - (spent - last) and steps > 1:
            spent, steps = spent - last, steps - 1
        return steps, spent
    total = max(1, round(budget / (spent / steps)))
    return total, spent / steps * total


# --- from variants to runs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run: what the plan says of it, and its full configuration."""

    planned: PlannedRun
    config: RunConfig


def job(
    variant: Variant, study: StudyConfig, learning_rate: float, seed: int, stage: Stage, dataset: Dataset | None = None
) -> Job:
    """A variant with a learning rate and a seed; a sweep's run gets its share of the budget."""
    config, short = variant.config, stage == "sweep" and study.sweep_share < 1
    if short:
        config, _ = _budgeted(config, study, dataset, study.sweep_share)
    training = config.training.model_copy(update={"learning_rate": learning_rate})
    config = config.model_copy(update={"seed": seed, "training": training})
    name = run_name(variant.name, variant_names(study), learning_rate, seed, short)
    return Job(PlannedRun(name, variant.name, variant.role, stage, learning_rate, seed), config)


def run_name(candidate: str, names: Sequence[str], learning_rate: float, seed: int, short: bool) -> str:
    """A directory name: plain characters only, one for each of `names` even where their slugs are alike."""
    return f"{_folders(names)[candidate]}-lr{learning_rate:g}-seed{seed}{'-sweep' if short else ''}"


def _folders(names: Sequence[str]) -> dict[str, str]:
    """For each name its slug, with a number behind it where an earlier name has it."""
    found: dict[str, str] = {}
    for name in names:
        own, at = slug(name), 1
        while own in found.values():
            at += 1
            own = f"{slug(name)}-{at}"
        found[name] = own
    return found


def variant_names(study: StudyConfig) -> list[str]:
    """Names of all candidates and of the controls that are asked for, in this order."""
    reference = study.reference or study.candidates[0].name
    controls = [again(reference)] if study.controls.same_twice else []
    controls += [handicapped(reference)] if study.controls.known_gap is not None else []
    return [*(candidate.name for candidate in study.candidates), *controls]


def slug(name: str) -> str:
    """Letters, digits, dots, dashes and underscores of a name; never empty, never hidden, never a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:60] or "candidate"


def sweep_jobs(expansion: Expansion, study: StudyConfig, dataset: Dataset | None = None) -> list[Job]:
    """Every candidate at every learning rate, with its first seeds; empty without a sweep."""
    return [
        one
        for at in range(study.sweep_seeds)
        for rate in sorted(set(study.learning_rates))
        for variant in expansion.variants
        if variant.role == "candidate"
        for one in rate_jobs(variant, study, rate, dataset, at)
    ]


def rate_jobs(
    variant: Variant, study: StudyConfig, rate: float, dataset: Dataset | None = None, at: int | None = None
) -> list[Job]:
    """A candidate at one learning rate, with each seed of the sweep (or the one at place `at`, if it has so many)."""
    seeds = variant.seeds[: study.sweep_seeds]
    return [job(variant, study, rate, seed, "sweep", dataset) for seed in (seeds if at is None else seeds[at : at + 1])]


def final_jobs(expansion: Expansion, study: StudyConfig, chosen: Mapping[str, float]) -> list[Job]:
    """Full-budget runs: seed by seed, so that a study stopped early has compared all candidates on the first seeds.

    Args:
        chosen: learning rate of each candidate; a control takes the reference's. One without a rate is left out.
    """
    jobs = []
    for at in range(max(len(variant.seeds) for variant in expansion.variants)):
        for variant in expansion.variants:
            if at < len(variant.seeds):
                source = variant.name if variant.role == "candidate" else expansion.reference
                if source not in chosen:
                    continue
                jobs.append(job(variant, study, chosen[source], variant.seeds[at], "final"))
    return jobs


@dataclass(frozen=True)
class Choice:
    """The outcome of a sweep: a learning rate to use, or `widen`: one more to try first."""

    learning_rate: float
    widen: float | None
    text: str


def choose_rate(losses: Mapping[float, float], widen: bool) -> Choice:
    """The learning rate with the lowest loss. At the grid's edge one beyond it is asked for, or the edge is flagged.

    Args:
        losses: learning rate -> best validation loss, or error; not a number where a run failed.
        widen: whether the grid may still be widened; it is, once.
    """
    rates = sorted(losses)
    finite = {rate: loss for rate, loss in losses.items() if loss == loss}
    if not finite:
        raise ConfigError(f"learning_rates: no run of the sweep ended with a loss; tried {_rates(rates)}")
    best = min(finite, key=lambda rate: (finite[rate], rate))
    at_edge = len(rates) > 1 and best in (rates[0], rates[-1])
    beyond = None
    if at_edge:
        ratio = rates[1] / rates[0] if best == rates[0] else rates[-1] / rates[-2]
        beyond = float(f"{best / ratio if best == rates[0] else best * ratio:.3g}")
    text = f"{best:g} was best of {_rates(rates)}"
    if at_edge and not widen:
        text += "; it lies at the edge of what was tried, a better one may lie beyond"
    if failed := [rate for rate in rates if rate not in finite]:
        text += f"; training failed at {_rates(failed)}"
    if len(rates) == 1:
        text = f"{best:g} was the only one tried"
    return Choice(best, beyond if widen else None, text)


def _rates(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)
