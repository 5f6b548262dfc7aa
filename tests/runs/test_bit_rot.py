"""Flipped bits, truncations, missing, foreign and unlisted files: each is named, and nothing of it is loaded."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trilemma.config import ModelConfig, RunConfig
from trilemma.errors import CheckpointError
from trilemma.runs import RunDirectory
from trilemma.runs.manifest import Manifest

Make = Callable[[int], dict[str, Tensor]]
FLIPS, TRUNCATIONS = (1000, 200) if os.environ.get("TRILEMMA_NIGHTLY") else (100, 20)


def loads(run: RunDirectory, make: Make) -> str | None:
    """None if checkpoint and model load, else the message; nothing may have been copied by then."""
    model, published = make(0), make(0)
    try:
        RunDirectory.open(run.path)
        run.load_model(published)
        run.read_summary()
        run.load_checkpoint(5, model, {"moment": torch.zeros(4)})
    except CheckpointError as error:
        assert all(torch.equal(model[name], value) for name, value in make(0).items()), "loaded before it was checked"
        return str(error)
    return None


def flip(path: Path, position: int, bit: int) -> bytes:
    """Flips one bit in place; returns what was there."""
    before = path.read_bytes()
    after = bytearray(before)
    after[position] ^= 1 << bit
    path.write_bytes(after)
    return before


def all_files(run: RunDirectory) -> list[Path]:
    skipped = (".lock", "metrics.jsonl")
    return sorted(path for path in run.path.rglob("*") if path.is_file() and path.name not in skipped)


def header_size(path: Path) -> int:
    if path.suffix != ".safetensors":
        return path.stat().st_size if path.suffix == ".json" else 0
    return 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])


def test_every_header_byte_and_a_hundred_payload_bits(run: RunDirectory, make_tensors: Make, session_seed: int) -> None:
    draw = random.Random(session_seed)
    places = [(path, position) for path in all_files(run) for position in range(header_size(path))]
    headers = len(places)
    payloads = [(path, header_size(path), path.stat().st_size) for path in all_files(run)]
    payloads = [item for item in payloads if item[2] > item[1]]
    for _ in range(FLIPS):
        path, low, high = draw.choice(payloads)
        places.append((path, draw.randrange(low, high)))
    assert headers > 2000
    for path, position in places:
        before = flip(path, position, draw.randrange(8))
        message = loads(run, make_tensors)
        path.write_bytes(before)
        assert message is not None, f"{path}, byte {position}: not noticed"
        assert str(path.parent) in message, f"{path}, byte {position}: not named: {message}"
        assert path.name == "manifest.json" or path.name in message, message
    print(f"{headers} header bytes and {FLIPS} payload bits flipped, all named")
    assert loads(run, make_tensors) is None


def test_truncations(run: RunDirectory, make_tensors: Make, session_seed: int) -> None:
    draw = random.Random(session_seed)
    for number in range(TRUNCATIONS):
        path = draw.choice(all_files(run))
        before = path.read_bytes()
        path.write_bytes(before[: draw.randrange(len(before))] if number else b"")
        message = loads(run, make_tensors)
        path.write_bytes(before)
        assert message is not None
        assert path.name in message


def test_missing_files(run: RunDirectory, make_tensors: Make) -> None:
    listed = all_files(run)
    assert len(listed) == 9
    for path in listed:
        before = path.read_bytes()
        path.unlink()
        message = loads(run, make_tensors)
        path.write_bytes(before)
        assert message is not None, path
        assert "missing" in message
        assert path.name in message


def test_an_unlisted_file_in_a_checkpoint(run: RunDirectory, make_tensors: Make) -> None:
    (run.checkpoint_path(5) / "extra.pt").write_bytes(b"x")
    assert "extra.pt: not listed in manifest.json; a foreign file" in (loads(run, make_tensors) or "")


def test_a_checkpoint_of_another_run(run: RunDirectory, tmp_path: Path, make_tensors: Make) -> None:
    other = RunDirectory.create(tmp_path / "other", RunConfig(model=ModelConfig(d_model=8)), b"{}")
    shutil.copytree(run.checkpoint_path(5), other.checkpoint_path(5))
    with pytest.raises(CheckpointError, match="step-00000005: foreign: a checkpoint of another run"):
        other.load_checkpoint(5, make_tensors(0))


@pytest.mark.parametrize("name", ["../secret", "a/b", "..", "", "x\0y"])
def test_a_manifest_cannot_name_files_outside(run: RunDirectory, make_tensors: Make, name: str) -> None:
    path = run.checkpoint_path(5) / "manifest.json"
    body = json.loads(path.read_text())
    digest = next(iter(body["files"].values()))
    path.write_bytes(
        Manifest("checkpoint", body["run"], {}, {})
        .encode()
        .replace(b'"files": {}', b'"files": ' + json.dumps({name: digest}).encode())
    )
    assert "is not a plain file name" in (loads(run, make_tensors) or "")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b"null", b"[" * 100_000, b'{"files": 3}', b"\xff\xfe", b'{"version": 1e400}']
)
def test_a_hostile_manifest_is_an_error_of_ours(run: RunDirectory, make_tensors: Make, body: bytes) -> None:
    (run.checkpoint_path(5) / "manifest.json").write_bytes(body)
    assert "manifest.json" in (loads(run, make_tensors) or "")


def test_a_huge_manifest_is_not_read(run: RunDirectory, make_tensors: Make) -> None:
    with (run.checkpoint_path(5) / "manifest.json").open("r+b") as stream:
        stream.truncate(1 << 40)  # sparse: a terabyte by its size
    assert "more than the" in (loads(run, make_tensors) or "")


def test_planted_defect_an_unchecked_manifest_is_found(
    run: RunDirectory, make_tensors: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check, flipped payload bits load unnoticed: the test above is not vacuous."""
    monkeypatch.setattr(Manifest, "check", lambda *_: None)
    path = run.checkpoint_path(5) / "model.safetensors"
    flip(path, path.stat().st_size - 1, 0)
    assert loads(run, make_tensors) is None
