"""What a run has counted so far: the part of its state that is not a tensor."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from trilemma.data import Batch
from trilemma.errors import CheckpointError
from trilemma.models import SequenceModel

RECORD_VERSION = 1
# Readings of the clock and of the machine: all else in a record is the same in every repetition of a run.
_MEASURED = ("seconds", "window_seconds", "peak_memory_bytes", "resumes")


@dataclass
class Counters:
    """Totals over the whole run, resumes included.

    Attributes:
        step: optimizer steps done.
        tokens: scored target tokens. input_tokens: valid input and source tokens read. With R-Drop, which runs each
            row twice, they count once.
        flops: 3 x the forward FLOPs of the rows' actual lengths (one forward and two backward products), and twice
            that with R-Drop.
        best_step, best_loss: of the lowest validation loss so far; with a score (a probe's accuracy, or the metric of
            `training.quality`) of the highest, best_score.
        bad_validations: validations since then, those without the score not counted. validated: step of the last one;
        score: what was measured last.
        window_loss, window_tokens, window_seconds: since the last training record.
        seconds: spent in optimizer steps; validation and saving are not counted.
        resumes: how often the run was resumed.
    """

    step: int = 0
    tokens: int = 0
    input_tokens: int = 0
    flops: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    best_score: float | None = None
    bad_validations: int = 0
    validated: int = 0
    score: float | None = None
    window_loss: float = 0.0
    window_tokens: int = 0
    seconds: float = 0.0
    window_seconds: float = 0.0
    peak_memory_bytes: int = 0
    resumes: int = 0

    def count(self, step: int, tokens: int, input_tokens: int, flops: int, loss: float) -> None:
        """Adds one optimizer step with its loss sum."""
        self.step = step
        self.tokens += tokens
        self.input_tokens += input_tokens
        self.flops += flops
        self.window_loss += loss
        self.window_tokens += tokens

    def judge(self, loss: float, score: float | None = None, counts: bool = True) -> bool:
        """Takes note of a validation; whether it is the best so far: by score where there is one, then by loss.

        `counts`: False for a validation between two measurements of the score, which can be neither better nor worse.
        """
        self.validated = self.step
        if not counts:
            return False
        self.score = score
        rank, best = (-(score or 0.0), loss), (-(self.best_score or 0.0), self.best_loss)
        if math.isfinite(loss) and (best[1] is None or rank < best):
            self.best_loss, self.best_score, self.best_step, self.bad_validations = loss, score, self.step, 0
            return True
        self.bad_validations += 1
        return False

    def record(self, rates: dict[str, float]) -> dict[str, Any]:
        """A training record for metrics.jsonl; starts a new window."""
        spent = self.seconds - self.window_seconds
        result = {
            **self._totals(),
            "loss": self.window_loss / max(self.window_tokens, 1),
            **rates,
            "tokens_per_second": self.window_tokens / spent if spent > 0 else 0.0,
        }
        self.window_loss, self.window_tokens, self.window_seconds = 0.0, 0, self.seconds
        return result

    def validation_record(self, loss: float) -> dict[str, Any]:
        """A validation record for metrics.jsonl; a loss that is not a number is written as null."""
        finite = math.isfinite(loss)
        perplexity = math.exp(loss) if finite and loss < 700 else None
        return {**self._totals(), "valid_loss": loss if finite else None, "valid_perplexity": perplexity}

    def _totals(self) -> dict[str, Any]:
        names = ("step", "tokens", "input_tokens", "flops", "seconds")
        return {name: getattr(self, name) for name in names}

    def to_record(self, data_hash: str) -> dict[str, Any]:
        """The content of trainer.json."""
        values = dataclasses.asdict(self)
        measured = {name: values.pop(name) for name in _MEASURED}
        return {"version": RECORD_VERSION, "data_hash": data_hash, **values, "measured": measured}

    @classmethod
    def from_record(cls, record: dict[str, Any], where: Path) -> Self:
        """Reads trainer.json; every field is checked for its type.

        Raises:
            CheckpointError: newer than this version, or a field is missing, unknown or of the wrong type.
        """
        version = record.get("version")
        if isinstance(version, int) and version > RECORD_VERSION:
            raise CheckpointError(f"{where}: trainer.json version {version} is newer than this trilemma; upgrade")
        measured = record.get("measured")
        values = {key: value for key, value in record.items() if key not in ("version", "data_hash", "measured")}
        values |= measured if isinstance(measured, dict) else {}
        for name, older in (("score", "accuracy"), ("best_score", "best_accuracy")):
            values.setdefault(name, values.pop(older, None))  # its name of old, or of before there were scores
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        if odd := sorted(defaults.keys() ^ values.keys()):
            raise CheckpointError(f'{where}: trainer.json: the field "{odd[0]}" is missing or unknown')
        for name, default in defaults.items():
            value = values[name]
            real = isinstance(default, float) or name in ("best_loss", "score", "best_score")
            allowed = (int, float) if real else (int,)
            missing = value is None and default is None
            if not missing and (type(value) not in allowed or not math.isfinite(value)):
                raise CheckpointError(f'{where}: trainer.json: the field "{name}" cannot be {value!r}')
        return cls(**values)


def flops_of(model: SequenceModel, batch: Batch, known: dict[tuple[int, int], int]) -> int:
    """Forward FLOPs of a micro-batch, by the actual lengths of its rows, or of its documents where rows are packed.

    `known` keeps the model's answer for each (length, source length).
    """
    if batch.segments is not None:
        rows = torch.arange(len(batch.segments))[:, None] * (int(batch.segments.max()) + 1)
        lengths = torch.bincount((rows + batch.segments)[batch.segments >= 0]).tolist()
        pairs = [(length, 0) for length in lengths if length]
    else:
        sources = batch.source_lengths.tolist() if batch.source_lengths is not None else [0] * len(batch.lengths)
        pairs = list(zip(batch.lengths.tolist(), sources, strict=True))
    total = 0
    for pair in pairs:
        if pair not in known:
            known[pair] = model.flops(*pair)
        total += known[pair]
    return total


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far, in bytes: of the GPU's allocator, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
