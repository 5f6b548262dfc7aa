"""Under autocast, as in training: calls with a carried State give the whole sequence's outputs; gradients flow."""

from __future__ import annotations

import pytest
import torch

from trilemma.mixers.base import MemoryMixer
from trilemma.mixers.build import build_mixer
from trilemma.registry import available_mixers, mixer_class
from trilemma.state import State

LENGTH = 70


@pytest.mark.parametrize("grad", [False, True], ids=["in-place", "autograd"])
@pytest.mark.parametrize("name", available_mixers())
def test_calls_are_the_whole_sequence(name: str, grad: bool) -> None:
    able = mixer_class(name).capabilities
    mixer = build_mixer(name, 32, able.causal or able.reads_memory, 4)
    with torch.no_grad():  # fresh weights may be zeros
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, memory = torch.randn(2, LENGTH, 32), torch.randn(2, 5, 32)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        state: State | None = mixer.remember(memory) if isinstance(mixer, MemoryMixer) else None
        whole, _ = mixer(x, state)
        assert whole.isfinite().all()
        if able.causal or able.reads_memory:
            if not able.reads_memory:
                state = mixer.init_state(2)
            parts = []
            for part in x.split([40, 1, 1, 20, 8], dim=1):
                y, state = mixer(part, state)
                parts.append(y)
            scale = whole.abs().max()
            assert (torch.cat(parts, dim=1).float() - whole.float()).abs().max() < 0.05 * scale
    if grad:
        whole.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
