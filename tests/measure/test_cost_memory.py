"""Peak memory sees an allocation that is freed again, and forgets it after a reset."""

from __future__ import annotations

import sys

import torch

from trilemma.measure.memory import PeakMemory, peak_memory_bytes, resident_bytes

SIZE = 64 << 20


def test_a_passing_allocation_is_seen() -> None:
    with PeakMemory("cpu") as memory:
        held = torch.ones(SIZE // 4)
        del held
    assert memory.peak_bytes >= memory.growth_bytes
    if memory.resettable:
        assert memory.growth_bytes >= SIZE * 0.9


def test_what_happened_before_the_block_is_not_counted() -> None:
    held = torch.ones(SIZE // 4)
    del held
    with PeakMemory("cpu") as memory:
        pass
    # Where the mark cannot be reset the block says so, and the earlier peak is still in its number.
    assert memory.resettable == (memory.growth_bytes < SIZE / 2)
    assert memory.resettable or sys.platform != "linux"


def test_resident_memory_is_below_its_peak() -> None:
    assert 0 < resident_bytes() <= peak_memory_bytes() * 1.01
