"""`trilemma export --to torch-export`: the decoding step as programs of torch.export, free of this package."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from torch.export import Dim, ExportedProgram

from trilemma.errors import CapabilityError, TrilemmaError
from trilemma.interop import manifest
from trilemma.interop.program import Programs, largest_difference, make_programs
from trilemma.interop.target import ExportOptions, tokenizer_file
from trilemma.runs import files
from trilemma.runs.load import LoadedRun

ROLES = ("step", "encoder")


def write(run: LoadedRun, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """Writes step.pt2 (and encoder.pt2), start.safetensors, tokenizer.json and program.json; returns the last.

    Raises:
        CapabilityError: a layout or mixer that cannot be traced; names it.
        LawError: the program gives other logits than the model.
    """
    programs = make_programs(run, options)
    traced = trace(programs, options)
    error = largest_difference(programs, *(traced[name].module() if name in traced else None for name in ROLES))
    names = {name: f"{name}.pt2" for name in traced}
    for name, program in traced.items():
        content = io.BytesIO()
        torch.export.save(program, content)
        files.write_file(folder / names[name], content.getbuffer())
    packages = {"torch": manifest.torch_version()}
    description = manifest.describe(run, programs, "torch-export", names, error, packages)
    write_beside(run, programs, folder, description)
    return description


def write_beside(run: LoadedRun, programs: Programs, folder: Path, description: dict[str, Any]) -> None:
    """What stands beside the programs: the first State, the tokenizer, and the page."""
    start = {name: tensor.contiguous() for name, tensor in programs.start.items()}
    files.write_file(folder / description["start"]["state"], save(start))
    files.write_file(folder / description["tokenizer"], tokenizer_file(run.tokenizer)[1])
    files.write_file(folder / manifest.FILE, manifest.dump(description))


def trace(programs: Programs, options: ExportOptions) -> dict[str, ExportedProgram]:
    """By role, the programs of torch.export; the batch is free unless `options.rows` fixes it.

    Raises:
        CapabilityError: torch.export cannot follow; names the mixers and the reason.
    """
    inputs: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {"step": (programs.step, programs.step_inputs)}
    if programs.encoder is not None and programs.encoder_inputs is not None:
        inputs["encoder"] = (programs.encoder, programs.encoder_inputs)
    traced = {}
    for role, (program, given) in inputs.items():
        build = partial(torch.export.export, program, given, dynamic_shapes=dynamic_rows(given, options))
        with warnings.catch_warnings():
            # torch's recurrent kernels list their weights anew in each trace
            warnings.filterwarnings("ignore", message="The tensor attributes? .*_flat_weights")
            traced[role] = following(role, programs, build)
    return traced


def dynamic_rows(given: tuple[Any, ...], options: ExportOptions) -> tuple[Any, ...] | None:
    """Axis 0 of every input is the row, of any number; None where the number is fixed."""
    if options.rows is not None:
        return None
    axis = {0: Dim("rows")}
    return tuple(dict.fromkeys(item, axis) if isinstance(item, dict) else axis for item in given)


def following(role: str, programs: Programs, build: Callable[[], Any]) -> Any:
    """`build()`, whose failures become one message."""
    try:
        return build()
    except TrilemmaError:
        raise
    except Exception as error:  # whatever the tracer, or an operator under it, raises
        model = programs.step.model
        stack = model.stacks()[0] if role == "encoder" else model.stack
        names = ", ".join(sorted({mixer.name for mixer in stack.mixers()}))
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        reason = next((line.strip(" -") for line in str(first).splitlines() if line.strip()), type(first).__name__)
        mend = "; a fixed number of rows may do: --rows 1" if "rows" in reason else ""
        raise CapabilityError(f"the {role} of this model ({names}) cannot be exported: {reason[:300]}{mend}") from error
