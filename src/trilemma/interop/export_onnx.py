"""`trilemma export --to onnx`: the decoding step as ONNX graphs, which onnxruntime runs beside the model first."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trilemma.interop import manifest
from trilemma.interop.export_torch import ROLES, following, trace, write_beside
from trilemma.interop.program import Programs, Tensors, largest_difference, make_programs
from trilemma.interop.target import ExportOptions, optional_package
from trilemma.runs.load import LoadedRun

AFTER = "next."  # before the names of the State that comes out: a name may stand once in a graph
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def write(run: LoadedRun, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """Writes step.onnx (and encoder.onnx), start.safetensors, tokenizer.json and program.json; returns the last.

    Raises:
        BackendError: a package is not installed.
        CapabilityError: an operator that has no ONNX form, or that onnxruntime does not run; names it.
        LawError: the graphs give other logits than the model.
    """
    _, _, runtime = (optional_package(name, "onnx", " ".join(_PACKAGES)) for name in _PACKAGES)
    programs = make_programs(run, options)
    names: dict[str, str] = {}
    sessions: dict[str, _Session] = {}
    for role, program in trace(programs, options).items():
        names[role] = f"{role}.onnx"
        inputs, outputs = _names(programs, role)
        convert = partial(
            torch.onnx.export, program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False
        )
        with _quiet():
            graph = following(role, programs, convert)
        graph.save(folder / names[role])
        open_it = partial(_Session, runtime, folder / names[role], outputs)
        sessions[role] = following(role, programs, open_it)
    step, encoder = (sessions.get(role) for role in ROLES)
    error = following("step", programs, partial(largest_difference, programs, step, encoder))
    packages = {"torch": manifest.torch_version(), "onnxruntime": runtime.__version__}
    description = manifest.describe(run, programs, "onnx", names, error, packages, after=AFTER)
    write_beside(run, programs, folder, description)
    return description


def _names(programs: Programs, role: str) -> tuple[list[str], list[str]]:
    """Of a graph's inputs and outputs, in order."""
    memory = list(programs.step_inputs[2]) if programs.encoder is not None else []
    if role == "encoder":
        return ["source", "source_lengths"], memory
    state = programs.step.state_names
    return ["tokens", *state, *memory], ["logits", *(f"{AFTER}{name}" for name in state)]


class _Session:
    """A graph in onnxruntime, called as `Step` and `Encoder` are."""

    def __init__(self, runtime: ModuleType, file: Path, outputs: list[str]) -> None:
        settings = runtime.SessionOptions()
        settings.log_severity_level = 4  # its errors come as exceptions too
        self.session = runtime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        self.inputs, self.outputs = [item.name for item in self.session.get_inputs()], outputs

    def __call__(self, *given: Tensor | Tensors) -> Any:
        """Tensors in the order of the inputs -> logits and State, or the memory."""
        flat = [tensor for item in given for tensor in (item.values() if isinstance(item, dict) else (item,))]
        feed = {name: tensor.numpy() for name, tensor in zip(self.inputs, flat, strict=True)}
        found = dict(zip(self.outputs, map(torch.from_numpy, self.session.run(self.outputs, feed)), strict=True))
        if "logits" not in found:
            return found
        return found.pop("logits"), {name.removeprefix(AFTER): tensor for name, tensor in found.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs each optional package that it does without, and uses names that torch has deprecated."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
