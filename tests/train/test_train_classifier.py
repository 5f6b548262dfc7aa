"""A classifier from recipe to calibrated probabilities."""

from __future__ import annotations

from pathlib import Path

import pytest

import trilemma
from trilemma.errors import CheckpointError
from trilemma.runs.directory import CALIBRATION
from trilemma.train import train

CONFIG = {
    "model": {"layout": "encoder-only", "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "mixer": "gru"},
    "data": {"task": "classification"},
    "tokenizer": {"kind": "character"},
    "training": {
        "steps": 40, "learning_rate": 0.02, "warmup_steps": 2, "batch_tokens": 64,
        "precision": "float32", "device": "cpu", "compile": "off",
    },
}  # fmt: skip
DATA = {
    "train": [("a b a", "yes"), ("b b", "no"), ("a a", "yes"), ("b a b b", "no"), ("", "no")] * 5,
    "valid": [("a b a", "yes"), ("a b a", "yes"), ("a b a", "no"), ("b b", "no"), ("b b", "no"), ("b b", "yes")] * 2,
}


def test_the_temperature_is_fitted_kept_and_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(CONFIG, data=DATA, out=tmp_path / "run")
    assert "calibration: temperature " in capfd.readouterr().err
    reader = trilemma.load(run.directory.path)
    assert reader.temperature == run.directory.read_temperature() is not None
    raw, calm = reader.classify(["a b"], raw=True)[0], reader.classify(["a b"])[0]
    assert raw.probabilities != calm.probabilities
    file = tmp_path / "valid.tsv"
    file.write_text("".join(f"{text}\t{label}\n" for text, label in DATA["valid"]))
    scores = reader.evaluate([file])
    assert scores["calibration_error"].signature == f"bins:15|temperature:{reader.temperature:.4g}"
    assert scores["calibration_error_raw"].signature == "bins:15|temperature:1"
    (run.directory.path / CALIBRATION).write_text('{"temperature": 1.0}')
    with pytest.raises(CheckpointError, match=r"calibration.json: truncated or altered"):
        trilemma.load(run.directory.path)


def test_too_little_validation_data_calibrates_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(CONFIG, data={**DATA, "valid": [("a b a", "yes"), ("b b", "no")]}, out=tmp_path / "run")
    assert "not calibrated: 2 validation examples bound no temperature" in capfd.readouterr().err
    assert trilemma.load(run.directory.path).temperature is None


def test_without_validation_data_there_is_none(tmp_path: Path) -> None:
    run = train(CONFIG, data={"train": DATA["train"]}, out=tmp_path / "run", quiet=True)
    reader = trilemma.load(run.directory.path)
    assert reader.temperature is None
    assert reader.classify(["a"])[0] == reader.classify(["a"], raw=True)[0]
