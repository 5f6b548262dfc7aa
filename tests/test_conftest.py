"""The test bench itself: poisoned memory is poisoned, the seed is replayable."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_uninitialised_memory_is_poisoned(dtype: torch.dtype) -> None:
    like = torch.ones(5, 7, dtype=dtype)
    for tensor in (torch.empty(5, 7, dtype=dtype), torch.empty_like(like), like.new_empty(3, 3)):
        assert tensor.isnan().all()


def test_the_seed_is_shared_and_drives_torch(session_seed: int) -> None:
    assert str(session_seed) == os.environ["TRILEMMA_SEED"]
    drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(session_seed)))
