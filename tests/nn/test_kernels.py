"""Which kernels are used: tried with the codes that saturate, each kind apart, and only where they pay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from trilemma.nn import kernels
from trilemma.nn.linear import Int8Linear, PackedInt8Linear, PackedLinear


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    for forget in (True, False):
        kernels.codes_pack.cache_clear()
        kernels.floats_pack.cache_clear()
        if forget:
            yield


def saturating(layer: PackedInt8Linear, x: Tensor) -> Tensor:
    """As processors before VNNI multiply: unsigned by signed codes, pairs of products added in 16 bits."""
    plain: Int8Linear = layer.of_codes  # type: ignore[assignment]
    inputs, scale = x.round().float() + 128, x.abs().amax(-1, keepdim=True) / 127
    weight = plain.codes.float()
    if weight.shape[1] % 2:
        inputs, weight = (torch.nn.functional.pad(value, (0, 1)) for value in (inputs, weight))
    products = inputs[:, None] * weight
    pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(-1) - 128 * weight.sum(-1)) * plain.scale * scale


def test_sums_that_saturate_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made = PackedInt8Linear.__init__

    def remembering(self: PackedInt8Linear, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        made(self, codes, scale, bias)
        object.__setattr__(self, "of_codes", Int8Linear(codes, scale, bias))

    monkeypatch.setattr(PackedInt8Linear, "__init__", remembering)
    monkeypatch.setattr(PackedInt8Linear, "forward", saturating)
    small = PackedInt8Linear(torch.full((2, 4), 60, dtype=torch.int8), torch.ones(2), None)
    x = torch.tensor([[127.0, 1.0, -5.0, 3.0]])
    assert torch.equal(small(x), x @ torch.full((4, 2), 60.0)), "the planted kernel is right for most codes"
    assert not kernels.codes_pack()
    assert "codes kept as float32" in kernels.explained()["int8"]
    assert kernels.floats_pack(torch.float32), "float32 does not fall with it"


def test_exact_sums_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PackedInt8Linear", Int8Linear)
    assert kernels.codes_pack()
    assert kernels.explained()["int8"].startswith("packed codes")


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_a_missing_kernel(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise error("no such operator")

    monkeypatch.setattr(kernels, "PackedInt8Linear", missing)
    monkeypatch.setattr(kernels, "PackedLinear", missing)
    assert not kernels.codes_pack()
    assert kernels.least_packed(torch.float32) is None
    assert kernels.explained()["float32"].startswith("plain")


def test_a_wrong_float_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: forward(self, x) * (1 + 1e-2))
    assert kernels.least_packed(torch.float32) is None


def test_the_rule_goes_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for capability in ("AVX2", "AVX512", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        found.append(kernels.least_packed(torch.float32))
        assert f"{found[-1]:,} weights" in kernels.explained()["float32"]
    assert found == [1 << 22, 1 << 16, 1 << 22]
    assert kernels.least_packed(torch.float64) is None
