"""The page of an exported program: what goes in, what comes out, how to start. JSON, for programs and people."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from trilemma import __version__
from trilemma.data.tokenizer import ROLES
from trilemma.interop.program import Programs, Tensors
from trilemma.interop.target import text_begin, tokenizer_file
from trilemma.runs.load import LoadedRun

FILE = "program.json"
VERSION = 1


def describe(
    run: LoadedRun,
    programs: Programs,
    target: str,
    files: dict[str, str],
    error: float,
    packages: dict[str, str],
    after: str = "",
) -> dict[str, Any]:
    """The content of program.json.

    Args:
        target: torch-export or onnx. files: by program, "step" and "encoder". error: from `largest_difference`.
        packages: versions of what wrote the programs. after: stands before the names of the State that comes out.
    """
    tokenizer, model, sizes = run.tokenizer, run.model, programs.sizes
    encoder = sizes.source is not None
    language_model = run.config.data.task == "language-model"
    begin = text_begin(tokenizer)
    memory: Tensors = programs.step_inputs[2] if encoder else {}
    step_inputs = [_tensor("tokens", programs.step_inputs[0]), *_named(programs.start), *_named(memory)]
    logits = {"name": "logits", "shape": ["rows", model.config.vocab_size], "dtype": _type(next(model.parameters()))}
    described: dict[str, Any] = {
        "step": {"file": files["step"], "inputs": step_inputs, "outputs": [logits, *_named(programs.start, after)]}
    }
    if programs.encoder_inputs is not None:
        source, lengths = programs.encoder_inputs
        inputs = [_tensor("source", source), _tensor("source_lengths", lengths)]
        described["encoder"] = {"file": files["encoder"], "inputs": inputs, "outputs": _named(memory)}
    return {
        "format": f"trilemma-{target}",
        "version": VERSION,
        "layout": model.layout,
        "mixers": sorted({mixer.name for mixer in model.mixers()}),
        "vocab_size": model.config.vocab_size,
        "special_ids": {role: getattr(tokenizer, role) for role in ROLES},
        "start": {
            "source_begin": begin if encoder else None,
            "source_end": [tokenizer.eos] if encoder else None,
            "prompt_begin": [tokenizer.bos] if encoder else [tokenizer.bos, *begin],
            "prompt_end": [] if encoder or language_model else [tokenizer.sep],
            "state": "start.safetensors",
        },
        "rows": sizes.rows,
        "context": sizes.context,
        "source_length": sizes.source,
        "max_length": model.config.max_length,
        "lowercase": run.config.data.lowercase,
        "tokenizer": tokenizer_file(tokenizer)[0],
        "programs": described,
        "difference": error,
        "made_with": {"trilemma": __version__, **packages},
    }


def dump(description: dict[str, Any]) -> bytes:
    """As written to the file."""
    return (json.dumps(description, ensure_ascii=False, indent=1) + "\n").encode()


def _named(tensors: Tensors, before: str = "") -> list[dict[str, Any]]:
    return [_tensor(before + name, tensor) for name, tensor in tensors.items()]


def _tensor(name: str, tensor: Tensor) -> dict[str, Any]:
    return {"name": name, "shape": ["rows", *tensor.shape[1:]], "dtype": _type(tensor)}


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def torch_version() -> str:
    """Without the build's suffix."""
    return torch.__version__.partition("+")[0]
