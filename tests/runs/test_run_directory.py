"""What a run directory keeps, and what it says when asked for what is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from trilemma.config import ModelConfig, RunConfig, TrainingConfig
from trilemma.errors import CheckpointError, ConfigError
from trilemma.runs import RunDirectory, tensors

Make = Callable[[int], dict[str, Tensor]]


def test_writes_the_reference_formats_bytes(tmp_path: Path, make_tensors: Make) -> None:
    named = make_tensors(1) | {"wide": torch.randn(2, 3).double(), "flag": torch.tensor([True, False])}
    ours = b"".join(tensors.encode(named))
    assert ours == save(named, metadata={"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(ours)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == named.keys()
    assert all(torch.equal(back[name], named[name]) and back[name].dtype == named[name].dtype for name in named)


def test_checkpoint_round_trip(run: RunDirectory, make_tensors: Make) -> None:
    run.save_checkpoint(12, make_tensors(12), {"moment": torch.ones(4)}, {"step": 12, "best_step": 5})
    assert run.checkpoints() == [5, 12]
    assert (run.latest_checkpoint(), run.best_checkpoint()) == (12, 5)
    model, optimizer = make_tensors(0), {"moment": torch.zeros(4)}
    assert run.load_checkpoint(12, model, optimizer) == {"step": 12, "best_step": 5}
    assert all(torch.equal(model[name], value) for name, value in make_tensors(12).items())
    assert torch.equal(optimizer["moment"], torch.ones(4))
    run.remove_checkpoint(5)
    assert run.checkpoints() == [12]


def test_saving_an_intact_step_again_keeps_it(run: RunDirectory, make_tensors: Make) -> None:
    run.save_checkpoint(5, make_tensors(99), {"moment": torch.ones(4)}, {"step": 5})
    model = make_tensors(0)
    run.load_checkpoint(5, model)
    assert torch.equal(model["embedding.weight"], make_tensors(5)["embedding.weight"])


def test_tied_weights_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

    assert list(tensors.model_tensors(Tied())) == ["first.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": torch.zeros(5)}, '"norm.weight" has shape [4], needed [5]'),
        ({"norm.weight": torch.zeros(4).double()}, '"norm.weight" is torch.float32, needed torch.float64'),
        ({"new": torch.zeros(1)}, 'the tensor "new" is missing'),
        ({"norm.weight": None}, 'the tensor "norm.weight" is unknown'),
    ],
)
def test_another_models_weights_are_refused(
    run: RunDirectory, make_tensors: Make, change: dict[str, Tensor | None], message: str
) -> None:
    wanted = {name: value for name, value in (make_tensors(0) | change).items() if value is not None}
    before = {name: value.clone() for name, value in wanted.items()}
    with pytest.raises(CheckpointError, match="foreign file") as error:
        run.load_checkpoint(5, wanted)
    assert message in str(error.value)
    assert all(torch.equal(wanted[name], before[name]) for name in wanted), "something was loaded before the check"


def test_metrics_lose_a_torn_last_line_and_what_follows_the_checkpoint(run: RunDirectory) -> None:
    for step in (1, 2, 3, 4):
        run.append_metrics({"step": step, "loss": step / 4})
    run.append_metrics({"step": 2, "valid_loss": 1.0})
    with (run.path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 5, "lo')
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3, 4, 2]
    run.cut_metrics(3, validated=1)
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3]
    run.append_metrics({"step": 4})
    assert run.read_metrics()[-1] == {"step": 4}


def test_damaged_metrics_name_the_line(run: RunDirectory) -> None:
    (run.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: not valid JSON"):
        run.read_metrics()


def test_scores_and_summary(run: RunDirectory) -> None:
    assert run.read_scores() == []
    scores = [{"split": "test", "metric": "bleu", "value": 31.5, "signature": "x", "size": 3}]
    run.write_scores(scores, {"test": ["eins", "", "drei ü"]})
    assert run.read_scores() == scores
    assert run.read_text("outputs.test.txt") == "eins\n\ndrei ü\n"
    assert run.read_summary() == {"steps": 5}
    assert not run._lock.held


def test_a_new_run_does_not_overwrite(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a run already; go on with --resume"):
        RunDirectory.create(run.path, RunConfig(), b"{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r'not empty \("thesis\.tex"\) and not a run'):
        RunDirectory.create(tmp_path / "mine", RunConfig(), b"{}")


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: no such folder"):
        RunDirectory.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no run here \(manifest\.json is missing\)"):
        RunDirectory.open(tmp_path)


def test_a_missing_checkpoint_names_those_that_exist(run: RunDirectory, make_tensors: Make) -> None:
    with pytest.raises(CheckpointError, match=r"step-00000007: no such checkpoint; there are: 5"):
        run.load_checkpoint(7, make_tensors(0))


def test_an_unfinished_run_has_no_model(tmp_path: Path, make_tensors: Make) -> None:
    fresh = RunDirectory.create(tmp_path / "fresh", RunConfig(), b"{}")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors yet: training has not ended"):
        fresh.load_model(make_tensors(0))


def test_the_identity_of_a_run_is_kept(run: RunDirectory) -> None:
    longer = RunConfig(training=TrainingConfig(steps=7))
    run.write_config(longer)
    assert run.read_config() == longer
    with pytest.raises(ConfigError, match="cannot change"):
        run.write_config(RunConfig(model=ModelConfig(d_model=8)))


def test_links_are_not_followed(run: RunDirectory, tmp_path: Path, make_tensors: Make) -> None:
    target = run.checkpoint_path(5) / "model.safetensors"
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a regular file"):
        run.load_checkpoint(5, make_tensors(0))


def test_the_way_to_a_run_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "big-disk")
    RunDirectory.create(tmp_path / "runs" / "mine", RunConfig(), b"{}")
    assert RunDirectory.open(tmp_path / "big-disk" / "mine").read_config() == RunConfig()


def test_a_newer_format_is_refused(run: RunDirectory) -> None:
    path = run.path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(CheckpointError, match="version 2 is newer than this trilemma"):
        RunDirectory.open(run.path)


def test_unlisted_weights_beside_the_run_are_refused_and_notes_are_not(run: RunDirectory) -> None:
    (run.path / "notes.txt").write_text("mine")
    RunDirectory.open(run.path)
    (run.path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not listed in manifest\.json; a foreign file"):
        RunDirectory.open(run.path)
