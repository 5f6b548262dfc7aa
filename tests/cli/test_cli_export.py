"""`trilemma export`: the folder that it writes, and what it says to a user's mistakes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trilemma.cli.main import main
from trilemma.runs import files

MakeRun = Callable[..., Path]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["export", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_a_run_becomes_a_folder(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    arguments = [str(make_run(model__mixer="gru")), "--to", "torch-export", "--out", str(out), "--rows", "1"]
    assert main(["export", *arguments, "--json"]) == 0
    page = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = ["encoder.pt2", "program.json", "start.safetensors", "step.pt2", "tokenizer.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    stored = json.loads((out / "program.json").read_text())
    assert page == {"out": str(out), "target": "torch-export", **stored}
    assert (stored["rows"], stored["source_length"], stored["context"]) == (1, 41, None)

    before = (out / "program.json").read_bytes()
    assert f"{out}: exists already" in refused(capsys, *arguments)
    assert (out / "program.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "torch-exprot"], 'unknown target "torch-exprot"; did you mean "torch-export"?'),
        (["--to", "ctranslate2", "--rows", "2"], "--rows: --to ctranslate2 has no such option"),
        (["--to", "torch-export", "--quantization", "int8"], "--quantization: --to torch-export has no such option"),
        (["--to", "torch-export", "--rows", "0"], "--rows"),
        (["--to", "torch-export", "--context", "9"], "--context: the model's State has a constant size"),
    ],
)
def test_mistakes(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run = make_run(model__layout="decoder-only", model__mixer="gru")
    assert message in refused(capsys, run, *arguments, "--out", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}, "nothing is left behind"


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, tmp_path / "nowhere", "--to", "torch-export", "--out", tmp_path / "out")
    assert "nowhere" in message
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(model__layout="decoder-only", model__mixer="gru")

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.disk, "write", full)
    message = refused(capsys, run, "--to", "torch-export", "--out", tmp_path / "out")
    assert "cannot be written: No space left on device; free some space" in message
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
