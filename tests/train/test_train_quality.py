"""`training.quality`: measured when due, ranked by, resumed to the same bytes; and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import trilemma
from trilemma.errors import CheckpointError, ConfigError, Interrupted
from trilemma.runs import RunDirectory
from trilemma.train import loop, progress
from trilemma.train.counters import Counters

Tiny = Callable[..., dict[str, Any]]
Contents = Callable[[Path], dict[str, Any]]


def validations(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "valid_loss" in line]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Qualities and losses that are given, not measured: losses fall all the time."""

    def give(values: list[float]) -> None:
        left: Iterator[float] = iter(values)
        losses: Iterator[float] = iter(range(99, 0, -1))
        monkeypatch.setattr(loop, "measure_quality", lambda *_: next(left))
        monkeypatch.setattr(loop.Trainer, "validation", lambda _: loop.Validation(float(next(losses)), 1, 0))

    return give


def test_the_metric_is_measured_when_due_and_at_the_end(tmp_path: Path, tiny_config: Tiny) -> None:
    quality = {"metric": "chrf", "every": 4, "examples": 7}
    config = tiny_config(steps=10, quality=quality, validate_every=3, keep_checkpoints=20, checkpoint_every=1)
    trilemma.train(config, out=tmp_path / "run", quiet=True)
    records = validations(tmp_path / "run")
    assert [record["step"] for record in records] == [3, 4, 6, 8, 9, 10]
    measured = {record["step"]: record["valid_chrf"] for record in records if "valid_chrf" in record}
    assert list(measured) == [4, 8, 10]
    summary = RunDirectory.open(tmp_path / "run").read_summary()
    assert summary["best_quality"] == {"metric": "chrf", "value": max(measured.values())}
    assert measured[summary["best_step"]] == max(measured.values())
    assert "highest chrf" in summary["weights"]
    # what the loop measured is what anybody finds who decodes the same lines with that checkpoint
    for step in (4, 10):
        predictor = trilemma.load(tmp_path / "run", checkpoint=step)
        dataset, _ = trilemma.data.prepare(predictor.config, predictor.tokenizer)
        sources, targets = dataset.eval_texts("valid")
        chosen = [place * 20 // 7 for place in range(7)]
        outputs = predictor.translate([sources[place] for place in chosen], method="greedy")
        score = trilemma.measure.quality.chrf(outputs, [targets[place] for place in chosen])
        assert score.value == pytest.approx(measured[step], abs=1e-9)


def test_the_best_is_that_of_the_metric(tmp_path: Path, tiny_config: Tiny, given: Any) -> None:
    """The loss falls to the end; where the metric is equal, the lower loss is better."""
    given([20.0, 30.0, 25.0, 30.0, 29.0])
    config = tiny_config(steps=10, quality={"metric": "bleu", "every": 2}, validate_every=1)
    trilemma.train(config, out=tmp_path / "run", quiet=True)
    assert RunDirectory.open(tmp_path / "run").read_summary()["best_step"] == 8


def test_the_progress_line_shows_it(
    tmp_path: Path, tiny_config: Tiny, given: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given([20.0, 30.0])
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0.0)  # every line is shown
    trilemma.train(tiny_config(steps=5, quality={"metric": "bleu", "every": 3}), out=tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert [("bleu 20.00" in line) for line in lines if " lr " in line] == [False, False, False, True, True]
    assert any(line.startswith("step 3  validation loss") and "bleu 20.00  (best so far)" in line for line in lines)


def test_patience_ends_a_run_that_stays_below_its_best(tmp_path: Path, tiny_config: Tiny, given: Any) -> None:
    """Validations between two measurements count nowhere, though their loss is lower each time."""
    given([20.0, 30.0, 25.0, 28.0, 29.0, 99.0])
    config = tiny_config(steps=30, quality={"metric": "bleu", "every": 2}, validate_every=1, patience=3)
    trilemma.train(config, out=tmp_path / "run", quiet=True)
    summary = RunDirectory.open(tmp_path / "run").read_summary()
    assert (summary["ended_by"], summary["steps"], summary["best_step"]) == ("patience", 10, 4)
    assert summary["best_quality"] == {"metric": "bleu", "value": 30.0}
    assert summary["best_valid_accuracy"] is None


@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only"])
def test_kill_and_resume_give_the_same_bytes(
    layout: str, runner: Any, tiny_config: Tiny, run_contents: Contents
) -> None:
    """Decoding touches no random stream: dropout goes on as if nobody had looked."""
    quality = {"metric": "bleu", "every": 2, "examples": 5, "decoding": "configured"}
    config = tiny_config(layout, ema=0.9 if layout == "decoder-only" else None, quality=quality, patience=50)
    config["decoding"] = {"method": "beam", "beam_size": 2, "max_length": 6}
    assert runner.train(f"{layout}-whole", config)["code"] == 0
    for order in ({"kill_call": 60}, {"kill_after_saves": 2}, {"kill_call_outside": 30}):
        answer = runner.train(f"{layout}-parts", config, **order)
        assert answer["code"] in (-9, 0), answer["log"]
    assert runner.train(f"{layout}-parts", config)["code"] == 0
    whole, parts = (run_contents(runner.folder / f"{layout}-{name}") for name in ("whole", "parts"))
    assert whole == parts
    assert any("valid_bleu" in record for record in whole["metrics.jsonl"])
    # and the same weights as without looking
    del config["training"]["quality"]
    assert runner.train(f"{layout}-blind", config)["code"] == 0
    blind = run_contents(runner.folder / f"{layout}-blind")
    last = "checkpoints/step-00000012/model.safetensors"
    assert blind[last] == whole[last]


@pytest.mark.parametrize("step", [4, 12])
@pytest.mark.parametrize("decoding", ["greedy", "configured"])
def test_a_signal_abandons_the_measurement(
    step: int, decoding: str, tmp_path: Path, tiny_config: Tiny, run_contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of decoding: the step is saved as it was trained, and measured once, by the resumed run."""
    quality = {"metric": "chrf", "every": 4, "examples": 5, "decoding": decoding}
    config = tiny_config(ema=0.9, quality=quality)
    config["decoding"] = {"method": "beam", "beam_size": 2, "max_length": 6, "batch_tokens": 8}
    trilemma.train(config, out=tmp_path / "whole", quiet=True)
    calls: list[int] = []
    measured: list[int] = []
    real = loop.measure_quality

    def struck(model: Any, *rest: Any) -> float:
        def strike(*_: object) -> None:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        measured.append(1)
        if len(measured) == step // 4:
            model.embedding.register_forward_hook(strike)
        return real(model, *rest)

    monkeypatch.setattr(loop, "measure_quality", struck)
    with pytest.raises(Interrupted, match=f"step {step} is saved"):
        trilemma.train(config, out=tmp_path / "parts", quiet=True)
    assert len(calls) == 3, "decoding went on after the signal"
    assert RunDirectory.open(tmp_path / "parts").latest_checkpoint() == step
    assert step not in [record["step"] for record in validations(tmp_path / "parts")]
    trilemma.train(config, out=tmp_path / "parts", resume=True, quiet=True)
    whole, parts = run_contents(tmp_path / "whole"), run_contents(tmp_path / "parts")
    early = f"checkpoints/step-{step:08}/trainer.json"  # was written before the measurement, not after it
    assert whole.pop(early)["validated"] == step
    assert parts.pop(early)["validated"] < step
    assert whole == parts


def test_classification_is_judged_by_accuracy(tmp_path: Path, tiny_config: Tiny) -> None:
    config = tiny_config("encoder-only", steps=4, checkpoint_every=2, quality={"metric": "accuracy"})
    config["data"] = {"task": "classification"}
    pairs = [("aa", "yes"), ("bb", "no"), ("ab", "yes"), ("ba", "no")] * 5
    trilemma.train(config, data={"train": pairs, "valid": pairs}, out=tmp_path / "run", quiet=True)
    assert [set(record) >= {"valid_accuracy"} for record in validations(tmp_path / "run")] == [True, True]


@pytest.mark.parametrize(
    ("layout", "quality", "message"),
    [
        ("encoder-decoder", {"metric": "accuracy"}, 'task seq2seq has no metric "accuracy"'),
        ("encoder-decoder", {"metric": "blue"}, 'did you mean "bleu"'),
        ("encoder-decoder", {"metric": "bleu", "every": 0}, "training.quality.every"),
        ("encoder-decoder", {"metrik": "bleu"}, 'unknown key "training.quality.metrik"; did you mean "metric"'),
        ("encoder-only", {"metric": "bleu"}, "masked-language-model is validated by its loss"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, tiny_config: Tiny, layout: str, quality: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        trilemma.train(tiny_config(layout, quality=quality), out=tmp_path / "run", quiet=True)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_without_validation_data_nothing_can_be_measured(tmp_path: Path, tiny_config: Tiny) -> None:
    config = tiny_config(quality={"metric": "bleu"})
    del config["data"]["valid"]
    with pytest.raises(ConfigError, match=r"there are none: set data\.valid"):
        trilemma.train(config, data={"train": [("a", "b")] * 8}, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_records_of_old_are_read() -> None:
    """The score was called accuracy; before there were probes it had no name."""
    record = Counters(step=3, score=0.5, best_score=0.75).to_record("hash")
    old = {{"score": "accuracy", "best_score": "best_accuracy"}.get(key, key): value for key, value in record.items()}
    assert Counters.from_record(old, Path("x")) == Counters(step=3, score=0.5, best_score=0.75)
    oldest = {key: value for key, value in old.items() if "accuracy" not in key}
    assert Counters.from_record(oldest, Path("x")) == Counters(step=3)
    with pytest.raises(CheckpointError, match='"score" cannot be True'):
        Counters.from_record({**record, "score": True}, Path("x"))
