"""Alignments: against attention written out, in every layout that has maps, and from tokens to words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_coverage_and_groups import attention
from test_decode_models import model_of, requests_of
from tiny_decoding_model import BOS, PAD

from trilemma.decode import Ensemble, Request
from trilemma.decode.alignment import source_attention, token_links, word_links, words_of_pieces, words_of_spans
from trilemma.errors import CapabilityError, ConfigError
from trilemma.models import SequenceModel

OUTPUTS = [[5, 9, 3], [7], [], [4, 4, 8, 6, 10]]


def weights(model: SequenceModel | Ensemble, requests: list[Request], **more: Any) -> list[torch.Tensor]:
    return source_attention(model, requests, OUTPUTS, pad=PAD, **more)


@pytest.mark.parametrize(("layer", "head"), [(None, None), (1, None), (2, None), (2, 1), (1, 2)])
@pytest.mark.parametrize("mixer", ["attention", "retention", "lstm"])
def test_weights_are_those_of_cross_attention(mixer: str, layer: int | None, head: int | None) -> None:
    model, requests = model_of("encoder-decoder", mixer), requests_of("encoder-decoder", 4)
    found = weights(model, requests, layer=layer, head=head)
    for request, output, matrix in zip(requests, OUTPUTS, found, strict=True):
        by_head = attention(model, request, output[:-1], layer or 1)  # of two layers the last but one is the first
        expected = by_head.mean(0) if head is None else by_head[head - 1]
        assert request.source is not None
        assert matrix.shape == (len(output), len(request.source) - 1)
        torch.testing.assert_close(matrix, expected[: len(output), :-1], rtol=1e-9, atol=1e-12)


def test_the_batch_changes_nothing_and_an_ensemble_is_the_mean() -> None:
    models = [model_of("encoder-decoder", "attention"), model_of("encoder-decoder", "gru", num_heads=4)]
    requests = requests_of("encoder-decoder", 4)
    one, two, both = (weights(either, requests) for either in (*models, Ensemble(models)))
    alone = weights(models[0], requests, batch_tokens=1)
    for first, second, mean, single in zip(one, two, both, alone, strict=True):
        torch.testing.assert_close(mean, (first + second) / 2)
        torch.testing.assert_close(first, single, rtol=1e-9, atol=1e-12)


CAUSAL = [("decoder-only", mixer) for mixer in ("attention", "retention", "mamba2", "gated_deltanet")]


@pytest.mark.parametrize(("layout", "mixer"), [*CAUSAL, ("prefix", "attention")])
def test_decoder_only_models_align_by_their_mixing_matrices(layout: str, mixer: str) -> None:
    model, requests = model_of(layout, mixer), requests_of(layout, 4)
    alone = weights(model, requests, batch_tokens=1)
    for request, output, matrix, single in zip(requests, OUTPUTS, weights(model, requests), alone, strict=True):
        assert matrix.shape == (len(output), len(request.prompt) - 2)
        assert (matrix >= 0).all()
        assert not output or matrix.numel() == 0 or matrix.max() > 0
        torch.testing.assert_close(matrix, single, rtol=1e-7, atol=1e-10)


def test_what_has_no_map() -> None:
    with pytest.raises(CapabilityError, match='a layer of "lstm" has no map from token to token'):
        weights(model_of("decoder-only", "lstm"), requests_of("decoder-only", 4))
    hybrid = model_of("decoder-only", ["lstm", "attention"])
    assert weights(hybrid, requests_of("decoder-only", 4), layer=2)
    with pytest.raises(ConfigError, match=r"alignment_layer=3: .* the layers 1 to 2"):
        weights(hybrid, requests_of("decoder-only", 4), layer=3)
    with pytest.raises(ConfigError, match=r"alignment_head=3: .* the heads 1 to 2"):
        weights(hybrid, requests_of("decoder-only", 4), layer=2, head=3)


def test_nothing_to_align() -> None:
    model = model_of("encoder-decoder", "attention")
    (only_end,) = source_attention(model, [Request([BOS], 5, source=[2])], [[5, 6]], pad=PAD)
    assert only_end.shape == (2, 0)
    assert token_links(only_end) == []
    assert source_attention(model, [], [], pad=PAD) == []


def test_links() -> None:
    matrix = torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.2, 0.2], [0.0, 0.3, 0.7], [0.2, 0.3, 0.5]])
    assert token_links(matrix) == [(1, 0), (0, 1), (2, 2), (2, 3)]
    # source words: [0, 1, 1]; the first output word is two tokens, one token of the output is white space
    assert word_links(matrix, [0, 1, 1], [0, 0, 1, None]) == [(1, 0), (1, 1)]
    assert word_links(matrix[:2], [0, 1, None], [0, 1]) == [(1, 0), (0, 1)]
    assert word_links(matrix[:0], [0, 1, 1], []) == []


def test_words_of_tokens() -> None:
    assert words_of_spans("ab  cd e", [(0, 1), (1, 2), (2, 3), (2, 6), (6, 8)]) == [0, 0, None, 1, 2]
    assert words_of_spans("", []) == []
    assert words_of_pieces(["", "Ein", "Ein Hu", "Ein Hund", "Ein Hund "]) == [None, 0, 1, 1, 1]
