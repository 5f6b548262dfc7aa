"""training.backend: decided once, written with its reason, obeyed on resume, named."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trilemma.config import RunConfig, parse
from trilemma.errors import BackendError, CapabilityError
from trilemma.models import SequenceModel, build_model
from trilemma.ops import backends, dispatch, fla_kernels
from trilemma.ops.decayed_scan import decayed_scan
from trilemma.train.choices import choose


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    backends.reset()


@pytest.fixture
def _present(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla, as if it ran here: our own form under its name."""
    changes: dict[str, Any] = {
        "call": inspect.unwrap(decayed_scan),
        "missing": lambda: "",
        "version": lambda: "0.6.0",
        "devices": ("cpu",),
    }
    monkeypatch.setattr(backends, "BACKENDS", [dataclasses.replace(fla_kernels.BACKENDS[0], **changes)])


def made(mixer: str = "retention", **training: Any) -> tuple[RunConfig, SequenceModel]:
    model = {"layout": "decoder-only", "mixer": mixer, "d_model": 16, "num_heads": 2, "num_layers": 1, "vocab_size": 20}
    settings = {"steps": 1, "device": "cpu", "precision": "bfloat16", **training}
    config = parse(RunConfig, {"model": model, "training": settings}, "config")
    return config, build_model(config.model)


def test_without_a_gpu_it_is_plain_and_says_why() -> None:
    chosen = choose(*made())
    assert chosen.training.backend == "plain"
    assert chosen.notes["training.backend"] == "backend fla runs on cuda, not on cpu"
    with pytest.raises(BackendError, match="runs on cuda, not on cpu"):
        choose(*made(backend="fla"))


@pytest.mark.usefixtures("_present")
def test_auto_takes_it_and_a_resumed_run_keeps_it() -> None:
    config, model = made()
    chosen = choose(config, model)
    assert chosen.training.backend == "fla"
    assert chosen.notes["training.backend"].startswith("decayed_scan: fla 0.6.0 (checked: ")
    assert chosen.training.compile == "off"
    for again in (chosen, choose(chosen, model)):
        assert again.training.backend == "fla"
        assert not dispatch._chosen["decayed_scan"].strict  # as when it was chosen
    assert chosen.notes == choose(chosen, model).notes
    other, model = made("attention")
    assert choose(other, model).training.backend == "plain"
    assert backends.path() == "plain"


@pytest.mark.usefixtures("_present")
def test_what_is_asked_for_is_named_and_strict() -> None:
    said: list[str] = []
    config, model = made(backend="fla")
    chosen = choose(config, model, said.append)
    assert "training.backend" not in chosen.notes
    assert said[-1].startswith("decayed_scan: fla 0.6.0 (checked: ")
    with pytest.raises(BackendError, match="decayed_scan: backend fla cannot serve this call: values in float32"):
        model(torch.zeros(1, 4, dtype=torch.long))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.zeros(1, 4, dtype=torch.long))
    assert dispatch._chosen["decayed_scan"].served == 1
    with pytest.raises(BackendError, match="takes values in bfloat16, not in float32"):
        choose(*made(backend="fla", precision="float32"))
    with pytest.raises(CapabilityError, match=r"compile is on, but kernels on the path plain\+fla are not traced"):
        choose(*made(backend="fla", compile="on"))
