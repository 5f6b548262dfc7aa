"""Kimi delta attention against transformers' layer of Kimi Linear, whose scan computes in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from trilemma.mixers.build import build_mixer
from trilemma.mixers.kda import KimiDeltaAttention

HEADS, HEAD_DIM, WIDTH, LENGTH, BATCH = 3, 8, 20, 75, 2
THEIRS = "transformers KimiLinearDeltaAttention"


def pair() -> tuple[KimiDeltaAttention, KimiLinearDeltaAttention]:
    """Our mixer and theirs with the same random weights; theirs has no bias in the output gate."""
    ours = build_mixer("kda", d_model=WIDTH, num_heads=HEADS, head_dim=HEAD_DIM, epsilon=1e-6)
    assert isinstance(ours, KimiDeltaAttention)
    config = KimiLinearConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        linear_num_heads=HEADS,
        linear_head_dim=HEAD_DIM,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
        layer_types=["linear_attention"],
    )
    theirs = KimiLinearDeltaAttention(config, 0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        ours.gate.bias.zero_()
        inner = HEADS * HEAD_DIM
        weights = ours.project.weight.split([inner, inner, inner, HEAD_DIM, HEAD_DIM, HEADS])
        layers = (theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.forget_gate.f_a_proj, theirs.g_a_proj)
        for layer, weight in zip((*layers, theirs.b_proj), weights, strict=True):
            layer.weight.copy_(weight)
        theirs.conv1d.weight.copy_(ours.convolution.weight.t()[:, None])
        theirs.forget_gate.f_b_proj.weight.copy_(ours.decay.weight)
        theirs.forget_gate.dt_bias.copy_(ours.decay_bias)
        theirs.forget_gate.A_log.copy_(ours.log_rate.view(1, 1, HEADS, 1))
        theirs.g_b_proj.weight.copy_(ours.gate.weight)
        theirs.o_norm.weight.copy_(ours.norm.weight)
        theirs.o_proj.weight.copy_(ours.out.weight)
    return ours, theirs


def test_whole_sequences_and_their_gradients(agrees: Callable[..., None]) -> None:
    ours, theirs = pair()
    x, weights = torch.randn(2, BATCH, LENGTH, WIDTH)
    results = []
    for run in (lambda x: ours(x)[0], theirs):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        results.append((y, *torch.autograd.grad((y * weights).sum(), leaf)))
    (y, gradient), (want, want_gradient) = results
    agrees("kda", "layer", y, want, oracle=THEIRS)
    agrees("kda", "gradients of the layer", gradient, want_gradient, oracle=THEIRS)


def test_steps(agrees: Callable[..., None]) -> None:
    ours, theirs = pair()
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        state, steps = ours.init_state(BATCH), []
        for token in x.split(1, dim=1):
            y, state = ours(token, state)
            steps.append(y)
        agrees("kda", "layer in cached steps", torch.cat(steps, dim=1), theirs(x), oracle=THEIRS)


@pytest.mark.parametrize("negative", [False, True])
def test_negative_eigenvalues_turn_a_direction_of_the_state_round(negative: bool) -> None:
    """Full strength, no decay, nothing written: I - beta k k^T, with beta at the end of its range."""
    mixer = build_mixer("kda", d_model=8, num_heads=1, negative_eigenvalues=negative)
    assert isinstance(mixer, KimiDeltaAttention)
    with torch.no_grad():
        mixer.log_rate.fill_(-30)
        mixer.project.weight[16:24] = 0  # values
        mixer.project.weight[-1] = 100  # beta
        state = mixer.init_state(1)
        state.matrix.copy_(torch.eye(8))
        mixer(torch.ones(1, 1, 8), state)
        smallest = torch.linalg.eigvalsh(state.matrix).min()
    torch.testing.assert_close(smallest, torch.tensor(-1.0 if negative else 0.0), rtol=0, atol=1e-3)
