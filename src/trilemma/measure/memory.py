"""Peak memory of a stretch of code.

On a GPU: what torch's allocator held at most. On a CPU: the largest resident set, whose high-water mark Linux lets a
process reset; elsewhere the mark covers the whole life of the process, and `resettable` says so.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from trilemma.machine import return_freed_memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory("cpu") as memory: ...; memory.peak_bytes`.

    Attributes:
        peak_bytes: the largest amount held within the block (GPU: by torch; CPU: by the process).
        growth_bytes: `peak_bytes` less what was held at the start; never negative.
        resettable: False where the mark could not be reset, so that `peak_bytes` may stem from before the block.
    """

    def __init__(self, device: str | torch.device) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._start = 0
        self.peak_bytes = 0
        self.growth_bytes = 0
        self.resettable = True

    def __enter__(self) -> Self:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            return_freed_memory()  # or a block that is used again would not be seen to grow
            self.resettable = reset_peak_resident()
            self._start = resident_bytes()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.peak_bytes = torch.cuda.max_memory_allocated() if self._on_gpu else peak_resident_bytes()
        self.growth_bytes = max(0, self.peak_bytes - self._start)


def peak_memory_bytes(device: str | torch.device = "cpu") -> int:
    """The most memory held since the start of the process, or since the last reset."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def resident_bytes() -> int:
    """Resident set of this process now; the high-water mark where the system does not tell."""
    return _status_bytes("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """High-water mark of the resident set."""
    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status_bytes("VmHWM") or (mark if sys.platform == "darwin" else mark * 1024)


def reset_peak_resident() -> bool:
    """Lowers the high-water mark to what is resident now; False where the system does not allow it."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0
