"""Backends: chosen once, checked against our own form, named, and never replaced silently.

No kernel of a GPU runs here. The registry is held to stand-ins on the CPU; the adapters to fla-core's naive forms,
which take the kernels' place under the kernels' signatures.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from trilemma import laws
from trilemma.errors import BackendError, ConfigError
from trilemma.laws import records
from trilemma.mixers.build import build_mixer
from trilemma.ops import backends, dispatch, fla_kernels
from trilemma.ops.decayed_scan import DECAYED_SCAN, decayed_scan
from trilemma.ops.delta_rule import delta_rule
from trilemma.ops.dispatch import Backend
from trilemma.ops.vector_decay import vector_scan
from trilemma.ops.vector_delta import vector_delta

OURS = {
    "decayed_scan": decayed_scan,
    "vector_scan": vector_scan,
    "delta_rule": delta_rule,
    "vector_delta": vector_delta,
}
PLACE: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    backends.reset()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A right backend named "fake" for the decayed scan, in float32 on the CPU, that serves no ranks; its calls."""
    made: list[str] = []
    own = inspect.unwrap(decayed_scan)

    def call(**given: Any) -> Any:
        made.append(dispatch.sizes(given))
        return own(**given)

    monkeypatch.setattr(backends, "BACKENDS", [fake(call)])
    return made


def fake(call: Callable[..., Any], missing: str = "", **changes: Any) -> Backend:
    given = {
        "name": "fake",
        "call": call,
        "missing": lambda: missing,
        "version": lambda: "1.2",
        "devices": ("cpu",),
        "dtypes": (torch.float32, torch.bfloat16),
    }
    return dataclasses.replace(fla_kernels.BACKENDS[0], **given | changes)


def scaled(**given: Any) -> Any:
    out, state = inspect.unwrap(decayed_scan)(**given)
    return out * 1.01, state


def wrong_backward(**given: Any) -> Any:
    return inspect.unwrap(decayed_scan)(**given | {"k": given["k"] * 1.01 - given["k"].detach() * 0.01})


def raising(**given: Any) -> Any:
    raise RuntimeError("out of resource: shared memory")


def drawn(**changes: Any) -> dict[str, Any]:
    q, k, v = torch.randn(3, 2, 2, 9, 4)
    return {"q": q, "k": k, "v": v, "log_decay": -torch.rand(2, 2, 9)} | changes


def test_nothing_is_chosen_unless_asked(calls: list[str]) -> None:
    decayed_scan(**drawn())
    assert backends.path() == "plain"
    assert backends.running() == []
    backends.choose("plain", [DECAYED_SCAN], **PLACE)
    decayed_scan(**drawn())
    assert backends.path() == "plain"
    assert not calls


@pytest.mark.parametrize("asked", ["auto", "fake"])
def test_a_right_backend_is_checked_once_then_runs_and_is_named(asked: str, calls: list[str]) -> None:
    said: list[str] = []
    (choice,) = backends.choose(asked, [DECAYED_SCAN], say=said.append, **PLACE)
    assert len(said) == 1
    assert said[0] == "decayed_scan: checking backend fake 1.2 against our own form, once"
    assert str(choice).startswith("decayed_scan: fake 1.2 (checked: ")
    assert 0 < float(str(choice)[:-1].split()[-1]) < 1e-6
    assert backends.path() == "plain+fake"
    lengths = {line.split("k [")[1].split("]")[0].split(", ")[2] for line in calls}
    assert {"200"} < lengths  # the pair's sizes and the backend's own
    calls.clear()
    given = drawn()
    torch.testing.assert_close(decayed_scan(**given), inspect.unwrap(decayed_scan)(**given))
    assert len(calls) == 1
    calls.clear()
    backends.choose(asked, [DECAYED_SCAN], say=said.append, **PLACE)
    assert not calls  # remembered
    assert len(said) == 1
    backends.reset()
    decayed_scan(**drawn())
    assert not calls
    assert backends.path() == "plain"


@pytest.mark.parametrize("asked", ["auto", "fake"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            scaled,
            r"differs from our own form of decayed_scan: output 0 by 1\.\de-02 where .* is allowed, most at q \[2, ",
        ),
        (wrong_backward, r"differs from our own form of decayed_scan: gradient of k by 1\.\de-02 where"),
        (raising, r"fails on decayed_scan: RuntimeError: out of resource: shared memory \(q \["),
    ],
)
def test_a_wrong_backend_does_not_run(
    call: Callable[..., Any], message: str, dtype: torch.dtype, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "BACKENDS", [fake(call)])
    place = {"device": "cpu", "dtype": dtype}
    if asked == "fake":
        with pytest.raises(BackendError, match=r"^backend fake 1\.2 on cpu in \w+ " + message):
            backends.choose(asked, [DECAYED_SCAN], **place)
    else:
        said: list[str] = []
        (choice,) = backends.choose(asked, [DECAYED_SCAN], say=said.append, **place)
        assert choice.runs == "plain PyTorch"
        assert "backend fake 1.2 on cpu" in choice.why
        assert said[-1] == str(choice)
    assert backends.path() == "plain"
    assert not backends.cache_file().exists()  # a failure is not remembered
    decayed_scan(**drawn())


@pytest.mark.parametrize(
    ("backend", "dtype", "reason"),
    [
        (fake(scaled, missing="not installed: pip install fake"), torch.float32, "not installed: pip install fake"),
        (fake(scaled, devices=("cuda",)), torch.float32, "backend fake runs on cuda, not on cpu"),
        (fake(scaled, dtypes=(torch.bfloat16,)), torch.float32, "takes values in bfloat16, not in float32"),
        (fake(scaled, refuses=lambda **_: "all"), torch.float32, "serves none of the calls drawn for decayed_scan"),
    ],
)
def test_what_cannot_serve_says_why(
    backend: Backend, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "BACKENDS", [backend])
    with pytest.raises(BackendError, match=reason):
        backends.choose("fake", [DECAYED_SCAN], device="cpu", dtype=dtype)
    (choice,) = backends.choose("auto", [DECAYED_SCAN], device="cpu", dtype=dtype)
    assert reason in str(choice)
    assert backends.path() == "plain"


def test_names_and_operators_without_a_kernel(calls: list[str]) -> None:
    with pytest.raises(ConfigError, match='unknown backend "fakee"; did you mean "fake"'):
        backends.choose("fakee", [DECAYED_SCAN], **PLACE)
    with pytest.raises(BackendError, match="backend fake has kernels for decayed_scan; the operators here: none"):
        backends.choose("fake", [], **PLACE)
    assert backends.choose("auto", [], **PLACE) == []


def test_a_call_that_is_refused_is_an_error_or_said(calls: list[str]) -> None:
    ranks = drawn(rank=3)
    backends.choose("fake", [DECAYED_SCAN], **PLACE)
    message = (
        r"decayed_scan: backend fake cannot serve this call: 3 writes a token \(q \[2, 2, 9, 4\], .*use backend auto"
    )
    with pytest.raises(BackendError, match=message):
        decayed_scan(**ranks | {"log_decay": -torch.rand(2, 2, 3)})
    said: list[str] = []
    backends.choose("auto", [DECAYED_SCAN], say=said.append, **PLACE)
    calls.clear()
    for _ in range(2):
        decayed_scan(**ranks | {"log_decay": -torch.rand(2, 2, 3)})
    decayed_scan(**{name: tensor.double() for name, tensor in drawn().items()})
    assert not calls
    assert said == [
        "decayed_scan: plain PyTorch, not fake, for 3 writes a token",
        "decayed_scan: plain PyTorch, not fake, for values in float64",
    ]
    assert "; plain PyTorch for 3 writes a token, values in float64)" in str(backends.running()[0])


def test_a_step_is_ours(calls: list[str]) -> None:
    backends.choose("fake", [DECAYED_SCAN], **PLACE)
    calls.clear()
    given = {name: tensor[:, :, :1] for name, tensor in drawn().items()}
    state = torch.zeros(2, 2, 4, 4)
    with torch.no_grad():
        _, after = decayed_scan(**given, state=state)
    assert after is state
    assert not calls


def test_a_damaged_cache_counts_as_empty(calls: list[str]) -> None:
    for content in ("{", "[]", '{"key": "no number"}'):
        backends.cache_file().parent.mkdir(parents=True, exist_ok=True)
        backends.cache_file().write_text(content)
        calls.clear()
        backends.choose("fake", [DECAYED_SCAN], **PLACE)
        assert calls
        (key,) = json.loads(backends.cache_file().read_text())
        assert key.startswith("decayed_scan/fake 1.2/torch ")


def test_a_path_with_a_backend_borrows_no_record(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = laws.fingerprint("retention")
    with pytest.raises(ConfigError, match=r'unknown path "plain\+fake"'):
        laws.fingerprint("retention", "plain+fake")
    backends.choose("fake", [DECAYED_SCAN], **PLACE)
    assert laws.fingerprint("retention") == plain
    one = laws.fingerprint("retention", "plain+fake")
    assert one != plain
    monkeypatch.setattr(backends, "BACKENDS", [dataclasses.replace(backends.BACKENDS[0], version=lambda: "1.3")])
    backends.choose("fake", [DECAYED_SCAN], **PLACE)
    assert laws.fingerprint("retention", "plain+fake") not in (one, plain)


def test_admission_runs_the_laws_with_the_backend_in_use(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And a record on the plain path without it, whatever is chosen."""
    said: list[str] = []
    verify = records.verify
    monkeypatch.setattr(records, "verify", lambda *a, **k: verify(*a, **{**k, "laws": ["split"], "variant": 0}))
    monkeypatch.setattr(records, "laws_of", lambda path: ["split"])
    mixers = [build_mixer("retention", 16, num_heads=2)]
    assert laws.admit(mixers, "fake", say=said.append, **PLACE) == "plain+fake"
    assert any(line.startswith("decayed_scan: fake 1.2 (checked") for line in said)
    assert 'no law record for "retention" on the path plain+fake (cpu): running the laws once' in said
    served = dispatch._chosen["decayed_scan"].served
    assert served > 0
    again: list[str] = []
    laws.admit(mixers, "fake", say=again.append, **PLACE)
    assert len(again) == 1  # the name of what runs
    calls.clear()
    records.record("retention", "plain")
    assert not calls
    assert backends.path() == "plain+fake"


@pytest.mark.parametrize("asked", ["auto", "fake"])
def test_a_backend_that_breaks_a_law(asked: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def require(mixers: Any, path: str, **_: Any) -> None:
        if path != "plain":
            raise laws.admission.LawError("the law split")

    monkeypatch.setattr(laws.admission, "require", require)
    said: list[str] = []
    mixers = [build_mixer("retention", 16, num_heads=2)]
    if asked == "fake":
        with pytest.raises(laws.admission.LawError, match="the law split"):
            laws.admit(mixers, asked, say=said.append, **PLACE)
    else:
        assert laws.admit(mixers, asked, say=said.append, **PLACE) == "plain"
        assert "the law split\nplain PyTorch runs instead" in said[-1]


def test_the_operators_of_what_is_inside_count() -> None:
    mixers = [build_mixer("bidirectional", 16, causal=False, inner="retention", num_heads=2), build_mixer("gru", 16)]
    assert "decayed_scan" in {pair.name for pair in laws.operators_of(mixers)}


# The adapters, with their authors' naive forms in the kernels' place.


def naive(folder: str) -> ModuleType:
    """fla-core's file alone: its package needs Triton."""
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "ops" / folder / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{folder.replace('/', '_')}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def signature(module: str, name: str) -> list[str]:
    """The parameters of a kernel, read from its source."""
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "ops" / module.replace(".", "/") / "chunk.py"
    body = file.read_text().partition(f"def {name}(")[2].partition("):")[0].partition(") ->")[0]
    return [line.split(":")[0].strip() for line in body.strip().splitlines()]


def stand_in(module: str, name: str) -> Callable[..., Any]:
    """A naive form under the kernel's signature: [B, L, H, *], float32 inside, packed sequences in one row."""
    forms = naive(module.replace(".", "/"))

    def flipped(form: Callable[..., Any], *tensors: Tensor, **rest: Any) -> Any:
        """For those that take [B, H, L, *]."""
        out, state = form(*(t.transpose(1, 2) for t in tensors), **rest)
        return out.transpose(1, 2), state

    def run(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, g: Any, beta: Any, a: Any, b: Any, gk: Any) -> Any:
        last: dict[str, Any] = {"initial_state": state, "output_final_state": True}
        widened = q * q.shape[-1] ** 0.5  # those that scale in any case
        if name == "chunk_simple_gla":
            return forms.naive_recurrent_simple_gla(q, k, v, g, scale=1.0, **last)
        if name == "chunk_gla":
            return forms.naive_recurrent_gla(widened, k, v, g, **last)
        if name == "chunk_gated_delta_rule":
            return forms.naive_recurrent_gated_delta_rule(q, k, v, beta, g, scale=1.0, **last)
        if name == "chunk_delta_rule":
            return flipped(forms.delta_rule_recurrence, widened, k, v, beta, **last)
        return flipped(forms.dplr_recurrence, widened, k, v, a, b, gk, **last)

    def kernel(**given: Any) -> Any:
        assert set(given) <= set(signature(module, name)), given.keys()
        assert given.pop("scale") == 1.0
        wanted, limits, state = (given.pop(n) for n in ("output_final_state", "cu_seqlens", "initial_state"))
        tensors = {n: given.pop(n, None) for n in ("q", "k", "v", "g", "beta", "a", "b", "gk")}
        assert not given
        if limits is None:
            out, final = run(state=state, **tensors)
            return out, final if wanted else None
        assert tensors["q"].shape[0] == 1
        spans = [slice(begin, end) for begin, end in zip(limits[:-1].tolist(), limits[1:].tolist(), strict=True)]
        pieces = [{n: None if t is None else t[:, span] for n, t in tensors.items()} for span in spans]
        return torch.cat([run(state=None, **piece)[0] for piece in pieces], dim=1), None

    return kernel


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Backend]:
    """fla's backends, on the CPU in float32 with stand-ins for the kernels."""
    monkeypatch.setattr(fla_kernels, "kernel", stand_in)
    changes: dict[str, Any] = {"missing": lambda: "", "devices": ("cpu",), "dtypes": (torch.float32,)}
    return {backend.pair.name: dataclasses.replace(backend, **changes) for backend in fla_kernels.BACKENDS}


@pytest.mark.parametrize("operator", sorted(OURS))
def test_an_adapter_passes_the_self_check(operator: str, kernels: dict[str, Backend]) -> None:
    """Outputs, states and all gradients, on layouts, scale, decays, groups of heads and the last State."""
    assert backends.self_check(kernels[operator], "cpu", torch.float32) < 1e-5


@pytest.mark.parametrize("operator", sorted(OURS))
def test_an_adapter_lays_packed_sequences_end_to_end(operator: str, kernels: dict[str, Backend]) -> None:
    given = kernels[operator].draw(torch.Generator().manual_seed(1), torch.float32)
    given |= {"state": None, "starts": torch.zeros(2, 200, dtype=torch.bool)}
    given["starts"][0, [0, 3, 64, 199]] = True
    given["starts"][1, [0, 120]] = True
    want, _ = OURS[operator](**given)
    dispatch._chosen[operator] = dispatch.Chosen(kernels[operator])
    got, _ = OURS[operator](**given)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert dispatch._chosen[operator].served == 1
    with pytest.raises(BackendError, match="packed sequences with a State"):
        OURS[operator](**given, want_state=True)


def test_fla_says_what_it_lacks_here() -> None:
    with pytest.raises(BackendError, match=r"^backend fla runs on cuda, not on cpu$"):
        backends.choose("fla", [DECAYED_SCAN], device="cpu", dtype=torch.bfloat16)
    if importlib.util.find_spec("triton") is None:
        with pytest.raises(BackendError, match=r"is not installed: pip install 'trilemma\[gpu\]'"):
            backends.choose("fla", [DECAYED_SCAN], device="cuda", dtype=torch.bfloat16)
    wide = torch.zeros(1, 1, 4, fla_kernels.WIDEST + 1)
    refused = fla_kernels._refuses(k=wide, v=wide, state=None, starts=None, want_state=False)
    assert refused == f"heads wider than {fla_kernels.WIDEST}"
