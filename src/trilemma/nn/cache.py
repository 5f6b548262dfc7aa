"""Storage of keys and values behind one interface, `append`: growing or reserved, and a ring for windows.

Legend: B rows, H key-value heads, L length of the call, K keys returned, D head dimension (of values possibly another).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from trilemma.errors import CapabilityError, LengthError
from trilemma.state import State, updated

_FIRST_CAPACITY = 16
_SPARE = 8  # tokens that a growing cache has room for after `select`, which a beam calls at every step


@dataclass
class KeyValues:
    """What a query may look at.

    Attributes:
        keys, values: [B, H, K, D].
        positions: [B or 1, K] position of each key in its sequence, -1 where there is none; None: key j is at position
            j in every row and all K are valid.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None


@dataclass
class KVCache(State):
    """Keys and values of all tokens read.

    Attributes:
        keys, values: [B, H, capacity, D]; zero where nothing was written. Values may be of width 0, where the
            keys hold them too.
        lengths: [B] tokens held.
        bound: at least max(lengths), known to Python; reads stop there.
        uniform: every row holds exactly `bound` tokens.
        fixed: made with a capacity: never grows by itself.
    """

    growing: ClassVar[dict[str, int]] = {"keys": 2, "values": 2}

    keys: Tensor
    values: Tensor
    lengths: Tensor
    bound: int
    uniform: bool
    fixed: bool

    @classmethod
    def empty(
        cls,
        rows: int,
        heads: int,
        head_dim: int,
        capacity: int | None,
        dtype: torch.dtype,
        device: torch.device,
        value_dim: int | None = None,
    ) -> KVCache:
        """No tokens; with `capacity` the room is reserved at once. `value_dim`: None: head_dim."""
        shape = (rows, heads, capacity or 0)
        return cls(
            keys=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            values=torch.zeros(*shape, head_dim if value_dim is None else value_dim, dtype=dtype, device=device),
            lengths=torch.zeros(rows, dtype=torch.int64, device=device),
            bound=0,
            uniform=True,
            fixed=capacity is not None,
        )

    @property
    def offset(self) -> Tensor | int:
        """Position of the next token: a number where it is the same in every row, else [B]."""
        return self.bound if self.uniform else self.lengths

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.keys.shape[2]

    @property
    def capacity_nbytes(self) -> int:
        """Bytes of all the room for keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of the tokens held."""
        widths = self.keys.shape[3] + self.values.shape[3]
        return int(self.lengths.sum()) * self.keys.shape[1] * widths * self.keys.element_size()

    def append(self, keys: Tensor, values: Tensor, lengths: Tensor | None) -> tuple[KeyValues, KVCache]:
        """Adds the valid tokens of a call; returns all there is to look at, and the new cache.

        Args:
            keys, values: [B, H, L, D].
            lengths: [B] valid tokens of the call, or None for all L.

        Raises:
            LengthError: more tokens than the reserved capacity.
        """
        length = keys.shape[2]
        if self.uniform and lengths is None:
            return self._grown(self.bound + length)._append_uniform(keys, values)
        count = torch.full_like(self.lengths, length) if lengths is None else lengths
        cache, write, end = self, _written, self.bound + length
        if end > self.keys.shape[2]:  # padding takes no room: look at what is really needed
            end, write = _longest(self.lengths + count), _merged
            cache = self._grown(end)
        after = replace(
            cache,
            keys=write(cache.keys, keys, cache.lengths, count),
            values=write(cache.values, values, cache.lengths, count),
            lengths=updated(cache.lengths, cache.lengths + count),
            bound=end,
            uniform=False,
        )
        read = after._read_bound()
        held = torch.arange(read, device=keys.device)[None, :]
        positions = torch.where(held < after.lengths[:, None], held, -1)
        return KeyValues(after.keys[:, :, :read], after.values[:, :, :read], positions), after

    def held(self) -> KeyValues:
        """All there is to look at, as `append` returns it."""
        positions = None
        if not self.uniform:
            held = torch.arange(self.bound, device=self.keys.device)[None, :]
            positions = torch.where(held < self.lengths[:, None], held, -1)
        return KeyValues(self.keys[:, :, : self.bound], self.values[:, :, : self.bound], positions)

    def room(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all the room, [B, H, capacity, D]; zero where nothing was written."""
        return self.keys, self.values

    def _append_uniform(self, keys: Tensor, values: Tensor) -> tuple[KeyValues, KVCache]:
        length, end = keys.shape[2], self.bound + keys.shape[2]
        if torch.is_grad_enabled():
            rest = self.keys[:, :, end:], self.values[:, :, end:]
            new_keys = torch.cat([self.keys[:, :, : self.bound], keys.to(self.keys.dtype), rest[0]], dim=2)
            new_values = torch.cat([self.values[:, :, : self.bound], values.to(self.values.dtype), rest[1]], dim=2)
        else:
            new_keys, new_values = self.keys, self.values
            new_keys[:, :, self.bound : end] = keys
            new_values[:, :, self.bound : end] = values
        lengths = updated(self.lengths, self.lengths + length)
        after = replace(self, keys=new_keys, values=new_values, lengths=lengths, bound=end)
        read = after._read_bound()
        positions = None
        if read > end:
            held = torch.arange(read, device=keys.device)
            positions = torch.where(held < end, held, -1)[None, :]
        return KeyValues(new_keys[:, :, :read], new_values[:, :, :read], positions), after

    def _read_bound(self) -> int:
        """Keys to read: exact when run as written, in buckets under compile so that shapes stay few."""
        if torch.compiler.is_compiling():
            return min(self.keys.shape[2], -(-self.bound // 64) * 64)
        return self.bound

    def reserve(self, tokens: int) -> KVCache:
        """Room for `tokens` tokens a row; the only verb that moves addresses."""
        missing = tokens - self.keys.shape[2]
        if missing <= 0:
            return self
        pad = (0, 0, 0, missing)
        keys = torch.nn.functional.pad(self.keys, pad)
        values = torch.nn.functional.pad(self.values, pad)
        return replace(self, keys=keys, values=values)

    def _grown(self, needed: int) -> KVCache:
        capacity = self.keys.shape[2]
        if needed <= capacity:
            return self
        if self.fixed:
            raise LengthError(f"the cache was reserved for {capacity} tokens, {needed} are needed; reserve more")
        return self.reserve(max(needed, capacity + capacity // 2, _FIRST_CAPACITY))

    def _tightened(self) -> KVCache:
        """The same cache with the exact bound (reads the lengths)."""
        return replace(self, bound=_longest(self.lengths))

    def select(self, rows: Tensor) -> KVCache:
        """Rows of a new batch; a cache of unequal rows is tightened to the longest, a growing one to what it holds."""
        room = self.keys.shape[2] if self.fixed else min(self.keys.shape[2], self.bound + _SPARE)
        keys, values = (tensor[:, :, :room].index_select(0, rows) for tensor in (self.keys, self.values))
        chosen = replace(self, keys=keys, values=values, lengths=self.lengths.index_select(0, rows))
        return chosen if self.uniform else chosen._tightened()

    def rewind(self, counts: Tensor) -> KVCache:
        """Shortens each row."""
        if bool((counts < 0).any()) or bool((counts > self.lengths).any()):
            raise CapabilityError("no more tokens can be taken back than were read")
        lengths = updated(self.lengths, self.lengths - counts)
        shorter = replace(self, lengths=lengths, uniform=False)._tightened()
        return replace(shorter, uniform=bool((lengths == shorter.bound).all()))


@dataclass
class RingCache(State):
    """Keys and values of the last `window` tokens, in a ring with `spare` slots for rewinding.

    The token at position p lies in slot p % slots. A call looks at the ring as it was and at its own keys, then writes.

    Attributes:
        keys, values: [B, H, slots, D], slots = window + spare.
        lengths: [B] tokens read, including those that the ring has let go.
        window: keys that a query may look at, its own included.
        taken: [B] tokens taken back since the last call, which may not exceed the spare slots.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    taken: Tensor
    window: int

    @classmethod
    def empty(
        cls, rows: int, heads: int, head_dim: int, window: int, spare: int, dtype: torch.dtype, device: torch.device
    ) -> RingCache:
        """No tokens."""
        shape = (rows, heads, window + spare, head_dim)
        return cls(
            keys=torch.zeros(shape, dtype=dtype, device=device),
            values=torch.zeros(shape, dtype=dtype, device=device),
            lengths=torch.zeros(rows, dtype=torch.int64, device=device),
            taken=torch.zeros(rows, dtype=torch.int64, device=device),
            window=window,
        )

    @property
    def offset(self) -> Tensor:
        """[B] position of the next token."""
        return self.lengths

    @property
    def capacity_nbytes(self) -> int:
        """Bytes of the ring."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values within the window."""
        _, heads, _, head_dim = self.keys.shape
        held = int(self.lengths.clamp(max=self.window).sum())
        return held * 2 * heads * head_dim * self.keys.element_size()

    def append(self, keys: Tensor, values: Tensor, lengths: Tensor | None) -> tuple[KeyValues, RingCache]:
        """As `KVCache.append`; the keys returned are the ring's (K = slots + L) in no order: use their positions."""
        slots, length = self.keys.shape[2], keys.shape[2]
        steps = torch.arange(length, device=keys.device)
        count = torch.full_like(self.lengths, length) if lengths is None else lengths
        valid = steps < count[:, None]
        places = self.lengths[:, None] + steps
        slot = torch.arange(slots, device=keys.device)[None, :]
        last = self.lengths[:, None] - 1
        held = last - (last - slot) % slots  # the newest position that falls into each slot
        held = torch.where((held >= 0) & (last >= 0), held, -1)
        positions = torch.cat([held, torch.where(valid, places, -1)], dim=1)
        all_keys = torch.cat([self.keys, keys.to(self.keys.dtype)], dim=2)
        seen = KeyValues(all_keys, torch.cat([self.values, values.to(self.values.dtype)], dim=2), positions)
        # After the call slot s holds the newest position p < lengths + count with p % slots == s; take it from the call
        # if it is new, else from the old ring.
        last = (self.lengths + count)[:, None] - 1
        newest = last - (last - slot) % slots
        from_call = newest - self.lengths[:, None]
        source = torch.where(from_call >= 0, slots + from_call, slot.expand_as(from_call))
        index = source[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        after = replace(
            self,
            keys=updated(self.keys, seen.keys.gather(2, index)),
            values=updated(self.values, seen.values.gather(2, index)),
            lengths=updated(self.lengths, self.lengths + count),
            taken=updated(self.taken, (self.taken - count).clamp(min=0)),
        )
        return seen, after

    def rewind(self, counts: Tensor) -> RingCache:
        """Shortens each row by at most the spare slots."""
        spare = self.keys.shape[2] - self.window
        taken = self.taken + counts
        if bool((counts < 0).any()) or bool((taken > spare).any()) or bool((counts > self.lengths).any()):
            raise CapabilityError(f"at most {spare} tokens, and no more than were read, can be taken back")
        return replace(self, lengths=updated(self.lengths, self.lengths - counts), taken=updated(self.taken, taken))


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if len(lengths) else 0


def _written(old: Tensor, new: Tensor, begins: Tensor, count: Tensor) -> Tensor:
    """`old` [B, H, K, D] with the first `count` [B] of `new` [B, H, L, D] from `begins` [B] on; begins + L <= K."""
    steps = torch.arange(new.shape[2], device=new.device)
    places = begins[:, None] + steps  # distinct within a row: no two writes meet
    valid = steps < count[:, None]
    index = places[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
    kept = torch.where(valid[:, None, :, None], new.to(old.dtype), old.gather(2, index))
    if torch.is_grad_enabled():
        return old.scatter(2, index, kept)
    return old.scatter_(2, index, kept)


def _merged(old: Tensor, new: Tensor, begins: Tensor, count: Tensor) -> Tensor:
    """As `_written` where only begins + count <= K holds; touches all of `old`."""
    from_call = torch.arange(old.shape[2], device=old.device) - begins[:, None]  # [B, K]
    is_new = (from_call >= 0) & (from_call < count[:, None])
    index = from_call.clamp(0, new.shape[2] - 1)[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
    return updated(old, torch.where(is_new[:, None, :, None], new.to(old.dtype).gather(2, index), old))
