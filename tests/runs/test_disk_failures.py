"""Disk full and I/O errors at every single call: a clear error, and what was good before stays good."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trilemma.config import RunConfig
from trilemma.errors import TrilemmaError
from trilemma.runs import RunDirectory, files

Make = Callable[[int], dict[str, Tensor]]


def _save(run: RunDirectory, make: Make) -> None:
    run.save_checkpoint(12, make(12), {"moment": torch.ones(4)}, {"step": 12, "best_step": 12})


def _publish(run: RunDirectory, make: Make) -> None:
    run.publish_model(make(12), {"summary.json": b'{"steps": 12}\n'})


def _remove(run: RunDirectory, make: Make) -> None:
    run.remove_checkpoint(4)


def _metrics(run: RunDirectory, make: Make) -> None:
    run.append_metrics({"step": 6})
    run.cut_metrics(5, 5)


ACTIONS: dict[str, Callable[[RunDirectory, Make], None]] = {
    "save": _save,
    "publish": _publish,
    "remove": _remove,
    "metrics": _metrics,
}


def damage(run: RunDirectory, make: Make) -> list[str]:
    """What is wrong with a run after an action failed: everything must load, as the old or as the new."""
    found = []
    try:
        run = RunDirectory.open(run.path)
        for step in run.checkpoints():
            model = make(0)
            run.load_checkpoint(step, model, {"moment": torch.zeros(4)})
            if not torch.equal(model["embedding.weight"], make(step)["embedding.weight"]):
                found.append(f"checkpoint {step} holds something else")
        if 5 not in run.checkpoints():
            found.append("the last good checkpoint is gone")
        model = make(0)
        run.load_model(model)
        if not any(torch.equal(model["embedding.weight"], make(step)["embedding.weight"]) for step in (5, 12)):
            found.append("the published model is neither the old nor the new")
        run.read_summary()
        run.read_metrics()
        run.recover()
        _save(run, make)
        _publish(run, make)
    except TrilemmaError as error:
        found.append(str(error))
    return found


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
def test_every_call_may_fail(
    action: str,
    error: int,
    forever: bool,
    run: RunDirectory,
    tmp_path: Path,
    make_tensors: Make,
    disk: Callable[[files.Disk], None],
    failing: Any,
) -> None:
    run.save_checkpoint(4, make_tensors(4), {"moment": torch.ones(4)}, {"step": 4, "best_step": 4})
    run.append_metrics({"step": 5})
    failures, k = 0, 0
    while True:
        k += 1
        victim = RunDirectory(tmp_path / f"copy{k}")
        shutil.copytree(run.path, victim.path)
        faulty = failing(k, error, forever)
        disk(faulty)
        try:
            ACTIONS[action](victim, make_tensors)
            succeeded, message = True, ""
        except TrilemmaError as problem:
            succeeded, message = False, str(problem)
        finally:
            disk(files.Disk())
        if not faulty.fired:
            break
        if not succeeded:
            failures += 1
            assert str(victim.path) in message, f"call {k}: the message names no file: {message}"
            assert errno.errorcode[error] == "EIO" or "No space left" in message, message
        assert damage(victim, make_tensors) == [], f"{action}, call {k}"
        shutil.rmtree(victim.path)
    print(f"{action}: {k - 1} calls failed in turn, {failures} reported")
    assert failures >= 3, "no call failed: the disk of the test is not used"


def test_creating_a_run_on_a_full_disk(tmp_path: Path, disk: Callable[[files.Disk], None], failing: Any) -> None:
    k = 0
    while True:
        k += 1
        faulty = failing(k, forever=True)
        disk(faulty)
        message = ""
        try:
            RunDirectory.create(tmp_path / f"run{k}", RunConfig(), b"{}")
        except TrilemmaError as error:
            message = str(error)
        finally:
            disk(files.Disk())
        assert str(tmp_path) in message or not faulty.fired or RunDirectory(tmp_path / f"run{k}").exists()
        if not faulty.fired:
            break
        if not RunDirectory(tmp_path / f"run{k}").exists():
            RunDirectory.create(tmp_path / f"run{k}", RunConfig(), b"{}")
        assert RunDirectory.open(tmp_path / f"run{k}").read_config() == RunConfig()
    assert k > 10


def test_short_writes_are_completed(run: RunDirectory, make_tensors: Make, disk: Callable[[files.Disk], None]) -> None:
    class Short(files.Disk):
        def write(self, fd: int, data: files.Chunk) -> int:
            return super().write(fd, memoryview(data)[:3])

    disk(Short())
    _save(run, make_tensors)
    assert damage(run, make_tensors) == []


def test_planted_defect_writing_in_place_is_found(
    run: RunDirectory, tmp_path: Path, make_tensors: Make, failing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the hidden folder and the rename, some failing call leaves damage, and `damage` must see it."""
    real = files.rename
    found = []
    for k in range(5, 45):
        victim = RunDirectory(tmp_path / f"copy{k}")
        shutil.copytree(run.path, victim.path)
        with monkeypatch.context() as patched:
            patched.setattr(files, "partial", lambda path: path)
            patched.setattr(files, "rename", lambda a, b: None if a == b else real(a, b))
            patched.setattr(files, "disk", failing(k, forever=True))
            with contextlib.suppress(TrilemmaError):
                _save(victim, make_tensors)
        found += damage(victim, make_tensors)
    assert found
