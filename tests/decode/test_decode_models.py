"""Decoding over the real models: every mixer and layout through prefill, step and State alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoding_model import BOS, EOS, PAD

from trilemma.config import DecodingConfig
from trilemma.decode import Request, compare_with_single, decode, length_penalty
from trilemma.measure.forced import forced_nats
from trilemma.models import SequenceModel, build_model

VOCAB = 24
MIXERS: list[Any] = [
    "attention",
    {"name": "attention", "window": 4},
    "retention",
    "lstm",
    "gru",
    ["attention", "retention"],
]
LAYOUTS = ["encoder-decoder", "decoder-only", "prefix"]
# only full attention can read a prefix in both directions
CASES = [(layout, mixer) for layout in LAYOUTS for mixer in MIXERS if layout != "prefix" or mixer == "attention"]
cases = pytest.mark.parametrize(("layout", "mixer"), CASES, ids=str)


def model_of(
    layout: str, mixer: Any, vocab: int = VOCAB, dtype: torch.dtype = torch.float64, **more: Any
) -> SequenceModel:
    """Random weights, sharpened so that decisions are clear and end-of-sequence comes."""
    torch.manual_seed(11)
    config = {
        "layout": "decoder-only" if layout == "prefix" else layout,
        "prefix": layout == "prefix",
        "vocab_size": vocab,
        "d_model": 16,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "mixer": mixer,
        "encoder_mixer": "attention" if layout == "encoder-decoder" else None,
        "dropout": 0.0,
        "tie_embeddings": False,  # tied random weights repeat their input
        **more,
    }
    model = build_model(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.4)
    return model


def requests_of(layout: str, count: int, limit: int = 10, vocab: int = VOCAB, seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for index in range(count):
        length = int(torch.randint(0, 9, (1,), generator=generator))
        tokens = torch.randint(3, vocab, (length,), generator=generator).tolist()
        if layout == "encoder-decoder":
            requests.append(Request([BOS], limit, source=[*tokens, EOS], index=index))
        else:
            prompt = [BOS, *tokens, 4]
            prefix = len(prompt) if layout == "prefix" else None
            requests.append(Request(prompt, limit, prefix=prefix, index=index))
    return requests


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
@cases
def test_batch_mates_do_not_matter(layout: str, mixer: Any, method: str) -> None:
    model = model_of(layout, mixer)
    config = DecodingConfig.model_validate({"method": method, "beam_size": 3, "batch_tokens": 10_000})
    requests = requests_of(layout, 10)
    report = compare_with_single(model, requests, config, eos=EOS, pad=PAD, dtype=torch.float64)
    assert report.disagreements == [], str(report)
    outputs = decode(model, requests, config, eos=EOS, pad=PAD)
    assert len({tuple(output[0].tokens) for output in outputs}) > 2, "a model that says one thing shows nothing"


@cases
def test_scores_are_those_of_forced_decoding(layout: str, mixer: Any) -> None:
    """What steps through State add up to is what one pass over the whole sequence says."""
    model = model_of(layout, mixer)
    requests = requests_of(layout, 6)
    config = DecodingConfig(beam_size=4, n_best=4)
    contexts, targets, found = [], [], []
    for request, outputs in zip(requests, decode(model, requests, config, eos=EOS, pad=PAD), strict=True):
        for output in outputs:
            contexts.append(request)
            targets.append(output.tokens + [EOS] * output.finished)
            found.append(output.log_probability)
    nats = forced_nats(model, contexts, targets, pad=PAD)
    np.testing.assert_allclose(found, -nats, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wide_beam_is_exact(layout: str) -> None:
    vocab, limit = 6, 3
    model = model_of(layout, "attention", vocab)
    others = [token for token in range(vocab) if token != EOS]
    outputs = [list(tokens) for length in range(limit) for tokens in itertools.product(others, repeat=length)]
    for request in requests_of(layout, 3, limit, vocab):
        targets = [[*tokens, EOS] for tokens in outputs]
        nats = forced_nats(model, [request] * len(targets), targets, pad=PAD)
        scores = [-n / length_penalty(len(target), 0.6) for n, target in zip(nats, targets, strict=True)]
        order = sorted(range(len(outputs)), key=lambda i: -scores[i])[:5]
        config = DecodingConfig(beam_size=200, n_best=5)
        found = decode(model, [request], config, eos=EOS, pad=PAD)[0]
        assert [output.tokens for output in found] == [outputs[i] for i in order]


@pytest.mark.parametrize("mixer", ["attention", "retention", "lstm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_below_float64_differences_are_near_ties(mixer: str, dtype: torch.dtype) -> None:
    model = model_of("encoder-decoder", mixer, dtype=dtype)
    requests = requests_of("encoder-decoder", 24)
    for method in ("greedy", "beam"):
        config = DecodingConfig.model_validate({"method": method})
        report = compare_with_single(model, requests, config, eos=EOS, pad=PAD, dtype=dtype)
        assert report.holds, str(report)


def test_learned_positions_end_where_they_end() -> None:
    """A request may use the last position, and no row is stepped beyond its own limit."""
    positions = 12
    model = model_of("decoder-only", "attention", positions="learned", max_length=positions)
    requests = [Request([BOS, *[5] * n, 4], positions - n - 1, index=n) for n in (1, 4, 9)]
    for method in ("greedy", "beam", "sample"):
        config = DecodingConfig.model_validate({"method": method})
        outputs = decode(model, requests, config, eos=EOS, pad=PAD)
        assert all(outputs)


def test_forced_decoding_does_not_depend_on_the_batch() -> None:
    model = model_of("encoder-decoder", "attention")
    requests = requests_of("encoder-decoder", 12)
    targets = [[*range(3, 3 + index), EOS] for index in range(12)]
    together = forced_nats(model, requests, targets, pad=PAD, batch_tokens=100_000)
    alone = forced_nats(model, requests, targets, pad=PAD, batch_tokens=1)
    np.testing.assert_allclose(together, alone, rtol=1e-12)
