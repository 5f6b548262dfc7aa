"""`trilemma quantize`: a run in 8 bits that every verb opens, and what it says of its quality."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import trilemma
from trilemma.cli.main import main
from trilemma.models import products
from trilemma.runs import RunDirectory

MakeRun = Callable[..., Path]
WIDE = {"model__d_model": 64, "model__d_ff": 64, "training__precision": "float32"}
LINES = "one\ntwo and three\n\nfour\n"


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """Two aligned files."""
    for name in ("s", "t"):
        (tmp_path / name).write_text("one\ntwo\nthree\n")
    return [str(tmp_path / "s"), str(tmp_path / "t")]


@pytest.mark.parametrize(("kind", "smaller", "near"), [("int8", 0.3, 0.05), ("int4", 0.25, 0.3)])
def test_a_coded_run(
    make_run: MakeRun, pairs: list[str], kind: str, smaller: float, near: float, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(**WIDE)
    assert main(["quantize", str(run), *pairs, "--json", *([] if kind == "int8" else ["--dtype", kind])]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = run.with_name(f"run-{kind}")
    assert result["run"] == str(folder)
    assert result["weight_bytes"]["after"] < smaller * result["weight_bytes"]["before"]
    assert result["weight_bytes"]["before"] == (run / "model.safetensors").stat().st_size
    changes = {entry["before"]["metric"]: entry for entry in result["scores"]}
    assert {"bleu", "loss"} <= changes.keys()
    before, after = (changes["loss"][side]["value"] for side in ("before", "after"))
    assert before != after
    assert after == pytest.approx(before, rel=near)
    config = RunDirectory.open(folder).read_config()
    assert config.model.quantization == kind
    assert "model.safetensors" in config.notes["quantization"]
    predictor = trilemma.load(folder, device="cpu")
    assert kind in predictor.path
    on_the_fly = trilemma.load(run, device="cpu", dtype=kind)
    assert products(on_the_fly.model) == products(predictor.model)
    assert predictor.translate(["one", "two"]) == on_the_fly.translate(["one", "two"])


def test_a_run_that_was_altered_is_not_read(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(**WIDE)
    assert main(["quantize", str(run), "--no-check", "--out", str(run.with_name("small"))]) == 0
    path = run.with_name("small") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    capsys.readouterr()
    assert main(["evaluate", str(run.with_name("small"))]) == 2
    assert "altered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "{run}", "--no-check", "x.tsv"], "files are what quality is measured on"),
        (["quantize", "{run}", "--no-check", "--out", "{run}"], "holds a run"),
        (["quantize", "{small}", "--no-check", "--out", "{run}-2"], "its weights are in int8 already"),
        (["quantize", "{small}", "--no-check", "--dtype", "int4"], "its weights are in int8 already"),
        (["quantize", "{run}", "--dtype", "int5"], '--dtype: weights are in int8 or int4, found "int5"; did you mean'),
        (["evaluate", "{small}", "--dtype", "int4"], "its weights are in int8 already; leave dtype to the run"),
        (["quantize", "nowhere"], "nowhere"),
        (["export", "{small}", "--to", "hf", "--out", "{run}-hf"], "its weights are in int8; export the run"),
        (["evaluate", "{small}", "--dtype", "bfloat16"], "its weights are in int8 and all else in float32"),
        (
            ["train", "{run}.yaml", "--from", "{small}", "--out", "{run}-3"],
            "its weights are in int8; start from the run",
        ),
    ],
)
def test_refusals(make_run: MakeRun, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(**WIDE)
    small = run.with_name("small")
    assert main(["quantize", str(run), "--no-check", "--out", str(small)]) == 0
    run.with_name("run.yaml").write_text("data: {train: {generated: copy, size: 10}}\ntraining: {steps: 1}\n")
    capsys.readouterr()
    assert main([argument.format(run=run, small=small) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_scores_of_another_type_are_not_kept(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(**WIDE, data__test={"generated": "copy", "size": 4}, data__task="seq2seq")
    assert main(["evaluate", str(run), "--dtype", "int8"]) == 0, capsys.readouterr().err
    assert not (run / "scores.json").exists()
    assert main(["evaluate", str(run)]) == 0
    assert (run / "scores.json").exists()
