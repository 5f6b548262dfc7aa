"""`trilemma doctor` says what it found, what it chose and why; --json is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trilemma import machine
from trilemma.cli.main import main
from trilemma.nn import kernels


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = machine.measure_ceilings("cpu", quick=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "measure_ceilings", lambda device: measured)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 1
    report = json.loads(lines[0])
    assert report["chosen"]["device"] == {"value": "cpu", "reason": "as asked"}
    assert report["chosen"]["precision"]["value"] in ("float32", "bfloat16")
    assert report["ceilings"]["float32_gflops"] > 0
    assert report["machine"]["threads"] >= 1
    assert "measuring" in captured.err
    reasons = {(item["runs"], item["why"]) for item in report["backends"]}
    assert reasons == {("plain PyTorch", "backend fla runs on cuda, not on cpu")}
    assert report["weights_on_the_cpu"] == kernels.explained()
    assert {"decayed_scan", "delta_rule"} <= {item["operator"] for item in report["backends"]}


def test_text_names_every_choice_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "device     cpu: as asked" in text
    assert machine.choose_precision("cpu")[1] in text
    assert "GFLOP/s" in text
    assert "GB/s" in text
    assert "decayed_scan  plain PyTorch (backend fla runs on cuda, not on cpu)" in text
    assert f"int8      {kernels.explained()['int8']}" in text
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "measuring" not in capsys.readouterr().err  # the second time it comes from the cache


def test_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cdua"]) == 2
    assert capsys.readouterr().err == 'trilemma: unknown device "cdua"; did you mean "cuda"?\n'
