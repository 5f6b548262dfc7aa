"""A model whose weights are read from a file is not initialised first: random numbers took half of the loading time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trilemma.config import ModelConfig, RunConfig, parse
from trilemma.data.tokenizer import symbol_tokenizer
from trilemma.models import build_model
from trilemma.runs import RunDirectory
from trilemma.runs.load import load_run
from trilemma.runs.tensors import model_tensors


def draws(state: torch.Tensor) -> bool:
    return not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("layout", "mixer"), [("encoder-decoder", "attention"), ("decoder-only", "retention"), ("decoder-only", "mamba2")]
)
def test_loading_draws_nothing_and_reads_every_weight(layout: str, mixer: str, tmp_path: Path) -> None:
    tokenizer = symbol_tokenizer(["a", "b"])
    model = {"layout": layout, "mixer": mixer, "vocab_size": tokenizer.vocab_size, "d_model": 16, "d_ff": 32}
    config = parse(RunConfig, {"model": {**model, "num_layers": 2, "num_heads": 2}})
    state = torch.get_rng_state()
    made = build_model(config.model)
    assert draws(state)  # the check can fail
    run = RunDirectory.create(tmp_path / "run", config, tokenizer.serialize().encode())
    run.publish_model(model_tensors(made))
    state = torch.get_rng_state()
    loaded = load_run(run.path).model
    if mixer != "mamba2":  # which draws the logarithm of its steps before it makes a parameter of it
        assert not draws(state)
    read = model_tensors(loaded)
    assert all(torch.equal(read[name], weight) for name, weight in model_tensors(made).items())


def test_models_are_drawn_as_before_once_one_was_loaded(tmp_path: Path) -> None:
    """Nothing of the loading stays switched on."""
    test_loading_draws_nothing_and_reads_every_weight("decoder-only", "attention", tmp_path)
    config = ModelConfig(layout="decoder-only", vocab_size=20, d_model=16, d_ff=32, num_layers=1, num_heads=2)
    one, other = (model_tensors(build_model(config)) for _ in range(2))
    assert any(not torch.equal(one[name], weight) for name, weight in other.items())
