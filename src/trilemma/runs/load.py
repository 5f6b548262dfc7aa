"""From a run directory to a model that can be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from trilemma.config import RunConfig
from trilemma.data.tokenizer import Tokenizer
from trilemma.errors import CheckpointError
from trilemma.models import SequenceModel, build_model
from trilemma.runs.directory import RunDirectory
from trilemma.runs.tensors import model_tensors


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with all that is needed to use it. The model is in evaluation mode."""

    model: SequenceModel
    tokenizer: Tokenizer
    config: RunConfig
    directory: RunDirectory


def load_run(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    checkpoint: int | Literal["published", "best", "last"] = "published",
) -> LoadedRun:
    """Opens a run, checking every file it reads against the manifest.

    Args:
        path: a run directory.
        device: where the weights go.
        dtype: floating-point type of the weights; None: float32, or float64 for a run trained in it.
        checkpoint: "published": model.safetensors, the weights that training chose; "best", "last" or a step: the raw
            weights of that checkpoint.
    Raises:
        CheckpointError: not a run, not finished, or a file is missing, truncated, altered or foreign.
    """
    directory = RunDirectory.open(path)
    config = directory.read_config()
    if config.model.vocab_size is None:
        raise CheckpointError(f"{directory.path}: config.yaml is not resolved: model.vocab_size is missing")
    stored = torch.float64 if config.training.precision == "float64" else torch.float32
    model = build_model(config.model).to(dtype=dtype or stored)
    if checkpoint == "published":
        directory.load_model(model_tensors(model), cast=True)
    else:
        directory.load_checkpoint(_step(directory, checkpoint), model_tensors(model), cast=True)
    tokenizer = Tokenizer.parse(directory.read_tokenizer(), str(directory.tokenizer_path))
    return LoadedRun(model.to(device).eval(), tokenizer, config, directory)


def _step(directory: RunDirectory, checkpoint: int | str) -> int:
    if isinstance(checkpoint, int):
        return checkpoint
    step = directory.best_checkpoint() if checkpoint == "best" else directory.latest_checkpoint()
    if step is None:
        raise CheckpointError(f"{directory.path}: no checkpoint to choose as {checkpoint}")
    return step
