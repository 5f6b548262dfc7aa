"""The typed configuration of a comparison: what `trilemma compare` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trilemma.config import CONFIG_VERSION, RunConfig, load_as
from trilemma.sections import Counts, Rates, Section, Seeds


class Candidate(Section):
    """One row of a comparison: a name, and what it changes in the base run."""

    name: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    seeds: Seeds | None = Field(None, description="None: the study's")


class Budget(Section):
    """What is held equal."""

    lock: Literal["tokens", "seconds", "flops"] = "tokens"
    amount: float = Field(..., gt=0, description="training tokens, seconds or FLOPs of each run")
    match_parameters: bool = Field(True, description="non-embedding parameters matched through d_ff, then depth")
    tolerance: float = Field(0.02, gt=0, lt=1)


class Controls(Section):
    """Runs that show that the comparison itself can be trusted."""

    same_twice: bool = Field(False, description="A/A: the reference again, with other seeds")
    known_gap: dict[str, Any] | None = Field(None, description="overrides that must make the reference worse")


class StudyTask(Section):
    """One task of a matrix: what it changes in the base run, and what is known of it."""

    name: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    amount: float | None = Field(None, gt=0, description="budget of each run; None: the study's")
    control: str | None = Field(None, description="the candidate that must solve it, or failures of others say nothing")
    solved: float = Field(0.99, gt=0, le=1, description="test accuracy from which on a run has solved it")
    expected: dict[str, Literal["solves", "fails", "depends"]] = Field(
        default_factory=dict, description="what is published, by candidate"
    )
    source: str = Field("", description="where it is published")


class StudyConfig(Section):
    """A comparison: candidates x learning rates x seeds under one budget; with tasks, one for each of them."""

    version: int = CONFIG_VERSION
    name: str = "study"
    base: RunConfig = RunConfig()
    candidates: list[Candidate] = Field(..., min_length=1)
    tasks: list[StudyTask] = Field(
        default_factory=list, description="columns of a matrix; empty: the base's data alone"
    )
    reference: str | None = Field(None, description="None: the first candidate")
    budget: Budget
    learning_rates: Rates = Field(default_factory=list, description="empty: the base's, no sweep")
    sweep_share: float = Field(1.0, gt=0, le=1, description="part of the budget that each run of the sweep gets")
    sweep_seeds: int = Field(1, ge=1, description="with how many of the seeds each learning rate is tried")
    widen: bool = Field(True, description="an optimum at the grid's edge adds one learning rate beyond it")
    seeds: Seeds = Field(default_factory=lambda: [1])
    controls: Controls = Controls()
    metric: str | None = Field(None, description="None: by task (bleu, accuracy, bits_per_byte, exact_match)")
    contexts: Counts = Field(default_factory=lambda: [128, 512, 2048])
    batch_sizes: Counts = Field(default_factory=lambda: [1], description="rows decoded at once, for inference cost")
    samples: int = Field(8, ge=0, description="outputs shown side by side")
    price_per_hour: float | None = Field(None, gt=0)
    workers: int = Field(1, ge=1, description="runs trained at once; they share the cores evenly")


def load_study(path: str | Path, overrides: list[str] | None = None) -> StudyConfig:
    """A study's configuration from YAML and overrides; errors as in `trilemma.config.load_config`."""
    return load_as(StudyConfig, path, overrides or [])
