"""`trilemma average`: the mean, in a run that every verb opens; other models refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trilemma
from trilemma.cli import main as cli
from trilemma.errors import CheckpointError
from trilemma.runs import RunDirectory
from trilemma.runs.load import load_run
from trilemma.runs.tensors import model_tensors
from trilemma.train.average import average

Tiny = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of one model, "one" and "two", that begin alike and differ in their rate."""
    from tests.train.conftest import tiny

    folder = tmp_path_factory.mktemp("runs")
    for name, rate in ("one", 1e-3), ("two", 3e-3):
        config = tiny(steps=9, checkpoint_every=3, keep_checkpoints=3, learning_rate=rate)
        trilemma.train(config, out=folder / name, quiet=True)
    return folder


def mean_of(*checkpoints: tuple[Path, int]) -> dict[str, torch.Tensor]:
    loaded = [model_tensors(load_run(run, checkpoint=step).model) for run, step in checkpoints]
    return {name: sum(t[name].detach().double() for t in loaded) / len(loaded) for name in loaded[0]}  # type: ignore[misc]


def check(found: Path, *checkpoints: tuple[Path, int]) -> None:
    wanted = mean_of(*checkpoints)
    for name, tensor in model_tensors(load_run(found).model).items():
        torch.testing.assert_close(tensor.detach().double(), wanted[name], rtol=1e-6, atol=1e-8)


def test_the_last_checkpoints_of_a_run(runs: Path, tmp_path: Path) -> None:
    one = runs / "one"
    summary = average([one], tmp_path / "mean", last=2)
    check(tmp_path / "mean", (one, 6), (one, 9))
    assert summary["weights"] == f"average of checkpoints 6, 9 of {one}"
    assert (summary["steps"], summary["valid_loss"]) == (9, None)
    made = RunDirectory.open(tmp_path / "mean")
    made.verify()
    assert made.read_summary() == summary
    assert "average of checkpoints 6, 9" in (tmp_path / "mean" / "card.md").read_text()


def test_checkpoints_of_several_runs_count_alike(runs: Path, tmp_path: Path) -> None:
    one, two = runs / "one", runs / "two"
    average([one, two], tmp_path / "mean", steps=[9, 3])
    check(tmp_path / "mean", (one, 3), (one, 9), (two, 3), (two, 9))


def test_every_verb_opens_it(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "mean")
    assert cli.main(["average", str(runs / "one"), "--last", "3", "--out", folder, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["run"], answer["ended_by"]) == (folder, "average")
    assert cli.main(["evaluate", folder, "--split", "valid", "--metrics", "loss"]) == 0
    assert trilemma.load(folder).translate(["a b"], max_length=3)
    assert cli.main(["bench", folder, "--contexts", "8", "--batch", "1", "--repeats", "1", "--new-tokens", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["train", folder, "--resume"]) == 2
    assert f"an average of checkpoints has no optimizer to go on with; begin another run with it: --from {folder}" in (
        capsys.readouterr().err
    )


def test_the_default_folder_stands_beside_the_run(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one", tmp_path / "one")
    assert cli.main(["average", str(tmp_path / "one"), "--last", "1"]) == 0
    check(tmp_path / "one-average", (runs / "one", 9))


def test_a_run_made_from_its_settings_can_be_resumed(runs: Path, tmp_path: Path) -> None:
    average([runs / "one"], tmp_path / "mean", last=2)
    settings = trilemma.config.load_config(tmp_path / "mean" / "config.yaml")
    trilemma.train(settings, out=tmp_path / "again", quiet=True)
    trilemma.train(settings, out=tmp_path / "again", resume=True, quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.d_ff": 16}, "model.d_ff is 16, not 32"),
        ({"model.mixer": "retention"}, "model.mixer is 'retention', not 'attention'"),
        ({"data.train": {"generated": "reverse", "size": 50, "options": {"symbols": 5}}}, "another tokenizer than"),
        ({"training.precision": "float64"}, "one of them is float64"),
        ({"seed": 77}, "begun from other weights than"),
        ({"data.lowercase": True}, "data.lowercase is True, not False"),
    ],
)
def test_other_models_are_refused_by_name(
    runs: Path, tmp_path: Path, tiny_config: Tiny, changes: dict[str, Any], message: str
) -> None:
    config = trilemma.config.merge(tiny_config(steps=1), changes)
    if "data.train" in changes:
        config["tokenizer"] = {"kind": "byte"}
        config["model"]["vocab_size"] = 262
    trilemma.train(config, out=tmp_path / "other", quiet=True)
    if "data.train" in changes:
        first = trilemma.config.merge(tiny_config(steps=1), {"model.vocab_size": 262})
        trilemma.train(first, out=tmp_path / "first", quiet=True)
    first_run = tmp_path / "first" if "data.train" in changes else runs / "one"
    with pytest.raises(CheckpointError) as error:
        average([first_run, tmp_path / "other"], tmp_path / "mean", last=1)
    assert str(tmp_path / "other") in str(error.value)
    assert str(first_run) in str(error.value)
    assert message in str(error.value)
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--last", "9"], "there are checkpoints at 3, 6, 9; 9 are asked for"),
        (["--last", "0"], "--last: at least 1, found 0"),
        (["--steps", "3,4"], "there are checkpoints at 3, 6, 9; none at 4"),
        (["--steps", "3,x"], '--steps: "3,x" is not a list of steps such as 900,1000'),
        (["--steps", "3,3"], "--steps: each may be given once"),
        (["--steps", "3", "--last", "1"], "give one of them"),
    ],
)
def test_mistakes_are_named(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "mean"
    assert cli.main(["average", str(runs / "one"), *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_is_no_run_or_is_taken(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["average", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["average", str(runs / "one"), "--last", "1", "--out", str(runs / "two")]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one", tmp_path / "one")
    file = RunDirectory(tmp_path / "one").checkpoint_path(9) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="altered"):
        average([tmp_path / "one"], tmp_path / "mean", last=1)
    assert not (tmp_path / "mean").exists()
