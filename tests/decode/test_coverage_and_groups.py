"""The coverage penalty against attention written out, and diverse beams against the algorithm one source at a time."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from test_decode_models import model_of, requests_of
from tiny_decoding_model import BOS, EOS, PAD, TinyModel, close, random_requests

from trilemma.config import DecodingConfig
from trilemma.decode import Ensemble, Hypothesis, Request, compare_with_single, decode, length_penalty
from trilemma.decode import beam as beam_module
from trilemma.errors import CapabilityError, ConfigError
from trilemma.mixers.cross_attention import CrossAttention
from trilemma.models import EncoderDecoder, SequenceModel


def run(model: object, requests: list[Request], **settings: object) -> list[list[Hypothesis]]:
    return decode(model, requests, DecodingConfig.model_validate(settings), eos=EOS, pad=PAD)  # type: ignore[type-var]


def attention(model: SequenceModel, request: Request, tokens: list[int], layer: int) -> torch.Tensor:
    """[heads, length, source], softmax(Q K / sqrt(d)) from the weights of a layer's cross-attention."""
    assert isinstance(model, EncoderDecoder)
    crosses = [part for parts in model.stack.parts() for part in parts if isinstance(part, CrossAttention)]
    cross, heard = crosses[layer - 1], []
    hook = cross.register_forward_pre_hook(lambda module, given: heard.append(given[0]))
    source = torch.tensor([request.source])
    with torch.no_grad():
        model(torch.tensor([[*request.prompt, *tokens]]), source=source)
        hook.remove()
        keys = cross.key_value(model.encode(source)).view(1, -1, 2, cross.num_kv_heads, cross.head_dim)[0, :, 0]
        queries = cross.query(heard[0]).view(-1, cross.num_heads, cross.head_dim)
        scores = torch.einsum("lhd,khd->hlk", queries, keys) / math.sqrt(cross.head_dim)
    return scores.softmax(-1)


def covered(weights: torch.Tensor) -> float:
    """Sum over source positions of log(min(attention received, 1)); weights [length, source]."""
    return float(weights.sum(0).clamp(max=1).log().sum())


def check_coverage(beta: float, head: int | None = None, layer: int = 1) -> None:
    vocab, limit = 5, 4
    model = model_of("encoder-decoder", ["attention", "gru"], vocab)
    for request in requests_of("encoder-decoder", 2, limit, vocab, seed=4):
        others = [token for token in range(vocab) if token != EOS]
        expected = []
        for length in range(limit):
            for tokens in itertools.product(others, repeat=length):
                weights = attention(model, request, list(tokens), layer)
                mean = weights.mean(0) if head is None else weights[head - 1]
                with torch.no_grad():
                    hidden = model(torch.tensor([[BOS, *tokens]]), source=torch.tensor([request.source]))
                    total = torch.log_softmax(model.head(hidden), -1)[0].gather(1, torch.tensor([[*tokens, EOS]]).T)
                score = float(total.sum()) / length_penalty(length + 1, 0.6) + beta * covered(mean)
                expected.append((score, list(tokens)))
        expected.sort(key=lambda pair: -pair[0])
        more = {} if head is None else {"alignment_head": head, "alignment_layer": layer}
        found = run(model, [request], beam_size=320, n_best=8, coverage_penalty=beta, **more)[0]
        assert [one.tokens for one in found] == [tokens for _, tokens in expected[:8]]
        assert all(close(one.score, score) for one, (score, _) in zip(found, expected, strict=False))


@pytest.mark.parametrize("beta", [0.2, 2.0])
def test_a_wide_beam_with_coverage_is_exact(beta: float) -> None:
    check_coverage(beta)


def test_one_head_of_one_layer() -> None:
    check_coverage(1.0, head=2, layer=2)


def test_planted_coverage_without_the_last_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: attention at the step of end-of-sequence is forgotten (the first step's is counted twice instead)."""
    right = beam_module._finish

    def wrong(finished: object, live: beam_module._Live, *more: object) -> object:
        return right(finished, beam_module.replace(live, attended=live.attended * 0.5), *more)  # type: ignore[arg-type]

    monkeypatch.setattr(beam_module, "_finish", wrong)
    with pytest.raises(AssertionError):
        check_coverage(2.0)


@pytest.mark.parametrize("mixer", ["attention", "retention", "lstm"])
def test_coverage_in_a_batch_is_coverage_alone(mixer: str) -> None:
    model = model_of("encoder-decoder", mixer)
    config = DecodingConfig(beam_size=3, n_best=2, coverage_penalty=0.4)
    requests = requests_of("encoder-decoder", 10)
    for either in (model, Ensemble([model, model_of("encoder-decoder", mixer, num_heads=4)])):
        report = compare_with_single(either, requests, config, eos=EOS, pad=PAD, dtype=torch.float64)
        assert report.disagreements == [], str(report)
        together, alone = (decode(either, part, config, eos=EOS, pad=PAD) for part in (requests, requests[3:4]))
        assert close(together[3][0].score, alone[0][0].score)


def test_coverage_when_the_longest_source_leaves_first() -> None:
    model = model_of("encoder-decoder", "attention")
    requests = [Request([BOS], limit, source=[*range(3, 3 + n), EOS]) for n, limit in ((9, 1), (4, 8), (6, 3), (0, 8))]
    config = DecodingConfig(beam_size=3, n_best=3, coverage_penalty=0.7)
    together = decode(model, requests, config, eos=EOS, pad=PAD)
    for request, outputs in zip(requests, together, strict=True):
        alone = decode(model, [request], config, eos=EOS, pad=PAD)[0]
        assert [one.tokens for one in outputs] == [one.tokens for one in alone]
        assert all(close(one.score, other.score) for one, other in zip(outputs, alone, strict=True))


def test_what_coverage_cannot_do() -> None:
    request = requests_of("decoder-only", 1)
    with pytest.raises(CapabilityError, match="coverage_penalty counts cross-attention, which only an encoder-decoder"):
        run(model_of("decoder-only", "attention"), request, coverage_penalty=0.1)
    model, request = model_of("encoder-decoder", "attention"), requests_of("encoder-decoder", 1)
    with pytest.raises(ConfigError, match=r"alignment_layer=3: this model's decoder has the layers 1 to 2"):
        run(model, request, coverage_penalty=0.1, alignment_layer=3)
    with pytest.raises(ConfigError, match=r"alignment_head=3: this layer has the heads 1 to 2"):
        run(model, request, coverage_penalty=0.1, alignment_head=3)


# Diverse beams


def diverse_by_hand(
    model: TinyModel, request: Request, groups: int, width: int, penalty: float, alpha: float
) -> list[tuple[float, tuple[int, ...]]]:
    """The best finished output of each group: prefixes in dictionaries, every distribution from scratch."""

    def following(tokens: tuple[int, ...]) -> list[float]:
        logits, _ = model.prefill(torch.tensor([[*request.prompt, *tokens]]), source=torch.tensor([request.source]))
        return torch.log_softmax(logits[0], -1).tolist()

    live: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())] for _ in range(groups)]
    ended: list[list[tuple[float, tuple[int, ...]]]] = [[] for _ in range(groups)]
    for length in range(1, request.limit + 1):
        used: Counter[int] = Counter()
        for group in range(groups):
            options = []
            for total, tokens in live[group]:
                for token, gain in enumerate(following(tokens)):
                    options.append((total + gain - penalty * used[token], total + gain, tokens, token))
            options.sort(key=lambda option: -option[0])
            for _, total, tokens, token in options[:width]:
                if token == EOS:
                    ended[group].append((total / length_penalty(length, alpha), tokens))
            going_on = [option for option in options if option[3] != EOS][:width]
            live[group] = [(total, (*tokens, token)) for _, total, tokens, token in going_on]
            used.update(option[3] for option in going_on)
    return [max(finished) for finished in ended if finished]


@pytest.mark.parametrize(("groups", "width", "penalty"), [(2, 1, 1.0), (3, 2, 0.5), (4, 1, 5.0), (2, 3, 0.0)])
def test_groups_are_those_of_the_algorithm(groups: int, width: int, penalty: float) -> None:
    model = TinyModel(vocab=7, seed=3, scale=1.0, eos_bias=1.0)
    requests = random_requests(5, seed=2, vocab=7, limit=6)
    settings = {"beam_size": groups * width, "beam_groups": groups, "diversity_penalty": penalty, "n_best": groups}
    for request, outputs in zip(requests, run(model, requests, **settings), strict=True):
        expected = dict(
            sorted((tokens, score) for score, tokens in diverse_by_hand(model, request, groups, width, penalty, 0.6))
        )
        finished = [one for one in outputs if one.finished]
        scores = {tuple(one.tokens): one.score for one in finished}
        assert set(scores) >= set(expected)  # where groups agree, their second outputs take the places
        assert all(close(scores[tokens], score) for tokens, score in expected.items())
        for one in outputs:
            tokens = one.tokens + [EOS] * one.finished
            assert close(one.log_probability, model.log_probability(request, tokens)), "the penalty is in no score"


def test_one_group_is_a_beam_and_a_penalty_brings_other_outputs() -> None:
    model = TinyModel(seed=1, scale=1.5)
    requests = random_requests(15, seed=1)

    def different(**settings: object) -> int:
        outputs = run(model, requests, beam_size=6, n_best=3, **settings)
        return sum(len({one.tokens[0] for one in found if one.tokens}) for found in outputs)

    assert different(beam_groups=3, diversity_penalty=4.0) > different()
    plain, grouped = (run(model, requests, beam_size=6, n_best=3, beam_groups=1, diversity_penalty=p) for p in (0, 9))
    assert plain == grouped


@pytest.mark.parametrize("mixer", ["attention", "retention", "gru"])
def test_groups_in_a_batch_are_groups_alone(mixer: str) -> None:
    model = model_of("encoder-decoder", mixer)
    requests = requests_of("encoder-decoder", 10)
    config = DecodingConfig(beam_size=4, beam_groups=2, n_best=4, coverage_penalty=0.1, no_repeat_ngram=3)
    together = decode(model, requests, config, eos=EOS, pad=PAD)
    for request, outputs in zip(requests, together, strict=True):
        alone = decode(model, [request], config, eos=EOS, pad=PAD)[0]
        assert [(one.tokens, one.finished, one.acted) for one in outputs] == [
            (one.tokens, one.finished, one.acted) for one in alone
        ]


def test_groups_must_divide_the_beam() -> None:
    with pytest.raises(ConfigError, match=r"beam_size=4 is no multiple of decoding\.beam_groups=3"):
        run(TinyModel(), random_requests(1), beam_groups=3)
