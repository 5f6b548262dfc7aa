"""This machine: what it has, what it measurably reaches, and what will be used and why.

Ceilings are measured, never taken from a data sheet: one matrix product in float32 and bfloat16, memory traffic at
several footprints (a small model lives in the cache), the cost of a tiny operation, and one feed-forward training step
under autocast. They take three to ten seconds and are cached per user under a key made of the hardware, the threads and
the torch version.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trilemma import __version__
from trilemma.errors import ConfigError, nearest

_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None

DEVICES = ("auto", "cpu", "cuda", "mps")

# Instruction sets that decide which paths are fast; names as Linux prints them.
_ISA = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
_NATIVE_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
NO_BFLOAT16 = "this CPU has no bfloat16 instructions (avx512_bf16, amx_bf16 or Arm bf16)"

# bfloat16 is chosen on a CPU only where a whole training step gains at least this factor from it.
_WORTHWHILE_GAIN = 1.15


@dataclass(frozen=True)
class Machine:
    """What this process may use."""

    platform: str
    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    isa: tuple[str, ...]
    gpu: str | None
    gpu_memory_bytes: int


@dataclass(frozen=True)
class Ceilings:
    """What one device measurably reaches.

    Attributes:
        device: "cpu", "cuda" or "mps".
        float32_gflops: matrix product, 10^9 FLOP/s (a multiply-add counts 2).
        bfloat16_gflops: the same with bfloat16 operands.
        bandwidth: (footprint in bytes, GB/s) pairs, rising footprint; the last one is main memory.
        overhead_us: one tiny operation called from Python, in microseconds.
        autocast_gain: float32 time over bfloat16-autocast time of a feed-forward training step.
    """

    device: str
    float32_gflops: float
    bfloat16_gflops: float
    bandwidth: tuple[tuple[int, float], ...]
    overhead_us: float
    autocast_gain: float

    def matmul_gflops(self, dtype: torch.dtype) -> float:
        """The matrix-product ceiling for operands of `dtype`; float64 counts half of float32."""
        if dtype in (torch.bfloat16, torch.float16):
            return self.bfloat16_gflops
        return self.float32_gflops / (2 if dtype == torch.float64 else 1)

    def bandwidth_gbps(self, footprint: int) -> float:
        """GB/s that can be had while working on `footprint` bytes over and over.

        The measured footprint just below is used, so that the ceiling errs on the high side and a fraction on the low.
        """
        smaller = [rate for size, rate in self.bandwidth if size <= footprint]
        return smaller[-1] if smaller else self.bandwidth[0][1]


def describe() -> Machine:
    """What this process may use: cores and memory after affinity and container limits."""
    has_gpu = torch.cuda.is_available()
    return Machine(
        platform=platform.platform(terse=True),
        cpu=_cpu_name(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=_memory_bytes(),
        isa=_instruction_sets(),
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        gpu_memory_bytes=torch.cuda.get_device_properties(0).total_memory if has_gpu else 0,
    )


def choose_device(requested: str = "auto") -> tuple[str, str]:
    """(device, reason). `ConfigError` if a device is asked for that is not there."""
    if requested not in DEVICES:
        raise ConfigError(f'unknown device "{requested}"{nearest(requested, DEVICES)}')
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if requested != "auto":
        if not present[requested]:
            raise ConfigError(f"device {requested}: torch finds none on this machine; use auto or cpu")
        return requested, "as asked"
    for device in ("cuda", "mps"):
        if present[device]:
            return device, "the fastest device that torch finds"
    return "cpu", "torch finds no GPU"


def choose_precision(device: str) -> tuple[str, str]:
    """(precision, reason) for `precision: auto`: "bfloat16" (autocast) where it pays, else "float32"."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if major >= 8:
            return "bfloat16", f"the GPU computes bfloat16 natively (capability {major}.{minor})"
        return "float32", f"the GPU has no native bfloat16 (capability {major}.{minor}; 8.0 is needed)"
    if device != "cpu":
        return "float32", f"bfloat16 is not validated on {device}"
    native = _NATIVE_BFLOAT16.intersection(_instruction_sets())
    if not native:
        return "float32", NO_BFLOAT16
    gain = ceilings("cpu").autocast_gain
    if gain >= _WORTHWHILE_GAIN:
        return "bfloat16", f"{', '.join(sorted(native))}: a training step is {gain:.1f} times as fast as in float32"
    return "float32", f"{', '.join(sorted(native))} is there, but a training step gains only a factor {gain:.2f}"


def emulates_bfloat16(device: str) -> bool:
    """Whether bfloat16 is computed without instructions for it, many times slower than float32."""
    return device == "cpu" and not _NATIVE_BFLOAT16.intersection(_instruction_sets())


def environment(device: str = "cpu", precision: str | None = None, compile: bool | None = None) -> dict[str, Any]:  # noqa: A002
    """What every stored number must name: versions, hardware, path and commit; plain JSON values."""
    machine = describe()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "trilemma": __version__,
        "platform": machine.platform,
        "cpu": machine.cpu,
        "cores": machine.cores,
        "threads": machine.threads,
        "memory_bytes": machine.memory_bytes,
        "gpu": machine.gpu,
        "device": device,
        "precision": precision,
        "compile": compile,
        "commit": commit(),
    }


def commit() -> str | None:
    """The git commit of this checkout ("+" appended if files differ from it); None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "src" / "trilemma").is_dir():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def usable_cores() -> int:
    """Cores that this process may run on: affinity and container quota counted."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def keep_freed_memory() -> bool:
    """Tells the C library to keep freed memory for the next allocation; True where it understood (glibc).

    By default it hands every large block back to the kernel and gets it again one faulting page at a time, which takes
    a sixth of a training step on a CPU, and of a beam's. Peak memory stays what it was; it is only given back when the
    process ends.
    """
    mallopt = getattr(_C_LIBRARY, "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1  # names and numbers of <malloc.h>
    return all(mallopt(name, most) == 1 for name in (trim_threshold, mmap_threshold))


def return_freed_memory() -> None:
    """Hands what was freed back to the system (glibc), so that the resident set tells what is held."""
    if (trim := getattr(_C_LIBRARY, "malloc_trim", None)) is not None:
        trim(0)


def synchronize(device: str | torch.device) -> None:
    """Waits until everything queued on `device` is done; needed before a clock is read."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize()
    elif kind == "mps":
        torch.mps.synchronize()


# --- ceilings ---------------------------------------------------------------------------------------------------------


def ceilings(device: str = "cpu", *, refresh: bool = False) -> Ceilings:
    """The measured ceilings of `device`: from this user's cache, or measured now (seconds) and cached."""
    file = cache_file()
    key = hardware_key(device)
    known = _read_cache(file)
    if not refresh and key in known:
        return known[key]
    measured = measure_ceilings(device)
    _write_cache(file, {**known, key: measured})
    return measured


def ceilings_are_cached(device: str = "cpu") -> bool:
    """Whether `ceilings` will answer at once."""
    return hardware_key(device) in _read_cache(cache_file())


def hardware_key(device: str = "cpu") -> str:
    """What the ceilings depend on: hardware, threads and torch version, as a short hash."""
    machine = describe()
    parts = [device, machine.cpu, machine.cores, machine.threads, machine.isa, machine.gpu, torch.__version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def cache_file() -> Path:
    """Where measured ceilings are kept, private to the user; follows XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "trilemma" / "ceilings.json"


def measure_ceilings(device: str = "cpu", *, quick: bool = False) -> Ceilings:
    """Measures now. `quick`: tiny sizes, for tests; such numbers mean nothing and are never cached."""
    on_gpu = torch.device(device).type == "cuda"
    side = 128 if quick else (8192 if on_gpu else 1024)
    mebibytes = (1, 2) if quick else ((64, 4096) if on_gpu else (2, 16, 384))
    # the caller's random stream and gradient mode are left as they were
    with torch.random.fork_rng(), torch.no_grad():
        return Ceilings(
            device=device,
            float32_gflops=_matmul_gflops(device, side // (2 if on_gpu else 1), torch.float32),
            bfloat16_gflops=_matmul_gflops(device, side, torch.bfloat16),
            bandwidth=tuple((size << 20, _bandwidth_gbps(device, size << 20)) for size in mebibytes),
            overhead_us=_overhead_us(device),
            autocast_gain=_autocast_gain(device, width=32 if quick else 256),
        )


def best_seconds(run: Callable[[], object], device: str, repeats: int = 7, inner: int = 1) -> float:
    """Shortest time of one call, in seconds: a ceiling is what the machine can do when nothing disturbs it."""
    run()  # allocates, picks kernels
    times: list[float] = []
    # no repetition once a second is spent: bfloat16 without instructions for it takes seconds a call
    while len(times) < repeats and sum(times) * inner < 1.0:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(inner):
            run()
        synchronize(device)
        times.append((time.perf_counter() - start) / inner)
    return min(times)


def _matmul_gflops(device: str, side: int, dtype: torch.dtype) -> float:
    # random operands: zeros draw less power and run measurably faster
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(left)
    return 2 * side**3 / best_seconds(lambda: torch.matmul(left, right, out=out), device) / 1e9


def _bandwidth_gbps(device: str, footprint: int) -> float:
    """STREAM's triad a = b + s * c over three float32 arrays, and a pure read; the better one counts."""
    elements = footprint // 12
    b, c = torch.rand(elements, device=device), torch.rand(elements, device=device)
    a = torch.empty_like(b)
    inner = max(1, (64 << 20) // footprint)
    triad = 3 * elements * 4 / best_seconds(lambda: torch.add(b, c, alpha=3.0, out=a), device, 5, inner)
    # a matrix-vector product reads its matrix once: what decoding does with the weights
    rows = torch.rand(max(1, footprint // 4 // 1024), 1024, device=device)
    vector = torch.rand(1024, device=device)
    read = rows.numel() * 4 / best_seconds(lambda: rows @ vector, device, 5, inner)
    return max(triad, read) / 1e9


def _overhead_us(device: str) -> float:
    tiny = torch.ones(1, device=device)
    return best_seconds(lambda: tiny.mul_(1.0), device, repeats=7, inner=500) * 1e6


def _autocast_gain(device: str, width: int) -> float:
    first, second = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.LayerNorm(width)).to(device)
    tokens = torch.randn(2048, width, device=device)
    kind = torch.device(device).type

    @torch.enable_grad()
    def step(enabled: bool) -> None:
        model.zero_grad()
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled):
            loss = model(tokens).square().mean()
        loss.backward()

    plain = best_seconds(lambda: step(False), device, repeats=5)
    return plain / best_seconds(lambda: step(True), device, repeats=5)


def _read_cache(file: Path) -> dict[str, Ceilings]:
    """An unreadable or foreign cache counts as empty: it holds nothing that cannot be measured again."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        fields = {field.name for field in dataclasses.fields(Ceilings)}
        return {
            str(key): Ceilings(**{**value, "bandwidth": tuple((int(s), float(r)) for s, r in value["bandwidth"])})
            for key, value in stored.items()
            if set(value) == fields
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write_cache(file: Path, values: dict[str, Ceilings]) -> None:
    """Written whole and renamed, so that a reader sees the old file or the new one. A read-only home is no error."""
    text = json.dumps({key: dataclasses.asdict(value) for key, value in values.items()}, indent=1)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


# --- hardware ---------------------------------------------------------------------------------------------------------


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpuinfo(*keys: str) -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in keys:
            return value.strip()
    return ""


def _cpu_name() -> str:
    return _cpuinfo("model name", "Model") or platform.processor() or platform.machine()


def _instruction_sets() -> tuple[str, ...]:
    flags = set(_cpuinfo("flags", "Features").split())
    return tuple(name for name in _ISA if name in flags)


def _memory_bytes() -> int:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total
