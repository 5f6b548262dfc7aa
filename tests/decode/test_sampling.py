"""Draws: reproducible, independent of batch-mates, and distributed as the model says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_decoding_model import EOS, PAD, TinyModel, random_requests

from trilemma.config import DecodingConfig
from trilemma.decode import decode, single
from trilemma.decode.sampling import draw, uniform


def sample(model: TinyModel, requests: list, **settings: object) -> list:
    config = DecodingConfig.model_validate({"method": "sample", **settings})
    return decode(model, requests, config, eos=EOS, pad=PAD)


def test_draws_are_uniform_and_uncorrelated() -> None:
    rows = np.arange(200_000)
    zeros = np.zeros_like(rows)
    by_index = uniform(0, rows, zeros, 0)
    assert by_index.min() >= 0
    assert by_index.max() < 1
    counts = np.histogram(by_index, bins=100, range=(0, 1))[0]
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert 50 < chi_square < 160  # 99 degrees of freedom
    for other in (uniform(1, rows, zeros, 0), uniform(0, rows, zeros + 1, 0), uniform(0, rows, zeros, 1)):
        assert abs(np.corrcoef(by_index, other)[0, 1]) < 0.01
    assert abs(np.corrcoef(by_index[:-1], by_index[1:])[0, 1]) < 0.01


def test_draws_are_fixed_for_ever() -> None:
    """A golden value: changing the generator changes every user's samples."""
    values = uniform(7, np.array([0, 1]), np.array([0, 2]), 3)
    assert values.tolist() == [0.7201731948294223, 0.24679261781139283]


def test_a_sample_does_not_depend_on_batch_mates() -> None:
    model = TinyModel(scale=1.0)
    requests = random_requests(30, limit=20)
    together = sample(model, requests, n_best=3, seed=5, batch_tokens=100_000)
    small = sample(model, requests, n_best=3, seed=5, batch_tokens=1)
    assert [[o.tokens for o in output] for output in together] == [[o.tokens for o in output] for output in small]
    assert [o.tokens for o in sample(model, requests[7:8], n_best=3, seed=5)[0]] == [o.tokens for o in together[7]]
    other = sample(model, requests, n_best=3, seed=6)
    assert sum(a[0].tokens != b[0].tokens for a, b in zip(together, other, strict=True)) > 15
    assert any(len({tuple(o.tokens) for o in output}) > 1 for output in together), "samples of one input are alike"


def test_planted_draws_by_row_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the draw is keyed by the row of the batch instead of the input."""
    monkeypatch.setattr(
        single,
        "uniform",
        lambda seed, indices, samples, position: uniform(seed, np.arange(len(indices)), samples, position),
    )
    with pytest.raises(AssertionError):
        test_a_sample_does_not_depend_on_batch_mates()


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(100_000, 4)
    uniforms = torch.from_numpy(uniform(0, np.arange(100_000), np.zeros(100_000, dtype=np.int64), 0))
    for temperature in (0.5, 1.0, 2.0):
        tokens, _ = draw(logits, uniforms, temperature)
        found = torch.bincount(tokens, minlength=4) / 100_000
        expected = torch.softmax(logits[0] / temperature, -1)
        assert (found - expected).abs().max() < 0.006


def test_filters() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(20_000, 4)
    uniforms = torch.from_numpy(uniform(0, np.arange(20_000), np.zeros(20_000, dtype=np.int64), 0))

    def kept(**filters: object) -> set[int]:
        return set(draw(logits, uniforms, 1.0, **filters)[0].tolist())  # type: ignore[arg-type]

    # probabilities: token 3 0.6439, token 1 0.2369, token 0 0.0871, token 2 0.0321
    assert kept() == {0, 1, 2, 3}
    assert kept(top_k=1) == {3}
    assert kept(top_k=3) == {0, 1, 3}
    assert kept(top_k=9) == {0, 1, 2, 3}
    assert kept(top_p=1e-9) == {3}
    assert kept(top_p=0.64) == {3}
    assert kept(top_p=0.65) == {1, 3}
    assert kept(top_p=0.89) == {0, 1, 3}
    assert kept(top_p=1.0) == {0, 1, 2, 3}
    # after top-k the two are renormalised to 0.731 and 0.269
    assert kept(top_k=2, top_p=0.7) == {3}
    assert kept(top_k=2, top_p=0.75) == {1, 3}
    tied = torch.zeros(20_000, 5)
    assert set(draw(tied, uniforms, 1.0, top_k=2)[0].tolist()) == {0, 1}


def test_top_k_of_one_is_greedy() -> None:
    model = TinyModel(scale=1.0)
    requests = random_requests(20)
    config = DecodingConfig(method="greedy")
    greedy = decode(model, requests, config, eos=EOS, pad=PAD)
    assert [o[0].tokens for o in sample(model, requests, top_k=1)] == [o[0].tokens for o in greedy]


def test_the_extreme_draws() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    for value in (0.0, 1.0 - 2.0**-53):
        tokens, margin = draw(logits, torch.full((2,), value, dtype=torch.float64))
        assert tokens.tolist() == [1, 0]
        assert margin.tolist() == [torch.inf, torch.inf]


def test_the_log_probability_is_the_models_own() -> None:
    model = TinyModel(scale=1.0)
    requests = random_requests(10)
    for request, outputs in zip(requests, sample(model, requests, temperature=2.0, top_k=3, n_best=2), strict=True):
        for output in outputs:
            expected = model.log_probability(request, output.tokens + [EOS] * output.finished)
            assert abs(output.log_probability - expected) < 1e-9
