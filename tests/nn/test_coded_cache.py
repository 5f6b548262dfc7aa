"""Keys and values in 8 bits: codes of each token by itself, awkward shapes, bytes, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trilemma.errors import CapabilityError, LengthError
from trilemma.nn.coded_cache import CodedCache, CodedRing, as_kept, make_cache, make_ring, token_bytes
from trilemma.state import load_state, save_state

CPU = torch.device("cpu")


def cache(rows: int = 2, capacity: int | None = None, value_dim: int | None = None) -> CodedCache:
    made = make_cache("int8", rows, 3, 8, capacity, torch.float32, CPU, value_dim)
    assert isinstance(made, CodedCache)
    return made


def ring(rows: int = 2) -> CodedRing:
    made = make_ring("int8", rows, 3, 8, 4, 1, torch.float32, CPU)
    assert isinstance(made, CodedRing)
    return made


@torch.no_grad()
def test_tokens_one_by_one_and_together_give_the_same_codes() -> None:
    keys, values = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8) * 100
    whole, after = cache().append(keys, values, None)
    state = cache()
    for at in range(7):
        seen, state = state.append(keys[:, :, at : at + 1], values[:, :, at : at + 1], None)
    assert torch.equal(seen.keys, whole.keys)
    assert torch.equal(seen.values, whole.values)
    kept = as_kept("int8", keys, values)
    assert torch.equal(kept[0], whole.keys)
    assert torch.equal(kept[1], whole.values)
    assert torch.equal(after.held().keys, whole.keys)
    assert 0 < float((kept[0] - keys).abs().max()) <= float(keys.abs().max()) / 254 * 1.01
    assert after.codes.keys.dtype == torch.int8


@torch.no_grad()
@pytest.mark.parametrize("make", [cache, ring])
def test_rows_that_wait_and_tokens_that_are_all_zero(make: type) -> None:
    state = make()
    keys = torch.randn(2, 3, 4, 8)
    keys[0, :, 1] = 0
    keys[1, :, 2:] = float("nan")  # padding, which is never looked at
    seen, state = state.append(keys, keys, torch.tensor([4, 0]))
    assert state.lengths.tolist() == [4, 0]
    assert seen.positions is not None
    assert (seen.positions >= 0).sum(1).tolist() == [4, 0]
    order = seen.positions[0].argsort()[-4:]
    assert torch.allclose(seen.keys[0, :, order], keys[0], atol=0.02)
    assert (seen.keys[0, :, order[1]] == 0).all()
    again, _ = state.append(keys[:, :, :1], keys[:, :, :1], None)
    assert again.positions is not None
    assert (again.positions >= 0).sum(1).tolist()[1] == 1


@torch.no_grad()
def test_values_of_width_zero_and_rows_of_no_number() -> None:
    state = cache(value_dim=0)
    keys = torch.randn(2, 3, 1, 8)
    seen, state = state.append(keys, keys[..., :0], None)
    assert seen.values.shape == (2, 3, 1, 0)
    assert state.nbytes == 2 * 3 * (8 + 4) == 2 * token_bytes("int8", 3, 8, torch.float32, 0)
    nothing, empty = cache(0).append(torch.zeros(0, 3, 2, 8), torch.zeros(0, 3, 2, 8), None)
    assert nothing.keys.shape == (0, 3, 2, 8)
    assert empty.nbytes == 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_are_those_of_codes_and_scales(dtype: torch.dtype) -> None:
    state = make_cache("int8", 2, 3, 64, 10, dtype, CPU)
    x = torch.randn(2, 3, 5, 64, dtype=dtype)
    _, state = state.append(x, x, None)
    scale = 8 if dtype == torch.float64 else 4
    assert state.nbytes == 2 * 5 * 3 * 2 * (64 + scale) == 2 * 5 * token_bytes("int8", 3, 64, dtype)
    assert state.capacity_nbytes == 2 * state.nbytes
    plain = make_cache(None, 2, 3, 64, 10, dtype, CPU)
    assert plain.capacity_nbytes == 2 * 10 * token_bytes(None, 3, 64, dtype)


@torch.no_grad()
def test_verbs_and_files(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 5, 8)
    _, state = cache().append(x, x, None)
    copy = state.clone()
    copy.codes.keys.zero_()
    assert torch.equal(state.held().keys, as_kept("int8", x, x)[0])
    assert torch.equal(state.select(torch.tensor([1, 1])).held().keys[0], state.held().keys[1])
    shorter = state.clone().rewind(torch.tensor([2, 2]))
    assert torch.equal(shorter.held().keys, state.held().keys[:, :, :3])
    save_state(state, tmp_path / "state.safetensors")
    loaded = load_state(cache(), tmp_path / "state.safetensors")
    assert isinstance(loaded, CodedCache)
    assert torch.equal(loaded.held().values, state.held().values)
    with pytest.raises(CapabilityError, match="no more tokens can be taken back"):
        state.rewind(torch.tensor([6, 0]))


def test_refusals() -> None:
    x = torch.randn(2, 3, 5, 8)
    with pytest.raises(LengthError, match="reserved for 4 tokens, 5 are needed"):
        cache(capacity=4).append(x, x, None)
    for make in (cache, ring):
        with pytest.raises(CapabilityError, match=r"a cache in 8 bits is for inference.*torch\.no_grad"):
            make().append(x.requires_grad_(), x, None)
    with pytest.raises(CapabilityError, match="a cache in 8 bits is for inference"):
        as_kept("int8", x, x)
