"""The token cache: ids of a whole split in memory-mapped files, built once and found again by what it was made from.

A store is a folder: for each field `<field>.tokens` (int32) and `<field>.offsets` (int64, examples + 1); where the
raw text is kept `<field>.text` (UTF-8) and `<field>.text_offsets`; and `meta.json`, written last, with the SHA-256 of
each file. It is built under a temporary name and renamed, so a store that exists is whole; what does not match its
hash is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from trilemma.errors import DataError

STORE_VERSION = 2  # 2: meta.json carries its own digest
_CHUNK = 1 << 20
_LARGE = 64 << 20  # bytes; a smaller file is hashed again each time
_ABANDONED = 24 * 3600.0  # seconds after which a store under construction is taken for one that was killed


def default_cache_dir() -> Path:
    """TRILEMMA_CACHE, else `trilemma` in the platform's folder for caches."""
    chosen = os.environ.get("TRILEMMA_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "trilemma"


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def content_hash(path: Path, root: Path) -> str:
    """`hash_file`, remembered under `root` for large files until their size, times or inode change."""
    status = path.stat()
    if status.st_size < _LARGE:
        return hash_file(path)
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    name = hash_values_of(str(path.resolve()))
    with locked(root / "hashes", name):
        memo = root / "hashes" / f"{name}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(memo.read_text(encoding="utf-8"))
            if known["stamp"] == stamp:
                return str(known["sha256"])
        digest = hash_file(path)
        temporary = memo.with_suffix(".tmp")
        temporary.write_text(json.dumps({"stamp": stamp, "sha256": digest}), encoding="utf-8")
        temporary.replace(memo)
        return digest


def hash_values_of(*parts: object) -> str:
    """SHA-256 of values that JSON can hold; the same values give the same text on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class Progress:
    """One line on stderr every few seconds of long work; silent for short work."""

    def __init__(self, what: str, every: float = 5.0) -> None:
        self.what, self.every = what, every
        self.start = self.last = time.monotonic()
        self.count = 0

    def add(self, count: int) -> None:
        self.count += count
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            rate = self.count / (now - self.start)
            print(f"{self.what}: {self.count:,} ({rate:,.0f}/s)", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class FieldInfo:
    """Totals of one field: token ids, and UTF-8 bytes of its text."""

    tokens: int
    bytes: int


class TokenStore:
    """Token ids of one split of one source, read from disk on demand.

    Attributes:
        size: number of examples. `offsets[field]`: int64 [size + 1]; `tokens[field]`: int32.
        bytes: UTF-8 bytes of the raw text of each field. `meta`: what else the builder noted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        values = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.key = str(values["key"])
        self.size = int(values["size"])
        self.bytes: dict[str, int] = values["bytes"]
        self.meta: dict[str, Any] = values["meta"]
        self.content_hash = hash_values_of(values["sha256"])
        self.fields: tuple[str, ...] = tuple(values["fields"])
        self.has_text: bool = values["text"]
        self.tokens = {field: _map(folder / f"{field}.tokens", np.dtype(np.int32)) for field in self.fields}
        self.offsets = {field: _map(folder / f"{field}.offsets", np.dtype(np.int64)) for field in self.fields}

    def ids(self, field: str, index: int) -> NDArray[np.int32]:
        """Token ids of one example."""
        start, stop = self.offsets[field][index : index + 2]
        return self.tokens[field][start:stop]

    def lengths(self, field: str) -> NDArray[np.int64]:
        """Token counts of all examples: int64 [size]."""
        return np.diff(self.offsets[field])

    def texts(self, field: str) -> Iterator[str]:
        """The raw text of each example."""
        if not self.has_text:
            raise DataError(f"{self.folder}: this store keeps no text")
        offsets = _map(self.folder / f"{field}.text_offsets", np.dtype(np.int64))
        with (self.folder / f"{field}.text").open("rb") as stream:
            for length in np.diff(offsets):
                yield stream.read(int(length)).decode("utf-8")


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # still mapped; slices of a plain array cost less


class StoreBuilder:
    """Writes a store piece by piece, in constant memory.

    `append` adds ids (and text) to the example under construction, `finish_example` closes it; `publish` makes the
    store visible under its key. Leaving the context without `publish` removes what was written.
    """

    def __init__(self, root: Path, key: str, fields: tuple[str, ...], keep_text: bool) -> None:
        self.root, self.key, self.fields, self.keep_text = root, key, fields, keep_text
        self.folder = root / f"building-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.size = 0
        self._tokens = dict.fromkeys(fields, 0)
        self._bytes = dict.fromkeys(fields, 0)
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> StoreBuilder:
        for left in self.root.glob("building-*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(left)
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise DataError(f"{self.root}: the token cache cannot be written: {error.strerror}") from None
        suffixes = ["tokens", "offsets", *(["text", "text_offsets"] if self.keep_text else [])]
        for name in (f"{field}.{suffix}" for field in self.fields for suffix in suffixes):
            self._files[name] = (self.folder / name).open("wb", buffering=_CHUNK)
        self._write_offsets()
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in self._files.values():
            with contextlib.suppress(OSError):
                stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, field: str, ids: list[int], text: str) -> None:
        """Adds ids and the text that they stand for to a field of the current example."""
        self._files[f"{field}.tokens"].write(np.asarray(ids, dtype=np.int32).tobytes())
        data = text.encode("utf-8")
        if self.keep_text:
            self._files[f"{field}.text"].write(data)
        self._tokens[field] += len(ids)
        self._bytes[field] += len(data)

    def finish_example(self) -> None:
        """Closes the current example."""
        self.size += 1
        self._write_offsets()

    def _write_offsets(self) -> None:
        for field in self.fields:
            self._files[f"{field}.offsets"].write(self._tokens[field].to_bytes(8, "little"))
            if self.keep_text:
                self._files[f"{field}.text_offsets"].write(self._bytes[field].to_bytes(8, "little"))

    def publish(self, meta: dict[str, Any]) -> TokenStore:
        """Syncs the files, writes `meta.json` and renames the folder to its key."""
        for stream in self._files.values():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        values = {
            "version": STORE_VERSION,
            "key": self.key,
            "fields": self.fields,
            "text": self.keep_text,
            "size": self.size,
            "bytes": self._bytes,
            "meta": meta,
            "sha256": {name: hash_file(self.folder / name) for name in sorted(self._files)},
        }
        with (self.folder / "meta.json").open("wb") as stream:
            stream.write(json.dumps({**values, "digest": _digest(values)}, indent=1).encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
        target = self.root / self.key
        if target.exists():  # damaged, or another process was faster with the same content
            shutil.rmtree(target)
        self.folder.rename(target)
        return TokenStore(target)


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of what `meta.json` says besides."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()


def damage(folder: Path) -> str | None:
    """Why a store cannot be used, or None: every file is compared with its SHA-256, `meta.json` with its own digest."""
    try:
        values = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if values["version"] != STORE_VERSION:
            return f"version {values['version']}, not {STORE_VERSION}"
        digest = values.pop("digest")
        if digest != _digest(values):
            return "meta.json was altered"
        hashes: dict[str, str] = values["sha256"]
        for name, expected in hashes.items():
            if hash_file(folder / name) != expected:
                return f"{name} was altered"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read: {error}"
    return None


@contextlib.contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Only one process of this machine at a time is inside for the same name; the others wait."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        stream = (root / f"{name}.lock").open("a")
    except OSError as error:
        raise DataError(f"{root}: the token cache cannot be written: {error.strerror}; set TRILEMMA_CACHE") from None
    with stream:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def open_or_build(root: Path, key: str, build: Callable[[], TokenStore]) -> TokenStore:
    """The store of a key; built when there is none, and built again, with a line on stderr, when it is damaged."""
    with locked(root, key):
        folder = root / key
        if folder.is_dir():
            reason = damage(folder)
            if reason is None:
                return TokenStore(folder)
            print(f"token cache {folder}: {reason}; building it again", file=sys.stderr)
        return build()
