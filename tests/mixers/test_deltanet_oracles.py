"""DeltaNet and Gated DeltaNet as layers: transformers' Qwen3-Next layer, and the equations token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from trilemma.mixers.build import build_mixer
from trilemma.mixers.deltanet import DeltaNet
from trilemma.mixers.gated_deltanet import GatedDeltaNet
from trilemma.state import State

WIDTH, HEADS, HEAD, LENGTH, BATCH = 32, 2, 8, 150, 2
QWENS = "transformers Qwen3NextGatedDeltaNet"


def their_config(value_heads: int) -> Qwen3NextConfig:
    return Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=HEAD,
        linear_value_head_dim=2 * HEAD,
        rms_norm_eps=1e-3,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )


def ours_and_theirs(value_heads: int) -> tuple[GatedDeltaNet, Qwen3NextGatedDeltaNet]:
    """Both layers with the same random weights; theirs keeps the projections of a key head side by side."""
    options = {"head_dim": HEAD, "num_value_heads": value_heads, "epsilon": 1e-3}
    ours = build_mixer("gated_deltanet", d_model=WIDTH, num_heads=HEADS, **options)
    assert isinstance(ours, GatedDeltaNet)
    theirs = Qwen3NextGatedDeltaNet(their_config(value_heads), 0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        keys, values = HEADS * HEAD, value_heads * 2 * HEAD
        grouped = theirs.in_proj_qkvz.weight.view(HEADS, -1, WIDTH)
        wide = values // HEADS
        qkvz = [part.reshape(-1, WIDTH) for part in grouped.split([HEAD, HEAD, wide, wide], dim=1)]
        beta, step = theirs.in_proj_ba.weight.view(HEADS, 2, -1, WIDTH).transpose(0, 1).reshape(2, -1, WIDTH)
        assert [len(part) for part in qkvz] == [keys, keys, values, values]
        ours.project.weight.copy_(torch.cat([*qkvz, step, beta]))
        ours.conv.weight.copy_(theirs.conv1d.weight[:, 0].t())
        theirs.A_log.sub_(3)  # with fresh rates their running sums of log decays lose digits
        for mine, other in (
            (ours.A_log, theirs.A_log),
            (ours.dt_bias, theirs.dt_bias),
            (ours.norm.weight, theirs.norm.weight),
            (ours.out.weight, theirs.out_proj.weight),
        ):
            assert mine is not None
            mine.copy_(other)
    return ours, theirs


def steps(mixer: nn.Module, x: Tensor, state: State) -> Tensor:
    """Token by token."""
    outputs = []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("value_heads", [2, 6])
def test_qwen3_next_s_layer(value_heads: int, agrees: Callable[..., None]) -> None:
    ours, theirs = ours_and_theirs(value_heads)
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    got, want = ours(x)[0], theirs(x)
    agrees("gated_deltanet", "layer", got, want, oracle=QWENS)
    weights = torch.randn_like(got)
    got, want = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (got, want))
    agrees("gated_deltanet", "gradients of the layer", got, want, oracle=QWENS)


@pytest.mark.parametrize("value_heads", [2, 6])
def test_qwen3_next_s_cached_steps(value_heads: int, agrees: Callable[..., None]) -> None:
    """A prompt, then tokens one by one, each side with its own cache."""
    ours, theirs = ours_and_theirs(value_heads)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        cache = DynamicCache(config=their_config(value_heads))
        parts = [theirs(x[:, :70], cache_params=cache)]
        parts += [theirs(token, cache_params=cache) for token in x[:, 70:].split(1, dim=1)]
        first, state = ours(x[:, :70], ours.init_state(BATCH))
        got, want = torch.cat([first, steps(ours, x[:, 70:], state)], dim=1), torch.cat(parts, dim=1)
    agrees("gated_deltanet", "layer in cached steps", got, want, oracle=QWENS)


@pytest.mark.parametrize("negative_eigenvalues", [False, True])
def test_deltanet_token_by_token(negative_eigenvalues: bool, agrees: Callable[..., None]) -> None:
    """The equations written out, in float64: windows of four inputs, one matrix for each head."""
    mixer = build_mixer("deltanet", d_model=WIDTH, num_heads=HEADS, negative_eigenvalues=negative_eigenvalues).double()
    assert isinstance(mixer, DeltaNet)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    projected = x @ mixer.project.weight.T
    line = torch.cat([x.new_zeros(BATCH, 3, 3 * WIDTH), projected[..., :-HEADS]], dim=1)
    matrix, want = x.new_zeros(BATCH, HEADS, WIDTH // HEADS, WIDTH // HEADS), []
    for t in range(LENGTH):
        mixed = nn.functional.silu((line[:, t : t + 4] * mixer.conv.weight).sum(1))
        q, k, v = mixed.view(BATCH, 3, HEADS, -1).unbind(1)
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        beta = torch.sigmoid(projected[:, t, -HEADS:]) * (2 if negative_eigenvalues else 1)
        erase = torch.eye(WIDTH // HEADS) - beta[..., None, None] * k[..., None] * k[..., None, :]
        matrix = erase @ matrix + beta[..., None, None] * k[..., None] * v[..., None, :]
        o = (q[..., None, :] @ matrix)[..., 0, :] / (WIDTH // HEADS) ** 0.5
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
        want.append(o.flatten(1) @ mixer.out.weight.T)
    expected = torch.stack(want, dim=1)
    found = {"layer": mixer(x)[0]}
    with torch.no_grad():
        found["layer in cached steps"] = steps(mixer, x, mixer.init_state(BATCH))
    for what, got in found.items():
        agrees("deltanet", what, got, expected, no_oracle="its layer needs a GPU")


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])
def test_a_state_turned_round_a_thousand_times_under_autocast(name: str) -> None:
    """One token again and again, beta near 2, next to no decay: bfloat16 products would lose the State altogether."""
    mixer = build_mixer(name, d_model=WIDTH, num_heads=HEADS, negative_eigenvalues=True)
    assert isinstance(mixer, (DeltaNet, GatedDeltaNet))
    x = torch.randn(BATCH, 1, WIDTH)
    with torch.no_grad():
        if isinstance(mixer, GatedDeltaNet):
            mixer.A_log.fill_(-20)
        mixer.project.weight[-HEADS:] = 5 * x[0] / x[0].square().sum()  # beta of the first row: 2 sigmoid(5)
    xs = x.expand(-1, 1000, -1)
    want = mixer(xs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(xs)[0].float()
    assert (got - want).abs().max() < 0.05 * want.abs().max()


def test_fresh_decays() -> None:
    """Rates up to 16, steps between 0.001 and 0.1: from keeping nearly all to a fifth."""
    mixer = build_mixer("gated_deltanet", d_model=WIDTH, num_heads=HEADS)
    assert isinstance(mixer, GatedDeltaNet)
    steps = nn.functional.softplus(mixer.dt_bias)
    assert ((steps > 0.9e-3) & (steps < 0.11)).all()
    assert ((mixer.A_log.exp() > 0) & (mixer.A_log.exp() <= 16)).all()
