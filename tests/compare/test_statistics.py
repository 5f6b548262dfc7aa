"""The statistics: coverage, power, false alarms, Holm against a hand calculation, BLEU against sacrebleu."""

from __future__ import annotations

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from trilemma.compare.metrics import METRICS, Array, bleu_from_sums, metric_named
from trilemma.compare.statistics import (
    compare_all,
    compare_pair,
    holm,
    interval,
    replicates_for,
    resample,
)
from trilemma.errors import ConfigError

LOSS = METRICS["loss"]
SEEDS, DOCUMENTS, REPLICATES = 3, 60, 400


def simulate(
    generator: np.random.Generator, mean: float, shared: Array, seeds: int = SEEDS, noise: float = 0.2
) -> list[Array]:
    """Per-document losses of `seeds` runs: seed effect 0.05, shared document effect, `noise` of run and document."""
    runs = []
    for _ in range(seeds):
        values = mean + generator.normal(0, 0.05) + shared + generator.normal(0, noise, len(shared))
        runs.append(np.stack([values, np.ones_like(values)], axis=1))
    return runs


def naive(runs: list[Array], trial: int, generator: np.random.Generator) -> tuple[float, float]:
    """The defect that `interval` avoids: seeds drawn with replacement."""
    apart = resample({str(at): [run] for at, run in enumerate(runs)}, LOSS, 1000, trial)
    replicates = np.stack([sample.replicates for sample in apart.values()], axis=1)  # [replicates, seeds]
    picks = generator.integers(0, len(runs), replicates.shape)
    draws = np.take_along_axis(replicates, picks, axis=1).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def test_intervals_cover_the_truth_where_drawing_seeds_with_replacement_does_not() -> None:
    generator = np.random.default_rng(7)
    trials, hits, naive_hits = 800, 0, 0
    for trial in range(trials):
        # The seeds' part dominates here: the small-sample correction is what is tested.
        shared = generator.normal(0, 0.05, DOCUMENTS)
        runs = {"a": simulate(generator, 3.0, shared, noise=0.05)}
        sample = resample(runs, LOSS, 1000, trial)["a"]
        found = interval(sample, LOSS, trial)
        hits += found.low <= 3.0 <= found.high
        low, high = naive(runs["a"], trial, generator)
        naive_hits += low <= 3.0 <= high
    assert 0.93 <= hits / trials <= 0.98
    assert naive_hits / trials < 0.85


def rates(effect: float, trials: int = 300) -> float:
    """Share of simulated studies of two candidates, `effect` apart, in which the pair is told apart."""
    generator = np.random.default_rng(11)
    found = 0
    for trial in range(trials):
        shared = generator.normal(0, 0.5, DOCUMENTS)
        runs = {"a": simulate(generator, 3.0, shared), "b": simulate(generator, 3.0 + effect, shared)}
        found += compare_pair(resample(runs, LOSS, REPLICATES, trial), "a", "b", trial).separated
    return found / trials


def test_no_difference_is_found_where_none_is() -> None:
    assert rates(0.0) <= 0.06


def test_a_planted_difference_is_found() -> None:
    # Four seed spreads, and less than half the spread between documents: pairing is what finds it.
    assert rates(0.2) >= 0.8


def test_documents_are_paired_between_candidates() -> None:
    generator = np.random.default_rng(3)
    shared = generator.normal(0, 5.0, DOCUMENTS)  # documents differ a hundred times more than candidates
    runs = {name: simulate(generator, mean, shared) for name, mean in (("a", 3.0), ("b", 3.6))}
    samples = resample(runs, LOSS, 2000)
    pair = compare_pair(samples, "a", "b")
    assert pair.separated and pair.difference < 0
    single = interval(samples["a"], LOSS)
    assert pair.high - pair.low < (single.high - single.low) / 3


def test_family_wise_errors_stay_at_the_level_over_many_pairs() -> None:
    generator = np.random.default_rng(5)
    wrong = uncorrected = 0
    for trial in range(150):
        shared = generator.normal(0, 0.5, DOCUMENTS)
        runs = {name: simulate(generator, 3.0, shared) for name in "abcd"}
        pairs = compare_all(resample(runs, LOSS, REPLICATES, trial), "abcd", trial)
        wrong += any(pair.separated for pair in pairs)
        uncorrected += any(pair.p is not None and pair.p < 0.05 for pair in pairs)
    assert wrong / 150 <= 0.07
    assert uncorrected > wrong  # the correction does something


def test_many_candidates_can_still_be_told_apart() -> None:
    """24 candidates are 276 pairs: with 10,000 replicates no p-value could be below 276 * 2 / 10,001 = 0.055."""
    generator = np.random.default_rng(2)
    shared = generator.normal(0, 0.5, DOCUMENTS)
    names = [f"c{at:02d}" for at in range(24)]
    runs = {name: simulate(generator, 9.0 if name == "c23" else 3.0, shared) for name in names}
    replicates = replicates_for([SEEDS] * len(names), DOCUMENTS)
    assert replicates == 400 * 276
    few, enough = (compare_all(resample(runs, LOSS, count), names) for count in (10_000, replicates))
    assert not any(pair.separated for pair in few)
    assert {pair.first for pair in enough if pair.separated} == set(names[:-1])
    assert {pair.second for pair in enough if pair.separated} == {"c23"}


def test_replicates_are_bounded_by_time_and_never_too_few() -> None:
    assert replicates_for([3] * 6, 1000) == 10_000  # 15 pairs
    assert replicates_for([3, 3] + [1] * 50, 1000) == 10_000  # only pairs with seeds enough count
    assert replicates_for([3] * 24, 10_000) == 40_000  # as many as are affordable
    for candidates in (2, 24, 60, 100):
        pairs = candidates * (candidates - 1) // 2
        assert pairs * 2 / (replicates_for([3] * candidates, 20_000) + 1) < 0.025


def test_holm_against_a_hand_calculation() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04; the last is lifted to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_give_no_p_value(seeds: int) -> None:
    generator = np.random.default_rng(0)
    shared = np.zeros(DOCUMENTS)
    runs = {"a": simulate(generator, 1.0, shared, seeds), "b": simulate(generator, 9.0, shared, SEEDS)}
    samples = resample(runs, LOSS, 200)
    pair = compare_pair(samples, "a", "b")
    assert pair.p is None and not pair.separated and pair.seeds == seeds
    assert interval(samples["a"], LOSS).seeds_counted is (seeds > 1)


def test_the_same_outputs_are_never_told_apart() -> None:
    perfect = np.ones((50, 2))
    samples = resample({"a": [perfect] * 3, "b": [perfect] * 3}, METRICS["exact_match"], 200)
    pair = compare_pair(samples, "a", "b")
    assert pair.p == 1.0 and not pair.separated
    found = interval(samples["a"], METRICS["exact_match"])
    # 50 of 50 right do not show that all are: Wilson's interval begins at 50 / (50 + 1.96 ** 2) = 92.87 %.
    assert (found.low, found.mean, found.high) == (pytest.approx(92.865, abs=0.001), 100.0, 100.0)


def test_resampling_is_reproducible_and_refuses_different_test_sets() -> None:
    generator = np.random.default_rng(1)
    runs = {"a": simulate(generator, 1.0, np.zeros(600))}
    first, second = resample(runs, LOSS, 600, 4)["a"], resample(runs, LOSS, 600, 4)["a"]
    assert np.array_equal(first.replicates, second.replicates)
    with pytest.raises(ValueError, match=r"same documents; found sizes \[60, 600\]"):
        resample({"a": runs["a"], "b": simulate(generator, 1.0, np.zeros(60))}, LOSS)


def sentence_statistics(hypotheses: list[str], references: list[str]) -> Array:
    scorer = BLEU(effective_order=True)
    rows = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        score = scorer.sentence_score(hypothesis, [reference])
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(rows, dtype=np.float64)


@pytest.mark.parametrize(
    "hypotheses",
    [
        ["the cat sat on the mat .", "a dog runs in the park today ."],
        ["the cat", "a park dog runs"],  # no 4-gram matches: smoothing
        ["xxx yyy zzz www vvv", "q r s t u"],  # nothing matches
        ["the mat", ""],
    ],
)
def test_bleu_of_sums_is_sacrebleus_corpus_score(hypotheses: list[str]) -> None:
    references = ["the cat sat on the red mat .", "a dog runs in the park ."]
    sums = sentence_statistics(hypotheses, references).sum(axis=0)
    expected = BLEU().corpus_score(hypotheses, [references]).score
    assert bleu_from_sums(sums) == pytest.approx(expected, abs=1e-9)


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match='unknown metric "blue"; did you mean "bleu"'):
        metric_named("blue")
