"""The verb: its one JSON line, its messages, what a person sees."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trilemma import machine
from trilemma.cli.main import main
from trilemma.train import progress, train

Tiny = Callable[..., dict[str, Any]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def to_file(config: dict[str, Any]) -> str:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return str(tmp_path / "config.yaml")

    return to_file


def test_train_resume_and_the_json_line(
    tiny_config: Tiny, write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tiny_config(steps=4)), str(tmp_path / "run")
    assert main(["train", file, "--out", out, "--json", "training.checkpoint_every=2"]) == 0
    seen = capsys.readouterr()
    (line,) = seen.out.splitlines()
    assert (json.loads(line)["steps"], json.loads(line)["run"]) == (4, out)
    assert "step 2  validation loss" in seen.err
    assert "done: 4 steps" in seen.err
    assert main(["train", file, "--out", out]) == 2
    assert "holds a run already; go on with --resume" in capsys.readouterr().err
    assert main(["train", out, "--resume", "training.steps=6"]) == 0
    assert "resumed after step 4" in capsys.readouterr().err
    assert main(["train", file, "--out", out, "--resume", "model.d_model=24"]) == 2
    assert "model.d_model is 24, but the run was started with 16" in capsys.readouterr().err


def test_bfloat16_without_instructions_for_it_is_obeyed_with_a_warning(
    tiny_config: Tiny, write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tiny_config(steps=1, precision="bfloat16"))
    for instructions, warned in ((("avx2",), True), (("avx512f", "avx512_bf16"), False)):
        monkeypatch.setattr(machine, "_instruction_sets", lambda instructions=instructions: instructions)
        assert main(["train", file, "--out", str(tmp_path / instructions[-1])]) == 0
        warning = "training.precision: bfloat16 (as asked, many times slower than float32: this CPU has no bfloat16"
        assert (warning in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_tokenz=5", 'unknown key "training.batch_tokenz"; did you mean "batch_tokens"?'),
        (
            "training.steps=many",
            "training.steps: Input should be a valid integer, unable to parse string as an integer, found 'many'",
        ),
        ("model.layout=encoder-only", "needs model.layout encoder-decoder or decoder-only"),
        ("model.mixer=atention", 'did you mean "attention"?'),
        ("training.max_tokens=0", "training.max_tokens"),
        ("model.positions=learned", "max_length"),
        ("model.max_length=3", "tokens, special ones counted, are more than model.max_length = 3"),
        ("model.vocab_size=5000", "more than 1,024 above the tokenizer's"),
    ],
)
def test_mistakes_are_one_message(
    tiny_config: Tiny, write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(["train", write(tiny_config()), "--out", str(tmp_path / "run"), override]) == 2
    seen = capsys.readouterr().err
    assert message in seen
    assert "Traceback" not in seen
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (
            (b"a\nb\n", b"x\n"),
            r"train\.a:2: this line has no partner in .*train\.b: .*train\.a has 2 lines, .*train\.b has 1",
        ),
        ((b"a\nb\xff\n", b"x\ny\n"), r"train\.a:2: invalid UTF-8 at byte 2"),
        ((b"", b""), r"train\.a: the file is empty"),
        ((b"a\n", None), r"train\.b: no such file"),
    ],
)
def test_bad_training_files_are_named(
    tiny_config: Tiny,
    write: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sides: tuple[bytes, bytes | None],
    message: str,
) -> None:
    config = tiny_config()
    config["data"]["train"] = {"source": str(tmp_path / "train.a"), "target": str(tmp_path / "train.b")}
    for name, content in zip("ab", sides, strict=True):
        if content is not None:
            (tmp_path / f"train.{name}").write_bytes(content)
    assert main(["train", write(config), "--out", str(tmp_path / "run")]) == 2
    seen = capsys.readouterr().err
    assert re.search(message, seen), seen
    assert "Traceback" not in seen
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "truncated or altered: 100 bytes, manifest.json says"),
        (lambda file: file.write_bytes(b"foreign" * 99), "truncated or altered: 693 bytes, manifest.json says"),
        (lambda file: file.unlink(), "missing; manifest.json lists it"),
    ],
)
def test_truncated_foreign_and_missing_weights_are_named(
    tiny_config: Tiny,
    write: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    file, out = write(tiny_config(steps=2, checkpoint_every=2)), tmp_path / "run"
    assert main(["train", file, "--out", str(out)]) == 0
    damage(out / "checkpoints" / "step-00000002" / "model.safetensors")
    assert main(["train", str(out), "--resume", "training.steps=3"]) == 2
    assert f"model.safetensors: {message}" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_the_run_is_in_use(
    tiny_config: Tiny, write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tiny_config(steps=3, checkpoint_every=2)), tmp_path / "run"
    assert main(["train", file, "--out", str(out)]) == 0
    weights = out / "checkpoints" / "step-00000003" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["train", str(out), "--resume", "training.steps=5"]) == 2
    seen = capsys.readouterr().err
    assert re.search(
        r"step-00000003/model\.safetensors: altered.*; to go on from step 2 instead, remove .*03$", seen, re.M
    )
    (out / ".lock").write_text('{"pid": 1, "host": "elsewhere"}')
    assert main(["train", str(out), "--resume", "training.steps=5"]) == 2
    assert "in use by process 1 on elsewhere" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


RECORD = {"step": 20, "loss": 3.25, "learning_rate": 1e-3, "tokens_per_second": 12345.6}


def test_one_line_on_a_terminal_and_plain_lines_elsewhere() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        display = progress.Display(stream=stream)
        display.step(RECORD, 100, 3700)
        display.step({**RECORD, "step": 40}, 100, 61)
        display.say("a message")
        display.close()
    assert terminal.getvalue().count("\r") >= 3
    assert "step 40/100  loss 3.2500  lr 1.00e-03  12,346 tokens/s, 1 min 01 s left" in terminal.getvalue()
    lines = pipe.getvalue().splitlines()
    assert lines == ["step 20/100  loss 3.2500  lr 1.00e-03  12,346 tokens/s, 1 h 01 min left", "a message"]
    quiet = io.StringIO()
    progress.Display(quiet=True, stream=quiet).say("x")
    assert quiet.getvalue() == ""


def test_tensorboard_if_asked_for_and_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    assert isinstance(progress.tracker("auto", tmp_path, 0), progress.NoTracker)
    with pytest.raises(progress.ConfigError, match="pip install tensorboard"):
        progress.tracker("on", tmp_path, 0)


def test_tensorboard_follows_where_it_is_installed(tiny_config: Tiny, tmp_path: Path) -> None:
    train(tiny_config(steps=2, tensorboard="auto"), out=tmp_path / "run", quiet=True)
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"learning_rate" in events.read_bytes()
    assert b"valid_loss" in events.read_bytes()


def test_one_command_to_signed_scores(
    tiny_config: Tiny, write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a raw file, divided here, to scores.json."""
    (tmp_path / "a.tsv").write_text("".join(f"wort {number}\tword {number}\n" for number in range(120)))
    config = tiny_config(steps=2)
    config["data"] = {"task": "seq2seq", "train": {"path": str(tmp_path / "a.tsv")}, "target_language": "zh"}
    config["decoding"] = {"method": "greedy", "max_length": 4}
    out = tmp_path / "run"
    assert main(["train", write(config), "--out", str(out), "--evaluate"]) == 2
    assert "--evaluate scores the test split, and there is none" in capsys.readouterr().err
    assert not out.exists()
    config["data"]["split"] = {"valid": 0.2, "test": 0.2}
    assert main(["train", write(config), "--out", str(out), "--evaluate", "--json"]) == 0
    seen = capsys.readouterr()
    (line,) = seen.out.splitlines()
    scores = json.loads(line)["scores"]
    assert json.loads((out / "scores.json").read_text()) == scores
    assert {score["metric"] for score in scores} >= {"bleu", "chrf", "loss"}
    assert "tok:zh" in scores[0]["signature"]
    assert "test\tbleu" in seen.err
