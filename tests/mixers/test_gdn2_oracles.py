"""Gated DeltaNet-2 against the equations around fla-core's naive scan, which computes in float32."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from trilemma.mixers.build import build_mixer
from trilemma.mixers.gdn2 import GatedDeltaNet2

HEADS, WIDTH, LENGTH, BATCH = 4, 32, 75, 2
HEAD_DIM = WIDTH // HEADS
ORACLE = {"oracle": "fla-core naive_recurrent_gdn2"}


def naive_form() -> ModuleType:
    """fla-core's file alone: its package needs Triton."""
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "ops" / "gdn2" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive_gdn2_layer", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("negative", [False, True])
def test_the_layer_around_the_naive_scan(negative: bool, agrees: Callable[..., None]) -> None:
    mixer = build_mixer("gdn2", d_model=WIDTH, num_heads=HEADS, negative_eigenvalues=negative)
    assert isinstance(mixer, GatedDeltaNet2)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x, heads = torch.randn(BATCH, LENGTH, WIDTH), (BATCH, LENGTH, HEADS, HEAD_DIM)
    w_q, w_k, w_v, w_b, w_w, w_1, w_3 = mixer.project.weight.split([WIDTH] * 5 + [HEAD_DIM] * 2)
    parts = []
    for weight, taps in zip((w_q, w_k, w_v), mixer.convolution.weight.split(WIDTH, dim=1), strict=True):
        late = nn.functional.pad(x @ weight.T, (0, 0, 3, 0))
        parts.append(nn.functional.silu(sum(late[:, j : j + LENGTH] * taps[j] for j in range(4))).view(heads))
    q, k, v = parts
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    time = torch.log1p((x @ w_1.T @ mixer.decay.weight.T + mixer.decay_bias).exp())
    erase, write = torch.sigmoid(x @ w_b.T), torch.sigmoid(x @ w_w.T)
    log_decay = -mixer.log_rate.exp()[:, None] * time.view(heads)
    o, _ = naive_form().naive_recurrent_gdn2(
        q, k, v, log_decay, (2 if negative else 1) * erase.view(heads), write.view(heads)
    )
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    gate = torch.sigmoid(x @ w_3.T @ mixer.gate.weight.T + mixer.gate.bias)
    want = (o.flatten(2) * gate) @ mixer.out.weight.T
    agrees("gdn2", "layer around its scan", mixer(x)[0], want, **ORACLE)
    with torch.no_grad():
        state, steps = mixer.init_state(BATCH), []
        for token in x.split(1, dim=1):
            y, state = mixer(token, state)
            steps.append(y)
    agrees("gdn2", "layer around its scan in cached steps", torch.cat(steps, dim=1), want, **ORACLE)


def test_equal_gates_give_kimi_delta_attention() -> None:
    """Erase and write gates of one number a head: the same function of the same weights."""
    gdn2, kda = (build_mixer(name, d_model=WIDTH, num_heads=HEADS).double() for name in ("gdn2", "kda"))
    strengths = torch.randn(HEADS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        qkv, erase, write, low = gdn2.project.weight.split([3 * WIDTH, WIDTH, WIDTH, 2 * HEAD_DIM])
        erase.copy_(strengths.repeat_interleave(HEAD_DIM, dim=0))
        write.copy_(erase)
        kda.project.weight.copy_(torch.cat([qkv, low, strengths]))
        for name, parameter in kda.named_parameters():
            if name != "project.weight":
                parameter.copy_(gdn2.get_parameter(name))
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(gdn2(x)[0], kda(x)[0], rtol=1e-9, atol=1e-10)
