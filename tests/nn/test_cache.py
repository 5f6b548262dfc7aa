"""Storage of keys and values: room, growth, refusals. That it never changes an answer is a law."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trilemma.errors import CapabilityError, LengthError
from trilemma.nn.cache import KVCache, RingCache

CPU = torch.device("cpu")


def cache(rows: int = 2, capacity: int | None = None) -> KVCache:
    return KVCache.empty(rows, 1, 3, capacity, torch.float32, CPU)


def tokens(rows: int, length: int, begin: int = 0) -> Tensor:
    """[rows, 1, length, 3] whose value is the token's number."""
    return (torch.arange(length) + begin + 1.0).view(1, 1, length, 1).expand(rows, 1, length, 3).clone()


def held(state: KVCache, row: int) -> list[float]:
    return state.keys[row, 0, : int(state.lengths[row]), 0].tolist()


@pytest.mark.parametrize("grad", [False, True])
def test_rows_fill_at_their_own_speed(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        state = cache()
        for lengths in ([2, 0], [1, 3], [0, 1]):
            new = tokens(2, max(lengths), begin=10)
            seen, state = state.append(new, new, torch.tensor(lengths))
        assert state.lengths.tolist() == [3, 4]
        assert held(state, 0) == [11, 12, 11]
        assert held(state, 1) == [11, 12, 13, 11]
        assert seen.positions is not None
        assert (seen.positions >= 0).sum(1).tolist() == [3, 4]


@pytest.mark.parametrize("grad", [False, True])
def test_padding_takes_no_room(grad: bool) -> None:
    """Room for exactly the tokens of each row, whatever the calls' padding (found by the law of split)."""
    with torch.set_grad_enabled(grad):
        state = cache(capacity=4)
        for lengths, width in (([3, 0], 3), ([0, 2], 4), ([1, 1], 3), ([0, 1], 4)):
            new = tokens(2, width)
            _, state = state.append(new, new, torch.tensor(lengths))
        assert state.lengths.tolist() == [4, 4]
        assert held(state, 0) == [1, 2, 3, 1]
        assert held(state, 1) == [1, 2, 1, 1]
        with pytest.raises(LengthError, match="reserved for 4 tokens, 5 are needed; reserve more"):
            state.append(tokens(2, 1), tokens(2, 1), torch.tensor([1, 0]))
        with pytest.raises(LengthError, match="reserved for 4 tokens, 5 are needed"):
            state.append(tokens(2, 1), tokens(2, 1), None)


def test_a_growing_cache_does_not_grow_with_padding() -> None:
    """Rows that wait for each other: room follows the longest row, not the sum of the calls."""
    state = cache()
    with torch.no_grad():
        for call in range(300):
            lengths = torch.tensor([int(call % 2 == 0), int(call % 2 == 1)])
            _, state = state.append(tokens(2, 1), tokens(2, 1), lengths)
    assert state.lengths.tolist() == [150, 150]
    assert state.keys.shape[2] <= 256


def test_growth_is_by_halves_and_reserve_is_exact() -> None:
    state = cache()
    sizes = []
    with torch.no_grad():
        for _ in range(200):
            _, state = state.append(tokens(2, 1), tokens(2, 1), None)
            sizes.append(state.keys.shape[2])
    assert sorted(set(sizes)) == [16, 24, 36, 54, 81, 121, 181, 271]
    assert cache().reserve(100).keys.shape[2] == 100
    assert state.reserve(10) is state


@pytest.mark.parametrize("capacity", [None, 40])
def test_chosen_rows_keep_reserved_room_and_drop_what_only_grew(capacity: int | None) -> None:
    state = cache(capacity=capacity)
    with torch.no_grad():
        for _ in range(30):
            seen, state = state.append(tokens(2, 1), tokens(2, 1), None)
        state = state.select(torch.tensor([1, 0, 1]))
    assert state.keys.shape[2] == (36 if capacity is None else capacity)
    assert torch.equal(state.keys[:, :, :30], seen.keys[[1, 0, 1]])
    assert not state.keys[:, :, 30:].any()


def test_bytes_held_and_reserved() -> None:
    state = cache(capacity=10)
    _, state = state.append(tokens(2, 4), tokens(2, 4), torch.tensor([4, 1]))
    assert state.nbytes == 5 * 2 * 3 * 4
    assert state.capacity_nbytes == 2 * 10 * 2 * 3 * 4


def test_rewinding_too_far_is_refused() -> None:
    _, state = cache().append(tokens(2, 2), tokens(2, 2), None)
    for counts in ([3, 0], [-1, 0]):
        with pytest.raises(CapabilityError, match="no more tokens can be taken back than were read"):
            state.rewind(torch.tensor(counts))
    assert state.rewind(torch.tensor([2, 2])).uniform
    assert not state.rewind(torch.tensor([1, 0])).uniform


def test_a_ring_takes_back_its_spare_slots_and_no_more() -> None:
    ring = RingCache.empty(1, 1, 3, window=4, spare=2, dtype=torch.float32, device=CPU)
    _, ring = ring.append(tokens(1, 9), tokens(1, 9), None)
    ring = ring.rewind(torch.tensor([1])).rewind(torch.tensor([1]))
    with pytest.raises(CapabilityError, match="at most 2 tokens"):
        ring.rewind(torch.tensor([1]))
    seen, ring = ring.append(tokens(1, 1, begin=70), tokens(1, 1, begin=70), None)
    assert ring.lengths.tolist() == [8]
    assert seen.positions is not None
    inside = {int(p): float(k[0]) for p, k in zip(seen.positions[0], seen.keys[0, 0], strict=True) if p >= 4}
    assert inside == {4: 5.0, 5: 6.0, 6: 7.0, 7: 71.0}
    ring.rewind(torch.tensor([1]))  # one token read: one slot is spare again


def test_a_ring_keeps_its_size() -> None:
    ring = RingCache.empty(2, 1, 3, window=5, spare=0, dtype=torch.float32, device=CPU)
    _, after = ring.append(tokens(2, 40), tokens(2, 40), torch.tensor([40, 3]))
    assert after.capacity_nbytes == ring.capacity_nbytes
    assert after.nbytes == (5 + 3) * 2 * 3 * 4
