"""`trilemma plan` on recipes and studies, and what it answers to mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trilemma.cli import main as cli

RECIPES = Path(__file__).parents[2] / "recipes"


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_paper_on_its_own_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(
        capsys, str(RECIPES / "transformer-base.yaml"), "--on", "P100", "--devices", "8", "--seconds-per-step", "0.4"
    )
    assert code == 0
    assert "62,984,192 in matrices" in out
    assert "model FLOPs    9.51e+17" in out
    assert "machine FLOPs  3.04e+18, time x devices x peak, what many papers print; 31% of it is arithmetic" in out
    assert "11 h 06 min at 0.4 s a step" in out
    assert "fits" in out


def test_a_study_plans_each_candidate(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, str(RECIPES / "demo.yaml"), "--on", "a100", "--price-per-hour", "2.5", "--json")
    assert code == 0
    found: list[dict[str, Any]] = json.loads(out.splitlines()[-1])["plans"]
    assert [one["name"] for one in found] == ["Transformer", "RetNet", "LSTM"]
    assert all(one["price"] > 0 and one["fraction"] == 0.35 and one["memory"]["total"] > 0 for one in found)
    assert found[1]["parameters"]["non_embedding"] == pytest.approx(found[0]["parameters"]["non_embedding"], rel=0.02)


@pytest.mark.turns(2)
def test_a_matrix_plans_each_task(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, str(RECIPES / "probes.yaml"), "--on", "A100", "--json")
    assert code == 0
    names = [one["name"] for one in json.loads(out.splitlines()[-1])["plans"]]
    assert len(names) == 5 * 9
    assert "MQAR: Mamba-2" in names


def test_a_study_that_locks_flops_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["budget.lock=flops", "budget.amount=1e12"]
    code, out, _ = plan(capsys, str(RECIPES / "demo.yaml"), *overrides, "--on", "A100", "--json")
    assert code == 0
    assert all(one["flops"] == pytest.approx(1e12, rel=0.02) for one in json.loads(out.splitlines()[-1])["plans"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "TPU"], 'unknown hardware "TPU"'),
        (["--fraction", "0"], "--fraction: a positive number is needed, found 0"),
        (["--fraction", "1.5"], "--fraction: at most 1, found 1.5"),
        (["--fraction", "0.5", "--seconds-per-step", "1"], "give one of them"),
        (["--seconds-per-step", "-1"], "--seconds-per-step: a positive number is needed, found -1"),
        (["--price-per-hour", "0"], "--price-per-hour: a positive number is needed"),
        (["--measure", "--on", "A100"], "--measure times this machine: leave out --on"),
        (["--on", "A100", "--devices", "2"], "1 micro-batches cannot be dealt evenly over 2 devices"),
        (["--on", "A100", "training.stepz=3"], 'unknown key "training.stepz"; did you mean "steps"'),
        (["--on", "A100", "training.steps=null"], "nothing ends this run"),
        (["--on", "A100", "model.mixer=retentoin"], 'did you mean "retention"'),
    ],
)
def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = plan(capsys, str(RECIPES / "copy.yaml"), *arguments)
    assert code == 2
    assert message in err
    assert out == ""


def test_a_file_that_is_no_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert plan(capsys, str(tmp_path / "none.yaml"))[0] == 2
    (tmp_path / "list.yaml").write_text("- 1\n")
    code, _, err = plan(capsys, str(tmp_path / "list.yaml"))
    assert code == 2
    assert "a mapping of sections is needed" in err
    assert plan(capsys, str(tmp_path))[0] == 2


def test_measured_here(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["training.batch_tokens=200", "training.precision=float32", "--measure", "--json"]
    code, out, _ = plan(capsys, str(RECIPES / "copy.yaml"), *arguments)
    assert code == 0
    found = json.loads(out.splitlines()[-1])["plans"][0]
    assert found["fraction_from"] == "measured"
    assert 0 < found["fraction"] < 1
