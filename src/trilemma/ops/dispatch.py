"""Which implementation of an operator runs: our own form, or a backend's kernel that was chosen and checked.

An operator says by `@served("name")` that others may run it in its place. Nobody does unless `trilemma.ops.backends`
has put a backend in `_chosen`: a call then costs one look-up in an empty dictionary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from trilemma.errors import BackendError
from trilemma.ops.truth import TruthPair

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Backend:
    """Another implementation of one operator.

    Attributes:
        name: as a user asks for it.
        pair: the operator, its reference, and random arguments.
        call: takes the operator's arguments by name, all of them, and returns what the operator returns.
        refuses: takes the same and says why this call cannot be served, or "".
        missing: why it cannot be had in this installation, or "".
        version: of its package.
        devices, dtypes: where it runs, and with which values.
        draw: arguments of the sizes that it was made for, as `pair.draw` draws them; small ones alone would not do.
    """

    name: str
    pair: TruthPair
    call: Callable[..., Any]
    refuses: Callable[..., str]
    missing: Callable[[], str]
    version: Callable[[], str]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    draw: Callable[[torch.Generator, torch.dtype], dict[str, Any]]


@dataclass
class Chosen:
    """A backend that runs an operator in this process.

    Attributes:
        strict: a call that it refuses is an error, or else our own form's and said once for each reason.
        say: told of those.
        checked: its error in the self-check.
        served: calls so far.
        left_plain: reasons for which calls ran in our own form.
    """

    backend: Backend
    strict: bool = True
    say: Callable[[str], None] | None = None
    checked: float = 0.0
    served: int = 0
    left_plain: list[str] = field(default_factory=list)

    def takes(self, given: Mapping[str, Any]) -> bool:
        """Whether it runs this call.

        Raises:
            BackendError: it refuses the call, and was asked for by name.
        """
        if _is_step(given):
            return False
        reason = self._refusal(given)
        if not reason:
            self.served += 1
            return True
        if _trying:
            return False
        if self.strict:
            raise BackendError(
                f"{self.backend.pair.name}: backend {self.backend.name} cannot serve this call: {reason} "
                f"({sizes(given)}); use backend auto or plain"
            )
        if reason not in self.left_plain:
            self.left_plain.append(reason)
            if self.say is not None:
                self.say(f"{self.backend.pair.name}: plain PyTorch, not {self.backend.name}, for {reason}")
        return False

    def _refusal(self, given: Mapping[str, Any]) -> str:
        values: Tensor = given["v"]
        if values.device.type not in self.backend.devices:
            return f"values on {values.device.type}"
        if values.dtype not in self.backend.dtypes:
            return f"values in {str(values.dtype).removeprefix('torch.')}"
        return self.backend.refuses(**given)


_chosen: dict[str, Chosen] = {}
_trying: list[bool] = []


def served(operator: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Declares that backends may run this operator, which is called as its `TruthPair` is."""

    def declare(plain: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        signature = inspect.signature(plain)

        @functools.wraps(plain)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            chosen = _chosen.get(operator)
            if chosen is None:
                return plain(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            if not chosen.takes(given.arguments):
                return plain(*args, **kwargs)
            result: Result = chosen.backend.call(**given.arguments)
            return result

        return call

    return declare


@contextmanager
def trying() -> Iterator[None]:
    """Within the block calls that a backend refuses run in our own form, and nothing is said: for laws and checks."""
    _trying.append(True)
    try:
        yield
    finally:
        _trying.pop()


@contextmanager
def plainly() -> Iterator[None]:
    """Within the block every operator runs in our own form."""
    kept = dict(_chosen)
    _chosen.clear()
    try:
        yield
    finally:
        _chosen.update(kept)


def sizes(given: Mapping[str, Any]) -> str:
    """Shapes of the tensors among arguments, and the other values."""
    shown = {name: list(value.shape) if isinstance(value, Tensor) else value for name, value in given.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def _is_step(given: Mapping[str, Any]) -> bool:
    """One token with a State is a form of its own, ours: no kernel for whole sequences is asked."""
    return given["k"].shape[2] == 1 and given["state"] is not None and given["starts"] is None
