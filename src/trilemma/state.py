"""State: what a sequence has left behind in a layer, and the verbs that every kind of it knows.

A KV cache, a window's ring buffer, a convolution's tail, a recurrence's matrix and the memory that cross-attention
reads are all a `State`: a pytree of tensors whose axis 0 is the sequence ("row"). Under autograd an update returns new
tensors and is differentiable; with autograd off it happens in place, at addresses that only `reserve` may move. Always
go on with the returned State; who wants to branch clones first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trilemma.errors import CapabilityError, CheckpointError

_FORMAT = "trilemma-state-1"

# How keys and values are held: None: in the type that the State was made with; or in 8 bits (`nn.coded_cache`).
CacheKind = Literal["int8"] | None


@dataclass
class State:
    """Base: a dataclass whose fields are tensors, States, tuples of States, or plain numbers known to Python.

    Floating-point tensors are the payload, and codes that stand for such numbers; other integer tensors (lengths,
    indices) are book-keeping and are not counted in `nbytes`.

    Attributes:
        growing: axis of a tensor, besides the rows, whose size is the State's own and not the mixer's.
    """

    growing: ClassVar[dict[str, int]] = {}

    def clone(self) -> Self:
        """An independent copy: running one never changes the other."""
        return self._map(torch.clone)

    def select(self, rows: Tensor) -> Self:
        """The State of a new batch whose row i is the old row `rows[i]`; rows may repeat or be left out.

        Args:
            rows: [new batch] int64.
        """
        return self._map_states(lambda tensor: tensor.index_select(0, rows), lambda state: state.select(rows))

    def rewind(self, counts: Tensor) -> Self:
        """Takes back the last `counts[r]` tokens of row r, exactly.

        Args:
            counts: [rows] int64, each between 0 and the `rewind` that the State was made with.

        Raises:
            CapabilityError: the State was made without room to rewind.
        """
        if self._own_tensors():
            raise CapabilityError(f"{type(self).__name__} cannot rewind; make it with init_state(..., rewind=n)")
        return self._map_states(lambda tensor: tensor, lambda state: state.rewind(counts))

    def reserve(self, tokens: int) -> Self:
        """Room for `tokens` in all, so that updates up to there move no address. States of constant size have it."""
        return self._map_states(lambda tensor: tensor, lambda state: state.reserve(tokens))

    def detach(self) -> Self:
        """The same values, cut off from autograd (truncated back-propagation through time)."""
        return self._map(torch.detach)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The State on another device; `dtype` changes floating-point tensors only."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None))

    @property
    def nbytes(self) -> int:
        """Bytes of payload that hold tokens."""
        own = sum(tensor.nbytes for _, tensor in self._own_tensors() if tensor.is_floating_point())
        return own + sum(state.nbytes for _, state in self._children())

    @property
    def capacity_nbytes(self) -> int:
        """Bytes of payload reserved, at least `nbytes`."""
        own = sum(tensor.nbytes for _, tensor in self._own_tensors() if tensor.is_floating_point())
        return own + sum(state.capacity_nbytes for _, state in self._children())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by dotted name."""
        found = dict(self._own_tensors())
        for name, state in self._children():
            found |= {f"{name}.{inner}": tensor for inner, tensor in state.tensors().items()}
        return found

    def numbers(self) -> dict[str, int]:
        """All plain numbers by dotted name."""
        found = {f.name: int(v) for f in fields(self) if isinstance(v := getattr(self, f.name), (bool, int))}
        for name, state in self._children():
            found |= {f"{name}.{inner}": number for inner, number in state.numbers().items()}
        return found

    # The walk over the pytree, written once.

    def _own_tensors(self) -> list[tuple[str, Tensor]]:
        return [(f.name, v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)]

    def _children(self) -> Iterator[tuple[str, State]]:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, State):
                yield f.name, value
            elif isinstance(value, tuple):
                yield from ((f"{f.name}.{i}", item) for i, item in enumerate(value) if isinstance(item, State))

    def _map_states(self, on_tensor: Callable[[Tensor], Tensor], on_state: Callable[[State], State]) -> Self:
        def convert(value: Any) -> Any:
            if isinstance(value, Tensor):
                return on_tensor(value)
            if isinstance(value, State):
                return on_state(value)
            if isinstance(value, tuple):
                return tuple(convert(item) for item in value)
            return value

        return replace(self, **{f.name: convert(getattr(self, f.name)) for f in fields(self)})

    def _map(self, on_tensor: Callable[[Tensor], Tensor]) -> Self:
        return self._map_states(on_tensor, lambda state: state._map(on_tensor))


@dataclass
class NoState(State):
    """The State of a part that remembers nothing, such as a feed-forward layer."""


@dataclass
class TupleState(State):
    """The States of several parts, in order; a part may have none (None) where it runs on whole sequences."""

    parts: tuple[State | None, ...]


def updated(old: Tensor, new: Tensor) -> Tensor:
    """`new` as the successor of `old`: itself under autograd, else written into `old` in place.

    Args:
        old: a State's tensor.
        new: the same shape; cast to `old`'s type when written.
    """
    if torch.is_grad_enabled():
        return new
    return old.copy_(new)


def save_state(state: State, path: str | Path) -> None:
    """Writes a State as one safetensors file (no code in it)."""
    numbers = {f"number:{name}": str(value) for name, value in state.numbers().items()}
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state.tensors().items()}
    save_file(tensors, str(path), metadata={"format": _FORMAT, "kind": type(state).__name__, **numbers})


def load_state(template: State, path: str | Path) -> State:
    """Reads a State that `save_state` wrote.

    Args:
        template: a State of the same kind, as `init_state` makes it; gives structure, types and devices.
        path: the file.

    Raises:
        CheckpointError: missing, damaged, of another kind, or holding other tensors than the template.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable State: {error}") from None
    if metadata.get("format") != _FORMAT or metadata.get("kind") != type(template).__name__:
        raise CheckpointError(f"{path}: holds no {type(template).__name__} of format {_FORMAT}")
    wanted = template.tensors()
    if wanted.keys() != tensors.keys():
        raise CheckpointError(f"{path}: tensors differ from the template's: {sorted(wanted.keys() ^ tensors.keys())}")
    numbers = {key.removeprefix("number:"): value for key, value in metadata.items() if key.startswith("number:")}
    if numbers.keys() != template.numbers().keys():
        raise CheckpointError(f"{path}: book-keeping differs from the template's")
    for name, tensor in tensors.items():
        if tensor.dtype != wanted[name].dtype or tensor.ndim != wanted[name].ndim:
            raise CheckpointError(f"{path}: tensor {name} has type {tensor.dtype}, {wanted[name].dtype} is needed")
    try:
        return _filled(template, "", tensors, {name: int(value) for name, value in numbers.items()})
    except ValueError:
        raise CheckpointError(f"{path}: book-keeping holds something that is no number") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _filled(state: State, prefix: str, tensors: dict[str, Tensor], numbers: dict[str, int]) -> State:
    def convert(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            _check_shape(name, value, tensors[name], state.growing.get(name.removeprefix(prefix), 0))
            # Aligned memory of its own: kernels choose by address, and other kernels give other bits.
            return tensors[name].to(value.device, copy=True)
        if isinstance(value, State):
            return _filled(value, f"{name}.", tensors, numbers)
        if isinstance(value, tuple):
            return tuple(convert(f"{name}.{i}", item) for i, item in enumerate(value))
        if isinstance(value, bool):
            return bool(numbers[name])
        return numbers[name] if isinstance(value, int) else value

    return replace(state, **{f.name: convert(f"{prefix}{f.name}", getattr(state, f.name)) for f in fields(state)})


def _check_shape(name: str, wanted: Tensor, found: Tensor, growing: int) -> None:
    """Rows, and the growing axis, are the file's; all other sizes are the mixer's."""
    sizes = enumerate(zip(wanted.shape, found.shape, strict=True))
    if any(want != have for axis, (want, have) in sizes if axis not in (0, growing)):
        raise CheckpointError(
            f"tensor {name} has the shape {list(found.shape)}, the template's is {list(wanted.shape)}"
        )
