"""What a training is planned for: this machine by its measured ceilings, or a named GPU by its data sheet."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from trilemma.errors import ConfigError, nearest
from trilemma.machine import Ceilings, Machine, choose_precision

HERE = "here"

# What training reaches of a matrix product's peak. On a GPU the runs of "Attention Is All You Need" imply 0.29 (base)
# and 0.42 (big); on a CPU a step of a 256-wide Transformer was measured at 0.7 (float32) and 0.27 (bfloat16).
_GPU_FRACTION = 0.35
_CPU_FRACTIONS = {"float32": 0.6, "bfloat16": 0.25, "float64": 0.6}


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: as shown.
        flops: peak of matrix products in FLOP/s (a multiply-add counts 2), by precision; absent: not supported.
        bandwidth: of its memory, bytes/s.
        memory_bytes: 0 where unknown.
        fractions: of the peak that training is assumed to reach, by precision.
        source: where the numbers come from.
        on_cpu: whether tensors are allocated by the C library, which keeps more than it holds.
        best_precision: what `training.precision: auto` becomes on this device.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory_bytes: int
    fractions: dict[str, float]
    source: str
    on_cpu: bool = False
    best_precision: str = "float32"

    def peak(self, precision: str) -> float:
        """FLOP/s in a precision.

        Raises:
            ConfigError: the device does not compute in it.
        """
        if precision not in self.flops:
            raise ConfigError(
                f"{self.name} does not compute in {precision}; set training.precision to {' or '.join(self.flops)}"
            )
        return self.flops[precision]


def _gpu(name: str, flops: dict[str, float], bandwidth: float, gigabytes: int, source: str) -> Hardware:
    fractions = dict.fromkeys(flops, _GPU_FRACTION)
    best = "bfloat16" if "bfloat16" in flops else "float32"
    return Hardware(name, flops, bandwidth, gigabytes * 10**9, fractions, source, best_precision=best)


# Dense peaks of the SXM boards, without structured sparsity.
GPUS: dict[str, Hardware] = {
    "P100": _gpu(
        "P100", {"float32": 9.5e12, "float64": 5.3e12}, 732e9, 16,
        "float32 as in footnote 5 of Vaswani et al. 2017, where the data sheet says 10.6; else NVIDIA P100 data sheet",
    ),
    "V100": _gpu(
        "V100", {"float32": 15.7e12, "float64": 7.8e12}, 900e9, 32, "NVIDIA V100 data sheet (SXM2, 32 GB)"
    ),
    "A100": _gpu(
        "A100", {"float32": 19.5e12, "bfloat16": 312e12, "float64": 19.5e12}, 2039e9, 80,
        "NVIDIA A100 data sheet (SXM, 80 GB)",
    ),
    "H100": _gpu(
        "H100", {"float32": 67e12, "bfloat16": 989e12, "float64": 67e12}, 3350e9, 80, "NVIDIA H100 data sheet (SXM)"
    ),
    "H200": _gpu(
        "H200", {"float32": 67e12, "bfloat16": 989e12, "float64": 67e12}, 4800e9, 141, "NVIDIA H200 data sheet (SXM)"
    ),
}  # fmt: skip


def named(name: str, fraction: float | None = None) -> Hardware:
    """A GPU of the table, by its name in any case.

    Args:
        fraction: of the peak, instead of the assumed one.

    Raises:
        ConfigError: not in the table.
    """
    if name.upper() not in GPUS:
        raise ConfigError(f'--on: unknown hardware "{name}"{nearest(name, [HERE, *GPUS])}')
    return _with_fraction(GPUS[name.upper()], fraction)


def of_board(device: str) -> Hardware | None:
    """The entry of a GPU by the name that its driver gives it, such as "NVIDIA H100 80GB HBM3".

    None for what the table does not hold: other GPUs, and the slower PCIe and NVL boards of the same ones.
    """
    words = re.findall(r"[A-Z0-9]+", device.upper())
    if {"PCIE", "NVL"} & set(words):
        return None
    return next((hardware for name, hardware in GPUS.items() if name in words), None)


def this_machine(machine: Machine, ceilings: Ceilings, fraction: float | None = None) -> Hardware:
    """The device of `ceilings` on this machine; precision `auto` is chosen as training chooses it."""
    on_cpu = ceilings.device == "cpu"
    dtypes = {"float32": ceilings.float32_gflops, "bfloat16": ceilings.bfloat16_gflops}
    flops = {name: rate * 1e9 for name, rate in dtypes.items()}
    flops["float64"] = flops["float32"] / 2
    hardware = Hardware(
        name=f"{machine.cpu}, {machine.threads} thread{'s' if machine.threads > 1 else ''}"
        if on_cpu
        else str(machine.gpu),
        flops=flops,
        bandwidth=ceilings.bandwidth[-1][1] * 1e9,
        memory_bytes=machine.memory_bytes if on_cpu else machine.gpu_memory_bytes,
        fractions=_CPU_FRACTIONS if on_cpu else dict.fromkeys(flops, _GPU_FRACTION),
        source="this machine's measured ceilings (trilemma doctor)",
        on_cpu=on_cpu,
        best_precision=choose_precision(ceilings.device)[0],
    )
    return _with_fraction(hardware, fraction)


def _with_fraction(hardware: Hardware, fraction: float | None) -> Hardware:
    return hardware if fraction is None else replace(hardware, fractions=dict.fromkeys(hardware.flops, fraction))
