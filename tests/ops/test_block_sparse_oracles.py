"""The branches of native sparse attention against two implementations of other people.

fla-core's naive forms have equal sizes of all blocks (l = d = l') and compute in float32. Stored numbers of a published
torch reference (XunhaoLai/native-sparse-attention-triton, commit 9bea856, `ops/torch`: compressed_attention_torch and
topk_sparse_attention_torch, run in float64 on the inputs stored with them) cover overlapping blocks.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trilemma.ops.block_sparse import (
    BlockSizes,
    Places,
    attend_compressed,
    attend_gathered,
    attend_masked,
    block_importance,
    select_blocks,
)

BATCH, HEADS, GROUPS, LENGTH, DIM = 2, 4, 2, 43, 8
NAME = "block_sparse_attention"
PUBLISHED = "numbers stored from XunhaoLai/native-sparse-attention-triton@9bea856, ops/torch"
ASSET = Path(__file__).parents[1] / "assets" / "nsa_reference.safetensors"


@pytest.fixture
def naive(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """fla-core's file alone: its package needs Triton, and its pooling and offsets are not asked for here."""
    for name, wanted in (("fla.ops.utils", "prepare_chunk_offsets"), ("fla.ops.utils.pooling", "mean_pooling")):
        empty = ModuleType(name)
        setattr(empty, wanted, None)
        monkeypatch.setitem(sys.modules, name, empty)
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "ops" / "nsa" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive_nsa", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that flash-attn is missing
        spec.loader.exec_module(module)
    return module


def sizes_of(size: int, count: int) -> BlockSizes:
    return BlockSizes(size, size, size, count, initial=1, local=2, window=1)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def places() -> Places:
    steps = torch.arange(LENGTH)[None]
    return Places(steps, steps, 0, LENGTH)


def flipped(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


@pytest.mark.parametrize(("size", "count"), [(4, 4), (3, 7), (8, 3)])
def test_selected_branch(naive: ModuleType, size: int, count: int, agrees: Callable[..., None]) -> None:
    q, k, v = drawn(BATCH, HEADS, LENGTH, DIM), drawn(BATCH, GROUPS, LENGTH, DIM), drawn(BATCH, GROUPS, LENGTH, DIM)
    blocks = -(-LENGTH // size)
    sizes = sizes_of(size, count)
    chosen = select_blocks(torch.rand(BATCH, GROUPS, LENGTH, blocks), places().within, sizes)
    want = naive.naive_nsa_selection(*flipped(q, k, v, chosen), size).transpose(1, 2)
    for form in (attend_gathered, attend_masked):
        got = form(q, k, v, chosen, places(), sizes)
        agrees(NAME, "selected branch", got, want, oracle="fla-core naive_nsa_selection", share=1e-5)


@pytest.mark.parametrize(("size", "count"), [(4, 4), (3, 7), (8, 3)])
def test_compressed_branch_and_choice(naive: ModuleType, size: int, count: int, agrees: Callable[..., None]) -> None:
    sizes = sizes_of(size, count)
    ended, blocks = sizes.ended(LENGTH), -(-LENGTH // size)
    q, k, v = drawn(BATCH, HEADS, LENGTH, DIM), drawn(BATCH, GROUPS, ended, DIM), drawn(BATCH, GROUPS, ended, DIM)
    got, mass = attend_compressed(q, k, v, places(), sizes)
    want, _ = naive.naive_nsa_compression(*flipped(q, k, v), size, DIM**-0.5)
    want = want.transpose(1, 2)
    agrees(NAME, "compressed branch", got, want, oracle="fla-core naive_nsa_compression", share=1e-5)
    chosen = select_blocks(block_importance(mass, blocks, None, sizes), places().within, sizes)
    padded = torch.nn.functional.pad(k, (0, 0, 0, blocks - ended))  # it counts the block under construction too
    theirs = naive.naive_nsa_topk(*flipped(q, padded), count, size, DIM**-0.5).transpose(1, 2)
    own = (torch.arange(LENGTH) // size)[:, None]
    assert torch.equal(chosen.masked_fill(chosen > own, -1).sort(-1).values, theirs.sort(-1).values)


def test_overlapping_blocks(agrees: Callable[..., None]) -> None:
    stored = load_file(ASSET)
    q, k, v, ck, cv = (
        stored[name].double().transpose(0, 1)[None]
        for name in ("queries", "keys", "values", "compressed_keys", "compressed_values")
    )
    sizes = BlockSizes(compress=4, stride=2, select=8, count=4, initial=1, local=2, window=1)
    steps = torch.arange(q.shape[2])[None]
    where, blocks = Places(steps, steps, 0, q.shape[2]), -(-q.shape[2] // sizes.select)
    coarse, mass = attend_compressed(q, ck, cv, where, sizes)
    chosen = select_blocks(block_importance(mass, blocks, None, sizes), steps, sizes)
    fine, masked = (form(q, k, v, chosen, where, sizes) for form in (attend_gathered, attend_masked))
    theirs = stored["chosen"].long()[None]
    assert torch.equal(
        chosen.masked_fill(chosen > steps[..., None] // sizes.select, -1).sort(-1).values, theirs.sort(-1).values
    )
    assert len(theirs[:, :, -1].unique()) > sizes.count  # the groups choose for themselves
    for what, name, got in (("compressed", "coarse", coarse), ("selected", "fine", fine), ("selected", "fine", masked)):
        want = stored[name].double().transpose(0, 1)[None]
        agrees(NAME, f"{what} branch of overlapping blocks", got, want, oracle=PUBLISHED, share=1e-5)


def test_equal_importance_goes_to_the_earlier_block() -> None:
    importance = torch.zeros(1, 1, 1, 50)
    chosen = select_blocks(importance, torch.tensor([[49 * 4]]), sizes_of(4, 7))
    assert sorted(chosen.flatten().tolist()) == [0, 1, 2, 3, 4, 48, 49]
