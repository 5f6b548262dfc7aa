"""Packed and 8-bit weights: the same results as the plain form, for every mixer, whole and in steps."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilemma.errors import CapabilityError, ConfigError
from trilemma.machine import Ceilings
from trilemma.measure import cost
from trilemma.models import SequenceModel, build_model, pack, packing, products, quantize
from trilemma.nn import linear
from trilemma.nn.linear import Int8Linear, PackedInt8Linear, PackedLinear, quantize_rows, quantize_rows_naive
from trilemma.registry import available_mixers, mixer_class
from trilemma.runs.tensors import model_tensors
from trilemma.train import train

VOCABULARY = 101
LIMITS = Ceilings("cpu", 100.0, 100.0, [[1, 10.0]], 1.0, 1.0)
CAUSAL = [name for name in available_mixers() if mixer_class(name).capabilities.causal and name != "yoco"]


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise only large ones are packed."""
    monkeypatch.setattr(packing, "_SMALLEST", 0)
    assert linear.packs(), "this build of torch packs no weights"


def model_of(mixer: Any, layout: str = "decoder-only", **changes: Any) -> SequenceModel:
    torch.manual_seed(3)
    values = {"layout": layout, "vocab_size": VOCABULARY, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 2}
    model = build_model({**values, "dropout": 0.0, "mixer": mixer, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@torch.no_grad()
def read(model: SequenceModel, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Logits of whole sequences, and of the same in steps [rows, 6, V]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (3, 7), generator=generator)[:rows]
    given = {"source": ids} if model.layout == "encoder-decoder" else {}
    whole = model.head(model(ids, **given))
    last, state = model.prefill(ids[:, :3], **given)
    steps = [last]
    for position in range(3, 7):
        logits, state = model.step(ids[:, position : position + 1], state)
        steps.append(logits[:, -1])
    return whole[:, 2:], torch.stack(steps, dim=1)


def share(one: Tensor, other: Tensor) -> float:
    """The difference as a share of the whole."""
    return float((one - other).float().norm() / other.float().norm())


@pytest.mark.parametrize("mixer", CAUSAL)
def test_packed_weights_give_the_same_results(mixer: str) -> None:
    model = model_of(mixer)
    expected = read(model)[0]
    packed = pack(copy.deepcopy(model))
    assert products(packed) == "packed-float32"
    for found in read(packed):
        assert share(found, expected) < 1e-5


@pytest.mark.parametrize("mixer", CAUSAL)
def test_eight_bits_give_nearly_the_same_and_both_forms_agree(mixer: str) -> None:
    model = model_of(mixer)
    expected = read(model)[0]
    coded = quantize(copy.deepcopy(model))
    assert (products(coded), coded.dtype) == ("int8", torch.float32)
    whole, steps = read(coded)
    assert share(whole, expected) < 0.1
    assert share(steps, whole) < 0.03  # a code may differ where the plain forms differ by rounding
    packed = pack(coded)
    assert products(packed) == "packed-int8"
    for found in read(packed):
        assert share(found, whole) < 0.03


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only"])
def test_heads_tied_or_not(layout: str, tied: bool) -> None:
    model = model_of("attention", layout, tie_embeddings=tied, logit_bias=True)
    counted = model.parameter_counts()
    expected = read(model)[0]
    for found in read(pack(copy.deepcopy(model))):
        assert share(found, expected) < 1e-5
    coded = quantize(model)
    assert coded.parameter_counts() == counted
    names = model_tensors(coded)
    assert not any(name.startswith("output.") for name in names)
    assert ("projection.codes" in names) != tied  # of a tied head the table's own codes are kept once
    assert share(read(pack(coded))[0], expected) < 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_packing_changes_neither_counts_nor_the_bytes_that_a_step_reads(tied: bool) -> None:
    """A tied table is packed beside itself: it must not count twice."""
    plain = model_of("attention", tie_embeddings=tied, logit_bias=True)
    ids = torch.zeros(1, 1, dtype=torch.long)
    for model in (plain, quantize(copy.deepcopy(plain))):
        found = []
        for one in (copy.deepcopy(model), pack(model)):
            with torch.no_grad():
                state = one.prefill(ids)[1]
                read = cost.parameter_bytes_read(one, functools.partial(one.step, ids, state))
            found.append((one.parameter_counts(), read))
        assert found[0] == found[1]


def test_costs_of_weights_that_cannot_be_copied_or_trained() -> None:
    packed = pack(model_of("attention"))
    rows = cost.measure_decode(packed, [4], new_tokens=1, repeats=1, limits=LIMITS)
    assert rows[0]["path"] == "plain/cpu/packed-float32"
    with pytest.raises(CapabilityError, match=r"the weights are packed-float32: they cannot be measured as torch.bf"):
        cost.measure_decode(packed, [4], dtype=torch.bfloat16, limits=LIMITS)
    for model in (packed, quantize(model_of("attention"))):
        with pytest.raises(CapabilityError, match="for inference only: their training has no cost"):
            cost.measure_training(model, limits=LIMITS)


def test_a_masked_language_model_and_a_classifier() -> None:
    ids = torch.randint(0, VOCABULARY, (2, 5))
    for changes in ({}, {"num_labels": 40}, {"head_transform": True}):
        model = model_of("attention", "encoder-only", **changes)
        with torch.no_grad():
            expected = model.head(model(ids))
            assert share(*(one.head(one(ids)) for one in (pack(copy.deepcopy(model)), model))) < 1e-5
            coded = pack(quantize(model))
            assert share(coded.head(coded(ids)), expected) < 0.1


def test_bfloat16_is_packed_and_float64_is_not() -> None:
    model = model_of("attention")
    wide = read(model)[0]
    halved = pack(copy.deepcopy(model).bfloat16())
    assert products(halved) == "packed-bfloat16"
    assert share(read(halved)[0], wide) < 0.05
    assert products(pack(model.double())) == "float64"
    with torch.no_grad():
        assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_batch_mates_do_not_matter_in_eight_bits() -> None:
    """Sums of codes are exact and every row has its own scale: bit for bit, not nearly."""
    layer = Int8Linear.of(nn.Linear(64, 48), torch.randn(48)).packed()
    rows = torch.randn(9, 64) * torch.logspace(-3, 3, 9)[:, None]
    together = layer(rows)
    for at in range(len(rows)):
        assert torch.equal(layer(rows[at : at + 1]), together[at : at + 1])


def test_codes_are_the_nearest_and_rows_of_zeros_stay_zero() -> None:
    x = torch.randn(5, 33) * 10
    x[2] = 0
    for found, expected in zip(quantize_rows(x), quantize_rows_naive(x), strict=True):
        assert torch.equal(found, expected.to(found.dtype))
    codes, scale = quantize_rows(x)
    assert int(codes.abs().max()) == 127
    assert float((codes * scale - x).abs().max() / scale.max()) <= 0.5 + 1e-5


@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 64), (0, 64), (2, 0, 64)])
@pytest.mark.parametrize("biased", [True, False])
def test_shapes_of_calls(shape: tuple[int, ...], biased: bool) -> None:
    plain = nn.Linear(64, 40, bias=biased)
    coded = Int8Linear.of(plain, plain.bias)
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.allclose(PackedLinear(plain.weight, plain.bias)(x), plain(x), atol=1e-5)
        assert coded.packed()(x).shape == plain(x).shape
        assert torch.allclose(coded.packed()(x), coded(x), atol=1e-4)
        assert torch.allclose(coded(x), plain(x), atol=0.1)


def test_what_is_no_number_stays_none() -> None:
    layer = Int8Linear.of(nn.Linear(64, 40), None).packed()
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    found = layer(x)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_a_kernel_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedInt8Linear, "forward", lambda self, x: torch.zeros(*x.shape[:-1], self.out_features))
    linear.packs.cache_clear()
    try:
        assert not linear.packs()
        model = model_of("attention")
        assert products(pack(copy.deepcopy(model))) == "float32"
        assert products(pack(quantize(model))) == "int8"
    finally:
        linear.packs.cache_clear()


def test_refusals() -> None:
    with pytest.raises(CapabilityError, match="nothing to quantize: no layer of this model is 32 wide"):
        quantize(model_of("attention", d_model=16, d_ff=16))
    data = {"train": {"generated": "copy", "size": 10}}
    config = {"model": {"quantization": "int8"}, "data": data, "training": {"steps": 1}}
    with pytest.raises(ConfigError, match=r"model\.quantization is of trained weights"):
        train(config, quiet=True)
