"""Vectors of texts and calibrated probabilities: against their definitions, in every layout, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trilemma.config import RunConfig, TokenizerConfig, parse
from trilemma.data import train_tokenizer
from trilemma.errors import CapabilityError, ConfigError, LengthError, TrilemmaError
from trilemma.measure.calibration import at_temperature, calibration_error, fit_temperature
from trilemma.models import build_model
from trilemma.predictor import Predictor
from trilemma.registry import available_mixers, mixer_class

TASKS = {
    "encoder-only": "masked-language-model",
    "encoder-decoder": "seq2seq",
    "decoder-only": "language-model",
}


def reader(layout: str = "encoder-only", task: str | None = None, **model: Any) -> Predictor:
    torch.manual_seed(4)
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 262}
    data = {"task": task or TASKS[layout], "labels": ["no", "yes"] if task == "classification" else None}
    config = parse(RunConfig, {"model": {"layout": layout, **sizes, **model}, "data": data})
    network = build_model(config.model).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return Predictor(network, train_tokenizer([], TokenizerConfig(kind="byte")), config)


LINES = ["a longer line of text", "", "x", "five", "another longer line of it"]


@pytest.mark.parametrize("layout", list(TASKS))
@pytest.mark.parametrize("mixer", ["attention", "gru"])
def test_a_mean_is_the_mean_of_the_tokens_in_their_order(layout: str, mixer: str) -> None:
    ours = reader(layout, mixer=mixer)
    found = ours.embed(LINES)
    for line, vector in zip(LINES, found, strict=True):
        ids = ours.tokenizer.encode(line)
        row = {
            "encoder-only": [ours.tokenizer.bos, *ids, ours.tokenizer.eos],
            "encoder-decoder": [*ids, ours.tokenizer.eos],
            "decoder-only": [ours.tokenizer.bos, *ids],
        }[layout]
        with torch.no_grad():
            alone = ours.model.encode(torch.tensor([row]))[0]
        np.testing.assert_allclose(vector, alone.mean(0).numpy(), rtol=1e-12, atol=1e-12)
    assert np.linalg.norm(found[1]) > 0.1  # the special tokens of an empty line


def test_the_vectors_are_those_that_the_head_reads() -> None:
    ours = reader(num_labels=2, task="classification", mixer="retention")
    ids = [ours.tokenizer.bos, *ours.tokenizer.encode("text"), ours.tokenizer.eos]
    with torch.no_grad():
        pooled = ours.model(torch.tensor([ids]))
    np.testing.assert_allclose(ours.embed(["text"]), pooled.numpy(), rtol=1e-12)


def test_first_last_and_length_one() -> None:
    encoder, decoder = reader(), reader("decoder-only")
    with torch.no_grad():
        hidden = encoder.model.encode(torch.tensor([[encoder.tokenizer.bos, 70, encoder.tokenizer.eos]]))[0]
        causal = decoder.model.encode(torch.tensor([[decoder.tokenizer.bos, 70]]))[0]
    text = encoder.tokenizer.decode([70])
    np.testing.assert_allclose(encoder.embed([text, *LINES], "cls")[0], hidden[0].numpy(), rtol=1e-12)
    np.testing.assert_allclose(decoder.embed([text, *LINES], "last")[0], causal[-1].numpy(), rtol=1e-12)
    unit = encoder.embed(LINES, normalise=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, rtol=1e-12)
    plain = encoder.embed(LINES)
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-12)
    assert encoder.embed([]).shape == (0, 16)


def test_a_prefix_model_reads_in_both_directions() -> None:
    ours = reader("decoder-only", task="seq2seq", prefix=True)
    row = [ours.tokenizer.bos, *ours.tokenizer.encode("ab"), ours.tokenizer.sep]
    with torch.no_grad():
        whole = ours.model(torch.tensor([row]), prefix=torch.tensor([len(row)]))
    np.testing.assert_allclose(ours.embed(["x" * 9, "ab"])[1], whole[0].mean(0).numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("layout", "pooling", "error", "message"),
    [
        ("encoder-only", "average", ConfigError, 'unknown pooling "average"; valid: cls, last, mean'),
        ("encoder-only", "last", CapabilityError, "pooling last is for decoder-only models; this one is encoder-only"),
        ("encoder-decoder", "cls", CapabilityError, "pooling cls is for encoder-only models"),
        ("decoder-only", "cls", CapabilityError, "pooling cls is for encoder-only models"),
    ],
)
def test_poolings_that_are_refused(layout: str, pooling: Any, error: type[TrilemmaError], message: str) -> None:
    with pytest.raises(error, match=message):
        reader(layout).embed([], pooling)


def test_too_long_and_no_text() -> None:
    ours = reader(positions="learned", max_length=6)
    assert ours.embed(["four"]).shape == (1, 16)
    with pytest.raises(LengthError, match=r"line 9: 7 tokens, special ones counted, more than model.max_length = 6"):
        ours.embed(["four", "fiver"], first_line=8)
    with pytest.raises(CapabilityError, match="a probe's run reads no text"):
        reader("decoder-only", task="probe").embed([])


def test_bert_with_the_same_weights_gives_the_same_vectors() -> None:
    """transformers' BertModel, mean over its attention mask, as sentence-transformers pools it."""
    transformers = pytest.importorskip("transformers")
    ours = reader(
        positions="learned", max_length=40, embedding_scale=False, embedding_norm=True, norm_position="post",
        activation="gelu", token_types=2, norm_epsilon=1e-12,
    )  # fmt: skip
    config = transformers.BertConfig(
        vocab_size=262, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40,
    )  # fmt: skip
    bert = transformers.BertModel(config, add_pooling_layer=False).double().eval()
    _copy_bert(bert, ours.model)
    rows = [[ours.tokenizer.bos, *ids, ours.tokenizer.eos] for ids in ours.tokenizer.encode_batch(LINES)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        hidden = bert(ids, attention_mask=mask).last_hidden_state
    wanted = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    np.testing.assert_allclose(ours.embed(LINES), wanted.numpy(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.embed(LINES, "cls"), hidden[:, 0].numpy(), rtol=1e-9, atol=1e-9)
    np.testing.assert_raises(AssertionError, np.testing.assert_allclose, ours.embed(LINES), hidden.mean(1).numpy())


@torch.no_grad()
def _copy_bert(bert: Any, model: Any) -> None:
    """Gives BERT our weights."""

    def take(target: nn.Module, source: nn.Module) -> None:
        for name, parameter in target.named_parameters():
            parameter.copy_(source.get_parameter(name))

    take(bert.embeddings.word_embeddings, model.embedding.tokens)
    take(bert.embeddings.position_embeddings, model.embedding.learned)
    take(bert.embeddings.token_type_embeddings, model.embedding.types)
    take(bert.embeddings.LayerNorm, model.embedding.norm)
    for layer, block in zip(bert.encoder.layer, model.stack.blocks, strict=True):
        attention, feed_forward = block.parts
        parts = [layer.attention.self.query, layer.attention.self.key, layer.attention.self.value]
        for part, weight, bias in zip(
            parts, attention.part.qkv.weight.chunk(3), attention.part.qkv.bias.chunk(3), strict=True
        ):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        take(layer.attention.output.dense, attention.part.out)
        take(layer.attention.output.LayerNorm, attention.norm)
        take(layer.intermediate.dense, feed_forward.part.up)
        take(layer.output.dense, feed_forward.part.down)
        take(layer.output.LayerNorm, feed_forward.norm)


# Calibration


def drawn(temperature: float, count: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of a model whose logits are `temperature` times too large, and labels of the true chances."""
    generator = np.random.default_rng(5)
    logits = generator.normal(size=(count, 3)) * 1.5
    truth = at_temperature(logits, 1.0)
    labels = (generator.random((count, 1)) > np.exp(truth).cumsum(1)).sum(1)
    return at_temperature(logits * temperature, 1.0), labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_found(temperature: float) -> None:
    found = fit_temperature(*drawn(temperature))
    assert found.temperature == pytest.approx(temperature, rel=0.03)
    assert found.error_after < 1.0
    if temperature != 1.0:
        assert found.error_before > 8.0
    assert found.loss_after <= found.loss_before + 1e-12
    assert json.loads(json.dumps(found.to_json()))["examples"] == 40_000


def test_it_is_the_lowest_cross_entropy() -> None:
    scores, labels = drawn(2.5, 500)
    best = fit_temperature(scores, labels)
    for factor in (0.99, 1.01):
        shifted = at_temperature(scores, best.temperature * factor)
        assert -shifted[np.arange(500), labels].mean() > best.loss_after


def test_a_split_without_mistakes_stops_at_the_bound() -> None:
    scores = np.log(np.array([[0.9, 0.1], [0.2, 0.8]]))
    assert fit_temperature(scores, [0, 1]).temperature == pytest.approx(0.05)
    assert fit_temperature(scores, [0, 1]).at_bound
    for margin in (1.0, 3.0, 10.0, 40.0):  # the slope is rounding long before the bound
        sure = np.array([[0.0, -margin], [-2 * margin, 0.0]])
        assert fit_temperature(sure - np.logaddexp.reduce(sure, axis=1, keepdims=True), [0, 1]).at_bound
    certain = np.array([[0.0, -np.inf], [-np.inf, 0.0]])
    assert np.isfinite(fit_temperature(certain, [0, 1]).loss_after)


def test_the_error_by_hand() -> None:
    shares = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.45, 0.55]]))
    # bins of a fifteenth: 0.9 twice (one right of two), 0.7 (right), 0.55 (wrong)
    wanted = 100 * (2 * abs(0.5 - 0.9) + abs(1 - 0.7) + abs(0 - 0.55)) / 4
    assert calibration_error(shares, [0, 1, 1, 0]) == pytest.approx(wanted)


def test_classify_divides_by_the_temperature() -> None:
    ours = reader(task="classification", num_labels=2)
    own = ours.classify(["text"])[0]
    ours.temperature = 2.0
    calm = ours.classify(["text"])[0]
    assert ours.classify(["text"], raw=True)[0] == own
    assert calm.label == own.label
    ratio = [found.probabilities["yes"] / found.probabilities["no"] for found in (own, calm)]
    assert ratio[1] == pytest.approx(ratio[0] ** 0.5)


# The wrapper `bidirectional` is what runs the causal ones here.
@pytest.mark.parametrize(
    "mixer",
    [
        name
        for name in available_mixers()
        if not mixer_class(name).capabilities.reads_memory and name != "bidirectional"
    ],
)
def test_every_mixer_reads_both_ways_and_batch_mates_do_not_matter(mixer: str) -> None:
    ours = reader(mixer=mixer)
    together = ours.embed(LINES)
    for line, vector in zip(LINES, together, strict=True):
        np.testing.assert_allclose(ours.embed([line])[0], vector, rtol=1e-7, atol=1e-9)
    one, other = ours.embed(["!", "?"], "cls")
    assert np.abs(one - other).max() > 1e-12, "the first token sees what follows"
