"""Where a token stands: absolute encodings for embeddings; rotations and biases for mixers.

Legend: B batch (or 1), L length, K keys, D dimension, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.nn.constants import kept


def sinusoid(positions: Tensor, dim: int, layout: str = "paper", dtype: torch.dtype = torch.float32) -> Tensor:
    """Fixed absolute encodings.

    Args:
        positions: [...] integers.
        dim: even size of the result's last axis.
        layout: "paper": PE(p, 2i) = sin(p / 10000^(2i/d)), PE(p, 2i+1) = cos of the same ("Attention Is All You Need",
            section 3.5). "tensor2tensor": the sines in the first half, the cosines in the second, with the exponent
            i / (d/2 - 1), as in that code base and in fairseq.
        dtype: of the result; angles are computed in float64.

    Returns:
        [..., dim].
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float64, device=positions.device)
    exponent = index / half if layout == "paper" else index / max(half - 1, 1)
    angles = positions[..., None].double() * torch.exp(-math.log(10000.0) * exponent)
    sines, cosines = angles.sin(), angles.cos()
    if layout == "paper":
        return torch.stack([sines, cosines], dim=-1).flatten(-2).to(dtype)
    return torch.cat([sines, cosines], dim=-1).to(dtype)


@kept
def rotation_frequencies(dim: int, base: float, end_point: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[dim / 2] radians per position.

    RoPE (arXiv 2104.09864): base^(-2i/dim). With `end_point` (torchscale's RetNet) the exponent runs from 0 to 1
    inclusive.
    """
    half = dim // 2
    steps = torch.arange(half, device=device, dtype=dtype)
    exponent = steps / max(half - 1, 1) if end_point else steps / half
    return torch.exp(-math.log(base) * exponent)


# What a kind of scaling has not.
_UNREAD = {
    "linear": ("original_length", "low", "high", "rounded", "magnitude"),
    "llama3": ("rounded", "magnitude"),
}


@dataclass(frozen=True)
class RotaryScaling:
    """Slower rotations, so that a model reads further than the length that it was first trained on.

    A pair that turns f radians a token turns s f + (1 - s) f / factor instead. `linear`: s = 0 (arXiv 2306.15595).
    The others keep pairs that turn often within `original_length` and slow down those that turn seldom; in between s
    grows evenly, with `llama3` by the number of turns (Llama 3.1's published code), with `yarn` by the pair's index
    (arXiv 2309.00071, section 3.2).

    Attributes:
        kind: linear, llama3 or yarn.
        factor: from 1 to a million.
        original_length: in tokens; needed by llama3 and yarn.
        low: turns within original_length up to which a pair is slowed down by the whole factor.
        high: turns from which it keeps its speed; None: 4 with llama3, 32 with yarn.
        rounded: yarn's borders are moved outward to whole pairs.
        magnitude: yarn's factor of rotated queries and keys; None: 1 + 0.1 ln factor (section 3.4).

    Raises:
        ConfigError: values that do not go together.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - what reads it from a configuration drops no key

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_length: int | None = None
    low: float = 1.0
    high: float | None = None
    rounded: bool = True
    magnitude: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= 1e6:
            raise ConfigError(f"rotary_scaling: factor must be from 1 to 1e6, found {self.factor}")
        if self.kind != "linear" and (self.original_length is None or self.original_length < 1):
            raise ConfigError(f"rotary_scaling: {self.kind} needs an original_length, found {self.original_length}")
        if not 0 < self.low < self.turns_kept:
            raise ConfigError(f"rotary_scaling: 0 < low < high is needed, found {self.low} and {self.turns_kept}")
        if not 0 < self.size < math.inf:
            raise ConfigError(f"rotary_scaling: magnitude must be above 0, found {self.magnitude}")
        for name in _UNREAD.get(self.kind, ()):
            if getattr(self, name) != getattr(RotaryScaling, name):  # the default
                raise ConfigError(f"rotary_scaling: {self.kind} has no {name}; leave it out")

    @property
    def turns_kept(self) -> float:
        """`high`, or what it is by default."""
        if self.high is not None:
            return self.high
        return 32.0 if self.kind == "yarn" else 4.0

    @property
    def size(self) -> float:
        """The factor of rotated queries and keys."""
        if self.kind != "yarn":
            return 1.0
        return 1 + 0.1 * math.log(self.factor) if self.magnitude is None else self.magnitude


@kept
def scaled_frequencies(
    dim: int, base: float, scaling: RotaryScaling, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """[dim / 2] radians per position of a scaled rotation."""
    frequencies = rotation_frequencies(dim, base, False, device, dtype)
    length, low, high = scaling.original_length or 1, scaling.low, scaling.turns_kept
    if scaling.kind == "linear":
        share = torch.zeros_like(frequencies)
    elif scaling.kind == "llama3":
        share = (frequencies * (length / (2 * math.pi)) - low) / (high - low)
    else:  # the (fractional) pairs that turn so often
        first, last = (dim / 2 * math.log(length / (2 * math.pi * turns)) / math.log(base) for turns in (high, low))
        if scaling.rounded:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        share = 1 - (torch.arange(dim // 2, device=device, dtype=dtype) - first) / (last - first or 1e-3)
    share = share.clamp(0, 1)
    return share * frequencies + (1 - share) * frequencies / scaling.factor


def rotate(x: Tensor, angles: Tensor, interleaved: bool = True, scale: Tensor | None = None) -> Tensor:
    """Rotates pairs of features by their position's angle.

    Args:
        x: [B, H, L, D].
        angles: [B or 1, L, D / 2] radians, or fewer: the last pairs stay as they are.
        interleaved: pairs are (0, 1), (2, 3), ...; else (i, i + D/2), the layout of Llama's weights.
        scale: [B or 1, L, D / 2] factor of each pair (xPos), or None.

    Returns:
        [B, H, L, D] of x's type.
    """
    if rest := x.shape[-1] // 2 - angles.shape[-1]:
        angles = nn.functional.pad(angles, (0, rest))
        scale = None if scale is None else nn.functional.pad(scale, (0, rest), value=1.0)
    if interleaved:  # the first of a pair turns by the negative angle; strided halves would take twice the time
        angles = torch.stack([-angles, angles], dim=-1).flatten(-2)
        scale = None if scale is None else scale.repeat_interleave(2, dim=-1)
    sine, cosine = angles.sin(), angles.cos()
    if scale is not None:
        sine, cosine = sine * scale, cosine * scale
    sine, cosine = sine.to(x.dtype)[:, None], cosine.to(x.dtype)[:, None]
    if interleaved:
        swapped: Tensor = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        rotated: Tensor = x * cosine + swapped * sine
        return rotated
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def xpos_scale(positions: Tensor, dim: int, scale_base: float, sign: int, dtype: torch.dtype) -> Tensor:
    """The decay of xPos (arXiv 2212.10554): zeta_i^(sign * position / scale_base), zeta_i = (2i/dim + 0.4) / 1.4.

    Queries take sign +1, keys -1, so that the product depends on the distance alone. Float32 holds it up to a position
    of about 70 * scale_base.

    Returns:
        [..., dim / 2].
    """
    index = torch.arange(0, dim, 2, device=positions.device, dtype=dtype)
    zeta = (index / dim + 0.4) / 1.4
    return torch.exp(sign * positions[..., None].to(dtype) / scale_base * zeta.log())


def alibi_slopes(num_heads: int) -> list[float]:
    """Slopes of ALiBi (arXiv 2108.12409): a geometric series from 2^(-8/n); for other n than powers of two, as its
    authors do, the series of the next lower power and every second one of the next higher."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    extra = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return (slopes + extra)[:num_heads]


def t5_buckets(distance: Tensor, causal: bool, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Bucket of each relative position, as T5 does it (arXiv 1910.10683, section 2.1).

    Args:
        distance: key position minus query position, any shape.
        causal: all buckets for the past; else half of them for each direction.

    Returns:
        int64 in [0, num_buckets), of the same shape.
    """
    buckets = torch.zeros_like(distance)
    if causal:
        distance = (-distance).clamp(min=0)
    else:
        num_buckets //= 2
        buckets = (distance > 0).long() * num_buckets
        distance = distance.abs()
    exact = num_buckets // 2
    ratio = (distance.clamp(min=1).double() / exact).log() / math.log(max_distance / exact)
    large = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return buckets + torch.where(distance < exact, distance, large)
