"""All file access of run directories goes through this module, and in it through `disk`.

`Disk` holds the primitive calls, one operating-system call each. Tests put a `Disk` of their own into `files.disk` to
make the k-th call fail, to record the calls, or to replay them as a power cut would leave them. Above the primitives
stand the few operations that runs need. Each turns an `OSError` into a `CheckpointError` that names the file.

Durability, by the POSIX rules: a file's bytes are safe after fsync of the file, its name after fsync of its folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from trilemma.errors import CheckpointError

CHUNK = 1 << 20
PARTIAL = ".partial"  # suffix of what is not published yet; never read, removed when the run is next opened for writing

Chunk = bytes | memoryview
Payload = Chunk | Iterable[Chunk]


class Disk:
    """The primitive calls. File descriptors are plain integers; links to files are never followed."""

    def open(self, path: Path, flags: int) -> int:
        follow = 0 if flags & os.O_DIRECTORY else os.O_NOFOLLOW
        return os.open(path, flags | follow | os.O_CLOEXEC, 0o666)

    def read(self, fd: int, size: int) -> bytes:
        return os.read(fd, size)

    def write(self, fd: int, data: Chunk) -> int:
        return os.write(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        os.rmdir(path)

    def names(self, path: Path) -> list[str]:
        return sorted(os.listdir(path))

    def status(self, path: Path, follow: bool = False) -> os.stat_result:
        return os.stat(path, follow_symlinks=follow)

    def lock(self, fd: int) -> None:
        """Raises BlockingIOError while another process holds it; the kernel drops it when the holder ends."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def tensors(self, path: Path) -> safe_open:
        return safe_open(os.fspath(path), framework="pt")


disk = Disk()


@dataclass(frozen=True)
class Digest:
    """What a manifest knows of a file: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@contextlib.contextmanager
def explained(path: Path, action: str) -> Iterator[None]:
    """Turns an `OSError` about `path` into a `CheckpointError` that says what was tried and how to mend it."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: cannot be {action}: no such file or folder") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            mend = "; free some space, then go on with --resume"
        elif error.errno == errno.ELOOP:
            mend = "; links are not followed inside a run"
        else:
            mend = ""
        raise CheckpointError(f"{path}: cannot be {action}: {os.strerror(error.errno or 0)}{mend}") from error


def write_file(path: Path, payload: Payload) -> Digest:
    """Writes a whole new file and syncs its bytes (not its name); a failure leaves no file behind."""
    with explained(path, "written"):
        fd = disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            try:
                digest = write_all(fd, payload)
                disk.sync(fd)
            finally:
                disk.close(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                disk.remove(path)
            raise
    return digest


def write_all(fd: int, payload: Payload) -> Digest:
    """Writes every byte to an open file, however little a single call takes."""
    sha, size = hashlib.sha256(), 0
    for chunk in [payload] if isinstance(payload, (bytes, memoryview)) else payload:
        view = memoryview(chunk).cast("B")
        sha.update(view)
        size += len(view)
        while view:
            view = view[disk.write(fd, view[:CHUNK]) :]
    return Digest(size, sha.hexdigest())


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    with explained(path, "synced"):
        fd = disk.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            disk.sync(fd)
        finally:
            disk.close(fd)


def partial(path: Path) -> Path:
    """Where `path` is written before it is published."""
    return path.with_name(f".{path.name}{PARTIAL}")


def replace_file(path: Path, payload: Payload) -> Digest:
    """Publishes one file: after a crash at any instant it holds the old bytes or the new ones."""
    digest = write_file(partial(path), payload)
    rename(partial(path), path)
    sync_folder(path.parent)
    return digest


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder; durable after `sync_folder` of the parent."""
    with explained(target, "put in place"):
        disk.rename(source, target)


def append(path: Path, data: bytes, sync: bool = False) -> None:
    """Appends to a file, creating it; with `sync` all that was appended so far is durable."""
    with explained(path, "appended to"):
        fd = disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            if data:
                write_all(fd, data)
            if sync:
                disk.sync(fd)
        finally:
            disk.close(fd)


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most `limit` bytes; the size is checked before anything is read."""
    size = file_size(path)
    if size is None:
        raise CheckpointError(f"{path}: no such file")
    if size > limit:
        raise CheckpointError(f"{path}: {size:,} bytes, more than the {limit:,} that such a file may have")
    return b"".join(_chunks(path))


def digest_of(path: Path) -> Digest:
    """Size and SHA-256 of a file, read in pieces."""
    sha, size = hashlib.sha256(), 0
    for chunk in _chunks(path):
        sha.update(chunk)
        size += len(chunk)
    return Digest(size, sha.hexdigest())


def _chunks(path: Path) -> Iterator[bytes]:
    with explained(path, "read"):
        fd = disk.open(path, os.O_RDONLY)
        try:
            while chunk := disk.read(fd, CHUNK):
                yield chunk
        finally:
            disk.close(fd)


def open_tensors(path: Path) -> safe_open:
    """The reference safetensors reader on `path`; it maps the file and allocates nothing for the tensors."""
    with explained(path, "read"):
        try:
            return disk.tensors(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a valid safetensors file: {error}") from error


def file_size(path: Path) -> int | None:
    """Bytes of a regular file, None where there is none; anything else under that name is an error."""
    try:
        with explained(path, "read"):
            status = disk.status(path)
    except CheckpointError as error:
        if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            return None
        raise
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return status.st_size


def is_folder(path: Path, follow: bool = False) -> bool:
    """Whether `path` is a folder; a link to one counts with `follow` only."""
    with explained(path, "read"):
        try:
            return stat.S_ISDIR(disk.status(path, follow).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False


def names(path: Path) -> list[str]:
    """Sorted names in a folder; empty where there is no folder."""
    try:
        with explained(path, "listed"):
            return disk.names(path)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, each made durable; an existing one (or a link to one) is fine."""
    missing = []
    while not is_folder(path, follow=True):
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        with explained(folder, "made"):
            disk.make_folder(folder)
        sync_folder(folder.parent)


def remove_tree(path: Path) -> None:
    """Removes a file, or a folder with all it holds."""
    if not is_folder(path):
        with explained(path, "removed"):
            disk.remove(path)
        return
    for name in names(path):
        remove_tree(path / name)
    with explained(path, "removed"):
        disk.remove_folder(path)
