"""Question answering from file to scores: trained, resumed, started from another run, evaluated, asked by the verb."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trilemma
from trilemma.cli.main import main
from trilemma.errors import CapabilityError
from trilemma.runs.load import LoadedRun
from trilemma.runs.tensors import model_tensors
from trilemma.train import train

PASSAGE = "Anna lives in Rome. Ben has 14 cats and one old dog. The tower was built by Carl in 1901, they say."
QUESTIONS = [("Who lives?", "Anna"), ("How many cats?", "14"), ("Built by whom?", "Carl"), ("When?", "1901")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    qas = [{"id": q, "question": q, "answers": [{"text": a, "answer_start": PASSAGE.index(a)}]} for q, a in QUESTIONS]
    path = tmp_path_factory.mktemp("data") / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": PASSAGE, "qas": qas}]}]}))
    return str(path)


def config(file: str, **training: Any) -> dict[str, Any]:
    source = {"path": file}
    return {
        "model": {
            "layout": "encoder-only", "pooling": "none", "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2,
            "dropout": 0.0, "mixer": {"name": "attention", "position": "rotary"}, "positions": "none",
        },
        "data": {
            "task": "question-answering", "train": source, "valid": source, "context_length": 72, "window_overlap": 24,
        },
        "tokenizer": {"kind": "character"},
        "training": {
            "steps": 120, "batch_tokens": 1200, "learning_rate": 0.01, "schedule": "cosine", "warmup_steps": 10,
            "precision": "float32", "device": "cpu", "compile": "off", "checkpoint_every": 60, "tensorboard": "off",
            **training,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(file: str, tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    return train(config(file), out=tmp_path_factory.mktemp("run") / "qa", quiet=True)


def test_what_was_learned_is_answered(run: LoadedRun, file: str) -> None:
    reader = trilemma.load(run.directory.path)
    found = reader.answer([(question, PASSAGE) for question, _ in QUESTIONS])
    assert [answer.text for answer in found] == [answer for _, answer in QUESTIONS]
    assert min(answer.probability for answer in found) > 0.3
    for evaluation in (reader.evaluate(split="valid"), reader.evaluate([file])):
        assert evaluation["exact_match"].value == evaluation["f1"].value == 100.0
        assert evaluation["f1"].signature == "unit:percent|words|punctuation:ascii|articles:en|longest:30"
        assert evaluation.hypotheses == [answer for _, answer in QUESTIONS]
    assert reader.evaluate(split="valid", metrics=["f1"], max_length=2)["f1"].value < 100.0
    assert "pipeline_tag: question-answering" in run.directory.read_text("card.md")


def test_it_goes_on_and_starts_others(run: LoadedRun, file: str, tmp_path: Path) -> None:
    start = {"start_from": str(run.directory.path)}
    again = {**config(file, steps=1, learning_rate=1e-12), **start}
    same = train(again, out=tmp_path / "same", quiet=True)
    assert "new:" not in same.config.notes["start_from"]
    for name, tensor in model_tensors(run.model).items():
        torch.testing.assert_close(model_tensors(same.model)[name], tensor, atol=1e-8, rtol=0)
    more = train({**again, "training": {**again["training"], "steps": 2}}, out=tmp_path / "same", resume=True)
    assert more.directory.read_summary()["steps"] == 2
    language = {**config(file, steps=1), **start}
    language["data"] = {"task": "masked-language-model", "context_length": 64}
    masked = train(language, data=["some text", "more"] * 9, out=tmp_path / "masked", quiet=True)
    assert masked.config.notes["start_from"].endswith("; left behind: output.bias, output.weight")
    back = train({**config(file, steps=1), "start_from": str(tmp_path / "masked")}, out=tmp_path / "back", quiet=True)
    assert back.config.notes["start_from"].endswith("; new: output.bias, output.weight")


@pytest.fixture
def ask(run: LoadedRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    def answer(text: str, *arguments: str, folder: Path | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        code = main(["answer", str(folder or run.directory.path), *arguments])
        return code, *capfd.readouterr()

    return answer


def test_the_verb(ask: Any, tmp_path: Path) -> None:
    text = "".join(json.dumps({"question": q, "context": PASSAGE}) + "\n" for q, _ in QUESTIONS)
    code, out, _ = ask(text, "--window", "3", "--json")
    *values, last = map(json.loads, out.splitlines())
    assert (code, last) == (0, {"lines": 4})
    assert [value["text"] for value in values] == [answer for _, answer in QUESTIONS]
    assert all(PASSAGE[value["start"] : value["end"]] == value["text"] for value in values)
    (tmp_path / "passage.txt").write_text(PASSAGE)
    code, out, _ = ask("When?\n", "--passage", str(tmp_path / "passage.txt"))
    assert json.loads(out)["text"] == "1901"
    code, out, _ = ask("When?\n", "--passage", str(tmp_path / "passage.txt"), "--longest", "2")
    assert len(json.loads(out)["text"]) <= 2


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("who?\n", (), "stdin: line 1: not a JSON object"),
        ("[1]\n", (), 'stdin: line 1: an object with "question" and "context" is needed'),
        ('{"question": "a", "contxt": "b"}\n', (), 'line 1: the key "context" must hold text; did you mean "contxt"?'),
        ('{"question": "a", "context": 7}\n', (), 'line 1: the key "context" must hold text'),
        (json.dumps({"question": "x" * 70, "context": "b"}) + "\n", (), "line 1: a question of 70 tokens leaves no"),
        ("a\n", ("--passage", "nowhere.txt"), "nowhere.txt: no such file"),
    ],
)
def test_the_verb_refuses(ask: Any, text: str, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = ask(text, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_other_verbs(run: LoadedRun, file: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CapabilityError, match="use trilemma answer"):
        trilemma.load(run.directory.path).translate(["a"])
    assert main(["evaluate", str(run.directory.path), file, file]) == 2
    assert "is scored on one .json file; 2 were given" in capfd.readouterr().err
    assert main(["evaluate", str(run.directory.path), "--metrics", "f2", file]) == 2
    assert 'no metric "f2"; valid: exact_match, f1' in capfd.readouterr().err
    assert main(["data", "check", file, "--task", "question-answering"]) == 2
    assert "data check reads lines of text; question-answering has none" in capfd.readouterr().err
