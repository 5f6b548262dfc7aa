"""Tiny runs, and a server that trains them in processes that may be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

LAYOUTS = ("encoder-decoder", "decoder-only", "encoder-only")


def tiny(layout: str = "encoder-decoder", **training: Any) -> dict[str, Any]:
    """A configuration that trains in a fraction of a second, with dropout, EMA and unequal micro-batches."""
    task = {"encoder-only": "masked-language-model"}.get(layout, "seq2seq")
    return {
        "name": "tiny",
        "seed": 3,
        "model": {"layout": layout, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32, "dropout": 0.2},
        "data": {
            "task": task,
            "train": {"generated": "copy", "size": 200},
            "valid": {"generated": "copy", "size": 20},
            "context_length": 24,
        },
        "tokenizer": {"kind": "character"},
        "training": {
            "steps": 12,
            "batch_tokens": 128,
            "accumulate": 2,
            "learning_rate": 0.01,
            "warmup_steps": 4,
            "weight_decay": 0.1,
            "label_smoothing": 0.1,
            "precision": "float32",
            "compile": "off",
            "device": "cpu",
            "checkpoint_every": 3,
            "keep_checkpoints": 2,
            "log_every": 1,
            "tensorboard": "off",
            **training,
        },
    }


@pytest.fixture
def tiny_config() -> Callable[..., dict[str, Any]]:
    """`tiny(layout, **training)` as a mapping."""
    return tiny


@pytest.fixture(scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _private_cache(_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(_cache))
    monkeypatch.setenv("TRILEMMA_CACHE", str(_cache / "trilemma"))


class Runner:
    """Starts trainings in processes of their own, one at a time."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(cache),
            "TRILEMMA_CACHE": str(cache / "trilemma"),
        }
        command = [sys.executable, str(Path(__file__).with_name("runner.py")), str(folder)]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def train(self, name: str, config: dict[str, Any], resume: bool = True, **order: Any) -> dict[str, Any]:
        """Trains `config` in the run called `name`; see runner.py for what else may be ordered."""
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        arguments = [str(file), "--out", str(self.folder / name), *(["--resume"] if resume else [])]
        order = {"arguments": arguments, "log": str(self.folder / f"{name}.log"), **order}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        answer["log"] = (self.folder / f"{name}.log").read_text()
        return answer

    def close(self) -> None:
        """Ends the server."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, _cache: Path) -> Iterator[Runner]:
    """A server of trainings for the tests of one file."""
    server = Runner(tmp_path_factory.mktemp("runs"), _cache)
    yield server
    server.close()


def contents(run: Path) -> dict[str, Any]:
    """Everything a run holds, without what a clock or the machine measured."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or path.name in ("manifest.json", ".lock", "card.md"):
            continue
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if "second" not in k} for line in lines]
        elif path.suffix == ".json" and path.name != "tokenizer.json":
            dropped = ("measured", "seconds", "tokens_per_second", "peak_memory_bytes", "resumes", "environment")
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in dropped}
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture
def run_contents() -> Callable[[Path], dict[str, Any]]:
    """`contents(run)`: what must be the same in every repetition."""
    return contents
