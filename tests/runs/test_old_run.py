"""A run stored with the first version of the format loads for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from trilemma.config import CONFIG_VERSION
from trilemma.errors import CheckpointError
from trilemma.runs import RunDirectory
from trilemma.runs.load import load_run

ASSETS = Path(__file__).parents[1] / "assets"


def test_the_stored_run_of_version_1_gives_the_same_answers() -> None:
    run = load_run(ASSETS / "run-v1", dtype=torch.float64)
    expected = json.loads((ASSETS / "run-v1.json").read_text())
    assert run.config.version == 1 <= CONFIG_VERSION
    assert run.tokenizer.decode([7, 8, 9]) == expected["text"]
    with torch.no_grad():
        hidden = run.model(torch.tensor([[1, 7, 8, 9]]), source=torch.tensor([[7, 8, 9, 2]]))
        logits = run.model.head(hidden)[0, -1]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert run.directory.read_summary()["steps"] == 6
    assert run.directory.checkpoints() == [6]
    assert [record["step"] for record in run.directory.read_metrics()] == [1, 2, 3, 4, 5, 6, 6]


def test_its_checkpoint_opens_too(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "run-v1", tmp_path / "run")
    loaded = load_run(tmp_path / "run", checkpoint="last")
    assert loaded.directory.load_trainer(6)["version"] == 1


def test_it_is_checked_like_any_other(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "run-v1", tmp_path / "run")
    path = RunDirectory(tmp_path / "run").path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or altered"):
        load_run(tmp_path / "run")
