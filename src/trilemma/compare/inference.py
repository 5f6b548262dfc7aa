"""Inference cost against context, and where two candidates' curves cross."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trilemma.compare.records import Inequality, RunRecord

_PLACE = ("cpu", "gpu", "device", "threads", "torch", "trilemma")  # of an environment: what a cost depends on


@dataclass(frozen=True)
class InferenceCurve:
    """One candidate's cost of producing a token, by tokens of context, one row at a time."""

    name: str
    ms_per_token: dict[int, float]
    state_bytes: dict[int, float]
    batched: dict[int, dict[int, float]]  # batch -> context -> ms per token of the whole batch, for batch > 1


@dataclass(frozen=True)
class Crossover:
    """Where a candidate becomes cheaper (or dearer) than the reference, in words. `context` None: nowhere measured."""

    candidate: str
    quantity: str  # "ms per token" or "state bytes"
    context: float | None
    text: str


def inference_of(name: str, runs: Sequence[RunRecord]) -> InferenceCurve | None:
    """The curve of the first run that was measured: the cost does not depend on the seed."""
    for run in runs:
        if run.inference.points:
            single = {point.context: point for point in run.inference.points if point.batch == 1}
            batched: dict[int, dict[int, float]] = {}
            for point in run.inference.points:
                if point.batch > 1:
                    batched.setdefault(point.batch, {})[point.context] = point.ms_per_token
            return InferenceCurve(
                name,
                {context: single[context].ms_per_token for context in sorted(single)},
                {context: single[context].state_bytes for context in sorted(single)},
                batched,
            )
    return None


def unequal_measurements(groups: Mapping[str, Sequence[RunRecord]]) -> list[Inequality]:
    """Costs that were measured elsewhere than their run was trained, or not all in the same place and stretch."""
    measured = {name: next((run for run in runs if run.inference.path), None) for name, runs in groups.items()}
    known = {name: run for name, run in measured.items() if run is not None}
    found = []
    for name, run in known.items():
        trained = run.summary.get("environment", {})
        for key in _PLACE:
            own = run.inference.environment.get(key)
            if key in trained and trained[key] != own:
                text = f"inference cost was measured with {key} {own}, training with {trained[key]}"
                found.append(Inequality(name, text))
    for key in ("path", *_PLACE):
        values = [run.inference.path if key == "path" else run.inference.environment.get(key) for run in known.values()]
        if len(distinct := dict.fromkeys(map(str, values))) > 1:
            text = f"inference cost: {key} differs between candidates: {' / '.join(distinct)}"
            found.append(Inequality("all", text))
    days = sorted({run.inference.measured[:10] for run in known.values()})
    if len(days) > 1:
        found.append(Inequality("all", f"inference cost was measured on different days: {', '.join(days)}"))
    return found


def crossovers(curves: Sequence[InferenceCurve], reference: str) -> list[Crossover]:
    """Each candidate against the reference: the context at which their costs cross, or who leads throughout."""
    by_name = {curve.name: curve for curve in curves}
    if reference not in by_name:
        return []
    base = by_name[reference]
    result = []
    for curve in curves:
        if curve.name != reference:
            result.append(_crossover(curve.name, "ms per token", curve.ms_per_token, reference, base.ms_per_token))
            result.append(_crossover(curve.name, "state bytes", curve.state_bytes, reference, base.state_bytes))
    return result


def _crossover(name: str, quantity: str, own: dict[int, float], reference: str, base: dict[int, float]) -> Crossover:
    contexts = [context for context in sorted(own) if context in base and own[context] > 0 and base[context] > 0]
    if not contexts:
        return Crossover(name, quantity, None, f"{name} and {reference} share no measured context.")
    logs = [math.log(own[context] / base[context]) for context in contexts]
    gaps = [own[context] - base[context] for context in contexts]
    span = f"from {contexts[0]:,} to {contexts[-1]:,} tokens of context"
    crossings = [
        _zero(contexts[at], contexts[at + 1], gaps[at], gaps[at + 1])
        for at in range(len(logs) - 1)
        if logs[at] * logs[at + 1] < 0
    ]
    if len(crossings) > 1:
        text = f"{quantity}: {name} and {reference} cross {len(crossings)} times {span}; read them as level there."
        return Crossover(name, quantity, None, text)
    last = f"{_times(math.exp(abs(logs[-1])))} {'more' if logs[-1] > 0 else 'less'} at {contexts[-1]:,}"
    if not crossings:
        if all(value == 0 for value in logs):
            return Crossover(name, quantity, None, f"{quantity}: {name} needs as much as {reference} {span}.")
        side = "less" if sum(logs) < 0 else "more"
        text = f"{quantity}: no crossover; {name} needs {side} than {reference} {span} ({last})."
        return Crossover(name, quantity, None, text)
    side = "less" if logs[-1] < 0 else "more"
    where = f"beyond about {crossings[0]:,.0f} tokens of context"
    text = f"{quantity}: {name} needs {side} than {reference} {where} ({last})."
    return Crossover(name, quantity, crossings[0], text)


def _zero(left: int, right: int, at_left: float, at_right: float) -> float:
    """Where a difference is zero; a straight line, because costs are constant or linear in the context."""
    return left + (right - left) * at_left / (at_left - at_right)


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times" if ratio < 10 else f"{ratio:.0f} times"
