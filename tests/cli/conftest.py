"""Run directories with random weights, made in a moment: what `generate`, `evaluate` and `classify` are tried on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from trilemma.config import RunConfig, TokenizerConfig, merge, parse
from trilemma.data import train_tokenizer
from trilemma.models import build_model
from trilemma.runs import RunDirectory
from trilemma.runs.tensors import model_tensors

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(name, **overrides)`: a finished run on bytes; overrides are dotted keys with "." as "__".

    With `texts` its vocabulary is their characters. `damaged`: no weight is a number.
    """

    def make(name: str = "run", *, texts: Sequence[str] | None = None, damaged: bool = False, **overrides: Any) -> Path:
        torch.manual_seed(5)
        values = {
            "model": {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
            "data": {"target_language": "de", "max_source_length": 40},
            "tokenizer": {"kind": "byte"},
            "decoding": {"max_length": 6},
            "training": {"precision": "float64"},
        }
        values = merge(values, {key.replace("__", "."): value for key, value in overrides.items()})
        kind = TokenizerConfig(kind="byte" if texts is None else "character")
        tokenizer = train_tokenizer(texts or [], kind, lowercase=values["data"].get("lowercase", False))
        config = parse(RunConfig, merge(values, {"model.vocab_size": tokenizer.vocab_size}))
        model = build_model(config.model).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (math.nan if damaged else 0.3))
        run = RunDirectory.create(tmp_path / name, config, tokenizer.serialize().encode())
        run.publish_model(model_tensors(model))
        return run.path

    return make
