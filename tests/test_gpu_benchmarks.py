"""What the benchmarks of a GPU decide without one: sizes, FLOPs, floors, and that nothing measured is lost."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trilemma.errors import ConfigError
from trilemma.machine import measure_ceilings

ROOT = Path(__file__).parents[1]
WEIGHTS = {"124m": 124e6, "350m": 350e6, "1.3b": 1.3e9, "6.7b": 6.7e9}


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


@pytest.fixture(scope="module")
def models() -> ModuleType:
    return importlib.import_module("gpu_models")


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    return importlib.import_module("gpu_cases")


# --- models


@pytest.mark.parametrize("size", WEIGHTS)
def test_models_have_the_weights_that_they_are_named_for(size: str, models: ModuleType) -> None:
    mixers = [mixer for mixer in models.MIXERS if not (size == "124m" and mixer == "attention-gqa8")]
    for mixer in mixers:
        model = models.decoder(size, mixer, "meta", torch.bfloat16)
        assert models.parameters(model) == pytest.approx(WEIGHTS[size], rel=0.03), mixer
        assert {(parameter.dtype, parameter.device.type) for parameter in model.parameters()} == {
            (torch.bfloat16, "meta")
        }
    assert torch.get_default_dtype() == torch.float32


def test_a_transformers_training_costs_what_the_rule_says(models: ModuleType) -> None:
    """6 for each matrix parameter, the tied output counted and the look-up not, and half of all pairs: 12 L d T / 2."""
    model = models.decoder("1.3b", "attention", "meta", torch.bfloat16)
    layers, width, inner, vocabulary, length = 24, 2048, 5376, 50304, 2048
    matrices = layers * (4 * width**2 + 3 * width * inner) + vocabulary * width
    wanted = 6 * matrices + 3 * layers * 4 * width * (length + 1) / 2
    assert models.training_flops(model, length) == pytest.approx(wanted, rel=1e-12)
    assert models.training_flops(model, length) * length == pytest.approx(3 * model.flops(length), rel=1e-12)


@pytest.mark.parametrize(
    ("mixer", "a_layer"),
    [
        # heads x (4 keys x values + chunk x (keys + values))
        ("retention", 8 * (4 * 256 * 512 + 64 * (256 + 512))),
        # 4 states x inner + chunk x (states + inner)
        ("mamba2", 4 * 128 * 4096 + 64 * (128 + 4096)),
        # heads x (6 keys x values + 1.5 chunk x (keys + values) + chunk^2)
        ("gated_deltanet", 6 * (6 * 256 * 512 + 1.5 * 128 * (256 + 512) + 128**2)),
    ],
)
def test_a_linear_mixers_training_costs_no_more_than_is_run(mixer: str, a_layer: float, models: ModuleType) -> None:
    model = models.decoder("1.3b", mixer, "meta", torch.bfloat16)
    assert models.mixing_flops(model.mixers()[0], 8192) == a_layer
    flops = models.training_flops(model, 8192)
    assert flops == models.training_flops(model, 2048)
    assert 0.9 < flops * 8192 / (3 * model.flops(8192)) < 1


def test_a_step_reads_weights_once_and_the_state_of_each_row(models: ModuleType) -> None:
    attention = models.decoder("tiny", "attention", "cpu", torch.float32)
    held = models.step_bytes(attention, context=100, rows=3)
    assert held["weight_bytes"] == 4 * models.parameters(attention)  # the tied table is the output: all is read
    assert held["state_bytes"] == 3 * 2 * 2 * 128 * 100 * 4
    assert held["written_bytes"] == 3 * 2 * 2 * 128 * 4
    retention = models.decoder("tiny", "retention", "cpu", torch.float32)
    held = models.step_bytes(retention, context=100, rows=3)
    assert held["state_bytes"] == held["written_bytes"] == 3 * 2 * 128 * 256 * 4


def test_shares_are_of_what_the_same_run_measured(models: ModuleType) -> None:
    ceilings = vars(measure_ceilings(quick=True)) | {"bandwidth": [[1, 9000.0], [10**9, 4000.0]]}
    assert models.of_bandwidth(2 * 10**9, 1.0, ceilings) == pytest.approx(0.5)
    row = {"tokens_per_second": 1e5, "flops_per_token": 4e9}
    run = {"board": {"flops": {"bfloat16": 1e15}}, "ceilings": {"bfloat16_gflops": 8e5}}
    assert models.utilisation(row, run) == pytest.approx({"peak": 0.4, "ceiling": 0.5})
    assert models.utilisation(row, run | {"board": None})["peak"] is None


# --- cases


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "x.json").read_text())["rows"]
    return rows


def ledger_in(cases: ModuleType, folder: Path, gpu: str | None = None) -> Any:
    ledger = cases.Ledger("x", folder)
    ledger.begin_run({"environment": {"gpu": gpu}})
    return ledger


def study_of(cases: ModuleType, measure: Any) -> Any:
    return cases.Study("x", "x.py", "", lambda tiny: [], measure, lambda result: "")


def test_what_is_finished_is_not_measured_again(cases: ModuleType, tmp_path: Path) -> None:
    asked: list[int] = []

    def measure(case: dict[str, Any], device: str) -> dict[str, Any]:
        asked.append(case["n"])
        assert rows_of(tmp_path)[-1]["reason"] == cases.INTERRUPTED  # should the process die now
        if case["n"] == 2:
            raise torch.OutOfMemoryError("too large\nby far")
        return {"ms": case["n"]}

    wanted = [{"n": n} for n in (1, 2, 3)]
    assert cases.work(study_of(cases, measure), ledger_in(cases, tmp_path), wanted, 60, 60) == 0
    assert [row["reason"] for row in rows_of(tmp_path)] == ["", "out of memory: too large", ""]
    again = ledger_in(cases, tmp_path)
    assert again.pending(wanted) == []
    again.drop_failed()
    cases.work(study_of(cases, measure), again, [*wanted, {"n": 4}], 60, 60)
    assert asked == [1, 2, 3, 2, 4]
    assert [(row["case"]["n"], row["run"]) for row in rows_of(tmp_path)] == [(1, 0), (3, 0), (2, 1), (4, 1)]


def test_after_an_error_another_process_goes_on(cases: ModuleType, tmp_path: Path) -> None:
    def measure(case: dict[str, Any], device: str) -> dict[str, Any]:
        if case["n"] == 1:
            raise RuntimeError(f"an illegal access in {ROOT}/benchmarks/x.py")
        if case["n"] == 2:
            raise ConfigError("a clear mistake")
        return {}

    wanted = [{"n": n} for n in (1, 2, 3)]
    assert cases.work(study_of(cases, measure), ledger_in(cases, tmp_path), wanted, 60, 60) == cases.BROKEN
    assert rows_of(tmp_path)[0]["reason"] == "RuntimeError: an illegal access in benchmarks/x.py"
    assert cases.work(study_of(cases, measure), ledger_in(cases, tmp_path), wanted, 60, 60) == 0
    assert [row["reason"] for row in rows_of(tmp_path)[1:]] == ["a clear mistake", ""]


def test_a_case_has_a_limit_and_the_end_of_all_time_is_no_failure(cases: ModuleType, tmp_path: Path) -> None:
    slow = study_of(cases, lambda case, device: time.sleep(30))
    assert cases.work(slow, ledger_in(cases, tmp_path), [{"n": 1}], 60, 0.05) == cases.BROKEN
    assert rows_of(tmp_path)[0]["reason"] == "longer than 0 s"
    assert cases.work(slow, ledger_in(cases, tmp_path), [{"n": 2}], 0.05, 60) == 0
    assert [row["case"]["n"] for row in rows_of(tmp_path)] == [1]


def test_workers_are_replaced_while_they_get_on(cases: ModuleType) -> None:
    left = [3]

    def missing() -> int:
        left[0] -= 1
        return max(left[0], 0)

    command = [sys.executable, "-c", f"raise SystemExit({cases.BROKEN})"]
    assert cases.oversee(command, missing, 60) == cases.BROKEN
    assert left[0] < 0
    assert cases.oversee([sys.executable, "-c", ""], missing, 60) == 0


def test_results_of_two_gpus_are_not_mixed(cases: ModuleType, tmp_path: Path) -> None:
    ledger_in(cases, tmp_path, "NVIDIA H200").put({"n": 1}, {"reason": ""})
    with pytest.raises(SystemExit, match=r"x holds results of NVIDIA H200, this is NVIDIA A100: use --name"):
        ledger_in(cases, tmp_path, "NVIDIA A100")


def test_cases_are_chosen_by_name_and_value(cases: ModuleType) -> None:
    some = [{"size": size, "batch": batch} for size in ("s", "m") for batch in (1, 8)]
    assert cases.chosen(some, ["size=m", "batch=1,8"]) == some[2:]
    with pytest.raises(ValueError, match=r"^--only batch=2: no case has batch 2; batch is 1, 8$"):
        cases.chosen(some, ["batch=2"])
    with pytest.raises(ValueError, match=r"there are batch, size$"):
        cases.chosen(some, ["rows=2"])


@pytest.mark.parametrize("name", ["gpu_laws", "gpu_training", "gpu_decode"])
def test_without_a_gpu_it_is_skipped_and_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cases: ModuleType
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match="77"):
        cases.arguments_of(importlib.import_module(name).STUDY)
    assert f"{name}: skipped: it measures a GPU, and torch finds no CUDA here" in capsys.readouterr().err


# --- what is measured


def test_the_wanted_models_lengths_and_batches_are_there() -> None:
    training, decode = importlib.import_module("gpu_training"), importlib.import_module("gpu_decode")
    trained = [case for case in training.cases(False) if case["backend"] == "plain"]
    assert len(trained) == 3 * 4 * 2 * 2
    assert {"size": "1.3b", "mixer": "mamba2", "length": 8192, "mode": "compiled", "backend": "plain"} in trained
    decoded = decode.cases(False)
    assert len(decoded) == 2 * (2 * 3 + 2) * 3 * 3
    assert {"size": "6.7b", "mixer": "retention", "context": 32768, "batch": 64, "path": "graph"} in decoded


@pytest.mark.parametrize("mixer", ["attention", "attention-gqa8", "retention"])
@pytest.mark.parametrize("rows", [1, 2])
def test_what_a_graph_would_repeat_gives_plain_logits(mixer: str, rows: int) -> None:
    decode = importlib.import_module("gpu_decode")
    for path in decode.PATHS if mixer != "retention" else decode.PATHS[:2]:
        case = {"size": "tiny", "mixer": mixer, "context": 20, "batch": rows, "path": path}
        found = decode.measure(case, "cpu")
        if path == "plain":
            assert found["ms"] > 0
            continue
        assert found["reason"].startswith("no CUDA graphs on cpu; what one would repeat differs by")
        assert found["error"] < 2e-6


def test_a_graph_that_answers_otherwise_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = importlib.import_module("gpu_decode")
    monkeypatch.setattr(decode.FixedStep, "restart", lambda step: None)  # the warm-up's tokens stay in the State
    case = {"size": "tiny", "mixer": "retention", "context": 20, "batch": 1, "path": "graph"}
    assert "of the largest, 0.0002 is allowed" in decode.measure(case, "cpu")["reason"]


def test_training_goes_on_with_fewer_rows_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    training = importlib.import_module("gpu_training")
    asked: list[int] = []

    def measured(case: dict[str, Any], rows: int, device: str) -> dict[str, Any]:
        asked.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError
        return {"rows": rows}

    monkeypatch.setattr(training, "measure_rows", measured)
    assert training.measure({"size": "1.3b", "length": 2048}, "cpu") == {"rows": 2}
    assert asked == [8, 4, 2]


def test_one_training_is_counted() -> None:
    training = importlib.import_module("gpu_training")
    case = {"size": "tiny", "mixer": "retention", "length": 32, "mode": "eager", "backend": "plain"}
    found = training.measure(case, "cpu")
    assert found["rows"] == 4
    assert found["tokens_per_second"] == pytest.approx(128 / found["step_ms"] * 1e3)
    assert found["last_loss"] < found["first_loss"]
