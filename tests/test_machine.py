"""The machine's description: choices follow measurements and instructions, the cache is harmless."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from trilemma import machine
from trilemma.errors import ConfigError


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return machine.cache_file()


@pytest.fixture(scope="module")
def quick() -> machine.Ceilings:
    return machine.measure_ceilings("cpu", quick=True)


def test_description_is_plausible() -> None:
    found = machine.describe()
    assert found.cores >= 1
    assert found.threads == torch.get_num_threads()
    assert found.memory_bytes > 2**28
    assert found.cpu


def test_measured_ceilings_are_positive_and_finite(quick: machine.Ceilings) -> None:
    numbers = [quick.float32_gflops, quick.bfloat16_gflops, quick.overhead_us, quick.autocast_gain]
    numbers += [rate for _, rate in quick.bandwidth]
    assert all(0 < number < 1e7 for number in numbers)


@pytest.mark.parametrize(("seconds", "repeats"), [(0.01, 7), (0.4, 3), (5.0, 1)])
def test_a_slow_call_is_not_repeated(seconds: float, repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def run() -> None:
        nonlocal now, calls
        now, calls = now + seconds, calls + 1

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now)
    assert machine.best_seconds(run, "cpu") == pytest.approx(seconds)
    assert calls == 1 + repeats, "one call warms up"


def test_measuring_leaves_the_random_stream_and_the_gradient_mode_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        machine.measure_ceilings("cpu", quick=True)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)


def test_bandwidth_takes_the_measured_footprint_below(quick: machine.Ceilings) -> None:
    ceilings = dataclasses.replace(quick, bandwidth=((100, 9.0), (1000, 5.0)))
    assert [ceilings.bandwidth_gbps(size) for size in (1, 100, 999, 1000, 10**9)] == [9.0, 9.0, 9.0, 5.0, 5.0]


def test_matmul_ceiling_by_type(quick: machine.Ceilings) -> None:
    ceilings = dataclasses.replace(quick, float32_gflops=100.0, bfloat16_gflops=300.0)
    by_type = [ceilings.matmul_gflops(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert by_type == [50.0, 100.0, 300.0]


@pytest.mark.parametrize(
    ("instructions", "gain", "precision", "reason"),
    [
        (("avx2",), 9.0, "float32", "no bfloat16 instructions"),
        (("avx512f", "avx512_bf16"), 1.05, "float32", "gains only a factor 1.05"),
        (("avx512f", "avx512_bf16"), 1.9, "bfloat16", "1.9 times as fast"),
        (("amx_bf16",), 3.0, "bfloat16", "amx_bf16"),
    ],
)
def test_precision_follows_instructions_and_measured_gain(
    instructions: tuple[str, ...],
    gain: float,
    precision: str,
    reason: str,
    quick: machine.Ceilings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_instruction_sets", lambda: instructions)
    monkeypatch.setattr(machine, "ceilings", lambda device: dataclasses.replace(quick, autocast_gain=gain))
    chosen, why = machine.choose_precision("cpu")
    assert chosen == precision
    assert reason in why


def test_device_choice() -> None:
    assert machine.choose_device("cpu") == ("cpu", "as asked")
    assert machine.choose_device("auto")[0] in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match='unknown device "gpu"'):
        machine.choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device cuda: torch finds none"):
            machine.choose_device("cuda")


def test_ceilings_are_measured_once(cache: Path, quick: machine.Ceilings, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measure(device: str) -> machine.Ceilings:
        calls.append(device)
        return quick

    monkeypatch.setattr(machine, "measure_ceilings", measure)
    assert not machine.ceilings_are_cached("cpu")
    assert machine.ceilings("cpu") == quick
    assert machine.ceilings_are_cached("cpu")
    assert machine.ceilings("cpu") == quick
    assert calls == ["cpu"]
    machine.ceilings("cpu", refresh=True)
    assert calls == ["cpu", "cpu"]


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"x": 1}', '{"KEY": {"device": "cpu"}}', '{"KEY": null}'])
def test_a_damaged_cache_is_measured_again(
    content: str, cache: Path, quick: machine.Ceilings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "measure_ceilings", lambda device: quick)
    cache.parent.mkdir(parents=True)
    cache.write_text(content.replace("KEY", machine.hardware_key("cpu")))
    assert machine.ceilings("cpu") == quick
    assert machine.hardware_key("cpu") in json.loads(cache.read_text())


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, quick: machine.Ceilings, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(machine, "measure_ceilings", lambda device: quick)
    assert machine.ceilings("cpu") == quick


def test_the_hardware_key_depends_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.hardware_key("cpu")
    described = dataclasses.replace(machine.describe(), threads=999)
    monkeypatch.setattr(machine, "describe", lambda: described)
    assert machine.hardware_key("cpu") != before


def test_environment_is_plain_json_and_names_what_a_number_needs() -> None:
    found = machine.environment("cpu", "float32", compile=False)
    assert json.loads(json.dumps(found)) == found
    wanted = {"python", "torch", "trilemma", "platform", "cpu", "threads", "device", "precision", "compile", "commit"}
    assert wanted <= set(found)


def test_environment_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure_ceilings", lambda device: pytest.fail("measured"))
    machine.environment("cpu")
