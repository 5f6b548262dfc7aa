"""Training on probes: judged by accuracy on labels, ended at a target, scored where labels stand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trilemma
from trilemma.config import RunConfig, parse
from trilemma.data import IGNORE, prepare
from trilemma.errors import CapabilityError, ConfigError
from trilemma.measure.evaluation import score_model
from trilemma.train import api, loop
from trilemma.train.api import train

Tiny = Callable[..., dict[str, Any]]


@pytest.fixture
def probe(tiny_config: Tiny) -> Tiny:
    """`tiny` on a recall probe with rows of two lengths."""

    def make(**training: Any) -> dict[str, Any]:
        config = tiny_config("decoder-only", **training)
        source = {"generated": "copying", "size": 60, "options": {"min_length": 4, "max_length": 5, "letters": 4}}
        config["data"] = {
            "task": "probe",
            "train": source,
            "valid": {**source, "size": 10},
            "test": {**source, "size": 12},
        }
        config["tokenizer"] = {"kind": "task"}
        config["training"] |= {"label_smoothing": 0.0}
        return config

    return make


def given(accuracies: dict[int, tuple[float, int]]) -> Callable[[Any], loop.Validation]:
    """Validations by step: loss, and hits of ten."""
    return lambda self: loop.Validation(accuracies[self.counters.step][0], 10, accuracies[self.counters.step][1])


def test_the_target_accuracy_ends_a_run_and_survives_a_kill(
    probe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.Trainer, "validation", given({3: (1.0, 4), 6: (0.5, 9), 9: (0.1, 10)}))
    config = probe(target_accuracy=0.9)
    with monkeypatch.context() as patch:
        patch.setattr(api, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))  # after the last checkpoint
        with pytest.raises(KeyboardInterrupt):
            train(config, out=tmp_path / "run", quiet=True)
    summary = train(config, out=tmp_path / "run", resume=True, quiet=True).directory.read_summary()
    assert (summary["ended_by"], summary["steps"], summary["best_valid_accuracy"]) == ("target_accuracy", 6, 0.9)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["valid_accuracy"] for line in lines if "valid_loss" in line] == [0.4, 0.9]


def test_the_most_accurate_weights_are_published(probe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a probe is longer than the training rows, the loss may rise while the accuracy does."""
    monkeypatch.setattr(loop.Trainer, "validation", given({3: (1.0, 4), 6: (2.0, 8), 9: (0.5, 7), 12: (3.0, 8)}))
    run = train(probe(), out=tmp_path / "run", quiet=True)
    summary = run.directory.read_summary()
    assert (summary["best_step"], summary["best_valid_accuracy"], summary["best_valid_loss"]) == (6, 0.8, 2.0)
    assert summary["weights"] == "step 6 (highest validation accuracy)"


def test_scores_count_labels_only(probe: Tiny, tmp_path: Path) -> None:
    run = train(probe(), out=tmp_path / "run", quiet=True)
    dataset, _ = prepare(run.config, run.tokenizer)
    found = score_model(run.model, dataset, "test")
    hits = labels = rows = 0
    nats = 0.0
    for batch in dataset.eval_batches("test"):
        for row in range(len(batch.inputs)):
            length = int(batch.lengths[row])
            with torch.no_grad():
                logits = run.model.head(run.model(batch.inputs[row : row + 1, :length]))[0].double().log_softmax(-1)
            wanted = batch.labels[row, :length]
            places = wanted != IGNORE
            right = (logits.argmax(-1) == wanted)[places]
            hits, labels, rows = hits + int(right.sum()), labels + int(places.sum()), rows + int(right.all())
            nats -= float(logits[places, wanted[places]].sum())
    assert found["accuracy"].value == pytest.approx(100 * hits / labels)
    assert found["exact_match"].value == pytest.approx(100 * rows / 12)
    assert found["loss"].value == pytest.approx(nats / labels, rel=1e-5)
    segments = found["accuracy"].segments
    assert segments is not None
    assert segments.shape == (12, 2)
    assert segments.sum(0).tolist() == [hits, labels]
    text = found.references[0].split()
    assert found.sources[0].split()[-len(text) + 1 :] == text[:-1]
    assert len(found.hypotheses[0].split()) == len(text)
    valid = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert valid["valid_accuracy"] == pytest.approx(score_model(_last(run), dataset, "valid")["accuracy"].value / 100)


def _last(run: Any) -> Any:
    return trilemma.load(run.directory.path, device="cpu", checkpoint="last").model


def test_a_probes_run_answers_nothing_else(probe: Tiny, tmp_path: Path) -> None:
    train(probe(), out=tmp_path / "run", quiet=True)
    predictor = trilemma.load(tmp_path / "run", device="cpu")
    assert 0 <= predictor.evaluate(metrics=["accuracy"])["accuracy"].value <= 100
    with pytest.raises(CapabilityError, match="a probe is scored on its own splits"):
        predictor.evaluate(["x.txt"])
    with pytest.raises(CapabilityError, match="generates no text"):
        predictor.generate(["a b"])
    with pytest.raises(CapabilityError, match="generates no text"):
        predictor.score(["a b"], ["a"])


def test_a_target_accuracy_is_for_probes(tiny_config: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"target_accuracy is for data\.task probe"):
        train(tiny_config(target_accuracy=0.5), out=tmp_path / "run", quiet=True)


def test_gradients_come_from_labels_alone(probe: Tiny, tmp_path: Path) -> None:
    """A batch's loss is the mean over its labels, and unlabelled tokens are no targets."""
    config = parse(RunConfig, probe())
    dataset, _ = prepare(config, cache_dir=tmp_path)
    batch = dataset.micro_batch(0)
    counted = int((batch.labels != IGNORE).sum())
    assert batch.num_targets == counted < int(batch.lengths.sum())
    assert np.isin(batch.labels[batch.labels != IGNORE].numpy(), np.arange(6, 6 + 7)).all()
