"""RWKV-7 against what the author's NumPy implementation gives for made-up weights.

The numbers are in tests/assets/rwkv7.json, with a note on where they come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trilemma.mixers.build import build_mixer
from trilemma.mixers.rwkv7 import RWKV7, RWKV7State
from trilemma.models import build_model

WIDTH, HEADS, LENGTH, RANK = 8, 2, 7, 32
STORED = json.loads((Path(__file__).parents[1] / "assets" / "rwkv7.json").read_text())
EXACT = {"rtol": 1e-9, "atol": 1e-10}
AUTHORS = "numbers stored from BlinkDL/RWKV-LM@524481d, rwkv_v7_numpy.py"


def wave(phase: int, *shape: int) -> Tensor:
    """Numbers between -1 and 1 that NumPy made in the same way."""
    steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(1.7 * phase + 0.9 * steps**1.1).view(shape)


def layer(number: int) -> RWKV7:
    """Layer 0 or 1, with its weights. A low-rank map is (d, r) and (r, d) there, and transposed in ours."""
    mixer = build_mixer("rwkv7", d_model=WIDTH, num_heads=HEADS, producer=number == 0, chunk_size=4).double()
    assert isinstance(mixer, RWKV7)
    first = 40 * number
    maps = {mixer.decay: (8, 9, 6), mixer.rate: (10, 11, 12), mixer.gate: (13, 14, None)}
    if mixer.value_blend is not None:
        maps[mixer.value_blend] = (16, 15, 17)
    with torch.no_grad():
        mixer.blend.copy_(0.5 + 0.5 * torch.stack([wave(first + i, WIDTH) for i in range(6)]))
        for low_rank, (down, up, bias) in maps.items():
            low_rank.down.weight.copy_(0.5 * wave(first + down, WIDTH, RANK).T)
            low_rank.up.weight.copy_(0.5 * wave(first + up, RANK, WIDTH).T)
            if bias is not None:
                low_rank.up.bias.copy_(wave(first + bias, WIDTH))
        mixer.bonus.copy_(wave(first + 7, HEADS, WIDTH // HEADS))
        mixer.removal.copy_(1 + 0.5 * wave(first + 18, WIDTH))
        mixer.replacement.copy_(wave(first + 19, WIDTH))
        for i, linear in enumerate((mixer.receptance, mixer.key, mixer.value, mixer.out)):
            linear.weight.copy_(wave(first + 20 + i, WIDTH, WIDTH))
        mixer.norm_weight.copy_(1 + 0.5 * wave(first + 24, WIDTH))
        mixer.norm_bias.copy_(wave(first + 25, WIDTH))
    return mixer


@pytest.mark.parametrize("size", [1, 3, LENGTH])
def test_two_layers_of_the_authors(size: int, agrees: Callable[..., None]) -> None:
    layers = [layer(0), layer(1)]
    inputs = [wave(1000 + number, 1, LENGTH, WIDTH) for number in (0, 1)]
    states: list[Any] = [mixer.init_state(1) for mixer in layers]
    outputs: list[list[Tensor]] = [[], []]
    for begin in range(0, LENGTH, size):
        shared: dict[str, Any] = {}
        for number, mixer in enumerate(layers):
            y, states[number] = mixer(inputs[number][:, begin : begin + size], states[number], None, shared)
            outputs[number].append(y)
    found = torch.stack([torch.cat(parts, dim=1)[0] for parts in outputs])
    wanted = torch.tensor(STORED["outputs"], dtype=torch.float64)
    what = {1: "layers in cached steps", LENGTH: "layers"}.get(size, f"layers in calls of {size}")
    agrees("rwkv7", what, found, wanted, oracle=AUTHORS)
    for state, stored in zip(states, STORED["states"], strict=True):
        assert isinstance(state, RWKV7State)
        want = torch.tensor(stored, dtype=torch.float64)
        torch.testing.assert_close(state.matrix[0].transpose(1, 2), want, **EXACT)


def test_a_stack_has_one_layer_that_hands_its_values_on() -> None:
    model = build_model({"layout": "decoder-only", "vocab_size": 11, "d_model": 16, "num_layers": 3, "mixer": "rwkv7"})
    found = [mixer for mixer in model.modules() if isinstance(mixer, RWKV7)]
    assert [mixer.producer for mixer in found] == [True, False, False]
    assert [mixer.value_blend is None for mixer in found] == [True, False, False]
