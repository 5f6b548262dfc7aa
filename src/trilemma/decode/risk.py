"""Minimum Bayes risk: the output that agrees best with all that the model might have said.

References: Eikema and Aziz 2020 (arXiv 2005.10283), section 5: candidates and pseudo-references are the same samples;
Freitag et al. 2022 (arXiv 2111.09388): utilities. The utility is chrF as sacrebleu counts it (Popovic 2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trilemma.config import DecodingConfig
from trilemma.errors import ConfigError

if TYPE_CHECKING:
    from sacrebleu.metrics.chrf import CHRF


def check_risk(config: DecodingConfig) -> None:
    """Refuses settings of minimum Bayes risk that exclude each other.

    Raises:
        ConfigError: greedy decoding, a beam smaller than the candidates, more outputs than candidates.
    """
    if config.mbr is None:
        return
    if config.method == "greedy":
        raise ConfigError(
            "decoding.mbr chooses among several outputs, greedy decoding gives one; "
            "use decoding.method=sample or decoding.method=beam"
        )
    if config.method == "beam" and config.mbr > config.beam_size:
        raise ConfigError(
            f"decoding.mbr={config.mbr} is more than decoding.beam_size={config.beam_size}; raise the beam size"
        )
    if config.n_best > config.mbr:
        raise ConfigError(f"decoding.n_best={config.n_best} is more than decoding.mbr={config.mbr} candidates")


def expected_chrf(candidates: Sequence[str], weights: Sequence[float]) -> NDArray[np.float64]:
    """Expected sentence chrF of each candidate, 0 to 100, when candidate i is what is meant with weight i.

    Args:
        candidates: [n] texts. weights: [n], summing to 1.

    Returns:
        [n]; texts that are alike have the same value. An empty text agrees with nothing but another one.
    """
    from sacrebleu.metrics.chrf import CHRF  # no other decoding waits for it

    chances: dict[str, float] = {}
    for text, weight in zip(candidates, weights, strict=True):
        chances[text] = chances.get(text, 0.0) + weight
    metric = CHRF()
    values = {text: sum(share * _utility(metric, text, other) for other, share in chances.items()) for text in chances}
    return np.array([values[text] for text in candidates])


def _utility(metric: CHRF, text: str, reference: str) -> float:
    if text == reference:
        return 100.0
    return float(metric.sentence_score(text, [reference]).score)
