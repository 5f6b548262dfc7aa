"""One drawn situation: a mixer with random weights, random inputs, and the comparison of what two ways of running give.

Legend: B rows, L length, D d_model, S memory positions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trilemma.laws.report import ViolationError
from trilemma.mixers.base import MemoryMixer, Mixer
from trilemma.ragged import Ragged
from trilemma.state import CacheKind, State

# What two lawful ways of computing one value may differ by, relative to the largest value of the tensor (or 1). In
# bfloat16, which keeps eight bits, thousands of random cases reached 0.02 in outputs and 0.12 in gradients: that of a
# norm whose sum nearly cancels magnifies rounding.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 0.08}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.4}
# The same with keys and values in 8 bits: where roundings differ a code may, by one of 127. In float64 none does, and
# what bfloat16 rounds is more.
CODED_TOLERANCE = {**TOLERANCE, torch.float32: 0.01}

# Values that padding may hold. NaN is the strictest: it survives multiplication by zero.
GARBAGE = (math.nan, math.nan, 1e4, 0.0)


@dataclass
class Trace:
    """The largest error met while the laws held, as a size and as a fraction of what was allowed."""

    error: float = 0.0
    worst: float = 0.0
    case: str = ""


@dataclass
class Case:
    """Draws of one case; all of them come from `generator`, so that a seed replays it.

    Attributes:
        mixer: with random weights, of type `dtype`.
        shared: what the stack would own.
        cache: how keys and values are held; unless None, nothing is differentiated.
    """

    mixer: Mixer
    dtype: torch.dtype
    generator: torch.Generator
    trace: Trace
    shared: dict[str, Tensor] = field(default_factory=dict)
    cache: CacheKind = None

    # Draws.

    def normal(self, *shape: int, leaf: bool = False) -> Tensor:
        """Standard normal values; a `leaf` is differentiated where anything is."""
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return drawn.to(torch.get_default_device(), self.dtype).requires_grad_(leaf and self.cache is None)

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator, device="cpu"))

    def integers(self, count: int, low: int, high: int) -> Tensor:
        """[count] numbers from low to high, both included."""
        drawn = torch.randint(low, high + 1, (count,), generator=self.generator, device="cpu")
        return drawn.to(torch.get_default_device())

    def flip(self) -> bool:
        """A coin."""
        return self.integer(0, 1) == 1

    def pick(self, choices: Sequence[int]) -> int:
        """One of the numbers."""
        return choices[self.integer(0, len(choices) - 1)]

    def permutation(self, count: int) -> Tensor:
        """[count]."""
        drawn = torch.randperm(count, generator=self.generator, device="cpu")
        return drawn.to(torch.get_default_device())

    def share(self, of: Tensor) -> Tensor:
        """[B] a number from 0 to of[b], both included."""
        drawn = torch.rand(len(of), generator=self.generator, device="cpu").to(of.device)
        return (drawn * (of + 1)).long()

    def spoiled(self, x: Tensor, valid: Tensor) -> Tensor:
        """x [B, L, ...] with what padding may hold where `valid` [B, L] is False."""
        garbage = GARBAGE[self.integer(0, len(GARBAGE) - 1)]
        return torch.where(valid[..., None], x, torch.full_like(x, garbage))

    def describe(self, **drawn: object) -> None:
        """Remembers what was drawn, for the report of a failure."""
        words = [f"{name}={_plain(value)}" for name, value in drawn.items()]
        self.trace.case = ", ".join([str(self.dtype).removeprefix("torch."), *words])

    # Running.

    def memory(self, rows: int, leaf: bool = False) -> tuple[Tensor, Tensor] | None:
        """What a mixer that reads a memory would read: values [B, S, width] and lengths [B]; None for others."""
        if not isinstance(self.mixer, MemoryMixer):
            return None
        positions = self.integer(1, 9)
        lengths = self.integers(rows, 1, positions)
        return self.normal(rows, positions, self.mixer.memory_width, leaf=leaf), lengths

    def begin(
        self, rows: int, memory: tuple[Tensor, Tensor] | None, capacity: int | None = None, rewind: int = 0
    ) -> State:
        """The State before the first token."""
        if isinstance(self.mixer, MemoryMixer):
            assert memory is not None
            values, lengths = memory
            valid = torch.arange(values.shape[1]) < lengths[:, None]
            return self.mixer.remember(self.spoiled(values, valid), lengths)
        return self.mixer.init_state(rows, capacity=capacity, rewind=rewind)

    def run(self, x: Tensor, state: State | None = None, ragged: Ragged | None = None) -> tuple[Tensor, State | None]:
        """The mixer on one call."""
        y, after = self.mixer(x, state, ragged, self.shared or None)
        if y.shape != x.shape:
            raise ViolationError(f"y has x's shape {tuple(x.shape)}; found {tuple(y.shape)}")
        if y.dtype != x.dtype:
            raise ViolationError(f"y has x's type {x.dtype}; found {y.dtype}")
        if (after is None) != (state is None):
            raise ViolationError("a State comes back exactly when one was given")
        return y, after

    def step(self, x: Tensor, state: State, ragged: Ragged | None = None) -> tuple[Tensor, State]:
        """The mixer on one call with a State."""
        y, after = self.run(x, state, ragged)
        assert after is not None
        return y, after

    def whole(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        prefix: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """y of whole sequences in one call; padding is spoiled."""
        state = self.begin(len(x), memory) if memory is not None else None
        if lengths is None and prefix is None and segments is None:
            return self.run(x, state)[0]
        ragged = Ragged(lengths=lengths, prefix=prefix, segments=segments)
        valid = ragged.valid(x.shape[1])
        return self.run(x if valid is None else self.spoiled(x, valid), state, ragged)[0]

    # Comparing.

    def close(
        self,
        got: Tensor,
        want: Tensor,
        tensor: str,
        claim: str,
        valid: Tensor | None = None,
        tolerance: float | None = None,
        scale: float = 1.0,
    ) -> None:
        """Both [B, L, ...] agree where `valid` [B, L]; else a violation.

        The error is a share of the largest value wanted, or of `scale` where that is larger; it may be `tolerance`
        (None: the type's).
        """
        if got.shape != want.shape:
            raise ViolationError(f"{claim}: shape {tuple(got.shape)}, expected {tuple(want.shape)}", tensor)
        if valid is not None:
            got, want = got.masked_fill(~valid[..., None], 0), want.masked_fill(~valid[..., None], 0)
        got, want = got.detach().double(), want.detach().double()
        scale = max(scale, _largest([want]))
        errors = ((got - want).abs() / scale).nan_to_num(math.inf, math.inf, math.inf)
        error = float(errors.max()) if errors.numel() else 0.0
        tolerance = tolerance or (TOLERANCE if self.cache is None else CODED_TOLERANCE)[self.dtype]
        if error > tolerance:
            row, token = None, None
            if errors.ndim >= 2:
                wrong = (errors.flatten(2).amax(2) if errors.ndim > 2 else errors) > tolerance
                token = int(wrong.any(0).nonzero()[0])
                row = int(wrong[:, token].nonzero()[0])
            raise ViolationError(claim, tensor, token, row, error, tolerance)
        if error / tolerance > self.trace.worst:
            self.trace.error, self.trace.worst = error, error / tolerance

    def same_bits(self, got: Tensor, want: Tensor, tensor: str, claim: str) -> None:
        """Equal to the last bit (a zero's sign aside)."""
        if got.shape != want.shape or not torch.equal(got, want):
            error = None
            if got.shape == want.shape:
                error = float((got.detach().double() - want.detach().double()).abs().nan_to_num(math.inf).max())
            raise ViolationError(claim, tensor, error=error, tolerance=0.0)

    def finite(self, value: Tensor, tensor: str, claim: str) -> None:
        """No NaN, no infinity."""
        if not bool(value.isfinite().all()):
            token = None
            if value.ndim == 3:
                token = int((~value.isfinite()).any(2).any(0).nonzero()[0])
            raise ViolationError(claim, tensor, token, error=math.inf)

    def named_leaves(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The given inputs, the mixer's parameters and what the stack owns."""
        named = {**leaves, **{f"parameter {k}": p for k, p in self.mixer.named_parameters()}}
        return named | {f"shared {name}": value for name, value in self.shared.items()}

    def gradients(self, loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of `leaves`, the mixer's parameters and what the stack owns; zeros where nothing flows; none where nothing
        is differentiated."""
        if self.cache is not None:
            return {}
        named = self.named_leaves(leaves)
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(named.items(), found, strict=True)
        }

    def same_gradients(
        self,
        got: Mapping[str, Tensor],
        want: Mapping[str, Tensor],
        claim: str,
        sensitivity: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """Each gradient of `want` is found in `got`, within tolerance.

        In bfloat16 a parameter's gradient, a sum over all tokens, may be nothing but what rounding left of it: there
        the largest of all parameters' gradients is the measure. Float64 holds each to its own. Where a gradient differs
        by more than the tolerance, `sensitivity` says how far rounding alone moves each; twice that is allowed, since
        two ways round.
        """
        parameters = {name for name in want if name.startswith(("parameter", "shared"))}
        rough = _largest([want[name] for name in parameters]) if self.dtype == torch.bfloat16 else 1.0
        for name, value in want.items():
            first, second = got[name], value
            if name in parameters or value.ndim != 3:
                first, second = first.reshape(-1), second.reshape(-1)
            scale = max(1.0, rough) if name in parameters else 1.0
            tolerance = GRADIENT_TOLERANCE[self.dtype]
            try:
                self.close(first, second, f"gradient of {name}", claim, tolerance=tolerance, scale=scale)
            except ViolationError as found:
                if sensitivity is None or self.dtype != torch.bfloat16 or found.error is None:
                    raise
                if found.error > 2 * sensitivity()[name]:
                    raise

    def in_float64(
        self, noise: float, seed: int, x: Tensor, memory: tuple[Tensor, Tensor] | None
    ) -> tuple[Case, Tensor, tuple[Tensor, Tensor] | None]:
        """This case in float64, every number of mixer and inputs moved by up to `noise` of itself."""
        generator = torch.Generator("cpu").manual_seed(seed)

        def moved(value: Tensor) -> Tensor:
            precise = value.detach().double()
            drawn = 2 * torch.rand(precise.shape, generator=generator, dtype=torch.float64, device="cpu") - 1
            return (precise * (1 + noise * drawn.to(precise.device))).requires_grad_(value.requires_grad)

        mixer = copy.deepcopy(self.mixer).double()
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.copy_(moved(parameter))
        shared = {name: moved(value) for name, value in self.shared.items()}
        other = Case(mixer, torch.float64, generator, Trace(), shared, self.cache)
        return other, moved(x), None if memory is None else (moved(memory[0]), memory[1])


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest error as a share of the largest value wanted, or of 1."""
    return float((got - want).abs().max()) / max(1.0, _largest([want])) if want.numel() else 0.0


def _largest(values: Sequence[Tensor]) -> float:
    """The largest magnitude among finite values, 0 if there is none."""
    return max((float(value.detach().abs().nan_to_num(0.0).max()) for value in values if value.numel()), default=0.0)


def leaves_of(x: Tensor, memory: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """The inputs whose gradients are compared."""
    return {"x": x} if memory is None else {"x": x, "memory": memory[0]}


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, Tensor) else value
