"""State: the walk over the pytree, files, and errors. That verbs commute with running is a law (tests/laws)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trilemma.errors import CapabilityError, CheckpointError
from trilemma.nn.cache import KVCache
from trilemma.state import NoState, State, TupleState, load_state, save_state, updated


@dataclass
class Leaf(State):
    payload: Tensor
    lengths: Tensor
    bound: int
    open: bool


def leaf(rows: int = 3, seed: int = 0) -> Leaf:
    generator = torch.Generator().manual_seed(seed)
    return Leaf(torch.randn(rows, 2, generator=generator), torch.arange(rows), 7, True)


def tree() -> TupleState:
    return TupleState((leaf(seed=1), None, TupleState((leaf(seed=2), NoState()))))


def test_names_numbers_and_bytes() -> None:
    state = tree()
    assert list(state.tensors()) == [
        "parts.0.payload",
        "parts.0.lengths",
        "parts.2.parts.0.payload",
        "parts.2.parts.0.lengths",
    ]
    assert state.numbers()["parts.2.parts.0.bound"] == 7
    assert state.numbers()["parts.0.open"] == 1
    assert state.nbytes == state.capacity_nbytes == 2 * 3 * 2 * 4  # integers are book-keeping


def test_clone_shares_nothing() -> None:
    state = tree()
    copy = state.clone()
    for name, tensor in copy.tensors().items():
        assert torch.equal(tensor, state.tensors()[name])
        tensor.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors().values(), tree().tensors().values(), strict=True))


@pytest.mark.parametrize("rows", [[2, 0], [1, 1, 1, 1], [], [0, 1, 2]])
def test_select_takes_rows_everywhere(rows: list[int]) -> None:
    state = tree()
    chosen = state.select(torch.tensor(rows, dtype=torch.int64))
    for name, tensor in chosen.tensors().items():
        assert torch.equal(tensor, state.tensors()[name][rows])
    assert chosen.numbers() == state.numbers()


def test_to_changes_floating_point_only() -> None:
    state = tree().to(dtype=torch.float64)
    types = {name.rpartition(".")[2]: tensor.dtype for name, tensor in state.tensors().items()}
    assert types == {"payload": torch.float64, "lengths": torch.int64}


def test_rewind_is_refused_without_room_for_it() -> None:
    with pytest.raises(CapabilityError, match=r"Leaf cannot rewind; make it with init_state\(\.\.\., rewind=n\)"):
        tree().rewind(torch.tensor([1, 0, 0]))
    assert isinstance(NoState().rewind(torch.tensor([1])), NoState)


def test_updated_writes_in_place_without_autograd_only() -> None:
    old, new = torch.zeros(3), torch.ones(3, dtype=torch.float64)
    assert updated(old, new) is new
    assert old.sum() == 0
    with torch.no_grad():
        result = updated(old, new)
    assert result.data_ptr() == old.data_ptr()
    assert result.dtype == torch.float32
    assert old.sum() == 3


def test_files_hold_all(tmp_path: Path) -> None:
    state = tree()
    save_state(state, tmp_path / "state")
    template = TupleState((leaf(seed=8), None, TupleState((leaf(seed=9), NoState()))))
    loaded = load_state(template, tmp_path / "state")
    assert isinstance(loaded, TupleState)
    assert loaded.numbers() == state.numbers()
    for name, tensor in loaded.tensors().items():
        assert torch.equal(tensor, state.tensors()[name])
    assert loaded.parts[1] is None


def _broken(path: Path, kind: str) -> None:
    save_state(tree(), path)
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "garbage":
        path.write_bytes(b"not a state" * 10)
    elif kind == "foreign":
        save_file({"x": torch.ones(2)}, path)
    elif kind == "other kind":
        save_state(leaf(), path)
    elif kind == "fewer":
        save_state(TupleState((leaf(),)), path)
    elif kind == "other type":
        save_state(tree().to(dtype=torch.float64), path)
    elif kind == "bad number":
        numbers = {f"number:{name}": "seven" for name in tree().numbers()}
        save_file(tree().tensors(), path, metadata={"format": "trilemma-state-1", "kind": "TupleState", **numbers})
    elif kind == "no numbers":
        save_file(tree().tensors(), path, metadata={"format": "trilemma-state-1", "kind": "TupleState"})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "not a readable State"),
        ("truncated", "not a readable State"),
        ("garbage", "not a readable State"),
        ("foreign", "holds no TupleState of format trilemma-state-1"),
        ("other kind", "holds no TupleState"),
        ("fewer", "tensors differ from the template's"),
        ("other type", "has type torch.float64, torch.float32 is needed"),
        ("bad number", "something that is no number"),
        ("no numbers", "book-keeping differs"),
    ],
)
def test_a_broken_file_is_named(kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    _broken(path, kind)
    with pytest.raises(CheckpointError, match=message) as error:
        load_state(tree(), path)
    assert str(path) in str(error.value)


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    """Heads, widths and the like belong to the mixer; rows and capacity may differ from the template's."""
    wide = KVCache.empty(2, 4, 8, 6, torch.float32, torch.device("cpu"))
    save_state(wide, tmp_path / "state")
    narrow = KVCache.empty(2, 4, 6, 6, torch.float32, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="shape"):
        load_state(narrow, tmp_path / "state")
