"""Several real processes under torchrun: the losses and the order of one; checkpoints open on any number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trilemma.runs.load import load_run
from trilemma.train import train
from trilemma.train.processes import Processes

Tiny = Callable[..., dict[str, Any]]


def torchrun(processes: int, config: dict[str, Any], out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    arguments = [str(file), "--out", str(out), *more]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "trilemma", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def numbers(run: Path, name: str) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


@pytest.mark.slow
def test_two_processes_train_like_one_and_hand_over_to_one(tiny_config: Tiny, tmp_path: Path) -> None:
    """Row 8 at a small size: 2 -> 1 processes, float64 without dropout, losses within 1e-9 relative."""
    config = tiny_config("encoder-decoder", accumulate=4, precision="float64", steps=9)
    config["model"]["dropout"] = 0.0
    one = train(config, out=tmp_path / "one", quiet=True)
    short = {**config, "training": {**config["training"], "steps": 6}}
    done = torchrun(2, short, tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("resumed after") == 0
    assert done.stderr.count("2 process(es)") == 1, "more than rank 0 has printed"
    assert json.loads(done.stdout)["processes"] == 2, "stdout holds exactly one JSON line"
    two = train(config, out=tmp_path / "two", resume=True, quiet=True)
    for name in ("loss", "valid_loss", "gradient_norm", "tokens", "input_tokens", "flops", "learning_rate"):
        expected = numbers(tmp_path / "one", name)
        got = numbers(tmp_path / "two", name)
        if name == "valid_loss":
            expected, got = expected[:2] + expected[-1:], got[:2] + got[-1:]
        assert got == pytest.approx(expected, rel=1e-9), name
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert load_run(tmp_path / "two").directory.read_summary()["resumes"] == 1
    back = torchrun(2, {**config, "training": {**config["training"], "steps": 12}}, tmp_path / "two", "--resume")
    assert back.returncode == 0, back.stderr
    assert "resumed after step 9" in back.stderr


def test_shares_must_be_even(tiny_config: Tiny, tmp_path: Path) -> None:
    done = torchrun(2, tiny_config(accumulate=3), tmp_path / "run")
    assert done.returncode != 0
    assert "3 micro-batches cannot be dealt evenly over 2 processes; set it to a multiple of 2" in done.stderr


def test_micro_batches_are_dealt_once() -> None:
    device = torch.device("cpu")
    dealt = [[item for item in range(12) if Processes(rank, 3, device).mine(item)] for rank in range(3)]
    assert sorted(sum(dealt, [])) == list(range(12))  # noqa: RUF017
    assert {len(items) for items in dealt} == {4}
