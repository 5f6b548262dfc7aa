"""Beam search against brute force, and its rules one by one."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_decoding_model import BOS, EOS, PAD, TinyModel, all_outputs, close, random_requests

from trilemma.config import DecodingConfig
from trilemma.decode import Hypothesis, Request, beam, decode, length_penalty
from trilemma.errors import ConfigError, TrilemmaError


def run(model: TinyModel, requests: list[Request], **settings: object) -> list[list[Hypothesis]]:
    return decode(model, requests, DecodingConfig.model_validate(settings), eos=EOS, pad=PAD)


def test_length_penalty_is_gnmt_equation_14() -> None:
    assert length_penalty(1, 0.6) == 1.0
    assert length_penalty(7, 0.0) == 1.0
    assert length_penalty(7, 1.0) == 2.0
    assert length_penalty(19, 0.5) == 2.0
    assert close(length_penalty(10, 0.6), 2.5**0.6)
    assert abs(length_penalty(10, 0.6) - 1.7328621) < 1e-7


def check_exactness(seeds: range, alpha: float) -> None:
    """A beam as wide as there are prefixes, against all outputs enumerated and scored alone."""
    vocab, limit = 4, 4
    for seed in seeds:
        model = TinyModel(vocab=vocab, seed=seed, scale=1.0, eos_bias=-1.0)
        for request in random_requests(3, seed=seed, vocab=vocab, limit=limit):
            expected = all_outputs(model, request, alpha, vocab)[:5]
            found = run(model, [request], beam_size=256, n_best=5, length_penalty=alpha)[0]
            assert [hypothesis.tokens for hypothesis in found] == [tokens for _, tokens in expected]
            for hypothesis, (score, _) in zip(found, expected, strict=True):
                assert hypothesis.finished
                assert close(hypothesis.score, score)
                assert close(hypothesis.log_probability, score * length_penalty(hypothesis.length, alpha))


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.6, 1.0, 2.0])
def test_a_beam_that_prunes_nothing_finds_the_exact_best(alpha: float) -> None:
    check_exactness(range(4), alpha)


def test_the_oracle_sees_a_wrong_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: length counted without end-of-sequence."""
    monkeypatch.setattr(beam, "length_penalty", lambda length, alpha: length_penalty(length - 1, alpha))
    with pytest.raises(AssertionError):
        check_exactness(range(4), 2.0)


def test_the_oracle_sees_a_wrong_reorder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the state is not reordered with the beams."""
    monkeypatch.setattr(beam, "_is_identity", lambda rows, size: len(rows) == size)
    with pytest.raises(AssertionError):
        check_exactness(range(4), 0.6)


@pytest.mark.parametrize("encoder", [True, False])
def test_greedy_is_a_beam_of_one_without_penalty(encoder: bool) -> None:
    for seed in range(5):
        model = TinyModel(seed=seed, scale=1.5)
        requests = random_requests(20, seed=seed, encoder=encoder)
        greedy = run(model, requests, method="greedy", length_penalty=0.0)
        single = run(model, requests, method="beam", beam_size=1, length_penalty=0.0)
        for (ours,), (theirs,) in zip(greedy, single, strict=True):
            assert (ours.tokens, ours.finished) == (theirs.tokens, theirs.finished)
            assert close(ours.score, theirs.score)


def test_scores_are_those_of_forced_decoding() -> None:
    model = TinyModel(seed=3, scale=1.0)
    requests = random_requests(12, seed=3)
    for request, outputs in zip(requests, run(model, requests, beam_size=5, n_best=5), strict=True):
        assert len(outputs) == 5
        order = [(output.finished, output.score) for output in outputs]
        assert order == sorted(order, reverse=True)
        assert len({(tuple(output.tokens), output.finished) for output in outputs}) == 5
        for output in outputs:
            tokens = output.tokens + [EOS] * output.finished
            assert close(output.log_probability, model.log_probability(request, tokens))
            assert close(output.score, output.log_probability / length_penalty(len(tokens), 0.6))


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.6, 2.0])
def test_stopping_early_changes_nothing(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyModel(seed=1, scale=2.0)
    requests = random_requests(20, seed=1, limit=15)
    early = run(model, requests, beam_size=4, n_best=2, length_penalty=alpha)
    rows = model.rows_stepped

    def only_at_the_limit(live: object, finished: object, length: int, limits: torch.Tensor, alpha: float) -> object:
        return limits <= length

    monkeypatch.setattr(beam, "_cannot_improve", only_at_the_limit)
    late = run(model, requests, beam_size=4, n_best=2, length_penalty=alpha)
    for ours, theirs in zip(early, late, strict=True):
        assert [output.tokens for output in ours] == [output.tokens for output in theirs]
    if alpha <= 0.6:
        assert rows < model.rows_stepped - rows, "stopping early saved no step"


def test_stopping_at_the_first_finished_one_would_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the common rule of stopping once as many are finished as wanted."""

    def hasty(live: object, finished: beam._Finished, length: int, limits: torch.Tensor, alpha: float) -> object:
        return (limits <= length) | (finished.score[:, -1] > -torch.inf)

    monkeypatch.setattr(beam, "_cannot_improve", hasty)
    with pytest.raises(AssertionError):
        check_exactness(range(4), 2.0)


def test_end_of_sequence_that_never_comes_is_cut_at_the_limit() -> None:
    model = TinyModel(seed=2, eos_bias=-math.inf)
    for method in ("greedy", "beam", "sample"):
        outputs = run(model, random_requests(5, limit=7), method=method)
        assert all(len(output[0].tokens) == 7 and not output[0].finished for output in outputs)


def test_unfinished_outputs_only_fill_places_that_no_finished_one_takes() -> None:
    model = TinyModel(seed=2, scale=1.0, eos_bias=-3.0)
    seen = 0
    for outputs in run(model, random_requests(20, limit=3), beam_size=4, n_best=4):
        kinds = [output.finished for output in outputs]
        assert kinds == sorted(kinds, reverse=True)
        seen += 0 < sum(kinds) < len(kinds)
    assert seen, "no input had outputs of both kinds"


def test_end_of_sequence_first_is_an_empty_output() -> None:
    model = TinyModel(eos_bias=1e4)
    for method in ("greedy", "beam", "sample"):
        for output in run(model, random_requests(3), method=method):
            assert output[0].tokens == []
            assert output[0].finished
            assert output[0].length == 1


def test_limits_differ_within_a_batch() -> None:
    model = TinyModel(eos_bias=-math.inf)
    requests = [Request([BOS], limit, source=[3, EOS]) for limit in (1, 5, 3)]
    for method in ("greedy", "beam", "sample"):
        assert [len(output[0].tokens) for output in run(model, requests, method=method)] == [1, 5, 3]


def test_a_vocabulary_smaller_than_the_beam() -> None:
    model = TinyModel(vocab=3, seed=4, scale=1.0)
    request = Request([BOS], 3, source=[EOS])
    expected = all_outputs(model, request, 0.6, 3)
    found = run(model, [request], beam_size=50, n_best=50)[0]
    finished = [output.tokens for output in found if output.finished]
    assert finished == [tokens for _, tokens in expected]
    assert len(found) == len(finished) + 2**3  # and the unfinished ones of full length


def test_no_requests() -> None:
    assert run(TinyModel(), []) == []


def test_not_a_number_is_an_error() -> None:
    for method in ("greedy", "beam", "sample"):
        model = TinyModel()
        model.bias[5] = math.nan
        with pytest.raises(TrilemmaError, match="not a number"):
            run(model, random_requests(3), method=method)


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="greedy decoding gives one output"):
        run(TinyModel(), random_requests(1), method="greedy", n_best=2)
    with pytest.raises(ConfigError, match=r"n_best=5 is more than decoding\.beam_size=4"):
        run(TinyModel(), random_requests(1), n_best=5)
