"""Power cuts: every prefix of the recorded calls, with what was not synced lost, torn or reordered.

The model is the POSIX one. A file's bytes are safe after fsync of the file; before that any part of them may be there.
A folder's names are safe after fsync of the folder; before that any subset of the pending changes may be there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trilemma.config import RunConfig
from trilemma.errors import TrilemmaError
from trilemma.runs import RunDirectory, files

Make = Callable[[int], dict[str, Tensor]]
SAMPLES = 4  # states drawn for each prefix
STEPS = (5, 9)


@dataclass
class Node:
    """A file (`data`) or a folder (`names`), with what is safe of it and what is pending."""

    folder: bool
    data: bytearray = field(default_factory=bytearray)
    safe: bytes = b""
    names: dict[str, Node] = field(default_factory=dict)
    pending: list[tuple[str, str, Any]] = field(default_factory=list)

    def now(self) -> dict[str, Node]:
        return applied(self.names, self.pending)


def applied(names: dict[str, Node], changes: list[tuple[str, str, Any]]) -> dict[str, Node]:
    """Names after changes; a change of a name that is not there is lost with it."""
    result = dict(names)
    for kind, name, value in changes:
        if kind == "add":
            result[name] = value
        elif kind == "remove":
            result.pop(name, None)
        elif name in result:
            result[value] = result.pop(name)
    return result


class RecordingDisk(files.Disk):
    """Works as usual and notes each call that changes something, as a change of a model file system."""

    def __init__(self, sync_files: bool = True, sync_folders: bool = True) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.marks: dict[int, str] = {}  # position in the log -> what had returned by then
        self._open: dict[int, Path] = {}
        self._sync_files, self._sync_folders = sync_files, sync_folders

    def open(self, path: Path, flags: int) -> int:
        new = not path.exists()
        fd = super().open(path, flags)
        self._open[fd] = path
        if flags & os.O_CREAT and new:
            self.log.append(("create", path))
        if flags & os.O_TRUNC:
            self.log.append(("truncate", path, 0))
        return fd

    def write(self, fd: int, data: files.Chunk) -> int:
        written = super().write(fd, data)
        self.log.append(("write", self._open[fd], bytes(memoryview(data)[:written])))
        return written

    def truncate(self, fd: int, size: int) -> None:
        super().truncate(fd, size)
        self.log.append(("truncate", self._open[fd], size))

    def sync(self, fd: int) -> None:
        path = self._open[fd]
        if path.is_dir() and self._sync_folders:
            self.log.append(("sync folder", path))
        elif not path.is_dir() and self._sync_files:
            self.log.append(("sync", path))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.log.append(("rename", source, target))

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.log.append(("make folder", path))

    def remove(self, path: Path) -> None:
        super().remove(path)
        self.log.append(("remove", path))

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self.log.append(("remove", path))


def replay(log: list[tuple[Any, ...]], root: Path) -> Node:
    """The model file system after the calls of `log`, all below `root`."""
    top = Node(True)

    def at(path: Path) -> Node:
        node = top
        for part in path.relative_to(root).parts:
            node = node.now()[part]
        return node

    for kind, path, *rest in log:
        if kind in ("create", "make folder"):
            at(path.parent).pending.append(("add", path.name, Node(kind == "make folder")))
        elif kind == "write":
            at(path).data += rest[0]
        elif kind == "truncate":
            del at(path).data[rest[0] :]
        elif kind == "sync":
            at(path).safe = bytes(at(path).data)
        elif kind == "sync folder":
            node = at(path)
            node.names, node.pending = node.now(), []
        elif kind == "rename":
            assert path.parent == rest[0].parent
            at(path.parent).pending.append(("rename", path.name, rest[0].name))
        else:
            at(path.parent).pending.append(("remove", path.name, None))
    return top


def cut(node: Node, target: Path, draw: random.Random) -> None:
    """Writes to `target` one state that a power cut may leave of `node`."""
    target.mkdir(parents=True)
    survivors = [change for change in node.pending if draw.random() < 0.5]
    for name, child in applied(node.names, survivors).items():
        if child.folder:
            cut(child, target / name, draw)
            continue
        data = bytes(child.data)
        torn = data[: draw.randrange(len(data) + 1)]
        zeroed = bytes(len(data))
        choices = [data] if data == child.safe else [child.safe, data, torn, zeroed]
        (target / name).write_bytes(draw.choice(choices))


def problems(path: Path, make: Make, promised: list[str]) -> list[str]:
    """What is wrong with a run after the power came back; `promised`: what had returned before the cut."""
    found: list[str] = []
    run = RunDirectory(path)
    try:
        if not run.exists():
            if "create" in promised:
                return ["the run is gone"]
            RunDirectory.create(path, RunConfig(), b"{}")
            return []
        run = RunDirectory.open(path)
        steps = run.checkpoints()
        for step in steps:
            model = make(0)
            record = run.load_checkpoint(step, model, {"moment": torch.zeros(4)})
            if record["step"] != step or not torch.equal(model["half"], make(step)["half"]):
                found.append(f"checkpoint {step} holds something else")
        found += [f"checkpoint {step} is gone" for step in STEPS if f"save {step}" in promised and step not in steps]
        published = [step for step in STEPS if f"publish {step}" in promised]
        if run.has("model.safetensors"):
            model = make(0)
            run.load_model(model)
            now = [step for step in STEPS if torch.equal(model["half"], make(step)["half"])]
            if not now or now[0] < max(published, default=0):
                found.append("the published model is not the newest that was promised")
            run.read_summary() if run.has("summary.json") else None
        elif published:
            found.append("the published model is gone")
        run.recover()
        run.save_checkpoint(20, make(20), {"moment": torch.ones(4)}, {"step": 20})
        run.publish_model(make(20))
        run.load_model(make(0))
    except TrilemmaError as error:
        found.append(str(error))
    return found


def history(root: Path, disk: RecordingDisk, make: Make) -> None:
    """A short life of a run: creation, two checkpoints, two publications."""
    run = RunDirectory.create(root / "run", RunConfig(), b"{}")
    disk.marks[len(disk.log)] = "create"
    for step in STEPS:
        run.save_checkpoint(step, make(step), {"moment": torch.ones(4)}, {"step": step})
        disk.marks[len(disk.log)] = f"save {step}"
        run.publish_model(make(step), {"summary.json": b'{"steps": 1}\n'})
        disk.marks[len(disk.log)] = f"publish {step}"


def attack(disk: RecordingDisk, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, seed: int) -> list[str]:
    """Every prefix of the history, several states each; all problems found."""
    root = tmp_path / "live"
    root.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(files, "disk", disk)
        history(root, disk, make)
    found, states = [], 0
    for length in range(len(disk.log) + 1):
        promised = [what for position, what in disk.marks.items() if position <= length]
        for sample in range(SAMPLES):
            draw = random.Random(f"{seed} {length} {sample}")
            place = tmp_path / f"cut-{length}-{sample}"
            cut(replay(disk.log[:length], root), place, draw)
            states += 1
            where = f"after {length} calls ({disk.log[length - 1][:2]}), sample {sample}"
            found += [f"{where}: {problem}" for problem in problems(place / "run", make, promised)]
    print(f"{states} states after {len(disk.log)} recorded calls, {len(found)} problems")
    assert states > 200
    return found


def test_every_power_cut_leaves_the_old_or_the_new(
    tmp_path: Path, make_tensors: Make, monkeypatch: pytest.MonkeyPatch, session_seed: int
) -> None:
    assert attack(RecordingDisk(), tmp_path, make_tensors, monkeypatch, session_seed) == []


@pytest.mark.parametrize("defect", ["sync_files", "sync_folders"])
def test_planted_defect_a_missing_sync_is_found(
    defect: str, tmp_path: Path, make_tensors: Make, monkeypatch: pytest.MonkeyPatch, session_seed: int
) -> None:
    assert attack(RecordingDisk(**{defect: False}), tmp_path, make_tensors, monkeypatch, session_seed) != []
