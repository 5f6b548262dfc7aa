"""Gated linear attention against the equations around fla-core's naive scan, which computes in float32."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from trilemma.mixers.build import build_mixer
from trilemma.mixers.gla import GatedLinearAttention

HEADS, WIDTH, LENGTH, BATCH = 4, 32, 75, 2
ORACLE = {"oracle": "fla-core naive_recurrent_gla"}


def naive_form() -> ModuleType:
    """fla-core's file alone: its package needs Triton."""
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "ops" / "gla" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive_gla_layer", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_layer_around_the_naive_scan(agrees: Callable[..., None]) -> None:
    mixer = build_mixer("gla", d_model=WIDTH, num_heads=HEADS)
    assert isinstance(mixer, GatedLinearAttention)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(BATCH, LENGTH, WIDTH)
    w_q, w_k, w_v, w_g, w_1 = mixer.project.weight.split([WIDTH // 2, WIDTH // 2, WIDTH, WIDTH, 16])
    heads = (BATCH, LENGTH, HEADS, -1)
    alpha = torch.sigmoid(x @ w_1.T @ mixer.decay.weight.T + mixer.decay.bias) ** (1 / 16)
    o, _ = naive_form().naive_recurrent_gla(*((x @ w.T).view(heads) for w in (w_q, w_k, w_v)), alpha.log().view(heads))
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    want = (nn.functional.silu(x @ w_g.T) * o.flatten(2)) @ mixer.out.weight.T
    agrees("gla", "layer around its scan", mixer(x)[0], want, **ORACLE)
    with torch.no_grad():
        state, steps = mixer.init_state(BATCH), []
        for token in x.split(1, dim=1):
            y, state = mixer(token, state)
            steps.append(y)
    agrees("gla", "layer around its scan in cached steps", torch.cat(steps, dim=1), want, **ORACLE)


def test_fresh_decays_are_near_one() -> None:
    """A zero bias under the sixteenth root: about 0.96 a token."""
    mixer = build_mixer("gla", d_model=WIDTH, num_heads=HEADS)
    assert isinstance(mixer, GatedLinearAttention)
    decay = torch.sigmoid(mixer.decay(torch.zeros(16))) ** (1 / mixer.gate_normalizer)
    torch.testing.assert_close(decay, torch.full_like(decay, 0.5 ** (1 / 16)))
