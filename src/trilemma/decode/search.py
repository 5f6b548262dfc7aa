"""Decoding of any number of inputs, batched by length, results in input order.

`compare_with_single` shows that batching is harmless.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from trilemma.config import DecodingConfig
from trilemma.decode.batching import collate, plan_batches
from trilemma.decode.beam import check_beam, decode_beam
from trilemma.decode.hypothesis import Hypothesis, Request, StateType, StepModel
from trilemma.decode.lexical import marked
from trilemma.decode.risk import check_risk
from trilemma.decode.single import decode_single
from trilemma.errors import ConfigError

_OF_SAMPLING = ("temperature", "top_k", "top_p")
# Differences between log-probabilities that rounding alone can make, by the precision that the model runs in.
NEAR_TIE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}


def decode(
    model: StepModel[StateType],
    requests: Sequence[Request],
    config: DecodingConfig,
    *,
    eos: int,
    pad: int,
    device: torch.device | str | None = None,
    margins: bool = False,
    unk: int | None = None,
) -> list[list[Hypothesis]]:
    """Decodes all requests; result i belongs to request i and holds up to `config.n_best` hypotheses, best first.

    Batch-mates do not matter: in float64 the tokens are those of decoding alone; below it they may differ only where
    two continuations are closer than rounding (`compare_with_single` shows it).

    Args:
        model: an encoder-decoder or decoder-only model in evaluation mode.
        requests: what to decode; all of one layout.
        config: the method and its settings; `batch_tokens` bounds a batch.
        eos, pad, unk: token ids; unk is needed to ban it.
        device: where inputs are put.
        margins: fill `Hypothesis.margin` (a little slower).

    Raises:
        ConfigError: settings that exclude each other.
        TrilemmaError: the model's output is not a number.
    """
    check_decoding(config)
    if config.method != "beam" and any(request.phrases for request in requests):
        raise ConfigError(f"phrases need decoding.method=beam; decoding.method={config.method} follows one hypothesis")
    hypotheses = {"greedy": 1, "beam": config.beam_size, "sample": config.n_best}[config.method]
    run = decode_beam if config.method == "beam" else decode_single
    results: list[list[Hypothesis]] = [[] for _ in requests]
    for positions in plan_batches(requests, config.batch_tokens, hypotheses):
        batch = collate([requests[position] for position in positions], pad, device)
        for position, outputs in zip(positions, run(model, batch, config, eos, pad, margins, unk), strict=True):
            phrases = requests[position].phrases
            results[position] = [marked(one, phrases) for one in outputs] if phrases else outputs
    return results


def check_decoding(config: DecodingConfig, asked: Collection[str] = ()) -> None:
    """Refuses settings that exclude each other.

    Args:
        config: the settings. asked: keys that were asked for in this call, which must have an effect.

    Raises:
        ConfigError: n_best with greedy decoding, a key of sampling without sampling, or a beam or candidates that
            cannot be (`check_beam`, `check_risk`).
    """
    idle = [key for key in _OF_SAMPLING if key in asked] if config.method != "sample" else []
    if idle:
        raise ConfigError(
            f"decoding.{idle[0]} has no effect with decoding.method={config.method}, which draws nothing; "
            f"set decoding.method=sample, or leave decoding.{idle[0]} out"
        )
    if config.method == "greedy" and config.n_best > 1:
        raise ConfigError(
            f"decoding.n_best={config.n_best}: greedy decoding gives one output; "
            "use decoding.method=beam or decoding.method=sample"
        )
    if config.method == "beam":
        check_beam(config)
    check_risk(config)


@dataclass(frozen=True)
class Disagreement:
    """One input whose output changed with its batch-mates.

    Attributes:
        index: the request's position.
        batched, single: the best outputs.
        gap: the smallest difference that decided between them: of a step taken on the way, or of the final scores.
        near_tie: `gap` is within what rounding can do at this precision; False: a defect.
    """

    index: int
    batched: Hypothesis
    single: Hypothesis
    gap: float
    near_tie: bool


@dataclass(frozen=True)
class BatchingReport:
    """How batched decoding compares with decoding one input at a time."""

    size: int
    tolerance: float
    disagreements: list[Disagreement]

    @property
    def holds(self) -> bool:
        """Whether every output is identical or a near-tie."""
        return all(disagreement.near_tie for disagreement in self.disagreements)

    def __str__(self) -> str:
        near = sum(disagreement.near_tie for disagreement in self.disagreements)
        text = (
            f"{self.size - len(self.disagreements)} of {self.size} outputs identical, {near} near-ties "
            f"(gap at most {self.tolerance:g}), {len(self.disagreements) - near} different"
        )
        lines = [
            f"  input {item.index}: gap {item.gap:.3g}, scores {item.batched.score:.6f} (batched) and "
            f"{item.single.score:.6f} (alone){'' if item.near_tie else ': DIFFERENT'}"
            for item in self.disagreements
        ]
        return "\n".join([text, *lines])


def compare_with_single(
    model: StepModel[StateType],
    requests: Sequence[Request],
    config: DecodingConfig,
    *,
    eos: int,
    pad: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    tolerance: float | None = None,
    unk: int | None = None,
) -> BatchingReport:
    """Decodes all requests in batches and one by one, and reports where the best outputs differ.

    Args:
        dtype: the precision that the model runs in.
        tolerance: differences of log-probability (for sampling: of probability) that count as near-ties; None: by
            `dtype`, from `NEAR_TIE`.

    Other arguments and errors are those of `decode`.
    """
    allowed = NEAR_TIE[dtype] if tolerance is None else tolerance
    batched = decode(model, requests, config, eos=eos, pad=pad, device=device, margins=True, unk=unk)
    disagreements = []
    for index, (request, outputs) in enumerate(zip(requests, batched, strict=True)):
        alone = decode(model, [request], config, eos=eos, pad=pad, device=device, margins=True, unk=unk)[0]
        ours, theirs = outputs[0], alone[0]
        if ours.tokens == theirs.tokens and ours.finished == theirs.finished:
            continue
        final = math.inf if config.method != "beam" else abs(ours.score - theirs.score)
        gap = min(ours.margin, theirs.margin, final)
        disagreements.append(Disagreement(index, ours, theirs, gap, gap <= allowed))
    return BatchingReport(len(requests), allowed, disagreements)
