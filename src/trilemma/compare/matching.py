"""Equal parameters: d_model stays, d_ff moves first, then depth. They are counted on models built without memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trilemma.config import ModelConfig
from trilemma.models import SequenceModel, build_model

# d_ff stays in this range of multiples of d_model; beyond it, depth moves instead.
_NARROWEST, _WIDEST = 1.0, 6.0
_DEPTH_REACH = 6  # layers more or fewer that are tried


@dataclass(frozen=True)
class Match:
    """A model near the target. `off` is its relative distance: +0.01 has 1 % more parameters than wanted."""

    config: ModelConfig
    parameters: int
    off: float


def skeleton(config: ModelConfig) -> SequenceModel:
    """The model without memory for its weights (torch's meta device): for counting, not for running.

    A vocabulary that is not known yet counts as one entry; non-embedding parameters do not depend on it.
    """
    if config.vocab_size is None:
        config = config.model_copy(update={"vocab_size": 1})
    with torch.device("meta"):
        return build_model(config)


def count(config: ModelConfig) -> int:
    """Non-embedding parameters."""
    return skeleton(config).parameter_counts()["non_embedding"]


def match_parameters(config: ModelConfig, target: int, tolerance: float) -> Match:
    """The nearest model to `target` non-embedding parameters.

    d_ff alone is tried first; where it would leave 1 to 6 times d_model, depth changes by as few layers as it takes.
    The result may be off by more than `tolerance`: the caller says so in the report.
    """
    tried = []
    for depth in _depths(config):
        found = _fit_width(depth, target)
        tried.append(found)
        ratio = (found.config.d_ff or 4 * config.d_model) / config.d_model
        if abs(found.off) <= tolerance and _NARROWEST <= ratio <= _WIDEST:
            return found
    return min(tried, key=lambda match: abs(match.off))


def _depths(config: ModelConfig) -> list[ModelConfig]:
    """`config` as it is, then with layers added or taken away, in all stacks alike, a whole mixer pattern at a time."""
    pattern = len(config.mixer) if isinstance(config.mixer, list) else 1
    result = [config]
    for steps in range(1, _DEPTH_REACH + 1):
        for change in (steps * pattern, -steps * pattern):
            layers = config.num_layers + change
            encoder = None if config.encoder_layers is None else config.encoder_layers + change
            if layers >= 1 and (encoder is None or encoder >= 1):
                result.append(config.model_copy(update={"num_layers": layers, "encoder_layers": encoder}))
    return result


def _fit_width(config: ModelConfig, target: int) -> Match:
    """Solves for d_ff: parameters are linear in it. A multiple of 8 is taken where that is close enough."""
    low, high = config.d_model, 2 * config.d_model
    at_low, at_high = (count(config.model_copy(update={"d_ff": width})) for width in (low, high))
    exact = low + (target - at_low) * (high - low) / (at_high - at_low)
    limits = int(_NARROWEST * config.d_model), int(_WIDEST * config.d_model)
    bounded = min(max(exact, limits[0]), limits[1])
    best = None
    for width in (8 * round(bounded / 8), round(bounded)):
        fitted = config.model_copy(update={"d_ff": max(1, width)})
        parameters = count(fitted)
        match = Match(fitted, parameters, parameters / target - 1.0)
        # a round width is faster on most hardware: the odd one only where it is needed
        if best is None or abs(best.off) > 0.005:
            best = match
    assert best is not None, "two widths are tried"
    return best
