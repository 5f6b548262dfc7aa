"""Named tensors as safetensors: written in a stream, read by the reference library after every shape is checked."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trilemma.errors import CheckpointError
from trilemma.runs import files

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def encode(tensors: Mapping[str, Tensor]) -> Iterator[files.Chunk]:
    """The bytes of a safetensors file, one tensor at a time, so that saving needs no second copy of the model.

    The layout is the reference library's (wide types first, then by name), so equal tensors give equal bytes.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once: of tied ones the first name stays. Nothing is copied."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            result[name] = tensor
    return result


def read(path: Path, into: Mapping[str, Tensor], cast: bool = False) -> None:
    """Copies the tensors of a file into existing ones of the same names and shapes.

    Every name, shape and type is compared before the first byte is copied.

    Args:
        path: a safetensors file that a manifest has already vouched for.
        into: targets by name; exactly these must be in the file.
        cast: another floating-point type is converted instead of refused.
    Raises:
        CheckpointError: not a safetensors file, or a tensor is missing, unknown, or of another shape or type.
    """
    reader = files.open_tensors(path)
    try:
        _check(path, reader, into, cast)
        with torch.no_grad():
            for name, target in into.items():
                target.copy_(reader.get_tensor(name))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a valid safetensors file: {error}") from error


def shapes(path: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Type and shape of each tensor of a file, from its header alone."""
    reader = files.open_tensors(path)
    return {name: _described(path, reader, name) for name in reader.keys()}  # noqa: SIM118 - not a mapping


def _described(path: Path, reader: safe_open, name: str) -> tuple[torch.dtype, list[int]]:
    view = reader.get_slice(name)
    dtype = _DTYPES.get(view.get_dtype())
    if dtype is None:
        raise CheckpointError(f'{path}: the tensor "{name}" has the type {view.get_dtype()}, which no run of ours has')
    return dtype, list(view.get_shape())


def _check(path: Path, reader: safe_open, into: Mapping[str, Tensor], cast: bool) -> None:
    held = set(reader.keys())
    if missing := sorted(set(into) - held):
        raise CheckpointError(f'{path}: foreign file: the tensor "{missing[0]}" is missing ({len(missing)} in all)')
    if unknown := sorted(held - set(into)):
        raise CheckpointError(f'{path}: foreign file: the tensor "{unknown[0]}" is unknown ({len(unknown)} in all)')
    for name, target in into.items():
        dtype, shape = _described(path, reader, name)
        if shape != list(target.shape):
            raise CheckpointError(f'{path}: foreign file: "{name}" has shape {shape}, needed {list(target.shape)}')
        if dtype != target.dtype and not (cast and dtype.is_floating_point and target.is_floating_point()):
            raise CheckpointError(f'{path}: foreign file: "{name}" is {dtype}, needed {target.dtype}')
