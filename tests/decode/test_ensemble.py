"""Several models as one: against averages written out, one prefix at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_decode_models import model_of, requests_of
from tiny_decoding_model import EOS, PAD, close

from trilemma.config import DecodingConfig
from trilemma.decode import Ensemble, Request, compare_with_single, decode
from trilemma.decode.ensemble import Average
from trilemma.measure.forced import forced_nats
from trilemma.models import SequenceModel

LAYOUTS = ["encoder-decoder", "decoder-only"]
AVERAGES: list[Average] = ["log-probability", "probability"]


def models_of(layout: str, **more: Any) -> list[SequenceModel]:
    """Of different mixers, widths and depths."""
    return [
        model_of(layout, "attention", **more),
        model_of(layout, "gru", d_model=24, num_layers=1, **more),
        model_of(layout, "retention", d_model=8, **more),
    ]


def averaged(models: list[SequenceModel], request: Request, tokens: list[int], average: Average) -> float:
    """Log-probability of `tokens`, from the equation."""
    total = 0.0
    for position, token in enumerate(tokens):
        inputs = torch.tensor([request.prompt + tokens[:position]])
        given = {} if request.source is None else {"source": torch.tensor([request.source])}
        with torch.no_grad():
            parts = [torch.softmax(model.head(model(inputs, **given))[0, -1], -1) for model in models]
        if average == "probability":
            mixed = sum(parts) / len(parts)
        else:
            mixed = torch.stack(parts).log().mean(0).exp()
            mixed = mixed / mixed.sum()
        total += math.log(float(mixed[token]))
    return total


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_have_the_averaged_probability(layout: str, average: Average) -> None:
    models = models_of(layout)
    ensemble = Ensemble(models, average)
    requests = requests_of(layout, 6)
    outputs = decode(ensemble, requests, DecodingConfig(n_best=2), eos=EOS, pad=PAD)
    for request, found in zip(requests, outputs, strict=True):
        for one in found:
            tokens = one.tokens + [EOS] * one.finished
            expected = averaged(models, request, tokens, average)
            assert close(one.log_probability, expected)
            assert close(-float(forced_nats(ensemble, [request], [tokens], pad=PAD)[0]), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_takes_the_best_of_the_average(layout: str) -> None:
    models = models_of(layout)
    (request,) = requests_of(layout, 1, limit=4)
    best = decode(Ensemble(models), [request], DecodingConfig(method="greedy"), eos=EOS, pad=PAD)[0][0]
    tokens: list[int] = []
    while len(tokens) < request.limit and (not tokens or tokens[-1] != EOS):
        options = [averaged(models, request, [*tokens, token], "log-probability") for token in range(24)]
        tokens.append(options.index(max(options)))
    assert best.tokens + [EOS] * best.finished == tokens


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_mates_do_not_matter(layout: str, method: str) -> None:
    config = DecodingConfig.model_validate({"method": method, "beam_size": 3})
    report = compare_with_single(
        Ensemble(models_of(layout)), requests_of(layout, 10), config, eos=EOS, pad=PAD, dtype=torch.float64
    )
    assert report.disagreements == [], str(report)


@pytest.mark.parametrize("average", AVERAGES)
def test_twice_the_same_is_the_same(average: Average) -> None:
    model = model_of("encoder-decoder", "attention")
    requests = requests_of("encoder-decoder", 8)
    one, two = (
        decode(either, requests, DecodingConfig(), eos=EOS, pad=PAD)
        for either in (model, Ensemble([model] * 2, average))
    )
    assert [found[0].tokens for found in one] == [found[0].tokens for found in two]


def test_the_shortest_positions_bound_all() -> None:
    models = [model_of("decoder-only", "attention"), model_of("decoder-only", "gru", positions="learned", max_length=9)]
    assert Ensemble(models).config.max_length == 9
    assert Ensemble(models[:1]).config.max_length is None
