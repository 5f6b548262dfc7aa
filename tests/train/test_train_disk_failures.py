"""Reliability row 4 in a whole training: the k-th write, sync or rename fails; the message is one, the run goes on."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from trilemma.runs import RunDirectory

Tiny = Callable[..., dict[str, Any]]


@pytest.mark.slow
def test_a_full_disk_stops_training_with_one_message(runner: Any, tiny_config: Tiny, run_contents: Any) -> None:
    config = tiny_config(steps=6)
    assert runner.train("whole", config)["code"] == 0
    reference = run_contents(runner.folder / "whole")["model.safetensors"]
    failed = 0
    for k in range(12, 160, 12):
        name = f"run{k}"
        answer = runner.train(name, config, fail=[k, errno.ENOSPC if k % 24 else errno.EIO])
        assert answer["code"] in (0, 2), answer["log"]
        if answer["code"] == 0:
            continue
        failed += 1
        assert "Traceback" not in answer["log"]
        assert "No space left on device" in answer["log"] or "Input/output error" in answer["log"]
        run = RunDirectory(runner.folder / name)
        for step in run.checkpoints():
            run.verify_checkpoint(step)
        assert runner.train(name, config)["code"] == 0
        assert (run.path / "model.safetensors").read_bytes() == reference
    print(f"{failed} failures ended a training")
    assert failed >= 3
