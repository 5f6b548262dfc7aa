"""Which examples make micro-batch k: every example once an epoch, any k at any time, little padding, no lost token."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trilemma.data.order import hash_values, permutation, raw_bits, uniform
from trilemma.data.plan import PairPlan, Part, StreamPlan, as_padded, cut, draw_epoch, whole_rows

Lengths = Callable[[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]]
lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=120)


def whole(size: int, weight: float = 1.0) -> list[Part]:
    return [Part(np.arange(size, dtype=np.int64), weight)]


def pair_plan(pairs: list[tuple[int, int]], seed: int = 1, budget: int = 200) -> PairPlan:
    first, second = (np.array(side, dtype=np.int64) for side in zip(*pairs, strict=True))
    return PairPlan(first, second, whole(len(pairs)), seed, budget)


def like_multi30k(size: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lengths like Multi30k's under a BPE of 8,000 entries: log-normal around 14, the sides correlated at 0.8."""
    draw = np.random.Generator(np.random.Philox(seed))
    common, own = draw.normal(size=(2, size))
    source = np.exp(2.64 + 0.30 * common)
    target = np.exp(2.66 + 0.33 * (0.8 * common + 0.6 * own))
    return tuple(np.clip(np.rint(side), 2, 60).astype(np.int64) + 1 for side in (source, target))


def test_random_words_are_golden() -> None:
    """The bits of Philox never change; if these do, stored runs could not be repeated."""
    assert raw_bits(1, "order.0", 2, 3).tolist() == [994372810803141851, 3686571121034704310, 16950890504551472945]
    assert permutation(7, "x", 0, 6).tolist() == [0, 2, 3, 4, 5, 1]
    assert hash_values(np.arange(2, dtype=np.int64), "number").tolist() == [4142913049992653494, 54453199550389446]


@given(seed=st.integers(0, 2**63), counter=st.integers(0, 2**40), size=st.integers(0, 200))
def test_permutations_are_permutations(seed: int, counter: int, size: int) -> None:
    order = permutation(seed, "test", counter, size)
    assert sorted(order.tolist()) == list(range(size))
    assert order.tolist() == permutation(seed, "test", counter, size).tolist()


def test_streams_of_random_numbers_differ() -> None:
    streams = [uniform(s, p, c, 500) for s in (0, 1) for p in ("a", "b") for c in (0, 1, 2**32, 2**33)]
    for index, stream in enumerate(streams):
        assert stream.min() >= 0 and stream.max() < 1 and abs(stream.mean() - 0.5) < 0.1
        assert all(abs(np.corrcoef(stream, other)[0, 1]) < 0.25 for other in streams[:index])


@given(pairs=lengths, budget=st.integers(80, 400))
def test_cut_takes_round_numbers_of_rows_within_the_budget(pairs: list[tuple[int, int]], budget: int) -> None:
    first, second = (np.array(side, dtype=np.int64) for side in zip(*pairs, strict=True))
    borders = cut(first, second, budget)

    def padded(low: int, high: int) -> int:
        longest = as_padded(first[low:high].max()) + as_padded(second[low:high].max())
        return int((high - low) * as_padded(longest))

    assert borders[0] == 0 and borders[-1] == len(pairs) and (np.diff(borders) > 0).all()
    for low, high in itertools.pairwise(borders):
        rows = int(high - low)
        assert padded(low, high) <= budget or rows == 1
        most = next((more for more in range(rows, len(pairs) - low + 1) if padded(low, low + more) > budget), None)
        if high < len(pairs):  # the last batch takes what is left
            assert most is not None and rows == max(1, whole_rows(most - 1))


@given(pairs=lengths, seed=st.integers(0, 99), epochs=st.integers(1, 3))
def test_every_example_once_an_epoch(pairs: list[tuple[int, int]], seed: int, epochs: int) -> None:
    plan = pair_plan(pairs, seed)
    for epoch in range(epochs):
        first = epoch * plan.batches()
        seen = [int(i) for k in range(first, first + plan.batches()) for i in plan.examples(k)]
        assert sorted(seen) == list(range(len(pairs)))


@given(pairs=lengths, seed=st.integers(0, 99), data=st.data())
def test_any_micro_batch_at_any_time(pairs: list[tuple[int, int]], seed: int, data: st.DataObject) -> None:
    in_order = pair_plan(pairs, seed)
    expected = [in_order.examples(k).tolist() for k in range(3 * in_order.batches())]
    plan = pair_plan(pairs, seed)
    for k in data.draw(st.permutations(range(len(expected)))):
        assert plan.examples(k).tolist() == expected[k]


def test_epochs_differ_and_seeds_differ() -> None:
    first_side, second_side = like_multi30k(4000, seed=1)
    plan, other = (PairPlan(first_side, second_side, whole(4000), seed, 2048) for seed in (1, 2))
    batches = plan.batches()
    first = [plan.examples(k).tolist() for k in range(batches)]
    assert first != [plan.examples(k + batches).tolist() for k in range(batches)]
    assert first != [other.examples(k).tolist() for k in range(batches)]
    # Not only the order of the batches changes: what is in them does, too.
    assert {tuple(sorted(b)) for b in first} != {tuple(sorted(plan.examples(k + batches))) for k in range(batches)}


def test_a_far_epoch_costs_no_more_than_the_first() -> None:
    plan = pair_plan([(1 + i % 20, 1 + i % 17) for i in range(400)])
    plan.examples(10**9)
    assert len(plan._epochs) <= 2


def like_tatoeba(size: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lengths like Tatoeba's English and German: short sentences, log-normal around 8, a few of up to 60."""
    draw = np.random.Generator(np.random.Philox(seed))
    common, own = draw.normal(size=(2, size))
    source = np.exp(2.10 + 0.36 * common)
    target = np.exp(2.15 + 0.40 * (0.8 * common + 0.6 * own))
    return tuple(np.clip(np.rint(side), 1, 60).astype(np.int64) + 1 for side in (source, target))


@pytest.mark.parametrize(
    ("lengths_of", "size", "budget", "most"),
    [
        (like_multi30k, 29_000, 1024, 0.015),
        (like_multi30k, 29_000, 2048, 0.02),
        (like_multi30k, 29_000, 4096, 0.03),
        (like_multi30k, 29_000, 8192, 0.05),
        (like_tatoeba, 60_000, 2048, 0.015),
        (like_tatoeba, 60_000, 8192, 0.04),
    ],
)
def test_at_most_five_per_cent_is_padding(lengths_of: Lengths, size: int, budget: int, most: float) -> None:
    """No more than 5 % of the compute goes to padding. 29,000 examples make 140 batches of 8,192 tokens, so
    larger budgets pad more: too few batches for all pairs of lengths."""
    first, second = lengths_of(size, 1)
    plan = PairPlan(first, second, whole(size), 1, budget)
    assert 0 < plan.padding() <= most, f"{plan.padding():.1%}"


def test_short_lengths_are_padded_as_they_are_and_longer_ones_even() -> None:
    assert as_padded(np.array([0, 1, 7, 24, 25, 26, 61])).tolist() == [0, 1, 7, 24, 26, 26, 62]


def test_numbers_of_rows_are_round() -> None:
    rounded = {7: 7, 15: 8, 31: 24, 47: 32, 127: 112, 159: 128, 319: 256, 700: 640}
    assert {rows: whole_rows(rows) for rows in rounded} == rounded


@pytest.mark.parametrize("budget", [2048, 4096, 8192])
def test_batches_have_few_sizes(budget: int) -> None:
    """What a CPU's kernels are prepared for is rows * length."""
    first, second = like_multi30k(29_000, seed=1)
    plan = PairPlan(first, second, whole(len(first)), 1, budget)
    batches = [plan.examples(k) for k in range(plan.batches())]
    sizes = {len(batch) * int(as_padded(side[batch].max())) for batch in batches for side in (first, second)}
    assert len(sizes) <= 50


def test_planted_defect_batches_without_buckets_pad_much_more() -> None:
    first, second = like_multi30k(29_000, seed=1)
    borders = cut(first, second, 4096)
    rows = np.diff(borders)
    longest = np.maximum.reduceat(first, borders[:-1]) + np.maximum.reduceat(second, borders[:-1])
    assert 1 - (first + second).sum() / (rows * longest).sum() > 0.3


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 3)), min_size=1, max_size=3), st.integers(1, 12))
def test_weights_are_how_often_an_example_is_seen(sizes: list[tuple[int, float]], epochs: int) -> None:
    starts = np.cumsum([0, *[size for size, _ in sizes]])
    parts = [Part(np.arange(starts[i], starts[i + 1]), weight) for i, (_, weight) in enumerate(sizes)]
    counts = Counter(int(i) for epoch in range(epochs) for i in draw_epoch(parts, 3, epoch))
    for part in parts:
        seen = [counts[int(i)] for i in part.examples]
        assert max(seen) - min(seen) <= 1  # every example once before any again
        assert sum(seen) == int(part.weight * len(seen) * epochs)


def test_fractional_weights_still_number_batches_without_gaps() -> None:
    parts = [Part(np.arange(50), 0.5), Part(np.arange(50, 70), 1.3)]
    first = np.array([1 + i % 30 for i in range(70)])
    plan = PairPlan(first, first, parts, 1, 120)
    forward = [plan.examples(k).tolist() for k in range(60)]
    again = PairPlan(first, first, parts, 1, 120)
    assert [again.examples(k).tolist() for k in reversed(range(60))] == forward[::-1]
    assert {plan.locate(k)[0] for k in range(60)} == set(range(plan.locate(59)[0] + 1))


@given(
    units=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    length=st.integers(1, 40),
    rows=st.integers(1, 4),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_a_stream_gives_every_token_once_an_epoch(
    units: list[int], length: int, rows: int, epoch: int, shuffle: bool
) -> None:
    plan = StreamPlan(np.array(units), whole(len(units)), 5, length, rows, shuffle)
    seen: Counter[tuple[int, int]] = Counter()
    batches = plan.batches()
    assert batches == math.ceil(math.ceil(sum(units) / length) / rows)
    short = 0
    for k in range(epoch * batches, (epoch + 1) * batches):
        for row in plan.pieces(k):
            size = sum(piece.stop - piece.start for piece in row)
            assert 0 < size <= length
            short += size < length
            seen.update((piece.document, place) for piece in row for place in range(piece.start, piece.stop))
    assert short <= 1
    assert seen == Counter((document, place) for document, size in enumerate(units) for place in range(size))


def test_rows_are_cut_elsewhere_in_each_epoch() -> None:
    plan = StreamPlan(np.array([1000]), whole(1), 5, 64, 1)
    starts = [{plan.pieces(k + epoch * plan.batches())[0][0].start for k in range(16)} for epoch in range(3)]
    assert starts[0] != starts[1] != starts[2]
