"""What outputs may be and must be: against all outputs enumerated, filtered by the rule as it is said in words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_decode_models import model_of, requests_of
from tiny_decoding_model import BOS, EOS, PAD, TinyModel, all_outputs, close, random_requests

from trilemma.config import DecodingConfig
from trilemma.decode import Hypothesis, Phrase, Request, compare_with_single, decode, rules
from trilemma.errors import ConfigError
from trilemma.measure.forced import forced_nats
from trilemma.registry import available_mixers, mixer_class

VOCAB, LIMIT, UNK = 5, 5, 4
Valid = Callable[[list[int]], bool]


def run(model: TinyModel, requests: list[Request], **settings: object) -> list[list[Hypothesis]]:
    return decode(model, requests, DecodingConfig.model_validate(settings), eos=EOS, pad=PAD, unk=UNK)


def no_repetition(size: int) -> Valid:
    def valid(tokens: list[int]) -> bool:
        grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
        return len(set(grams)) == len(grams)

    return valid


def contains(phrase: Phrase) -> Valid:
    def valid(tokens: list[int]) -> bool:
        size = len(phrase.tokens)
        inside = any(tuple(tokens[i : i + size]) == phrase.tokens for i in range(len(tokens)))
        return inside or (phrase.first is not None and tuple(tokens[: len(phrase.first)]) == phrase.first)

    return valid


@functools.cache
def enumerated(seed: int, eos_bias: float) -> tuple[TinyModel, Request, list[tuple[float, list[int]]]]:
    """A model, a request, and all its outputs with their scores, best first."""
    model = TinyModel(vocab=VOCAB, seed=seed, scale=1.0, eos_bias=eos_bias)
    (request,) = random_requests(1, seed=seed, vocab=VOCAB, limit=LIMIT)
    return model, request, all_outputs(model, request, 0.6, VOCAB)


def check_against_all(change: Callable[[Request], Request], valid: Valid, **settings: object) -> None:
    """A beam that prunes nothing finds all outputs that are valid, in order."""
    changed = 0
    for seed in range(4):
        model, request, everything = enumerated(seed, -2.0)
        expected = [pair for pair in everything if valid(pair[1])]
        found = run(model, [change(request)], beam_size=1280, n_best=400, **settings)[0]
        found = [one for one in found if one.finished]
        assert [one.tokens for one in found] == [tokens for _, tokens in expected]
        assert all(close(one.score, score) for one, (score, _) in zip(found, expected, strict=True))
        changed += expected != everything
    assert changed, "the rule had nothing to do"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_twice(size: int) -> None:
    check_against_all(lambda request: request, no_repetition(size), no_repeat_ngram=size)


def test_the_unknown_token_is_banned() -> None:
    check_against_all(lambda request: request, lambda tokens: UNK not in tokens, unknown="ban")


@pytest.mark.parametrize("forced", [(3,), (4, 4), (0, 1, 3, 4)])
def test_a_forced_beginning(forced: tuple[int, ...]) -> None:
    check_against_all(
        lambda request: replace(request, forced=forced), lambda tokens: tuple(tokens[: len(forced)]) == forced
    )


PHRASES = [
    (Phrase((3,)),),
    (Phrase((3, 4)), Phrase((4, 3))),
    (Phrase((3, 3, 4)),),
    (Phrase((4, 3), first=(3,)),),
    (Phrase((3, 1)), Phrase((0,))),
]


@pytest.mark.parametrize("phrases", PHRASES, ids=str)
def test_phrases_must_appear(phrases: tuple[Phrase, ...]) -> None:
    check_against_all(
        lambda request: replace(request, phrases=phrases),
        lambda tokens: all(contains(phrase)(tokens) for phrase in phrases),
    )


@pytest.mark.parametrize("beam", [1, 2, 4])
def test_narrow_beams_meet_all_phrases(beam: int) -> None:
    """Whatever the model prefers, and at the tightest limit: phrases and an end."""
    model = TinyModel(vocab=20, scale=3.0)
    # two of them begin alike: a token may not count for both, or none is ever finished
    phrases = (Phrase((11, 12, 11, 13)), Phrase((11, 7)), Phrase((9, 8)))
    for seed in range(3):
        for limit in (9, 20):
            requests = random_requests(8, seed=seed, vocab=20, limit=limit)
            asked = [replace(request, phrases=phrases[: 1 + n % 3]) for n, request in enumerate(requests)]
            for request, outputs in zip(asked, run(model, asked, beam_size=beam, n_best=1), strict=True):
                assert all(contains(phrase)(outputs[0].tokens) for phrase in request.phrases)


def test_phrases_of_one_line_change_no_other() -> None:
    model = TinyModel(seed=2, scale=1.5)
    requests = random_requests(12, seed=3)
    plain = run(model, requests, beam_size=4, n_best=3)
    mixed = [replace(one, phrases=(Phrase((5, 6)),)) if n % 3 == 0 else one for n, one in enumerate(requests)]
    found = run(model, mixed, beam_size=4, n_best=3)
    for number, (ours, theirs) in enumerate(zip(found, plain, strict=True)):
        same = [one.tokens for one in ours] == [one.tokens for one in theirs]
        assert same or number % 3 == 0


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_batch_mates_do_not_matter(method: str) -> None:
    model = TinyModel(seed=1, scale=2.0)
    requests = [
        replace(request, forced=(3, 5)[: number % 3], phrases=(Phrase((6, 3)),) if method == "beam" else ())
        for number, request in enumerate(random_requests(12, seed=1))
    ]
    settings = {"method": method, "no_repeat_ngram": 2, "unknown": "ban", "beam_size": 3}
    config = DecodingConfig.model_validate(settings)
    report = compare_with_single(model, requests, config, eos=EOS, pad=PAD, dtype=torch.float64, unk=UNK)
    assert report.disagreements == [], str(report)
    for request, (best, *_) in zip(requests, run(model, requests, **settings), strict=True):
        assert tuple(best.tokens[: len(request.forced)]) == request.forced
        assert UNK not in best.tokens[len(request.forced) :]
        tokens = best.tokens + [EOS] * best.finished
        assert close(best.log_probability, model.log_probability(request, tokens)), "scores stay the model's own"


def test_rules_are_reported_where_they_act() -> None:
    model = TinyModel(seed=2, scale=3.0, eos_bias=-3.0)
    requests = random_requests(20, limit=12)
    free = run(model, requests, method="greedy")
    ruled = run(model, requests, method="greedy", no_repeat_ngram=2)
    seen = [bool(one.acted) for (one,) in ruled]
    assert seen == [not no_repetition(2)(one.tokens) for (one,) in free]
    assert any(seen)
    assert not all(seen)
    assert {one.acted for (one,) in ruled} == {(), ("no_repeat_ngram",)}
    assert all(one.acted == () for (one,) in free)


def test_a_loop_is_broken() -> None:
    """A model that says one token for ever."""
    model = TinyModel(scale=0.1)
    model.bias[6] = 50.0
    request = Request([BOS], 12, source=[EOS])
    assert run(model, [request], method="greedy")[0][0].tokens == [6] * 12
    outputs = run(model, [request], method="greedy", no_repeat_ngram=3)[0]
    assert no_repetition(3)(outputs[0].tokens)


def test_a_forced_token_is_stronger_than_a_rule() -> None:
    model = TinyModel()
    request = Request([BOS], 8, source=[EOS], forced=(3, 3, 3, UNK))
    for method in ("greedy", "beam", "sample"):
        best = run(model, [request], method=method, no_repeat_ngram=1, unknown="ban")[0][0]
        assert best.tokens[:4] == [3, 3, 3, UNK]


def test_planted_rules_one_token_late_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: repetitions are looked for in the tokens before the last."""
    right = rules.NoRepeat.banned
    monkeypatch.setattr(rules.NoRepeat, "banned", lambda self, history, *more: right(self, history[:, :-1], *more))
    with pytest.raises(AssertionError):
        test_no_ngram_twice(2)


def test_a_phrase_that_cannot_be_met_is_reported() -> None:
    """The model would end at once; a rule forbids a token of the phrase."""
    model = TinyModel(eos_bias=3.0)
    requests = [Request([BOS], 6, source=[EOS], phrases=(Phrase(tokens),)) for tokens in ((3, 3), (5, 6))]
    first, second = run(model, requests, no_repeat_ngram=1)
    assert not first[0].finished
    assert first[0].acted[-1] == "unmet"
    assert second[0].finished
    assert "unmet" not in second[0].acted


@pytest.mark.parametrize("settings", [{"method": "greedy"}, {"method": "sample", "n_best": 2}, {"beam_size": 3}])
def test_where_nothing_is_allowed_the_output_ends(settings: dict[str, object]) -> None:
    """Of eight tokens all are banned but two, of which no output holds either twice."""
    banned = [token for token in range(8) if token not in (5, 6)]
    requests = random_requests(3, vocab=8, limit=6)
    for outputs in run(TinyModel(), requests, banned=banned, no_repeat_ngram=1, **settings):
        assert outputs
        for one in outputs:
            assert (sorted(one.tokens), one.finished) == ([5, 6], True)
            assert "banned" in one.acted
    for outputs in run(TinyModel(), requests, banned=list(range(8)), **settings):
        assert all((one.tokens, one.finished, one.acted) == ([], True, ("banned",)) for one in outputs)
        assert outputs


def test_groups_end_where_nothing_is_allowed() -> None:
    requests = random_requests(3, vocab=8, limit=6)
    for outputs in run(TinyModel(), requests, banned=list(range(8)), beam_size=4, beam_groups=2):
        assert [(one.tokens, one.finished) for one in outputs] == [([], True)]


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_an_unknown_token_that_is_the_end_cannot_be_banned(method: str) -> None:
    config = DecodingConfig(method=method, unknown="ban")
    with pytest.raises(ConfigError, match="unknown=ban: this vocabulary has no unknown token"):
        decode(TinyModel(), random_requests(1), config, eos=EOS, pad=PAD, unk=EOS)


def test_what_excludes_each_other() -> None:
    request = Request([BOS], 8, source=[EOS], phrases=(Phrase((3,)),))
    for method in ("greedy", "sample"):
        with pytest.raises(ConfigError, match=f"phrases need decoding.method=beam; decoding.method={method}"):
            run(TinyModel(), [request], method=method)
    with pytest.raises(ConfigError, match=r"phrases and decoding\.beam_groups exclude each other"):
        run(TinyModel(), [request], beam_groups=2)


MIXERS = [name for name in available_mixers() if mixer_class(name).capabilities.causal]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_obeys_through_its_state(mixer: str) -> None:
    """Phrases, forced beginnings and rules, in a batch and alone."""
    layout = "decoder-only"
    model = model_of(layout, mixer, num_layers=2)
    requests = [
        replace(request, forced=(3, 5)[: number % 3], phrases=(Phrase((6, 3)),)[: number % 2])
        for number, request in enumerate(requests_of(layout, 5))
    ]
    config = DecodingConfig(beam_size=3, n_best=2, no_repeat_ngram=2, unknown="ban")
    report = compare_with_single(model, requests, config, eos=EOS, pad=PAD, dtype=torch.float64, unk=UNK)
    assert report.disagreements == [], str(report)
    outputs = decode(model, requests, config, eos=EOS, pad=PAD, unk=UNK)
    for request, (best, *_) in zip(requests, outputs, strict=True):
        assert all(contains(phrase)(best.tokens) for phrase in request.phrases)
        tokens = best.tokens + [EOS] * best.finished
        assert close(-float(forced_nats(model, [request], [tokens], pad=PAD)[0]), best.log_probability)
