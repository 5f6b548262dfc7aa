"""RG-LRU against transformers' RecurrentGemma: Griffin's recurrent block whole, and a prompt with cached steps.

The oracle computes its recurrence in float32. It lets a sequence's first token in unscaled, as the published code does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

from trilemma.mixers.build import build_mixer
from trilemma.mixers.rglru import RGLRU

HEADS, WIDTH, LENGTH, BATCH = 3, 24, 19, 2
ORACLE: dict[str, Any] = {"oracle": "transformers RecurrentGemmaRecurrentBlock"}


def pair(channels: int) -> tuple[RGLRU, RecurrentGemmaRecurrentBlock]:
    """Our mixer and theirs with the same random weights."""
    ours = build_mixer("rglru", WIDTH, num_heads=HEADS, width=channels)
    assert isinstance(ours, RGLRU)
    config = RecurrentGemmaConfig(hidden_size=WIDTH, lru_width=channels, num_attention_heads=HEADS)
    theirs = RecurrentGemmaRecurrentBlock(config, layer_idx=0)
    unit = theirs.rg_lru
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        for layer, weight, bias in zip(
            (theirs.linear_x, theirs.linear_y), ours.project.weight.chunk(2), ours.project.bias.chunk(2), strict=True
        ):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        theirs.linear_out.load_state_dict(ours.out.state_dict())
        theirs.conv_1d.weight.copy_(ours.conv.weight.t()[:, None])
        theirs.conv_1d.bias.copy_(ours.conv.bias)
        unit.recurrent_param.copy_(ours.radius)
        for gate, weight, bias in (
            (ours.recurrence_gate, unit.recurrent_gate_weight, unit.recurrent_gate_bias),
            (ours.input_gate, unit.input_gate_weight, unit.input_gate_bias),
        ):
            weight.copy_(gate.weight.transpose(1, 2))
            bias.copy_(gate.bias.view_as(bias))
    return ours, theirs


def run(theirs: RecurrentGemmaRecurrentBlock, x: Tensor, first: int = 0, use_cache: bool = False) -> Tensor:
    positions = torch.arange(first, first + x.shape[1]).expand(len(x), -1)
    return theirs(x, positions, None, use_cache=use_cache)[0]


@pytest.mark.parametrize("channels", [WIDTH, 36])
def test_whole_sequences_and_their_gradients(channels: int, agrees: Callable[..., None]) -> None:
    ours, theirs = pair(channels)
    results = []
    x, weights = torch.randn(2, BATCH, LENGTH, WIDTH)
    for form in (lambda x: ours(x)[0], lambda x: run(theirs, x)):
        leaf = x.clone().requires_grad_()
        y = form(leaf)
        (y * weights).sum().backward()
        results.append((y, leaf.grad))
    (y, grad), (want, want_grad) = results
    agrees("rglru", "layer", y, want, **ORACLE)
    grads, wanted = (grad, ours.radius.grad), (want_grad, theirs.rg_lru.recurrent_param.grad)
    agrees("rglru", "gradients of the layer", grads, wanted, **ORACLE)


def test_a_prompt_and_steps_against_their_cache(agrees: Callable[..., None]) -> None:
    ours, theirs = pair(WIDTH)
    x, state, first = torch.randn(BATCH, LENGTH, WIDTH), ours.init_state(BATCH), 0
    with torch.no_grad():
        for part in x.split([6] + [1] * (LENGTH - 6), dim=1):
            y, state = ours(part, state)
            want = run(theirs, part, first, use_cache=True)
            agrees("rglru", "layer in cached steps", y, want, **ORACLE)
            first += part.shape[1]


def test_the_comparison_can_fail() -> None:
    """Without the exception for the first token, already the first output differs."""
    ours, theirs = pair(WIDTH)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        assert (ours(x)[0] - run(theirs, x, first=1)).abs().max() > 1e-3


@pytest.mark.parametrize("bias", [-1e4, -100.0, -20.0, 20.0, 1e4])
@pytest.mark.parametrize("radius", [-1e3, -30.0, 0.0, 30.0])
def test_gates_wide_open_and_shut_have_finite_gradients(bias: float, radius: float) -> None:
    """At a = 1 the slope of sqrt(1 - a^2) is infinite; what reaches the weights is not."""
    ours, _ = pair(WIDTH)
    with torch.no_grad():
        ours.recurrence_gate.bias.fill_(bias)
        ours.radius.fill_(radius)
    x = torch.randn(BATCH, 300, WIDTH, requires_grad=True)
    y, _ = ours(x)
    y.square().sum().backward()
    for value in (y, x.grad, *(weight.grad for weight in ours.parameters())):
        assert value is not None
        assert value.isfinite().all()
