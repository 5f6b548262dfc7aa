"""Backends: faster implementations of our operators, by others, admitted only where they give our answer.

A backend runs where its package is installed, on its devices, with its types, and after a self-check on this machine:
random calls, forward and backward, against the operator's naive reference in float64. What runs is named by `path` and
`running`; nothing is replaced silently. The choice is made once for a process and an operator:

    choose("auto", [DECAYED_SCAN], device="cuda", dtype=torch.bfloat16)
    [str(choice) for choice in running()]     # ["decayed_scan: fla 0.6.0 (checked: 3e-03)"]

Without a call of `choose`, and after `reset`, everything runs in plain PyTorch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trilemma.errors import BackendError, ConfigError, nearest
from trilemma.ops import dispatch
from trilemma.ops.dispatch import Backend, Chosen
from trilemma.ops.fla_kernels import BACKENDS as FLA
from trilemma.ops.truth import TruthPair

BACKENDS: list[Backend] = [*FLA]
PLAIN = "plain PyTorch"

# Root mean square of the differences over that of the values, all draws together. Our own forms reach 6e-3 in bfloat16,
# 7e-4 in float16 and 3e-7 in float32, where kernels that multiply in TF32 are refused. Gradients of gates are sums that
# nearly cancel.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 8e-3}
_FOR_GATES = 3.0
_GATES = ("log_decay", "beta")
_PRECISE = ("state", *_GATES)  # the mixers hand these over in float32
_DRAWS = 16  # of the pair's own sizes; a quarter as many of the backend's
_SEED = 20261122
_SOURCES = (Path(__file__), Path(dispatch.__file__))


class Choice(NamedTuple):
    """What runs an operator, and why."""

    operator: str
    runs: str
    why: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.runs} ({self.why})"


def choose(
    asked: str,
    pairs: Iterable[TruthPair],
    *,
    device: str,
    dtype: torch.dtype,
    strict: bool = True,
    say: Callable[[str], None] | None = None,
) -> list[Choice]:
    """Decides what runs these operators from now on in this process; all others run in plain PyTorch.

    Args:
        asked: "plain"; "auto", which takes a backend where there is one that can serve, and says why if not; or a
            backend's name, which must serve every one of these operators that it has a kernel for.
        pairs: of the operators.
        device, dtype: where the values will be, and in which type.
        strict: a call that a backend asked for by name cannot serve is an error; otherwise, and with "auto", it runs
            in our own form, which is said.
        say: told of what happens after this.

    Returns:
        What runs each of these operators that has a backend.

    Raises:
        ConfigError: no backend is called so.
        BackendError: the backend asked for is not installed, runs on another device or type, has no kernel for any of
            these operators, or differs from our own form.
    """
    names = ["auto", "plain", *sorted({backend.name for backend in BACKENDS})]
    if asked not in names:
        raise ConfigError(f'unknown backend "{asked}"{nearest(asked, names)}')
    reset()
    operators = sorted({pair.name for pair in pairs})
    known = [backend for name in operators for backend in BACKENDS if backend.pair.name == name]
    if asked == "plain":
        return [Choice(name, PLAIN, "as asked") for name in sorted({backend.pair.name for backend in known})]
    wanted = [backend for backend in known if asked in ("auto", backend.name)]
    if asked != "auto" and not wanted:
        theirs = ", ".join(backend.pair.name for backend in BACKENDS if backend.name == asked)
        ours = ", ".join(operators) or "none"
        raise BackendError(f"backend {asked} has kernels for {theirs}; the operators here: {ours}")
    refusals: dict[str, list[str]] = {}
    admitted: dict[str, Chosen] = {}
    for backend in wanted:
        name = backend.pair.name
        if name in admitted:
            continue
        try:
            error = _admitted(backend, torch.device(device).type, dtype, say)
        except BackendError as refusal:
            if asked != "auto":
                raise
            refusals.setdefault(name, []).append(str(refusal))
            if say is not None and torch.device(device).type in backend.devices and not backend.missing():
                say(str(Choice(name, PLAIN, str(refusal))))  # it could have been had
        else:
            admitted[name] = Chosen(backend, asked != "auto" and strict, say, error)
    dispatch._chosen.update(admitted)
    plain = [Choice(name, PLAIN, "; ".join(why)) for name, why in refusals.items() if name not in admitted]
    return sorted([*running(), *plain])


def running() -> list[Choice]:
    """The operators that a backend runs: its name and version; the error of its self-check and what it left to us."""
    found = []
    for name, chosen in sorted(dispatch._chosen.items()):
        left = f"; {PLAIN} for {', '.join(chosen.left_plain)}" if chosen.left_plain else ""
        version = f"{chosen.backend.name} {chosen.backend.version()}"
        found.append(Choice(name, version, f"checked: {chosen.checked:.0e}{left}"))
    return found


def reset() -> None:
    """From now on everything runs in plain PyTorch."""
    dispatch._chosen.clear()


def path() -> str:
    """The path that calls take now: "plain", or with the names of the backends in use, "plain+fla"."""
    return "+".join(["plain", *sorted({chosen.backend.name for chosen in dispatch._chosen.values()})])


def identity() -> str:
    """What a law record on this path stands on beside our own sources: each backend in use, to the letter."""
    return "\n".join(_key(chosen.backend, "") for _, chosen in sorted(dispatch._chosen.items()))


def cache_file() -> Path:
    """Where this user's passed self-checks are kept; follows XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "trilemma" / "backends.json"


def _admitted(backend: Backend, device: str, dtype: torch.dtype, say: Callable[[str], None] | None) -> float:
    """The error of the self-check, made now or remembered.

    Raises:
        BackendError: it cannot serve here, or differs from our own form.
    """
    if device not in backend.devices:
        raise BackendError(f"backend {backend.name} runs on {', '.join(backend.devices)}, not on {device}")
    if missing := backend.missing():
        raise BackendError(f"backend {backend.name}: {missing}")
    if dtype not in backend.dtypes:
        given, taken = (str(kind).removeprefix("torch.") for kind in (dtype, backend.dtypes[0]))
        raise BackendError(f"backend {backend.name} takes values in {taken}, not in {given}")
    place = torch.cuda.get_device_name() if device == "cuda" else device
    key = _key(backend, f"{place}/{dtype}")
    remembered = _read()
    if key not in remembered:
        if say is not None:
            say(f"{backend.pair.name}: checking backend {backend.name} {backend.version()} against our own form, once")
        remembered = {**remembered, key: self_check(backend, device, dtype)}
        _write(remembered)
    return remembered[key]


def self_check(backend: Backend, device: str, dtype: torch.dtype) -> float:
    """The largest error of a backend over random calls and their gradients, against the naive reference in float64.

    Raises:
        BackendError: an error is too large, a call fails, or none is served; names what, how much and the sizes.
    """
    pair, trial = backend.pair, Chosen(backend)
    generator = torch.Generator().manual_seed(_SEED)
    found: dict[str, _Error] = {}
    label = f"backend {backend.name} {backend.version()} on {device} in {str(dtype).removeprefix('torch.')}"
    for draw in [*[pair.draw] * _DRAWS, *[backend.draw] * (_DRAWS // 4)]:
        with torch.device(device):
            drawn = {name: _held(name, value, dtype) for name, value in draw(generator, torch.float32).items()}
        before = trial.served
        dispatch._chosen[pair.name] = trial
        try:
            with dispatch.trying():
                got = _results(pair.fast, drawn, dtype)
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:300]}"
            raise BackendError(f"{label} fails on {pair.name}: {text} ({dispatch.sizes(drawn)})") from error
        finally:
            del dispatch._chosen[pair.name]
        if trial.served == before:
            continue
        exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in drawn.items()}
        for name, want in _results(pair.naive, exact, dtype).items():
            found.setdefault(name, _Error()).add(got[name], want, dispatch.sizes(drawn))
    if not found:
        raise BackendError(f"{label} serves none of the calls drawn for {pair.name}")
    for name, total in found.items():
        gate = name.removeprefix("gradient of ") in _GATES
        allowed = TOLERANCE[dtype] * (_FOR_GATES if gate else 1.0)
        if not total.relative <= allowed:
            raise BackendError(
                f"{label} differs from our own form of {pair.name}: {name} by {total.relative:.1e} where {allowed:.1e} "
                f"is allowed, most at {total.sizes}; it is not used"
            )
    return max(total.relative for total in found.values())


@dataclass
class _Error:
    """Of one quantity over all draws."""

    differences: float = 0.0
    values: float = 0.0
    worst: float = field(default=-1.0)
    sizes: str = ""

    def add(self, got: Tensor, want: Tensor, sizes: str) -> None:
        difference = float((got.double() - want).square().sum())
        self.differences += difference
        self.values += float(want.square().sum())
        if not difference <= self.worst:  # NaN is the worst
            self.worst, self.sizes = difference, sizes

    @property
    def relative(self) -> float:
        if self.differences == 0:
            return 0.0
        return math.sqrt(self.differences / self.values) if self.values > 0 else math.inf


def _held(name: str, value: Any, dtype: torch.dtype) -> Any:
    """A value as the type can hold it, so that only the arithmetic differs; gates and States in float32 at least."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    rounded = value.to(dtype)
    return rounded.to(torch.promote_types(dtype, torch.float32)) if name in _PRECISE else rounded


@torch.enable_grad()
def _results(
    form: Callable[..., tuple[Tensor, ...]], drawn: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs, and gradients of a weighted sum of them."""
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in drawn.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    outputs = form(**{**drawn, **leaves})
    loss = sum((leaf.double().sum() * 0 for leaf in leaves.values()), torch.zeros((), dtype=torch.float64))
    for output in outputs:
        weights = torch.arange(1, output.numel() + 1, device=output.device, dtype=torch.float64).cos()
        loss = loss + (output.double() * weights.to(dtype).double().view(output.shape)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    return named | {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}


def _key(backend: Backend, place: str) -> str:
    """All that a self-check stands on."""
    forms = (backend.call, backend.pair.naive, backend.pair.draw)
    files = {Path(source) for form in forms if (source := inspect.getsourcefile(inspect.unwrap(form))) is not None}
    digest = hashlib.sha256()
    for content in sorted(file.read_bytes() for file in {*files, *_SOURCES}):
        digest.update(hashlib.sha256(content).digest())
    versions = f"{backend.name} {backend.version()}/torch {torch.__version__}"
    return f"{backend.pair.name}/{versions}/{place}/{digest.hexdigest()}"


def _read() -> dict[str, float]:
    """An unreadable or foreign file counts as empty: the checks can be run again."""
    try:
        content = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {key: float(error) for key, error in entries if isinstance(error, (int, float))}


def _write(remembered: Mapping[str, float]) -> None:
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(dict(sorted(remembered.items())), indent=1) + "\n", encoding="utf-8")
    part.replace(file)
