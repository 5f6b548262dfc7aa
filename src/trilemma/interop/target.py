"""What all targets of `trilemma export` share: their options, and a folder that appears whole or not at all."""

from __future__ import annotations

import base64
import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from trilemma.data import Tokenizer
from trilemma.data.backends import Bound
from trilemma.data.pieces import MARIAN
from trilemma.errors import BackendError, CapabilityError, ConfigError
from trilemma.runs import files


@dataclass(frozen=True)
class ExportOptions:
    """What a user may ask of a target; each target reads its own.

    Attributes:
        rows: sequences that a program reads at once; None: any number.
        context: tokens that a growing State has room for; None: from the run's data.
        source_length: tokens that the encoder's program reads, padding included; None: from the run's data.
        quantization: of the weights; None: float32.
    """

    rows: int | None = None
    context: int | None = None
    source_length: int | None = None
    quantization: str | None = None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into; it is renamed to `path` when all has gone well, and removed otherwise.

    Raises:
        ConfigError: `path` exists.
        CheckpointError: it cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path}: exists already; nothing is overwritten: choose another --out, or remove it")
    draft = files.partial(path)
    if files.is_folder(draft):
        files.remove_tree(draft)
    files.make_folder(draft)
    try:
        with files.explained(path, "written"):
            yield draft
            for name in files.names(draft):  # others wrote them, and did not sync
                _sync(draft / name)
        files.sync_folder(draft)
        files.rename(draft, path)
        files.sync_folder(path.parent)
    except BaseException:
        files.remove_tree(draft)
        raise


def _sync(file: Path) -> None:
    fd = files.disk.open(file, os.O_RDONLY)
    try:
        files.disk.sync(fd)
    finally:
        files.disk.close(fd)


def optional_package(name: str, target: str, install: str) -> ModuleType:
    """An optional package.

    Args:
        name: to import. target: what needs it. install: what pip is given.

    Raises:
        BackendError: it is not installed, or does not load here; names the pip line.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(f"--to {target} needs the package {name} ({error}); pip install {install}") from None


def tokenizer_file(tokenizer: Tokenizer) -> tuple[str, bytes]:
    """Name and content of the file in which others read a tokenizer: tokenizer.json, or a SentencePiece model.

    Raises:
        CapabilityError: Marian's tokenizer, which is several files.
    """
    values = json.loads(tokenizer.serialize())
    values = values.get("tokenizer", values)  # with the ids that an imported model fixed
    if values.get("format") == MARIAN:
        raise CapabilityError(
            "a Marian tokenizer is two SentencePiece models, source.spm and target.spm, and a vocabulary, vocab.json: "
            "this target holds one tokenizer's file; export the run with --to hf, which writes all three"
        )
    if "model" in values and isinstance(values["model"], str):
        return "tokenizer.model", base64.b64decode(values["model"])
    return "tokenizer.json", json.dumps(values, ensure_ascii=False).encode()


def text_begin(tokenizer: Tokenizer) -> list[int]:
    """Ids that every text begins with, on either side, which the tokenizer's own file does not say (BART)."""
    before = tokenizer.backend.before if isinstance(tokenizer.backend, Bound) else None
    return [] if before is None else [before]
