"""xPos says where it ends instead of overflowing."""

from __future__ import annotations

import pytest
import torch

from trilemma.errors import LengthError
from trilemma.mixers.build import build_mixer


def test_positions_beyond_the_range_are_refused() -> None:
    mixer = build_mixer("attention", 8, num_heads=2, position="xpos", xpos_base=1.0)
    y, _ = mixer(torch.randn(1, 71, 8))
    assert torch.isfinite(y).all()
    with pytest.raises(LengthError, match=r"position 71 is too far for xPos with xpos_base 1: at most 70; raise it"):
        mixer(torch.randn(1, 72, 8))
