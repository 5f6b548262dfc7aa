"""`trilemma score`: log-probabilities of given texts, equal to sums written out, and to what `generate` says."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import trilemma
from trilemma import laws
from trilemma.cli.main import main
from trilemma.decode import length_penalty

MakeRun = Callable[..., Path]
PAIRS = [("one", "eins"), ("two and three", ""), ("", "null"), ("naïve 犬", "犬 犬")]


@pytest.fixture(autouse=True)
def _lawful(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws.admission, "require", lambda mixers, path, **options: {})


@pytest.fixture
def run_score(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Callable[..., tuple]:
    """`run_score(input, *arguments)`: (exit code, stdout, stderr)."""

    def run(text: bytes | str, *arguments: str | Path) -> tuple[int, str, str]:
        raw = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        code = main(["score", *map(str, arguments)])
        captured = capfdbinary.readouterr()
        return code, captured.out.decode(), captured.err.decode()

    return run


def by_hand(run: Path, source: str, target: str) -> list[float]:
    """Log-probabilities of the target's tokens, each by a forward pass of its own."""
    predictor = trilemma.load(run, device="cpu")
    model, tokenizer = predictor.model, predictor.tokenizer
    given = torch.tensor([[*tokenizer.encode(source), tokenizer.eos]])
    prefix, values = [tokenizer.bos], []
    for token in [*tokenizer.encode(target), tokenizer.eos]:
        with torch.no_grad():
            logits = model.head(model(torch.tensor([prefix]), source=given))[0, -1]
        values.append(float(torch.log_softmax(logits, -1)[token]))
        prefix.append(token)
    return values


def test_scores_are_sums_of_log_probabilities(make_run: MakeRun, run_score: Callable[..., tuple]) -> None:
    run = make_run()
    text = "".join(f"{source}\t{target}\n" for source, target in PAIRS)
    code, out, err = run_score(text, run, "--device", "cpu")
    assert code == 0, err
    rows = [line.split("\t") for line in out.splitlines()]
    code, out, _ = run_score(text, run, "--jsonl", "--device", "cpu", "--window", "1", "decoding.length_penalty=1.0")
    objects = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == len(objects) == len(PAIRS)
    for (source, target), row, value in zip(PAIRS, rows, objects, strict=True):
        expected = by_hand(run, source, target)
        assert value["token_log_probabilities"] == pytest.approx(expected, rel=1e-9)
        assert value["log_probability"] == pytest.approx(sum(expected), rel=1e-9)
        assert value["score"] == pytest.approx(sum(expected) / length_penalty(len(expected), 1.0), rel=1e-9)
        assert float(row[0]) == pytest.approx(sum(expected) / length_penalty(len(expected), 0.6), abs=1e-6)
        assert (float(row[1]), int(row[2])) == (pytest.approx(sum(expected), abs=1e-6), len(expected))
        assert len(value["pieces"]) == len(expected)
        assert value["pieces"][-1] == "<eos>"
    assert [value["index"] for value in objects] == [0, 1, 2, 3]
    assert "4 lines," in err


def test_files_and_standard_input_say_the_same(
    make_run: MakeRun, run_score: Callable[..., tuple], tmp_path: Path
) -> None:
    run = make_run()
    text = "".join(f"{source}\t{target}\n" for source, target in PAIRS)
    (tmp_path / "s").write_text("".join(f"{source}\n" for source, _ in PAIRS))
    (tmp_path / "t").write_text("".join(f"{target}\n" for _, target in PAIRS))
    _, expected, _ = run_score(text, run)
    code, out, err = run_score("", run, "--source", tmp_path / "s", "--target", tmp_path / "t")
    assert (code, out) == (0, expected), err
    assert run_score("", run)[:2] == (0, "")
    out = run_score(text, run, "--json")[1].splitlines()
    assert json.loads(out[-1])["lines"] == 4


def test_a_language_model_scores_texts_alone(
    make_run: MakeRun, run_score: Callable[..., tuple], tmp_path: Path
) -> None:
    run = make_run(model__layout="decoder-only", model__mixer="gru", data__task="language-model")
    (tmp_path / "t").write_text("abc\n\n")
    code, out, err = run_score("abc\n\n", run)
    assert code == 0, err
    assert [line.split("\t")[2] for line in out.splitlines()] == ["4", "1"]
    assert run_score("", run, "--target", tmp_path / "t")[1] == out
    code, _, err = run_score("", run, "--source", tmp_path / "t", "--target", tmp_path / "t")
    assert code == 2
    assert "a language model scores texts alone" in err


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("a\tb\nc\n", [], "stdin: line 2: a source and a target divided by one tab are needed, found 0 tabs"),
        ("a\tb\tc\n", [], "stdin: line 1: a source and a target divided by one tab are needed, found 2 tabs"),
        (b"a\t\xff\n", [], "stdin: line 1: invalid UTF-8 at byte 3"),
        ("", ["--source", "s2"], "--source and --target go together"),
        ("", ["--source", "s2", "--target", "t1"], "t1 ends after 1 lines, s2 goes on"),
        ("", ["--source", "t1", "--target", "s2"], "t1 ends after 1 lines, s2 goes on"),
        ("", ["--source", "s2", "--target", "nothing"], "nothing: no such file"),
        ("", ["decoding.length_penaltee=1"], 'did you mean "length_penalty"?'),
        ("", ["--dtype", "float8"], 'unknown dtype "float8"'),
    ],
)
def test_mistakes(
    make_run: MakeRun,
    run_score: Callable[..., tuple],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str | bytes,
    arguments: list[str],
    message: str,
) -> None:
    run = make_run()
    monkeypatch.chdir(tmp_path)
    Path("s2").write_text("a\nb\n")
    Path("t1").write_text("c\n")
    code, _, err = run_score(text, run, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_what_cannot_be_scored(make_run: MakeRun, run_score: Callable[..., tuple]) -> None:
    run = make_run(
        "labels",
        model__layout="encoder-only",
        model__num_labels=2,
        data__task="classification",
        data__labels=["no", "yes"],
    )
    code, _, err = run_score("a\tb\n", run)
    assert (code, "use trilemma classify" in err) == (2, True)
    run = make_run("short", model__positions="learned", model__max_length=5)
    code, out, err = run_score("a\tb\nabcde\tb\n", run, "--window", "1")
    assert code == 2
    assert "line 2: 6 tokens, more than model.max_length = 5" in err
    assert out.count("\n") == 1


def test_a_byte_order_mark_is_no_text(make_run: MakeRun, run_score: Callable[..., tuple]) -> None:
    run = make_run()
    plain = run_score("abc\txy\n", run)
    assert run_score(b"\xef\xbb\xbfabc\txy\n", run)[1] == plain[1]
