"""Packed, 8-bit and 4-bit weights: the same results as the plain form, for every mixer, whole and in steps."""

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
from trilemma.nn import kernels
from trilemma.nn.codes import quantize_rows, quantize_rows_naive
from trilemma.nn.linear import HeldInt8Linear, Int4Linear, Int8Linear, PackedInt8Linear, PackedLinear
from trilemma.registry import available_mixers, mixer_class
from trilemma.runs.tensors import model_tensors
from trilemma.train import train

VOCABULARY = 101
LIMITS = Ceilings("cpu", 100.0, 100.0, [[1, 10.0]], 1.0, 1.0)
CAUSAL = [name for name in available_mixers() if mixer_class(name).capabilities.causal and name != "yoco"]


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise only large ones are packed."""
    monkeypatch.setattr(kernels, "_LEAST_WIDE", 0)
    monkeypatch.setattr(kernels, "_LEAST", 0)
    assert kernels.floats_pack(torch.float32), "this build of torch packs no weights"


CODES = "packed-int8" if kernels.codes_pack() else "int8-in-float32"  # by this processor


def ready(layer: Int8Linear) -> PackedInt8Linear | HeldInt8Linear:
    """As `pack` makes it on this machine."""
    return layer.packed() if CODES == "packed-int8" else layer.held()


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
    assert products(packed) == CODES
    for found in read(packed):
        assert share(found, whole) < 0.03


@pytest.mark.parametrize("mixer", CAUSAL)
def test_codes_kept_as_float32_give_the_plain_form_s_results(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "codes_pack", lambda: False)
    coded = quantize(model_of(mixer))
    whole = read(coded)[0]
    for least in (0, 1 << 30):  # its float32 products packed, and not
        monkeypatch.setattr(packing, "least_packed", lambda dtype, least=least: least)
        held = pack(copy.deepcopy(coded))
        assert products(held) == "int8-in-float32"
        for found in read(held):
            assert share(found, whole) < 0.03


@pytest.mark.parametrize("mixer", CAUSAL)
def test_four_bits_are_what_their_codes_stand_for(mixer: str) -> None:
    model = model_of(mixer)
    expected = read(model)[0]
    coded = quantize(copy.deepcopy(model), "int4")
    assert (products(coded), coded.dtype) == ("int4", torch.float32)
    assert coded.parameter_counts() == model.parameter_counts()
    whole, steps = read(coded)
    assert 0.001 < share(whole, expected) < 0.3
    assert share(steps, whole) < 0.03  # the head's inputs are coded in 8 bits
    held = pack(coded)
    assert products(held) == "int4-in-float32"
    for found in read(held):
        assert share(found, whole) < 0.03


def test_what_four_bits_do_not_fit_is_in_eight() -> None:
    model = quantize(model_of("attention", d_ff=72, tie_embeddings=False), "int4")
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert [kind for name, kind in kinds.items() if name.endswith(".down")] == [Int8Linear] * 2
    assert [kind for name, kind in kinds.items() if name.endswith(".up")] == [Int4Linear] * 2
    assert kinds["projection"] is Int8Linear


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
    for model in (plain, quantize(copy.deepcopy(plain))):
        counts, packed = model.parameter_counts(), pack(copy.deepcopy(model))
        assert packed.parameter_counts() == counts
        if products(packed) != "int8-in-float32":
            assert step_bytes(packed) == step_bytes(model)


def test_codes_kept_as_float32_are_read_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "codes_pack", lambda: False)
    model = model_of("attention", bias=False)
    held = pack(quantize(copy.deepcopy(model)))
    assert step_bytes(held) == step_bytes(model)  # four bytes a weight; scales are no parameters


def step_bytes(model: SequenceModel) -> int:
    """Bytes of weights that one step of one row reads."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        state = model.prefill(ids)[1]
        return cost.parameter_bytes_read(model, functools.partial(model.step, ids, state))


def test_costs_of_weights_that_cannot_be_copied_or_trained() -> None:
    packed = pack(model_of("attention"))
    rows = cost.measure_decode(packed, [4], new_tokens=1, repeats=1, limits=LIMITS)
    assert rows[0]["path"] == "plain/cpu/packed-float32"
    with pytest.raises(CapabilityError, match=r"the weights are packed-float32: they cannot be measured as torch.bf"):
        cost.measure_decode(packed, [4], dtype=torch.bfloat16, limits=LIMITS)
    coded = quantize(model_of("attention"))
    for model in (packed, coded, pack(copy.deepcopy(coded))):
        with pytest.raises(CapabilityError, match="for inference only: their training has no cost"):
            cost.measure_training(model, limits=LIMITS)
    rows = cost.measure_decode(pack(coded), [4], new_tokens=1, repeats=1, limits=LIMITS)
    assert rows[0]["path"] == f"plain/cpu/{CODES}"


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
    assert products(halved) == ("packed-bfloat16" if kernels.floats_pack(torch.bfloat16) else "bfloat16")
    assert share(read(halved)[0], wide) < 0.05
    assert products(pack(model.double())) == "float64"
    with torch.no_grad():
        assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize("width", [64, 1024, 1025, 2500])
def test_batch_mates_do_not_matter_in_eight_bits(width: int) -> None:
    """Sums of codes are exact and every row has its own scale: bit for bit, not nearly."""
    layer = Int8Linear.of(nn.Linear(width, 48), torch.randn(48))
    rows = torch.randn(9, width) * torch.logspace(-3, 3, 9)[:, None]
    rows[3] = 7.0  # codes as large as can be, all of one sign
    layer.codes[5] = 127
    for form in (layer, layer.held(), ready(layer)):
        together = form(rows)
        for at in range(len(rows)):
            assert torch.equal(form(rows[at : at + 1]), together[at : at + 1])
        assert float((together[3, 5] - layer(rows)[3, 5]).abs() / together[3, 5].abs()) < 1e-6


@pytest.mark.parametrize("biased", [True, False])
def test_all_forms_of_codes_agree_at_the_largest_codes(biased: bool) -> None:
    """Far from luck: sums of the largest products, which 16 bits cannot hold."""
    codes = torch.full((40, 1100), 127, dtype=torch.int8)
    codes[::2] = -127
    layer = Int8Linear(codes, torch.rand(40) + 0.5, torch.randn(40) if biased else None)
    x = torch.full((3, 1100), 2.0)
    x[1] = -2.0
    x[2] = 0.0
    expected = x @ (codes.float() * layer.scale[:, None]).t() + (layer.bias if biased else 0)
    for form in (layer, layer.held(), ready(layer)):
        assert torch.allclose(form(x), expected, rtol=1e-5, atol=1e-5)


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
        for form in (coded.held(), ready(coded)):
            assert form(x).shape == plain(x).shape
            assert torch.allclose(form(x), coded(x), atol=1e-4)
        assert torch.allclose(coded(x), plain(x), atol=0.1)
        smaller = Int4Linear.of(plain)
        assert (smaller.out_features, smaller.in_features) == (40, 64)
        assert torch.allclose(smaller.held()(x), smaller(x), atol=1e-5)
        assert torch.allclose(smaller(x), plain(x), atol=0.5)


def test_what_is_no_number_stays_none() -> None:
    layer = Int8Linear.of(nn.Linear(64, 40), None)
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    for form in (layer, layer.held(), ready(layer)):
        found = form(x)
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()


def test_a_kernel_that_disagrees_is_not_used_and_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("attention")
    for wrong, names in (
        (PackedInt8Linear, ("packed-float32", "int8-in-float32")),
        (PackedLinear, ("float32", CODES)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(wrong, "forward", lambda self, x: torch.zeros(*x.shape[:-1], self.out_features))
            kernels.codes_pack.cache_clear()
            kernels.floats_pack.cache_clear()
            found = products(pack(copy.deepcopy(model))), products(pack(quantize(copy.deepcopy(model))))
        kernels.codes_pack.cache_clear()
        kernels.floats_pack.cache_clear()
        assert found == names


def test_refusals() -> None:
    with pytest.raises(CapabilityError, match="nothing to quantize: no layer of this model is 32 wide"):
        quantize(model_of("attention", d_model=16, d_ff=16))
    data = {"train": {"generated": "copy", "size": 10}}
    config = {"model": {"quantization": "int8"}, "data": data, "training": {"steps": 1}}
    with pytest.raises(ConfigError, match=r"model\.quantization is of trained weights"):
        train(config, quiet=True)
