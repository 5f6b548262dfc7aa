"""`trilemma show` on runs with random weights: page, pictures, JSON line, messages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trilemma import laws
from trilemma.cli.main import main

MakeRun = Callable[..., Path]
LANGUAGE_MODEL = {"model__layout": "decoder-only", "data__task": "language-model"}


@pytest.fixture(autouse=True)
def _lawful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "require", lambda mixers, path, **options: {})  # the laws have tests of their own


def shown(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> dict[str, Any]:
    assert main(["show", str(run), *arguments, "--device", "cpu", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result: dict[str, Any] = json.loads(line)
    return result


def test_alignments_of_an_encoder_decoder(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shown"
    result = shown(capsys, make_run(), "ab <c>", "--target", "xy", "--out", str(out))
    assert result["tokens"] == ["<bos>", "x", "y"]
    assert result["source_tokens"] == ["a", "b", "\N{OPEN BOX}", "<", "c", ">", "<eos>"]
    assert [(m["stack"], m["columns"], m["shape"]) for m in result["maps"]] == [
        ("encoder", "inputs", [2, 7, 7]),
        ("decoder", "inputs", [2, 3, 3]),
        ("decoder", "source", [2, 3, 7]),
    ]
    for found in result["maps"]:
        assert found["error"] < 1e-12
        assert Path(found["file"]).read_bytes().startswith(b"\x89PNG")
    page = (out / "show.html").read_text(encoding="utf-8")
    assert result["report"] == str(out / "show.html")
    assert page.count("<img") == 3
    assert "ab &lt;c&gt;" in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_without_a_target_the_model_writes_one(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = shown(capsys, make_run(), "ab", "--out", str(tmp_path / "shown"))
    assert result["target"] is not None
    assert result["tokens"][0] == "<bos>"


def test_a_mixer_without_a_matrix_is_named(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(**LANGUAGE_MODEL, model__num_layers=3, model__mixer=["retention", "lstm", "attention"])
    out = tmp_path / "shown"
    assert main(["show", str(run), "ab", "--out", str(out), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"2 maps: {out / 'show.html'}\n"
    assert "decoder layer 2: lstm: no mixing matrix" in captured.err
    assert "No mixing matrix" in (out / "show.html").read_text(encoding="utf-8")
    result = shown(capsys, run, "ab", "--layers", "1,2", "--out", str(tmp_path / "some"))
    assert [found["mixer"] for found in result["maps"]] == ["retention"]
    assert result["without"] == ["decoder layer 2: lstm"]
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == [
        "decoder-01-retention-decayed_scan.png",
        "show.html",
    ]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("ab", ["--layers", "1,x"], '--layers: "1,x" is not a list of numbers such as 1,6'),
        ("ab", ["--layers", "2"], "--layers: this model has layers 1 to 1; 2 is none of them"),
        ("ab", ["--target", "x"], "--target: a language-model run has no other side; give one text"),
        ("", [], "there is no text to show"),
        ("a" * 300, [], "301 tokens: maps are drawn of 256 at most; show a shorter text"),
    ],
)
def test_mistakes(
    make_run: MakeRun,
    tmp_path: Path,
    text: str,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = make_run(**LANGUAGE_MODEL), tmp_path / "shown"
    assert main(["show", str(run), text, *options, "--out", str(out), "--device", "cpu"]) == 2
    assert f"trilemma: {message}" in capsys.readouterr().err
    assert not out.exists()


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path / "none"), "a", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "none" in capsys.readouterr().err
