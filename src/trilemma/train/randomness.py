"""Randomness as a function of where it is used, never of what was drawn before.

A resumed run therefore needs no saved generator: reseeding at the same place gives the same dropout masks.
"""

from __future__ import annotations

import hashlib

import torch


def derive(*parts: int | str) -> int:
    """A 63-bit seed from integers and strings; any difference in any part gives an unrelated seed."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def reseed(seed: int, step: int, microbatch: int, rank: int = 0) -> None:
    """Sets torch's generators for one micro-batch.

    Args:
        seed: of the run.
        step: optimizer step, from 1.
        microbatch: its number within the step, over all processes, so that masks do not depend on who computes it.
        rank: of the process within a group that shares one micro-batch (tensor parallelism); 0 for data parallelism.
    """
    torch.manual_seed(derive(seed, "dropout", step, microbatch, rank))
