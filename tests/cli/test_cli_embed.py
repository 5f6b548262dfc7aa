"""`trilemma embed` on runs with random weights: what is printed, in which order, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import trilemma
from trilemma.cli.main import main

MakeRun = Callable[..., Path]
TEXT = "one\n\na longer line\nx\nanother, longer still\n"


@pytest.fixture
def embed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(folder: Path, text: str | bytes, *arguments: str) -> tuple[int, str, str]:
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = main(["embed", str(folder), *arguments])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    return make_run(
        model__layout="encoder-only", model__mixer="lstm", model__max_length=30, data__task="masked-language-model"
    )


def test_one_json_line_a_line_in_order(run: Path, embed: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = embed(run, TEXT)
    assert code == 0
    values = [json.loads(line) for line in out.splitlines()]
    assert all(list(value) == ["embedding"] for value in values)
    wanted = trilemma.load(run).embed(TEXT.split("\n")[:-1])
    np.testing.assert_allclose([value["embedding"] for value in values], wanted, rtol=1e-8)
    assert embed(run, TEXT, "--window", "2")[1].count("\n") == 5
    np.testing.assert_allclose(json.loads(embed(run, "x", "--window", "1")[1])["embedding"], wanted[3], rtol=1e-8)
    assert embed(run, "")[:2] == (0, "")


def test_options_and_the_last_line(run: Path, embed: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = embed(run, "a\nb\n", "--pooling", "cls", "--normalise", "--json")
    assert code == 0
    first, _, last = map(json.loads, out.splitlines())
    assert np.linalg.norm(first["embedding"]) == pytest.approx(1.0)
    assert last == {"lines": 2, "pooling": "cls", "normalised": True}


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("a\n", ["--pooling", "maen"], 'unknown pooling "maen"; did you mean "mean"?'),
        ("a\n", ["--pooling", "last"], "pooling last is for decoder-only models"),
        ("a\n" + "b" * 29 + "\n", [], "line 2: 31 tokens, special ones counted, more than model.max_length = 30"),
        (b"a\nb\n\xff\n", [], "stdin: line 3: invalid UTF-8 at byte 1"),
        ("a\n", ["--dtype", "float8"], 'unknown dtype "float8"'),
    ],
)
def test_embed_refuses(
    run: Path, embed: Callable[..., tuple[int, str, str]], text: str | bytes, arguments: list[str], message: str
) -> None:
    code, out, err = embed(run, text, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_no_run_and_a_foreign_file(run: Path, embed: Callable[..., tuple[int, str, str]]) -> None:
    assert "no run here" in embed(run.parent, "a\n")[2]
    (run / "pytorch_model.bin").write_bytes(b"pickle")
    assert "foreign file" in embed(run, "a\n")[2]
