"""What one call looks like."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trilemma.ragged import Ragged, call_positions, zero_padding

CPU = torch.device("cpu")


def test_valid_positions_from_lengths() -> None:
    valid = Ragged(lengths=torch.tensor([3, 0, 1])).valid(3)
    assert valid is not None
    assert valid.tolist() == [[True, True, True], [False] * 3, [True, False, False]]
    assert Ragged().valid(5) is None


def test_valid_positions_from_segments_and_from_both() -> None:
    segments = torch.tensor([[0, 0, 1, 1], [0, 1, -1, -1]])
    by_segments, by_both = (
        Ragged(lengths=lengths, segments=segments).valid(4) for lengths in (None, torch.tensor([3, 1]))
    )
    assert by_segments is not None
    assert by_both is not None
    assert by_segments.tolist() == [[True] * 4, [True, True, False, False]]
    assert by_both.tolist() == [[True, True, True, False], [True, False, False, False]]


def test_packed_positions_begin_anew() -> None:
    ragged = Ragged(segments=torch.tensor([[4, 4, 4, 0, 0, 7], [1, 2, 3, 3, -1, -1]]))
    assert ragged.is_packed
    assert ragged.starts is not None
    assert ragged.packed_positions is not None
    assert ragged.starts.tolist() == [
        [False, False, False, True, False, True],
        [False, True, True, False, True, False],
    ]
    assert ragged.packed_positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 0, 1]]
    assert Ragged().starts is None
    assert Ragged().packed_positions is None


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=3))
def test_packed_positions_count_each_sequence(rows: list[list[int]]) -> None:
    length = max(sum(sizes) for sizes in rows)
    segments, expected = torch.full((len(rows), length), -1), torch.zeros(len(rows), length, dtype=torch.int64)
    for row, sizes in enumerate(rows):
        used = sum(sizes)
        segments[row, :used] = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        expected[row, :used] = torch.cat([torch.arange(size) for size in sizes])
    ragged = Ragged(segments=segments)
    valid, positions = ragged.valid(length), ragged.packed_positions
    assert valid is not None
    assert positions is not None
    assert torch.equal(positions[valid], expected[valid])


def test_positions_go_on_where_each_row_is() -> None:
    assert call_positions(3, None, 0, CPU).tolist() == [[0, 1, 2]]
    assert call_positions(2, None, 5, CPU).tolist() == [[5, 6]]
    assert call_positions(2, Ragged(), torch.tensor([0, 7]), CPU).tolist() == [[0, 1], [7, 8]]


def test_zero_padding_ends_not_a_number_and_its_gradient() -> None:
    x = torch.ones(2, 3, 2, requires_grad=True)
    spoiled = torch.where(torch.tensor([[1, 1, 0], [0, 0, 0]])[..., None].bool(), x, torch.nan)
    clean = zero_padding(spoiled, Ragged(lengths=torch.tensor([2, 0])).valid(3))
    assert clean.sum() == 4
    (gradient,) = torch.autograd.grad(clean.sum(), x)
    assert gradient.sum() == 4
    assert zero_padding(x, None) is x
    heads = torch.full((2, 4, 3, 5), torch.nan)
    assert zero_padding(heads, torch.zeros(2, 3, dtype=torch.bool), dim=2).sum() == 0
