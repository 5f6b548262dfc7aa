"""What a report says, as plain data: made by `analysis`, read by tables, plots and templates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trilemma.compare.curves import Curve, Judged, Stability
from trilemma.compare.inference import Crossover, InferenceCurve
from trilemma.compare.metrics import Metric
from trilemma.compare.records import Inequality, PlannedRun, Role
from trilemma.compare.statistics import Interval, PairTest


@dataclass(frozen=True)
class Quality:
    """The test metric of one candidate; `values` are (seed, value)."""

    signature: str
    interval: Interval
    values: list[tuple[int, float]]


@dataclass(frozen=True)
class Training:
    """Medians over a candidate's full-budget runs. FLOPs are counted from formulas, not from the clock."""

    learning_rate: float
    steps: float
    tokens: float
    tokens_per_second: float
    seconds: float
    flops: float
    peak_memory_bytes: float

    @property
    def seconds_per_million(self) -> float:
        """The training corner: seconds for a million scored tokens."""
        return 1e6 / self.tokens_per_second if self.tokens_per_second > 0 else math.nan


@dataclass(frozen=True)
class Corner:
    """One corner of the triangle: the raw value, and log2 of how many times better than the reference it is."""

    value: float
    log2_ratio: float

    @property
    def times(self) -> float:
        """How many times better than the reference: 1 is equal, 2 is twice as good or half as dear."""
        return float(2.0**self.log2_ratio)


@dataclass(frozen=True)
class CandidateResult:
    """One row of the report. `corners` has quality, training and, where measured, inference."""

    name: str
    role: Role
    mixer: str
    layout: str
    parameters: dict[str, int]
    quality: Quality
    training: Training
    inference: InferenceCurve | None
    curve: Curve
    corners: dict[str, Corner]
    price: dict[str, float]  # train, per_million_tokens; empty without a price
    runs: list[str]  # names of its run directories, seed by seed


@dataclass(frozen=True)
class SweepPoint:
    """One learning rate tried: `loss` is the best validation loss (a probe's: error), a mean over the sweep's seeds."""

    candidate: str
    learning_rate: float
    loss: float
    chosen: bool


@dataclass(frozen=True)
class SideBySide:
    """One test example and every candidate's output for it (the first seed's)."""

    index: int
    source: str
    reference: str
    outputs: dict[str, str]


@dataclass(frozen=True)
class Control:
    """Outcome of an A/A or known-gap control that was asked for.

    `passed` None: undecided (it has not finished, or has too few seeds); that withholds verdicts as a failure does.
    """

    name: str
    passed: bool | None
    text: str


@dataclass(frozen=True)
class Report:
    """Everything that the report says."""

    name: str
    task: str
    reference: str
    metric: Metric
    split: str
    documents: int
    budget: dict[str, float | str | bool]
    context: int | None  # the longest measured for all: ms per token, state and money are compared there
    candidates: list[CandidateResult]
    controls: list[CandidateResult]
    outcomes: list[Control]
    pairs: list[PairTest]
    verdicts: list[str]
    withheld: str  # why no verdict is printed; empty where they are
    judged: Judged  # what curves and rank stability show
    stability: Stability
    crossovers: list[Crossover]
    criterion: str  # what the learning rate was chosen by
    sweep: list[SweepPoint]
    sweep_notes: dict[str, str]
    samples: list[SideBySide]
    inequalities: list[Inequality]
    limits: list[str]
    missing: list[PlannedRun]
    data_hash: str
    order_hashes: dict[int, str]  # seed -> hash of the order in which examples were seen
    environment: dict[str, Any]  # JSON values; a list of values where runs differ
    command: str
    price_per_hour: float | None
