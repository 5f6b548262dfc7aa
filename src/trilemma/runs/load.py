"""From a run directory to a model that can be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from trilemma.config import RunConfig
from trilemma.data.tokenizer import Tokenizer
from trilemma.errors import CheckpointError, ConfigError
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
        ConfigError: another `dtype` than float32 for a quantized run.
    """
    directory = RunDirectory.open(path)
    config = directory.read_config()
    if config.model.vocab_size is None:
        raise CheckpointError(f"{directory.path}: config.yaml is not resolved: model.vocab_size is missing")
    coded = config.model.quantization
    if coded is not None and dtype not in (None, torch.float32):
        raise ConfigError(f"{path}: its weights are in {coded} and all else in float32; leave dtype to the run")
    doubled = config.training.precision == "float64" and coded is None
    stored = torch.float64 if doubled else torch.float32
    with _Undrawn():
        model = build_model(config.model).to(dtype=dtype or stored)
    if checkpoint == "published":
        directory.load_model(model_tensors(model), cast=True)
    else:
        directory.load_checkpoint(_step(directory, checkpoint), model_tensors(model), cast=True)
    tokenizer = Tokenizer.parse(directory.read_tokenizer(), str(directory.tokenizer_path))
    return LoadedRun(model.to(device).eval(), tokenizer, config, directory)


class _Undrawn(TorchFunctionMode):
    """Parameters made inside keep what their memory held: all are read from a file next, and random numbers would take
    half of a model's loading time."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            drawn = args[0] if args else kwargs["tensor"]
            if isinstance(drawn if drawn._base is None else drawn._base, nn.Parameter):  # parts of one, too
                return drawn
        return func(*args, **kwargs)


def _step(directory: RunDirectory, checkpoint: int | str) -> int:
    if isinstance(checkpoint, int):
        return checkpoint
    step = directory.best_checkpoint() if checkpoint == "best" else directory.latest_checkpoint()
    if step is None:
        raise CheckpointError(f"{directory.path}: no checkpoint to choose as {checkpoint}")
    return step
