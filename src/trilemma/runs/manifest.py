"""Manifests: which files belong to a run or a checkpoint, with the size and SHA-256 of each.

A manifest is written last and checked before anything it lists is used. It also carries its own digest, so that a
flipped byte in it is found as well. While files of a run are being replaced, `pending` holds the digests that come
next: after a crash between the renames a file is right if it is the old one or the next one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trilemma.errors import CheckpointError
from trilemma.runs import files
from trilemma.runs.files import Digest

FORMAT_VERSION = 1
NAME = "manifest.json"
_LIMIT = 16 << 20


@dataclass(frozen=True)
class Manifest:
    """What a folder must hold. `kind`: "run" or "checkpoint"; `run`: the identity of the run that wrote it."""

    kind: str
    run: str
    files: dict[str, Digest]
    pending: dict[str, Digest] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Canonical JSON; `decode` accepts these bytes and no others."""
        body: dict[str, Any] = {
            "format": f"trilemma-{self.kind}",
            "version": FORMAT_VERSION,
            "run": self.run,
            "files": _to_json(self.files),
            "pending": _to_json(self.pending),
        }
        body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()

    def check(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Compares files with their digests; None: all that are listed.

        Raises:
            CheckpointError: names the first file that is missing, truncated, altered or not listed.
        """
        for name in sorted(self.files.keys() | self.pending.keys()) if names is None else names:
            known = [digest for digest in (self.files.get(name), self.pending.get(name)) if digest is not None]
            path = folder / name
            if not known:
                raise CheckpointError(f"{path}: not listed in {folder / NAME}; it is foreign and is not read")
            size = files.file_size(path)
            if size is None:
                if name in self.files:
                    raise CheckpointError(f"{path}: missing; {NAME} lists it. Put it back from a copy of the run")
                continue  # its first publication was cut short
            if size not in {digest.size for digest in known}:
                raise CheckpointError(f"{path}: truncated or altered: {size:,} bytes, {NAME} says {known[0].size:,}")
            if files.digest_of(path) not in known:
                raise CheckpointError(f"{path}: altered: its SHA-256 is not the one in {NAME}")

    def check_no_others(self, folder: Path) -> None:
        """Raises `CheckpointError` for the first name in `folder` that the manifest does not list."""
        for name in files.names(folder):
            if name != NAME and name not in self.files:
                raise CheckpointError(f"{folder / name}: not listed in {NAME}; a foreign file. Remove it")


def read(folder: Path, kind: str) -> Manifest:
    """The manifest of a folder.

    Raises:
        CheckpointError: missing, altered, of another kind, or written by a newer version.
    """
    path = folder / NAME
    if files.file_size(path) is None:
        raise CheckpointError(f"{path}: missing; this is not a complete {kind}")
    data = files.read_file(path, _LIMIT)
    body = _parse(path, data)
    version = body.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version} is newer than this trilemma's {FORMAT_VERSION}; upgrade"
        )
    if body.get("format") != f"trilemma-{kind}":
        raise CheckpointError(f"{path}: not the manifest of a trilemma {kind}")
    manifest = Manifest(kind, str(body.get("run")), _from_json(path, body, "files"), _from_json(path, body, "pending"))
    if manifest.encode() != data:
        raise CheckpointError(f"{path}: altered: it does not agree with its own SHA-256")
    return manifest


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: altered: not valid JSON") from None
    if not isinstance(body, dict):
        raise CheckpointError(f"{path}: altered: not a JSON object")
    return body


def _to_json(digests: dict[str, Digest]) -> dict[str, Any]:
    return {name: {"size": digest.size, "sha256": digest.sha256} for name, digest in digests.items()}


def _from_json(path: Path, body: dict[str, Any], key: str) -> dict[str, Digest]:
    entries = body.get(key)
    result = {}
    for name, entry in entries.items() if isinstance(entries, dict) else [("", None)]:
        if not name or Path(name).name != name or name in (".", "..") or "\0" in name or not isinstance(entry, dict):
            raise CheckpointError(f"{path}: altered: the entry {name!r} is not a plain file name with a digest")
        size, sha256 = entry.get("size"), entry.get("sha256")
        if type(size) is not int or not isinstance(sha256, str) or len(sha256) != 64:
            raise CheckpointError(f"{path}: altered: the digest of {name!r} is not valid")
        result[name] = Digest(size, sha256)
    return result
