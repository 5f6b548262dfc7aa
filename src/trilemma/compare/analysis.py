"""From a study's files to everything that its report says: one plain `Report`.

Nothing here trains, measures or draws; `analyse` is a pure function of a `StudyRecord`. Tables, plots, HTML and JSON
are made from the `Report` alone, so they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trilemma.compare import words
from trilemma.compare.curves import Judged, curve_of, judged_by, stability, validations
from trilemma.compare.declared import unequal_models
from trilemma.compare.inference import InferenceCurve, crossovers, inference_of, unequal_measurements
from trilemma.compare.metrics import Metric, metric_named
from trilemma.compare.records import Documents, Inequality, Role, RunRecord, StudyRecord
from trilemma.compare.results import CandidateResult, Control, Corner, Quality, Report, SideBySide, SweepPoint, Training
from trilemma.compare.statistics import Sample, compare_all, compare_pair, interval, replicates_for, resample
from trilemma.config import MixerSpec, ModelConfig
from trilemma.errors import CheckpointError
from trilemma.study import StudyConfig

_SHORTEST_STRETCH = 5.0  # seconds of training between two validations that tell a pace
_EVEN = 1.5  # the fastest stretch over the slowest, from which on times are doubted


def analyse(record: StudyRecord, price_per_hour: float | None = None) -> Report:
    """Computes the report.

    Raises:
        CheckpointError: no candidate has been trained and scored, or runs were scored differently.
    """
    study = record.study
    price = price_per_hour if price_per_hour is not None else study.price_per_hour
    groups = _final_groups(record)
    names = [candidate.name for candidate in study.candidates if candidate.name in groups]
    if not names:
        raise CheckpointError("no candidate of this study has been trained and scored yet: there is nothing to report")
    wanted = study.reference or study.candidates[0].name
    reference = wanted if wanted in names else names[0]
    metric = _metric(groups)
    samples = _resampled(groups, metric, names)
    judged = judged_by([run for name in names for run in groups[name]], metric.name)
    own = {name: _row(name, runs, samples[name], metric, study.budget.lock, judged) for name, runs in groups.items()}
    context = _largest_shared_context(list(own.values()))
    rows = {name: _compared(row, own[reference], metric, context, price) for name, row in own.items()}
    candidates = [rows[name] for name in names]
    controls = [row for row in rows.values() if row.role != "candidate"]
    pairs = compare_all(samples, names)
    outcomes = _outcomes(record, groups, samples, metric)
    withheld = words.withheld(outcomes)
    scale = words.scale(candidates, study.budget.lock, study.budget.amount)
    first_run = groups[names[0]][0]
    first = _documents(first_run)
    return Report(
        name=study.name,
        task=words.task(study),
        reference=reference,
        metric=metric,
        split=first.split,
        documents=len(first.statistics),
        budget=study.budget.model_dump(),
        context=context,
        candidates=candidates,
        controls=controls,
        outcomes=outcomes,
        pairs=pairs,
        verdicts=[] if withheld else words.verdicts(pairs, rows, metric, scale),
        withheld=withheld,
        judged=judged,
        stability=stability([row.curve for row in candidates], judged),
        crossovers=crossovers([row.inference for row in candidates if row.inference], reference),
        criterion=words.criterion(study.base.data.task),
        sweep=_sweep(record, candidates),
        sweep_notes=record.plan.sweep_notes,
        samples=_side_by_side(names, groups),
        inequalities=[
            *record.plan.inequalities,
            *unequal_models(record.study, groups, reference),
            *_found_inequalities(record, groups),
        ],
        limits=words.limits(study, candidates, record.missing, first_run.config.training.validate_tokens),
        missing=record.missing,
        data_hash=" / ".join(_distinct(record.runs, "data_hash")),
        order_hashes=_order_hashes(groups),
        environment=environment(record.runs),
        command=record.plan.command,
        price_per_hour=price,
    )


def _final_groups(record: StudyRecord) -> dict[str, list[RunRecord]]:
    """Full-budget, scored runs by candidate, in the plan's order."""
    groups: dict[str, list[RunRecord]] = {}
    for run in record.runs:
        if run.planned.stage == "final" and run.documents is not None:
            groups.setdefault(run.planned.candidate, []).append(run)
    return groups


def _documents(run: RunRecord) -> Documents:
    assert run.documents is not None, "only scored runs are grouped"
    return run.documents


def _metric(groups: Mapping[str, Sequence[RunRecord]]) -> Metric:
    found = {(_documents(run).metric, len(_documents(run).statistics)) for runs in groups.values() for run in runs}
    if len(found) > 1:
        shown = "; ".join(f"{name} on {size} documents" for name, size in sorted(found))
        raise CheckpointError(f"the runs of this study were scored differently and cannot be compared: {shown}")
    return metric_named(found.pop()[0])


def _resampled(groups: Mapping[str, Sequence[RunRecord]], metric: Metric, names: Sequence[str]) -> dict[str, Sample]:
    """Bootstrap samples of all candidates and controls, with draws enough for every pair of `names`."""
    documents = {name: [_documents(run).statistics for run in runs] for name, runs in groups.items()}
    size = len(documents[names[0]][0])
    return resample(documents, metric, replicates_for([len(groups[name]) for name in names], size))


def _row(
    name: str, runs: list[RunRecord], sample: Sample, metric: Metric, lock: str, judged: Judged
) -> CandidateResult:
    """All of a row but for what depends on the other rows: corners and price."""
    model = runs[0].config.model
    seeds = [run.planned.seed for run in runs]
    values = [(seed, float(value)) for seed, value in zip(seeds, sample.values, strict=True)]
    return CandidateResult(
        name=name,
        role=runs[0].planned.role,
        mixer=mixer_label(model),
        layout=model.layout,
        parameters={key: int(count) for key, count in runs[0].summary["parameters"].items()},
        quality=Quality(_documents(runs[0]).signature, interval(sample, metric), values),
        training=_training(runs),
        inference=inference_of(name, runs),
        curve=curve_of(name, runs, lock, judged),
        corners={},
        price={},
        runs=[run.planned.name for run in runs],
    )


def mixer_label(model: ModelConfig) -> str:
    """The mixers: "retention", "attention + gru" for a pattern, "encoder's / decoder's" where they differ."""
    own = _mixer_names(model.mixer)
    if model.layout != "encoder-decoder" or model.encoder_mixer is None:
        return own
    encoder = _mixer_names(model.encoder_mixer)
    return own if encoder == own else f"{encoder} / {own}"


def _mixer_names(spec: MixerSpec | list[MixerSpec]) -> str:
    layers = spec if isinstance(spec, list) else [spec]
    return " + ".join(dict.fromkeys(layer if isinstance(layer, str) else _one_name(layer) for layer in layers))


def _one_name(options: Mapping[str, object]) -> str:
    """A wrapper's label names what it wraps: bidirectional(retention)."""
    inner = options.get("inner")
    if inner is None:
        return str(options.get("name", "?"))
    wrapped = inner if isinstance(inner, str) else _one_name(inner) if isinstance(inner, dict) else "?"
    return f"{options.get('name', '?')}({wrapped})"


def _training(runs: Sequence[RunRecord]) -> Training:
    def median(key: str) -> float:
        return float(np.median([float(run.summary.get(key) or 0.0) for run in runs]))

    rates = [float(run.summary["tokens"]) / float(run.summary["seconds"]) for run in runs if run.summary["seconds"]]
    return Training(
        learning_rate=runs[0].planned.learning_rate,
        steps=median("steps"),
        tokens=median("tokens"),
        tokens_per_second=float(np.median(rates)) if rates else math.nan,
        seconds=median("seconds"),
        flops=median("flops"),
        peak_memory_bytes=median("peak_memory_bytes"),
    )


def _price(
    training: Training, inference: InferenceCurve | None, per_hour: float, context: int | None
) -> dict[str, float]:
    """Money to train once and, where `context` was measured, for a million tokens after so many."""
    price = {"train": training.seconds / 3600.0 * per_hour}
    if inference is not None and context is not None:
        hours = inference.ms_per_token[context] * 1e6 / 1000.0 / 3600.0
        price["per_million_tokens"] = hours * per_hour
    return price


def _largest_shared_context(rows: Sequence[CandidateResult]) -> int | None:
    """The longest context measured for all that were measured at all: costs are compared there and nowhere else."""
    measured = [set(row.inference.ms_per_token) for row in rows if row.inference is not None]
    shared = set.intersection(*measured) if measured else set()
    return max(shared) if shared else None


def _compared(
    row: CandidateResult, reference: CandidateResult, metric: Metric, context: int | None, per_hour: float | None
) -> CandidateResult:
    """The row with its corners against the reference, and its price."""
    own, base = row.quality.interval.mean, reference.quality.interval.mean
    sign = 1.0 if metric.higher_is_better else -1.0
    corners = {
        "quality": Corner(own, sign * log2_ratio(own, base)),
        "training": Corner(
            row.training.seconds_per_million,
            -log2_ratio(row.training.seconds_per_million, reference.training.seconds_per_million),
        ),
    }
    if context is not None and row.inference and reference.inference:
        cost = row.inference.ms_per_token[context]
        corners["inference"] = Corner(cost, -log2_ratio(cost, reference.inference.ms_per_token[context]))
    price = {} if per_hour is None else _price(row.training, row.inference, per_hour, context)
    return dataclasses.replace(row, corners=corners, price=price)


def log2_ratio(own: float, base: float) -> float:
    """log2(own / base); not a number where either is not positive."""
    return math.log2(own / base) if own > 0 and base > 0 else math.nan


def _outcomes(
    record: StudyRecord, groups: Mapping[str, Sequence[RunRecord]], samples: Mapping[str, Sample], metric: Metric
) -> list[Control]:
    """The outcome of every control that was asked for, or of which there are runs; one that has none is undecided."""
    study = record.study
    controls = study.controls
    asked: dict[Role, bool] = {"same-twice": controls.same_twice, "known-gap": controls.known_gap is not None}
    planned = [run.planned for run in record.runs] + record.missing
    reference = study.reference or study.candidates[0].name
    own = next(candidate.seeds for candidate in study.candidates if candidate.name == reference) or study.seeds
    outcomes = []
    for role, wanted in asked.items():
        runs = [run for run in planned if run.role == role and run.stage == "final"]
        if not wanted and not runs:
            continue
        name = runs[0].candidate if runs else role
        finished = len(groups.get(name, ()))
        needed = max(len(runs), len(own) if wanted else 0)
        if finished < needed:
            outcomes.append(Control(name, None, words.unfinished(role, finished, needed)))
        elif reference not in groups:
            outcomes.append(Control(name, None, words.without_reference(role, reference)))
        else:
            outcomes.append(Control(name, *words.control(name, role, compare_pair(samples, reference, name), metric)))
    return outcomes


def _sweep(record: StudyRecord, candidates: Sequence[CandidateResult]) -> list[SweepPoint]:
    if not record.study.learning_rates:
        return []
    chosen = {row.name: row.training.learning_rate for row in candidates}
    share_is_whole = record.study.sweep_share == 1.0
    seeds = {one.name: (one.seeds or record.study.seeds)[: record.study.sweep_seeds] for one in record.study.candidates}
    found: dict[tuple[str, float], list[float]] = {}
    for run in record.runs:
        planned = run.planned
        # At the full budget, a sweep's best runs are also that candidate's first final runs.
        is_sweep = planned.stage == "sweep" or (share_is_whole and planned.seed in seeds.get(planned.candidate, ()))
        values = [_criterion(line) for line in validations(run)]
        if is_sweep and planned.role == "candidate" and values:
            found.setdefault((planned.candidate, planned.learning_rate), []).append(min(values))
    order = {candidate.name: at for at, candidate in enumerate(record.study.candidates)}
    return [
        SweepPoint(name, rate, float(np.mean(found[name, rate])), chosen.get(name) == rate)
        for name, rate in sorted(found, key=lambda key: (order[key[0]], key[1]))
    ]


def _criterion(line: Mapping[str, float]) -> float:
    """What a validation is judged by: the error of a probe, elsewhere the loss."""
    return 1.0 - float(line["valid_accuracy"]) if "valid_accuracy" in line else float(line["valid_loss"])


def _side_by_side(names: Sequence[str], groups: Mapping[str, Sequence[RunRecord]]) -> list[SideBySide]:
    outputs: dict[int, dict[str, str]] = {}
    texts: dict[int, tuple[str, str]] = {}
    for name in names:
        for sample in _documents(groups[name][0]).samples:
            outputs.setdefault(sample.index, {})[name] = sample.output
            texts[sample.index] = (sample.source, sample.reference)
    return [SideBySide(index, *texts[index], outputs[index]) for index in sorted(outputs)]


def _distinct(runs: Sequence[RunRecord], key: str) -> list[str]:
    return list(dict.fromkeys(str(run.summary.get(key, "unknown")) for run in runs))


def _order_hashes(groups: Mapping[str, Sequence[RunRecord]]) -> dict[int, str]:
    hashes: dict[int, list[str]] = {}
    for runs in groups.values():
        for run in runs:
            hashes.setdefault(run.planned.seed, []).append(str(run.summary.get("order_hash", "unknown")))
    return {seed: " / ".join(dict.fromkeys(found)) for seed, found in sorted(hashes.items())}


def _environments(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Every key of the runs' environments with its distinct values, as JSON has them."""
    found: dict[str, list[Any]] = {}
    for run in runs:
        for key, value in run.summary.get("environment", {}).items():
            values = found.setdefault(str(key), [])
            if all(repr(value) != repr(other) for other in values):  # True is not 1
                values.append(value)
    return found


def environment(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Every key of the runs' environments: its value or, where runs differ, the list of all values."""
    return {key: values[0] if len(values) == 1 else values for key, values in _environments(runs).items()}


def _unequal_seeds(study: StudyConfig, groups: Mapping[str, Sequence[RunRecord]]) -> list[Inequality]:
    found = []
    for candidate in study.candidates:
        wanted = sorted(candidate.seeds or study.seeds)
        got = sorted(run.planned.seed for run in groups.get(candidate.name, ()))
        if not got:
            text = "has no finished run: it is left out of this report"
        elif got != wanted:
            text = f"finished with seeds {got} of {wanted}"
        elif len(wanted) != len(study.seeds):
            text = f"ran with {len(wanted)} seeds, the study asks for {len(study.seeds)}"
        else:
            continue
        found.append(Inequality(candidate.name, text))
    return found


def _uneven_paces(groups: Mapping[str, Sequence[RunRecord]]) -> list[Inequality]:
    """Candidates whose training was much slower at times, between one validation and the next: something else ran."""
    found = []
    for name, runs in groups.items():
        paces = []
        for run in runs:
            lines = [line for line in run.metrics if line.get("valid_loss") is not None]
            for before, after in itertools.pairwise(lines):  # what comes before the first one holds the warm-up
                seconds = float(after["seconds"]) - float(before["seconds"])
                if seconds >= _SHORTEST_STRETCH:
                    paces.append((float(after["tokens"]) - float(before["tokens"])) / seconds)
        if paces and max(paces) > _EVEN * min(paces):
            text = f"its training ran at {min(paces):,.0f} to {max(paces):,.0f} tokens/s: times of training say little"
            found.append(Inequality(name, text))
    return found


def _found_inequalities(record: StudyRecord, groups: Mapping[str, Sequence[RunRecord]]) -> list[Inequality]:
    """What the finished runs themselves show to be unequal."""
    found = []
    if len(_distinct(record.runs, "data_hash")) > 1:
        found.append(Inequality("all", "runs were trained on different data (their data hashes differ)"))
    for seed, hashes in _order_hashes(groups).items():
        if " / " in hashes:
            found.append(Inequality("all", f"seed {seed}: candidates did not see the examples in the same order"))
    for key, values in _environments(record.runs).items():
        if len(values) > 1:
            text = f"environment: {key} differs between runs: {words.setting(values)}"
            found.append(Inequality("all", text))
    signatures = dict.fromkeys(_documents(run).signature for runs in groups.values() for run in runs)
    if len(signatures) > 1:
        found.append(Inequality("all", f"metric signatures differ: {' / '.join(signatures)}"))
    found += _unequal_seeds(record.study, groups)
    for name, runs in groups.items():
        for context, reason in {c: why for run in runs for c, why in run.inference.unmeasured.items()}.items():
            found.append(Inequality(name, f"inference at {context:,} tokens was not measured: {reason}"))
    found += unequal_measurements(groups)
    found += _uneven_paces(groups)
    found += [Inequality(failure.planned.candidate, failure.text) for failure in record.failures]
    lock = record.study.budget.lock
    for name, runs in groups.items():
        whole = [run for run in runs if run.summary.get("ended_by") != "target_accuracy"]
        if len(whole) < len(runs):
            early = f"{len(runs) - len(whole)} of {len(runs)} runs"
            found.append(Inequality(name, f"{early} reached the target accuracy and ended before their budget"))
        for key in ("tokens", "seconds", "flops"):
            spent = [float(run.summary.get(key) or 0.0) for run in whole]
            off = max((abs(value / record.study.budget.amount - 1.0) for value in spent), default=0.0)
            if key == lock and off > 0.02:
                found.append(Inequality(name, f"spent {off:+.1%} off the locked {key} (worst seed)"))
    return found
