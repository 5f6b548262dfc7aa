"""A map between another library's tensors and ours, stated once and read in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trilemma.errors import CapabilityError, CheckpointError
from trilemma.interop.keys import read_json
from trilemma.runs import files

Shape = tuple[int, ...]

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Weight:
    """One tensor of ours, made of theirs.

    Attributes:
        ours: its name in our model.
        theirs: one name, or several whose rows stand one after the other.
        sizes: with several: how many rows each of them has.
        order: which of these rows is ours, row by row; None: as they stand.
        transposed: ours has theirs' rows as columns.
        factor, offset: ours = factor * theirs + offset.
        ones: axes of size 1 that theirs have besides, in ascending order.
        skipped: rows at the start of theirs that nothing reads; they are written as zeros.
        aliases: other names under which the same tensor may be stored (tied weights); never written.
    """

    ours: str
    theirs: str | tuple[str, ...]
    sizes: tuple[int, ...] = ()
    order: Tensor | None = None
    transposed: bool = False
    factor: float = 1.0
    offset: float = 0.0
    ones: tuple[int, ...] = ()
    skipped: int = 0
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, in order."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    def shapes(self, shape: Shape) -> list[Shape]:
        """The shapes of theirs, given ours."""
        return [part.shape for part in self.outward(torch.empty(shape, device="meta"))]

    def inward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Ours."""
        parts = [(tensor.squeeze(self.ones) if self.ones else tensor)[self.skipped :] for tensor in tensors]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        whole = whole if self.order is None else whole[self.order]
        whole = whole.t() if self.transposed else whole
        return whole.contiguous() if self._same else whole.float() * self.factor + self.offset

    def outward(self, tensor: Tensor) -> list[Tensor]:
        """Theirs."""
        whole = tensor if self._same else (tensor - self.offset) / self.factor
        whole = whole.t() if self.transposed else whole
        whole = whole if self.order is None else whole[self.order.argsort()]
        sizes = self.sizes or (len(whole),)
        assert sum(sizes) == len(whole) and len(sizes) == len(self.names), self.ours
        return [self._outward(part).contiguous() for part in whole.split(sizes)]

    @property
    def _same(self) -> bool:
        """Whether the numbers are theirs."""
        return self.factor == 1 and self.offset == 0

    def _outward(self, part: Tensor) -> Tensor:
        if self.skipped:
            part = torch.cat([part.new_zeros(self.skipped, *part.shape[1:]), part])
        for axis in self.ones:
            part = part.unsqueeze(axis)
        return part


@dataclass(frozen=True)
class Zeros:
    """A tensor of ours that theirs lack: it is zero, and must be when it is exported."""

    ours: str


@dataclass(frozen=True)
class LeftOut:
    """Tensors of theirs that have no part in this model, by a regular expression; named to the user with the reason.

    Attributes:
        value: what they must hold, or None.
    """

    pattern: str
    why: str
    value: Tensor | None = None


Rule = Weight | Zeros | LeftOut


@dataclass
class Renamed:
    """A directory's tensors under the names that a map has for them.

    Args:
        source: the directory's files.
        prefix: of the base model; files of the bare model lack it, and then it is put before every name.
        endings: old endings of names and what they are called now.
    """

    source: TensorFiles
    prefix: str = ""
    endings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.where = self.source.where
        held = self.source.names()
        self._bare = bool(self.prefix) and not any(name.startswith(self.prefix) for name in held)
        self._known: dict[str, str] = {}
        for name in held:
            known = (self.prefix if self._bare else "") + self._modern(name)
            if known in self._known:
                raise CheckpointError(f'{self.where}: "{self._known[known]}" and "{name}" are one tensor\'s names')
            self._known[known] = name

    def _modern(self, name: str) -> str:
        for old, new in self.endings.items():
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    def names(self) -> list[str]:
        """The names as the map has them."""
        return list(self._known)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self.source.shape(self._known[name])

    def get(self, name: str) -> Tensor:
        """A tensor."""
        return self.source.get(self._known[name])

    def real(self, name: str) -> str:
        """The name in the files, also of a tensor that they lack."""
        return self._known.get(name, name.removeprefix(self.prefix) if self._bare else name)


class TensorFiles:
    """The safetensors files of a directory: one, or several with an index.

    Raises:
        CheckpointError: none, damaged, or only pickle files, which are refused.
    """

    def __init__(self, directory: Path) -> None:
        self.where = str(directory)
        self._readers: dict[str, safe_open] = {}
        self._paths: dict[str, Path] = {}
        for path in _files(directory):
            reader = files.open_tensors(path)
            for name in reader.keys():  # noqa: SIM118 - not a mapping
                if name in self._readers:
                    raise CheckpointError(f'{path}: the tensor "{name}" stands in {self._paths[name].name} too')
                self._readers[name], self._paths[name] = reader, path
        _check_index(directory, self._paths)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._readers)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from the header alone."""
        return tuple(self._readers[name].get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """A tensor; `CheckpointError` if it holds no ordinary floating-point numbers."""
        reader, path = self._readers[name], self._paths[name]
        kind = reader.get_slice(name).get_dtype()
        if kind not in _FLOATS:
            raise CheckpointError(
                f'{path}: the tensor "{name}" has the type {kind}; quantised weights cannot be imported, only '
                f"{', '.join(_FLOATS)}"
            )
        try:
            tensor: Tensor = reader.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a valid safetensors file: {error}") from error
        return tensor


_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


def _files(directory: Path) -> list[Path]:
    if (directory / _INDEX).is_file():
        return [_inside(directory, name) for name in sorted(set(_weight_map(directory).values()))]
    if (directory / _ONE).is_file():
        return [directory / _ONE]
    pickles = [name for name in files.names(directory) if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{directory / pickles[0]}: a pickle file can run code when it is opened, and is refused; {_ONE} is "
            "needed. Save the model again with transformers: model.save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise CheckpointError(f"{directory}: no weights: {_ONE} or {_INDEX} is needed")


def _weight_map(directory: Path) -> dict[str, str]:
    found = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(
            f'{directory / _INDEX}: not an index of safetensors files: the mapping "weight_map" is needed'
        )
    return {str(name): str(file) for name, file in found.items()}


def _inside(directory: Path, name: str) -> Path:
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise CheckpointError(f'{directory / _INDEX}: "{name}" is no safetensors file of this folder')
    if not (directory / name).is_file():
        raise CheckpointError(f"{directory / name}: missing; {_INDEX} lists it")
    return directory / name


def _check_index(directory: Path, paths: Mapping[str, Path]) -> None:
    if not (directory / _INDEX).is_file():
        return
    for name, file in _weight_map(directory).items():
        if name not in paths:
            raise CheckpointError(f'{directory / file}: the tensor "{name}" is missing; {_INDEX} lists it')


def read(source: Renamed, rules: Sequence[Rule], needed: Mapping[str, Shape]) -> tuple[dict[str, Tensor], list[str]]:
    """Our tensors, every one of theirs accounted for.

    Args:
        source: theirs.
        rules: the map; together they name each tensor of `needed` once.
        needed: names and shapes of our model's tensors.

    Returns:
        tensors by our names, and what was left out with the reasons.

    Raises:
        CheckpointError: names the tensor that is missing, left over, of wrong shape, or not what it must be.
    """
    held = set(source.names())
    result: dict[str, Tensor] = {}
    for rule in rules:
        if isinstance(rule, Zeros):
            result[rule.ours] = torch.zeros(needed[rule.ours])
        elif isinstance(rule, Weight):
            result[rule.ours] = _inward(source, rule, needed[rule.ours], held)
    assert result.keys() == needed.keys(), result.keys() ^ needed.keys()
    notes = []
    for rule in rules:
        if isinstance(rule, LeftOut):
            names = sorted(name for name in held if re.fullmatch(rule.pattern, name))
            _check_value(source, rule, names)
            held -= set(names)
            if names:
                shown = _short([source.real(name) for name in names])
                notes.append(f"left out: {', '.join(shown)} ({rule.why})")
    if held:
        first = sorted(held)[0]
        raise CheckpointError(
            f'{source.where}: the tensor "{source.real(first)}" {list(source.shape(first))} is left over '
            f"({len(held)} in all): this architecture has no place for it"
        )
    return result, notes


def _inward(source: Renamed, rule: Weight, shape: Shape, held: set[str]) -> Tensor:
    names = list(rule.names)
    found = [name for name in rule.aliases if name in held]
    if found and names[0] not in held:
        names = [found.pop(0)]
    for name, wanted in zip(names, rule.shapes(shape), strict=True):
        if name not in held:
            raise CheckpointError(
                f'{source.where}: the tensor "{source.real(name)}" {list(wanted)} is missing ({rule.ours})'
            )
        if source.shape(name) != wanted:
            raise CheckpointError(
                f'{source.where}: the tensor "{source.real(name)}" has shape {list(source.shape(name))}, needed '
                f"{list(wanted)} ({rule.ours})"
            )
    tensors = [source.get(name) for name in names]
    for alias in found:
        if source.shape(alias) != tensors[0].shape or not torch.equal(source.get(alias), tensors[0]):
            raise CheckpointError(
                f'{source.where}: "{source.real(alias)}" and "{source.real(names[0])}" are tied, but differ'
            )
    held.difference_update(names, rule.aliases)
    return rule.inward(tensors)


def _check_value(source: Renamed, rule: LeftOut, names: Sequence[str]) -> None:
    for name in names if rule.value is not None else ():
        assert rule.value is not None
        same = source.shape(name) == tuple(rule.value.shape)
        if not same or not torch.allclose(source.get(name).float(), rule.value.float(), atol=1e-4):
            raise CheckpointError(
                f'{source.where}: the tensor "{source.real(name)}" is not what it must be: {rule.why}'
            )


def _short(names: Sequence[str]) -> list[str]:
    """Names with their layer numbers as *, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def write(ours: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Their tensors: the inverse of `read`.

    Raises:
        CapabilityError: a tensor of ours that theirs lack is not zero.
    """
    result: dict[str, Tensor] = {}
    for rule in rules:
        if isinstance(rule, Zeros) and bool(ours[rule.ours].any()):
            raise CapabilityError(f"{rule.ours} is not zero, and this architecture has no place for it")
        if isinstance(rule, Weight):
            result.update(zip(rule.names, rule.outward(ours[rule.ours]), strict=True))
    return result
