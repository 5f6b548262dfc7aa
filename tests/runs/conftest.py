"""Runs small enough to damage a thousand times, and disks that fail or remember."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trilemma.config import RunConfig
from trilemma.runs import RunDirectory, files

PRIMITIVES = (
    *("open", "read", "write", "truncate", "sync", "close", "rename", "make_folder"),
    *("remove", "remove_folder", "names", "status", "lock", "tensors"),
)


class FailingDisk(files.Disk):
    """The k-th call (from 1) fails with `error`, and with `forever` all later ones that write."""

    def __init__(self, k: int, error: int = errno.ENOSPC, forever: bool = False) -> None:
        self.k, self.error, self.forever = k, error, forever
        self.calls = self.fired = 0

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name not in PRIMITIVES:
            return value

        def call(*arguments: Any) -> Any:
            self.calls += 1
            again = self.forever and self.calls > self.k and name in ("open", "write", "sync", "rename", "make_folder")
            if self.calls == self.k or again:
                self.fired += 1
                if name == "close":
                    value(*arguments)
                raise OSError(self.error, os.strerror(self.error))
            return value(*arguments)

        return call


@pytest.fixture(autouse=True)
def _no_waiting_for_the_platter(monkeypatch: pytest.MonkeyPatch) -> None:
    """That syncs are asked for is what test_power_cut proves; that the kernel obeys is not ours to test."""
    monkeypatch.setattr(files.Disk, "sync", lambda self, fd: None)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[files.Disk], None]:
    """Puts a disk of the test's own in place of the real one."""
    return lambda replacement: monkeypatch.setattr(files, "disk", replacement)


@pytest.fixture
def failing() -> type[FailingDisk]:
    return FailingDisk


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding.weight": torch.randn(7, 4, generator=generator),
        "norm.weight": torch.randn(4, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "count": torch.tensor(seed),
        "empty": torch.zeros(0, 2),
    }


@pytest.fixture
def make_tensors() -> Callable[[int], dict[str, torch.Tensor]]:
    """Tensors that differ with the seed, of every shape and type that runs hold."""
    return tensors_of


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with the checkpoint of step 5 and a published model, both made from seed 5."""
    directory = RunDirectory.create(tmp_path / "run", RunConfig(), b'{"tokenizer": true}')
    directory.save_checkpoint(5, tensors_of(5), {"moment": tensors_of(55)["norm.weight"]}, {"step": 5, "best_step": 5})
    directory.publish_model(tensors_of(5), {"summary.json": b'{"steps": 5}\n'})
    return directory
