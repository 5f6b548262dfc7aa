"""`trilemma evaluate` and `trilemma classify` on runs with random weights: what is printed, kept and refused."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import trilemma
from trilemma.cli.main import main
from trilemma.runs import RunDirectory

MakeRun = Callable[..., Path]


@pytest.fixture
def run(make_run: MakeRun, tmp_path: Path) -> Path:
    (tmp_path / "test.tsv").write_text("one\teins\ntwo\tzwei\n\t\nfour\tvier\n", encoding="utf-8")
    return make_run(data__test={"path": str(tmp_path / "test.tsv")}, data__train={"path": str(tmp_path / "gone.tsv")})


def test_the_runs_own_split(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["test", name] for name in ("bleu", "chrf", "exact_match", "loss", "perplexity", "bits_per_byte")
    ]
    assert "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in lines[0]
    assert "[" in lines[2], "exact match has an interval"
    assert "cut at the length limit" in captured.err
    scores = RunDirectory.open(run).read_scores()
    assert [score["metric"] for score in scores] == [line.split()[1] for line in lines]
    assert all(score["split"] == "test" and score["size"] == 4 for score in scores)
    outputs = RunDirectory.open(run).read_text("outputs.test.txt").split("\n")
    assert outputs[:-1] == trilemma.load(run).translate(["one", "two", "", "four"])
    assert outputs[2] == ""


def test_scores_are_kept_metric_by_metric(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--metrics", "loss,bleu"]) == 0
    assert main(["evaluate", str(run), "--metrics", "bleu"]) == 0
    kept = RunDirectory.open(run).read_scores()
    assert sorted(score["metric"] for score in kept) == ["bleu", "loss"]
    assert "kept in" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--metrics", "chrf", "decoding.method=greedy"]) == 0
    assert "not kept: these are not the run's own decoding settings" in capsys.readouterr().err
    assert RunDirectory.open(run).read_scores() == kept


def test_the_signature_says_that_case_was_ignored(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(data__lowercase=True)
    source, target = run.parent / "a.src", run.parent / "a.tgt"
    source.write_text("One\nTWO\n", encoding="utf-8")
    outputs = trilemma.load(run).translate(["One", "TWO"])
    target.write_text("".join(f"{text.upper()}\n" for text in outputs), encoding="utf-8")
    assert main(["evaluate", str(run), str(source), str(target), "--metrics", "bleu,chrf,exact_match"]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert "case:lc" in line
        assert "case:mixed" not in line


def test_what_the_tokenizer_does_not_know_is_said(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A likelihood of "unknown" is not that of the text: neither silently better nor comparable."""
    known, strange = "abcabc\n", "abc 犬犬犬\nabc\n"
    language = make_run("lm", texts=["abc"], model__layout="decoder-only", data__task="language-model")
    file = language.parent / "text.txt"
    for text, note in ((known, ""), (strange, "text: 4 token(s) on 1 line(s) stand for text that the tokenizer")):
        file.write_text(text, encoding="utf-8")
        assert main(["evaluate", str(language), str(file)]) == 0
        captured = capfd.readouterr()
        assert note in captured.err
        assert [("unknown:4" in line) for line in captured.out.splitlines()] == [bool(note)] * 3
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("abc\n犬\n".encode())))
    assert main(["score", str(language)]) == 0
    assert "note: 1 of the scored tokens stand for text" in capfd.readouterr().err
    pairs = make_run("pairs", texts=["abc"])
    table = pairs.parent / "pairs.tsv"
    table.write_text("犬\tabc\nabc\ta犬\n", encoding="utf-8")
    assert main(["evaluate", str(pairs), str(table)]) == 0
    captured = capfd.readouterr()
    assert "sources: 1 token(s) on 1 line(s)" in captured.err
    assert "targets: 1 token(s) on 1 line(s)" in captured.err
    assert sum("unknown:1" in line for line in captured.out.splitlines()) == 3  # the likelihoods
    classes = {"model__layout": "encoder-only", "model__num_labels": 2, "data__task": "classification"}
    classifier = make_run("classes", texts=["abc"], data__labels=["no", "yes"], **classes)
    assert classify(classifier, "abc\n犬\n", monkeypatch) == 0
    assert "note: 1 lines held characters or words that the tokenizer does not know" in capfd.readouterr().err


def test_a_model_that_gives_no_numbers_is_one_message(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = {"model__layout": "encoder-only", "damaged": True}
    classifier = make_run(
        "classes", **encoder, model__num_labels=2, data__task="classification", data__labels=["no", "yes"]
    )
    question = make_run(
        "questions", **encoder, model__pooling="none", model__num_labels=2, data__task="question-answering"
    )
    language = make_run("lm", damaged=True, model__layout="decoder-only", data__task="language-model")
    file = classifier.parent / "a.txt"
    file.write_text("no\n", encoding="utf-8")
    asked = '{"question": "who?", "context": "Ada."}\n'
    for verb, run, text in (
        ("classify", classifier, "a\n"),
        ("embed", classifier, "a\n"),
        ("answer", question, asked),
        ("score", language, "a\n"),
        ("evaluate", language, ""),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert main([verb, str(run), *([str(file)] if verb == "evaluate" else [])]) == 2, verb
        captured = capfd.readouterr()
        assert "the model's output is not a number" in captured.err, verb
        assert captured.out == "", verb


def test_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--metrics", "bleu", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    result = json.loads(captured.out)
    assert result["scores"][0]["metric"] == "bleu"
    assert result["scores"][0]["signature"]
    assert "bleu" in captured.err


def test_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.en").write_text("one\ntwo\n")
    (tmp_path / "other.zh").write_text("一\n二\n", encoding="utf-8")
    assert main(["evaluate", str(run), str(tmp_path / "other.en"), str(tmp_path / "other.zh")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("other.zh\tbleu")
    assert RunDirectory.open(run).read_scores() == [], "scores of files given by hand are not the run's"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "tset"], '--split: unknown value "tset"; did you mean "test"?'),
        (["--split", "valid"], "there is no valid data"),
        (["--metrics", "blue"], 'no metric "blue"; did you mean "bleu"?'),
        (["nothing.tsv"], "nothing.tsv: no such file"),
        (["decoding.beam_sise=3"], 'did you mean "beam_size"?'),
    ],
)
def test_mistakes(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.fixture
def classifier(make_run: MakeRun) -> Path:
    return make_run(
        "classifier",
        model__layout="encoder-only",
        model__num_labels=3,
        data__task="classification",
        data__labels=["bad", "fair", "good"],
    )


def classify(run: Path, text: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    return main(["classify", str(run), *arguments])


def test_labels_and_probabilities(
    classifier: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "a film\n\nwörter\n" + "x\n" * 5
    assert classify(classifier, text, monkeypatch, "--window", "2") == 0
    rows = [line.split("\t") for line in capfd.readouterr().out.splitlines()]
    assert len(rows) == 8
    expected = trilemma.load(classifier).classify(text.splitlines())
    for row, result in zip(rows, expected, strict=True):
        shares = dict(column.split("=") for column in row[2:])
        assert list(shares) == ["bad", "fair", "good"]
        assert sum(map(float, shares.values())) == pytest.approx(1, abs=1e-5)
        assert row[0] == result.label == max(shares, key=lambda name: float(shares[name]))
        assert row[1] == shares[row[0]]
    assert classify(classifier, text, monkeypatch, "--jsonl", "--json") == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["label"] for line in lines[:-1]] == [row[0] for row in rows]
    assert lines[-1]["lines"] == 8


def test_classify_refuses(
    classifier: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert classify(run, "a\n", monkeypatch) == 2
    assert "task is seq2seq, not classification" in capfd.readouterr().err
    assert classify(classifier, "a\nb\n" + "x" * 41, monkeypatch, "--window", "2") == 2
    assert "line 3: 41 tokens, more than data.max_source_length = 40" in capfd.readouterr().err


def test_what_a_cache_in_eight_bits_costs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--cache", "int8", "--metrics", "loss,exact_match", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["path"].endswith("+cache-int8")
    scores = {score["metric"]: score["value"] for score in result["scores"]}
    before = {score["metric"]: score["value"] for score in result["without_cache"]}
    assert scores["loss"] != before["loss"]
    assert scores["loss"] == pytest.approx(before["loss"], rel=0.05)
    assert f"test\tloss\t{before['loss']:.4f} -> {scores['loss']:.4f} (" in captured.err
    assert not (run / "scores.json").exists()
    assert main(["evaluate", str(run), "--cache", "int9"]) == 2
    assert 'unknown cache "int9"; did you mean "int8"?' in capsys.readouterr().err
