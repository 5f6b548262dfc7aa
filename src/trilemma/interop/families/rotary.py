"""Rotations in config.json: `rope_parameters`, or the older `rope_theta` beside `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trilemma.errors import ConfigError
from trilemma.interop.keys import Keys
from trilemma.mixers.attention import Attention
from trilemma.nn.positions import RotaryScaling

_ORIGINAL = "original_max_position_embeddings"
_KINDS = ("default", "linear", "llama3", "yarn")
_BY_LENGTH = ("dynamic", "longrope")


def read_rotary(
    keys: Keys, max_length: int, head_dim: int | None = None, harmless: Sequence[str] = ()
) -> dict[str, Any]:
    """The options of `attention` that a config.json's rotations come to.

    Args:
        keys: the file. max_length: its max_position_embeddings.
        head_dim: where a part of it may be rotated, a quarter unless the file says otherwise; None: only whole heads.
        harmless: keys of the rotations that change nothing in this family.

    Raises:
        ConfigError: rotations of another type, or with a key or value that cannot be honoured.
    """
    keys.only("rope_interleaved", False)
    keys.only("use_mrope", False)
    new, old = keys.within("rope_parameters"), keys.within("rope_scaling")
    if new.values and old.values and new.values != old.values:
        raise ConfigError(f"{keys.where}: rope_parameters and rope_scaling say different things; keep one of them")
    found = old if old.values else new
    kind = found.take("rope_type", found.take("type", "default"))
    found.skip("rope_theta", *harmless)
    theta = found.values.get("rope_theta", keys.take("rope_theta", 10000.0))
    if not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
        raise ConfigError(f"{keys.where}: rope_theta: a number above 0 is needed, found {theta!r}")
    rotated: dict[str, Any] = {}
    if head_dim is None:
        for holder in (keys, found):
            holder.only("partial_rotary_factor", 1.0, None)
    else:
        share = found.take("partial_rotary_factor", keys.take("partial_rotary_factor", 0.25))
        turned = int(head_dim * share) if 0 < share <= 1 else 0
        if turned % 2 or turned == 0:
            raise ConfigError(
                f"{keys.where}: partial_rotary_factor is {share}; an even number of a head's {head_dim} features must "
                "be rotated"
            )
        rotated = {"rotary_dim": turned}
    if kind in _BY_LENGTH:
        raise ConfigError(
            f'{found.where}: rope_type "{kind}" cannot be honoured: it turns every token by an angle that depends on '
            "how long the text has become, so that tokens read earlier would have to be turned anew"
        )
    if kind not in _KINDS:
        raise ConfigError(f'{found.where}: rope_type "{kind}" cannot be honoured; only {", ".join(_KINDS)} can')
    scaling = _scaling(found, kind, max_length)
    found.finish()
    if scaling is not None:
        try:
            RotaryScaling(**scaling)
        except ConfigError as error:
            raise ConfigError(f"{found.where}: {error}") from None
    return {"rotary_base": float(theta), "rotary_scaling": scaling, **rotated}


def reach(rotary: Mapping[str, Any], max_length: int) -> int:
    """How far a model reads: with yarn, files may still state the length before the scaling.

    Args:
        rotary: what `read_rotary` returned. max_length: the file's max_position_embeddings.
    """
    scaling = rotary["rotary_scaling"]
    if scaling is None or scaling["kind"] != "yarn":
        return max_length
    return max(max_length, int(scaling["original_length"] * scaling["factor"]))


def _scaling(found: Keys, kind: str, max_length: int) -> dict[str, Any] | None:
    """Our `RotaryScaling`."""
    if kind == "default":
        return None
    if kind == "linear":
        return {"kind": kind, "factor": found.need("factor", float)}
    original = found.size(_ORIGINAL, max_length)
    common = {"kind": kind, "original_length": original}
    if kind == "llama3":
        low, high = found.need("low_freq_factor", float), found.need("high_freq_factor", float)
        return {**common, "factor": found.need("factor", float), "low": low, "high": high}
    factor = found.take("factor", max_length / original)
    magnitude = found.maybe("attention_factor", float)
    scales = found.take("mscale", 0.0), found.take("mscale_all_dim", 0.0)
    if magnitude is None and all(scales):
        above, below = (1 + 0.1 * scale * math.log(max(factor, 1.0)) for scale in scales)
        magnitude = above / below
    return {
        **common,
        "factor": factor,
        "low": found.take("beta_slow", 0.0) or 1.0,  # 0 counts as absent there
        "high": found.take("beta_fast", 0.0) or 32.0,
        "rounded": found.take("truncate", True),
        "magnitude": magnitude,
    }


def write_rotary(mixer: Attention, partial: bool = False) -> dict[str, Any]:
    """The keys of config.json for the rotations of a mixer; partial: of a family that may rotate a part of a head."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": mixer.rotary_base}
    scaling = mixer.rotary_scaling
    if scaling is not None:
        parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            parameters[_ORIGINAL] = scaling.original_length
        if scaling.kind == "llama3":
            parameters |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.turns_kept}
        if scaling.kind == "yarn":
            parameters |= {"beta_slow": scaling.low, "beta_fast": scaling.turns_kept, "truncate": scaling.rounded}
            parameters["attention_factor"] = scaling.size
    if partial:
        share = mixer.rotary_dim / mixer.head_dim
        exact = int(mixer.head_dim * share) == mixer.rotary_dim  # as it will be computed
        parameters["partial_rotary_factor"] = share if exact else math.nextafter(share, 1)
    return {"rope_theta": mixer.rotary_base, "rope_parameters": parameters}
