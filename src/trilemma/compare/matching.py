"""Equal parameters: d_model stays, d_ff moves first, then depth. They are counted on models built without memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trilemma.config import MixerSpec, ModelConfig
from trilemma.models import SequenceModel, build_model

# d_ff stays in this range of multiples of d_model; beyond it, depth moves instead.
_NARROWEST, _WIDEST = 1.0, 6.0
_CLOSE_ENOUGH = 0.005
_DEPTH_REACH = 6  # layers more or fewer that are tried, all stacks together


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

    d_ff alone is tried first; where it would leave 1 to 6 times d_model, depth changes by as few layers as it takes, of
    the encoder and the decoder apart; among equal changes the one that leaves d_ff nearest to 4 * d_model is taken.
    The result may be off by more than `tolerance`: the caller says so in the report.
    """
    tried: list[Match] = []
    for alike in _depths(config):
        found = [_fit_width(depth, target) for depth in alike]
        fitting = [match for match in found if abs(match.off) <= tolerance]
        if fitting:
            return min(fitting, key=lambda match: abs(math.log(_ratio(match) / 4.0)))
        tried += found
    return min(tried, key=lambda match: abs(match.off))


def _ratio(match: Match) -> float:
    assert match.config.d_ff is not None, "a fitted model states its d_ff"
    return match.config.d_ff / match.config.d_model


def _depths(config: ModelConfig) -> Iterator[list[ModelConfig]]:
    """`config` as it is, then with one layer more or fewer, two, ...; a whole pattern of mixers at a time."""
    yield [config]
    own, encoder = _pattern(config.mixer), _pattern(config.encoder_mixer or config.mixer)
    apart = config.layout == "encoder-decoder"
    layers, encoder_layers = config.num_layers, config.encoder_layers or config.num_layers
    for changes in range(1, _DEPTH_REACH + 1):
        alike = []
        for at in range(-changes, changes + 1):
            rest = changes - abs(at) if apart else 0
            for other in {rest, -rest}:
                new = layers + at * own, encoder_layers + other * encoder
                if abs(at) + abs(other) == changes and min(new) >= 1:
                    update = {"num_layers": new[0], "encoder_layers": new[1] if apart else config.encoder_layers}
                    alike.append(config.model_copy(update=update))
        yield alike


def _pattern(mixer: MixerSpec | list[MixerSpec]) -> int:
    return len(mixer) if isinstance(mixer, list) else 1


def _fit_width(config: ModelConfig, target: int) -> Match:
    """Solves for d_ff: parameters are linear in it. A multiple of 8 is taken where that is close enough."""
    low, high = (max(1, int(limit * config.d_model)) for limit in (_NARROWEST, _WIDEST))
    ends = [_measured(config, width, target) for width in (low, high)]
    span = ends[1].parameters - ends[0].parameters
    if span == 0:  # no feed-forward layers: only depth can be fitted
        return ends[0]
    exact = low + (target - ends[0].parameters) * (high - low) / span
    if not low <= exact <= high:
        return min(ends, key=lambda match: abs(match.off))
    # a round width is faster on most hardware: the odd one only where it is needed
    even = _measured(config, max(low, 8 * round(exact / 8)), target)
    return even if abs(even.off) <= _CLOSE_ENOUGH else _measured(config, round(exact), target)


def _measured(config: ModelConfig, width: int, target: int) -> Match:
    fitted = config.model_copy(update={"d_ff": width})
    parameters = count(fitted)
    return Match(fitted, parameters, parameters / target - 1.0)
