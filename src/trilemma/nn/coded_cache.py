"""Keys and values in 8 bits behind the caches' interface: codes, and one scale for each token and head.

A token's codes depend on that token alone, and whoever looks at keys and values looks at what the codes stand for, the
call's own included. So reading token by token, in chunks or as a whole gives the same keys and values: the law of
splitting holds as tightly as without codes, up to codes that differ where roundings of the projections differ.

Legend: B rows, H key-value heads, L length of the call, K keys returned, D head dimension (of values possibly another).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.errors import CapabilityError
from trilemma.nn.cache import KeyValues, KVCache, RingCache
from trilemma.nn.codes import quantize_rows
from trilemma.state import CacheKind, State


@dataclass
class CodedCache(State):
    """A cache whose keys and values are 8-bit codes.

    Attributes:
        codes: int8, of keys and values [B, H, capacity, D].
        scales: of the same tokens, [B, H, capacity, 1], float32 at least; what a code of 1 stands for.
    """

    codes: KVCache
    scales: KVCache

    @property
    def lengths(self) -> Tensor:
        """[B] tokens held."""
        return self.codes.lengths

    @property
    def bound(self) -> int:
        """See `KVCache`."""
        return self.codes.bound

    @property
    def uniform(self) -> bool:
        """See `KVCache`."""
        return self.codes.uniform

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.codes.capacity

    @property
    def offset(self) -> Tensor | int:
        """Position of the next token: a number where it is the same in every row, else [B]."""
        return self.codes.offset

    def append(self, keys: Tensor, values: Tensor, lengths: Tensor | None) -> tuple[KeyValues, CodedCache]:
        """As `KVCache.append`; keys and values returned are what the codes stand for, of the type of the scales.

        Raises:
            LengthError: more tokens than the reserved capacity.
            CapabilityError: keys or values want gradients.
        """
        (key_codes, key_scales), (value_codes, value_scales) = _coded(keys), _coded(values)
        codes, coded = self.codes.append(key_codes, value_codes, lengths)
        scales, scaled = self.scales.append(key_scales, value_scales, lengths)
        return _decoded(codes, scales), CodedCache(coded, scaled)

    def held(self) -> KeyValues:
        """All there is to look at, as `append` returns it."""
        return _decoded(self.codes.held(), self.scales.held())

    def room(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all the room, [B, H, capacity, D]; zero where nothing was written."""
        (keys, values), (key_scales, value_scales) = self.codes.room(), self.scales.room()
        return _meaning(keys, key_scales), _meaning(values, value_scales)


@dataclass
class CodedRing(State):
    """A ring whose keys and values are 8-bit codes; attributes as of `CodedCache`."""

    codes: RingCache
    scales: RingCache

    @property
    def lengths(self) -> Tensor:
        """[B] tokens read."""
        return self.codes.lengths

    @property
    def offset(self) -> Tensor:
        """[B] position of the next token."""
        return self.codes.offset

    def append(self, keys: Tensor, values: Tensor, lengths: Tensor | None) -> tuple[KeyValues, CodedRing]:
        """As `RingCache.append`; types and errors as of `CodedCache.append`."""
        (key_codes, key_scales), (value_codes, value_scales) = _coded(keys), _coded(values)
        codes, coded = self.codes.append(key_codes, value_codes, lengths)
        scales, scaled = self.scales.append(key_scales, value_scales, lengths)
        return _decoded(codes, scales), CodedRing(coded, scaled)


def make_cache(
    kind: CacheKind,
    rows: int,
    heads: int,
    head_dim: int,
    capacity: int | None,
    dtype: torch.dtype,
    device: torch.device,
    value_dim: int | None = None,
) -> KVCache | CodedCache:
    """An empty cache of a kind; other arguments as of `KVCache.empty`."""
    if kind is None:
        return KVCache.empty(rows, heads, head_dim, capacity, dtype, device, value_dim)
    value_dim = head_dim if value_dim is None else value_dim
    codes = KVCache.empty(rows, heads, head_dim, capacity, torch.int8, device, value_dim)
    return CodedCache(codes, KVCache.empty(rows, heads, 1, capacity, _scale_type(dtype), device, min(1, value_dim)))


def make_ring(
    kind: CacheKind,
    rows: int,
    heads: int,
    head_dim: int,
    window: int,
    spare: int,
    dtype: torch.dtype,
    device: torch.device,
) -> RingCache | CodedRing:
    """An empty ring of a kind; other arguments as of `RingCache.empty`."""
    if kind is None:
        return RingCache.empty(rows, heads, head_dim, window, spare, dtype, device)
    codes = RingCache.empty(rows, heads, head_dim, window, spare, torch.int8, device)
    return CodedRing(codes, RingCache.empty(rows, heads, 1, window, spare, _scale_type(dtype), device))


def as_kept(kind: CacheKind, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, L, D] as a cache of that kind would give them back: of calls that build no State.

    Raises:
        CapabilityError: a kind of 8 bits, and keys or values want gradients.
    """
    if kind is None:
        return keys, values
    (key_codes, key_scales), (value_codes, value_scales) = _coded(keys), _coded(values)
    return _meaning(key_codes, key_scales).to(keys.dtype), _meaning(value_codes, value_scales).to(values.dtype)


def token_bytes(kind: CacheKind, heads: int, head_dim: int, dtype: torch.dtype, value_dim: int | None = None) -> int:
    """Bytes that one token takes in a cache of that kind; arguments as of `KVCache.empty`."""
    value_dim = head_dim if value_dim is None else value_dim
    if kind is None:
        return heads * (head_dim + value_dim) * dtype.itemsize
    return heads * (head_dim + value_dim + (1 + min(1, value_dim)) * _scale_type(dtype).itemsize)


def _scale_type(dtype: torch.dtype) -> torch.dtype:
    """A scale in fewer bits would be off by as much as a code is."""
    return torch.promote_types(dtype, torch.float32)


def _coded(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] -> codes [..., D] and scales [..., 1]; [..., 0] twice where D = 0."""
    if x.requires_grad:
        raise CapabilityError("a cache in 8 bits is for inference, no gradient passes it: run under torch.no_grad()")
    if x.shape[-1] == 0:
        return x.to(torch.int8), x
    return quantize_rows(x.to(_scale_type(x.dtype)))


def _decoded(codes: KeyValues, scales: KeyValues) -> KeyValues:
    return KeyValues(_meaning(codes.keys, scales.keys), _meaning(codes.values, scales.values), codes.positions)


def _meaning(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes [..., D] with scales [..., 1] stand for."""
    return codes.to(scales.dtype).mul_(scales)
