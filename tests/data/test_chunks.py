"""What is tokenised at once is bounded: a thousand short texts, or a megabyte of long ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trilemma.data.prepare import _BATCH, _CHARACTERS, _chunks

Sizes = st.lists(st.integers(0, 400_000), max_size=30)


@given(sizes=Sizes, short=st.integers(0, 2500))
def test_chunks_hold_every_item_in_order_and_little_text(sizes: list[int], short: int) -> None:
    text = "x" * 400_000
    items = [((text[:size], "y"), True) for size in sizes] + [(("a", "b"), index % 2 == 0) for index in range(short)]
    chunks = list(_chunks(iter(items)))
    assert [item for chunk in chunks for item in chunk] == items
    for chunk in chunks:
        assert 0 < len(chunk) <= _BATCH
        assert sum(len(first) + len(second) for (first, second), _ in chunk[:-1]) < _CHARACTERS


def test_few_chunks_are_made_of_short_texts() -> None:
    items = [(("short",), True)] * 2500
    assert [len(chunk) for chunk in _chunks(iter(items))] == [1000, 1000, 500]
