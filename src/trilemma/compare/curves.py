"""Validation loss along training: curves against tokens, FLOPs and seconds, and whether the ranking holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trilemma.compare.records import RunRecord

AXES = ("tokens", "flops", "seconds")
SHARES = {"quarter": 0.25, "half": 0.5, "full": 1.0}


@dataclass(frozen=True)
class CurvePoint:
    """One validation: where it stood, and the loss: mean, lowest and highest over seeds (nats per scored token)."""

    step: int
    tokens: float
    flops: float
    seconds: float
    loss: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Curve:
    """A candidate's validations, and its mean loss at a quarter, half and the full budget (None: not measured)."""

    name: str
    points: list[CurvePoint]
    at_share: dict[str, float | None]


@dataclass(frozen=True)
class Flip:
    """Two candidates that change places between two shares of the budget: `ahead` led at `early`, not at `late`."""

    ahead: str
    behind: str
    early: str
    late: str


@dataclass(frozen=True)
class Stability:
    """Rankings (best first) by share; a share at which some candidate was not validated is left out."""

    rankings: dict[str, list[str]]
    flips: list[Flip]
    text: str


def validations(run: RunRecord) -> list[dict[str, Any]]:
    """The run's lines that carry a validation loss."""
    return [line for line in run.metrics if line.get("valid_loss") is not None]


def curve_of(name: str, runs: Sequence[RunRecord], lock: str) -> Curve:
    """Runs of one candidate that differ in their seed only; points are averaged where they stand at the same step."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        for line in validations(run):
            by_step.setdefault(int(line["step"]), []).append(line)
    points = []
    for step, lines in sorted(by_step.items()):
        losses = [float(line["valid_loss"]) for line in lines]
        x = {axis: float(np.mean([float(line.get(axis, 0.0)) for line in lines])) for axis in AXES}
        points.append(
            CurvePoint(step, **x, loss=float(np.mean(losses)), low=min(losses), high=max(losses), seeds=len(losses))
        )
    return Curve(name, points, {share: _mean_at(runs, lock, part) for share, part in SHARES.items()})


def _mean_at(runs: Sequence[RunRecord], lock: str, share: float) -> float | None:
    values = [loss_at(validations(run), lock, share) for run in runs]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def loss_at(lines: Sequence[dict[str, Any]], axis: str, share: float) -> float | None:
    """Validation loss at a share of the run, by linear interpolation; None before the first validation."""
    if not lines:
        return None
    at = [float(line[axis]) for line in lines]
    losses = [float(line["valid_loss"]) for line in lines]
    wanted = share * at[-1]
    if wanted < at[0]:
        return None
    return float(np.interp(wanted, at, losses))


def stability(curves: Sequence[Curve]) -> Stability:
    """Ranks the candidates at each share and names every pair that changes places."""
    rankings: dict[str, list[str]] = {}
    for share in SHARES:
        found = [(loss, curve.name) for curve in curves if (loss := curve.at_share[share]) is not None]
        if len(found) == len(curves):
            rankings[share] = [name for _, name in sorted(found)]
    flips = [
        Flip(ahead, behind, early, "full")
        for early in ("quarter", "half")
        if early in rankings and "full" in rankings
        for at, ahead in enumerate(rankings[early])
        for behind in rankings[early][at + 1 :]
        if rankings["full"].index(ahead) > rankings["full"].index(behind)
    ]
    return Stability(rankings, flips, _stability_text(curves, rankings, flips))


def _stability_text(curves: Sequence[Curve], rankings: dict[str, list[str]], flips: list[Flip]) -> str:
    if len(curves) < 2:
        return "One candidate: there is no ranking."
    unknown = [share for share in SHARES if share not in rankings]
    if flips:
        passed: dict[str, dict[str, None]] = {}
        for flip in flips:
            passed.setdefault(flip.ahead, {})[flip.behind] = None
        pairs = "; ".join(
            f"{ahead} led {', '.join(others)} earlier and trails later" for ahead, others in passed.items()
        )
        text = f"Ranking unstable: {pairs}. More training may change the order again."
    elif "full" in rankings and len(rankings) > 1:
        shares = " and ".join(f"a {share}" if share == "quarter" else share for share in rankings if share != "full")
        text = f"The order by validation loss is the same at {shares} of the budget as at the full one."
    else:
        text = "Rank stability is unknown."
    if unknown:
        text += f" Not every candidate was validated at: {', '.join(unknown)}."
    return text
