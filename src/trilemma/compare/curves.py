"""Quality along training: curves against tokens, FLOPs and seconds, and whether the ranking holds.

Quality is the metric on validation data where every run measured one (`training.quality`, probes, language models),
else the validation loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trilemma.compare.metrics import METRICS
from trilemma.compare.records import RunRecord

AXES = ("tokens", "flops", "seconds")
SHARES = {"quarter": 0.25, "half": 0.5, "full": 1.0}
_LABELS = {"chrf": "chrF"}


@dataclass(frozen=True)
class Judged:
    """By what validations are judged: `key` in the runs' metrics, `label` and `unit` in words."""

    key: str
    label: str
    unit: str
    higher_is_better: bool
    factor: float = 1.0  # of the stored values

    @property
    def title(self) -> str:
        """Label and unit, for captions and axes."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def heading(self) -> str:
        """The title as a caption begins with it."""
        return self.title[:1].upper() + self.title[1:]

    def value(self, line: Mapping[str, Any]) -> float:
        """The value of a line that carries it."""
        return self.factor * float(line[self.key])


LOSS = Judged("valid_loss", "validation loss", "nats per scored token", False)


def judged_by(runs: Sequence[RunRecord], metric: str) -> Judged:
    """What all `runs` have measured on validation data: the metric of `training.quality`, else the study's, else loss.

    Args:
        metric: the name of the study's.
    """
    quality = runs[0].config.training.quality
    for name in dict.fromkeys([quality.metric if quality else metric, metric]):
        # Found once, at the end, it would be a point and no curve.
        if all(sum(line.get(f"valid_{name}") is not None for line in run.metrics) > 1 for run in runs):
            return _judged(name, is_share=quality is None and runs[0].config.data.task == "probe")
    return LOSS


def _judged(name: str, is_share: bool) -> Judged:
    """`is_share`: what is a percentage elsewhere is stored as a share of 1, as probes do."""
    known = METRICS.get(name)
    if known is None:  # chrf: measured in training, but no metric of a study
        return Judged(f"valid_{name}", f"validation {_LABELS.get(name, name)}", "", True)
    factor = 100.0 if is_share and known.is_proportion else 1.0
    return Judged(f"valid_{name}", f"validation {known.label}", known.unit, known.higher_is_better, factor)


@dataclass(frozen=True)
class CurvePoint:
    """One validation: where it stood, and what was found: mean, lowest and highest over seeds."""

    step: int
    tokens: float
    flops: float
    seconds: float
    value: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Curve:
    """A candidate's validations, and its mean at a quarter, half and the full budget (None: not measured)."""

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


def validations(run: RunRecord, judged: Judged = LOSS) -> list[dict[str, Any]]:
    """The run's lines that carry what is `judged`."""
    return [line for line in run.metrics if line.get(judged.key) is not None]


def curve_of(name: str, runs: Sequence[RunRecord], lock: str, judged: Judged) -> Curve:
    """Runs of one candidate that differ in their seed only; points are averaged where they stand at the same step."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        for line in validations(run, judged):
            by_step.setdefault(int(line["step"]), []).append(line)
    points = []
    for step, lines in sorted(by_step.items()):
        values = [judged.value(line) for line in lines]
        x = {axis: float(np.mean([float(line.get(axis, 0.0)) for line in lines])) for axis in AXES}
        points.append(
            CurvePoint(step, **x, value=float(np.mean(values)), low=min(values), high=max(values), seeds=len(values))
        )
    return Curve(name, points, {share: _mean_at(runs, lock, part, judged) for share, part in SHARES.items()})


def _mean_at(runs: Sequence[RunRecord], lock: str, share: float, judged: Judged) -> float | None:
    values = [_value_at(validations(run, judged), lock, share, judged) for run in runs]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _value_at(lines: Sequence[dict[str, Any]], axis: str, share: float, judged: Judged) -> float | None:
    """What was found at a share of the run, by linear interpolation; None before the first validation."""
    if not lines:
        return None
    at = [float(line[axis]) for line in lines]
    wanted = share * at[-1]
    if wanted < at[0]:
        return None
    return float(np.interp(wanted, at, [judged.value(line) for line in lines]))


def stability(curves: Sequence[Curve], judged: Judged) -> Stability:
    """Ranks the candidates at each share and names every pair that changes places."""
    rankings: dict[str, list[str]] = {}
    for share in SHARES:
        sign = -1.0 if judged.higher_is_better else 1.0
        found = [(sign * value, curve.name) for curve in curves if (value := curve.at_share[share]) is not None]
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
    return Stability(rankings, flips, _stability_text(curves, rankings, flips, judged))


def _stability_text(curves: Sequence[Curve], rankings: dict[str, list[str]], flips: list[Flip], judged: Judged) -> str:
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
        text = f"Ranking by {judged.label} unstable: {pairs}. More training may change the order again."
    elif "full" in rankings and len(rankings) > 1:
        shares = " and ".join(f"a {share}" if share == "quarter" else share for share in rankings if share != "full")
        text = f"The order by {judged.label} is the same at {shares} of the budget as at the full one."
    else:
        text = "Rank stability is unknown."
    if unknown:
        text += f" Not every candidate was validated at: {', '.join(unknown)}."
    return text
