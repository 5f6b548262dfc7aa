"""One writer a run: a lock file that names its holder and that the kernel releases when the holder dies."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from trilemma.errors import RunInUseError
from trilemma.runs import files

NAME = ".lock"
_LIMIT = 4096


class RunLock:
    """A lock on `folder`, held from `acquire` to `release`.

    The lock is the kernel's (`flock`), so that of a killed process is free at once and nobody races to take it over.
    The text in it says who holds it. On file systems that share no locks between hosts that text is the only sign, so
    a name of another host, left in it, is respected.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            RunInUseError: another process holds it; its pid and host are named.
        """
        with files.explained(self.path, "locked"):
            fd = files.disk.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                self._take(fd)
            except BaseException:
                files.disk.close(fd)
                raise
        self._fd = fd

    def release(self) -> None:
        """Gives the lock back; harmless if it is not held."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with files.explained(self.path, "released"):
                try:
                    files.disk.truncate(fd, 0)
                finally:
                    files.disk.close(fd)

    def _take(self, fd: int) -> None:
        folder, here = self.path.parent, socket.gethostname()
        try:
            files.disk.lock(fd)
        except BlockingIOError:
            pid, host = _holder(files.disk.read(fd, _LIMIT))
            raise RunInUseError(f"{folder}: in use by process {pid} on {host}; wait for it or end it") from None
        pid, host = _holder(files.disk.read(fd, _LIMIT))
        if host not in ("", "unknown", here):
            raise RunInUseError(
                f"{folder}: in use by process {pid} on {host}; if that process is gone, remove {self.path}"
            )
        files.disk.truncate(fd, 0)
        files.write_all(fd, json.dumps({"pid": os.getpid(), "host": here}).encode())


def _holder(text: bytes) -> tuple[str, str]:
    """pid and host as written in a lock file; ("", "") for an empty one, "unknown" where it is not ours."""
    if not text.strip():
        return "", ""
    try:
        value = json.loads(text)
        return str(value["pid"]), str(value["host"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "unknown", "unknown"
