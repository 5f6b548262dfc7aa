"""Retention against torchscale (its authors' code), form by form, and against fla-core's naive form.

torchscale's forms scale their outputs differently; its RMS norm takes the scale away again, exactly so when its epsilon
is zero. The parallel form with our normaliser switched on agrees at any epsilon. Versions: tests/oracles.txt.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchscale.component.multiscale_retention import MultiScaleRetention

from trilemma.mixers.build import build_mixer
from trilemma.mixers.retention import Retention, retention_log_decay
from trilemma.ops.decayed_scan import decayed_scan

HEADS, WIDTH, LENGTH, BATCH = 3, 24, 20, 2
AUTHORS = "torchscale MultiScaleRetention"


def pair(epsilon: float, **options: Any) -> tuple[Retention, MultiScaleRetention]:
    """Our mixer and theirs with the same random weights, in float64."""
    ours = build_mixer("retention", d_model=WIDTH, num_heads=HEADS, epsilon=epsilon, **options).double()
    assert isinstance(ours, Retention)
    arguments = SimpleNamespace(layernorm_eps=epsilon, multiway=False)
    theirs = MultiScaleRetention(arguments, WIDTH, 2 * WIDTH, HEADS).double()
    with torch.no_grad():
        for layer, weight in zip(
            ("q_proj", "k_proj", "v_proj", "g_proj"), ours.project.weight.split(ours.widths), strict=True
        ):
            getattr(theirs, layer).weight.copy_(weight)
        theirs.out_proj.weight.copy_(ours.out.weight)
    theirs.group_norm.forward = theirs.group_norm._norm  # the same formula without its rounding to float32
    return ours, theirs


def inputs(seed: int) -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine as torchscale wants them: each frequency for two neighbours."""
    half = WIDTH // HEADS // 2
    frequencies = 10000.0 ** -torch.linspace(0, 1, half, dtype=torch.float64)
    turned = positions[:, None].double() * frequencies.repeat_interleave(2)
    return turned.sin(), turned.cos()


def decays() -> Tensor:
    return torch.tensor(retention_log_decay(HEADS, "paper"), dtype=torch.float64).exp()


def decay_mask(length: int) -> Tensor:
    """[H, length, length] gamma^(n - m) below the diagonal, written out."""
    mask = torch.zeros(HEADS, length, length, dtype=torch.float64)
    for n in range(length):
        for m in range(n + 1):
            mask[:, n, m] = decays() ** (n - m)
    return mask


def parallel(theirs: MultiScaleRetention, x: Tensor) -> Tensor:
    mask = decay_mask(x.shape[1])
    return theirs(x, (angles(torch.arange(x.shape[1])), mask / mask.sum(-1, keepdim=True).sqrt()))


def recurrent(theirs: MultiScaleRetention, x: Tensor) -> Tensor:
    state: dict[str, Tensor] = {}
    outputs = []
    for n in range(x.shape[1]):
        position = (angles(torch.tensor([n])), decays())
        outputs.append(theirs(x[:, n : n + 1], position, incremental_state=state))
    return torch.cat(outputs, dim=1)


def chunkwise(theirs: MultiScaleRetention, x: Tensor, size: int) -> Tensor:
    mask = decay_mask(size)
    last = mask[:, -1]
    scale = mask.sum(-1, keepdim=True).sqrt()
    steps = torch.arange(size, dtype=torch.float64)
    value_decay = (last / last.sum(-1, keepdim=True))[..., None]
    query_decay = (decays()[:, None] ** (steps + 1))[..., None] / (scale / last.sum(-1)[:, None, None])
    position = (mask / scale, (decays() ** size)[:, None, None], query_decay, value_decay)
    return theirs(x, (angles(torch.arange(x.shape[1])), position), chunkwise_recurrent=True)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 1e-2])
def test_parallel_form_with_the_normaliser(epsilon: float, session_seed: int, agrees: Callable[..., None]) -> None:
    ours, theirs = pair(epsilon, normaliser=True)
    x = inputs(session_seed)
    agrees("retention", "layer", ours(x)[0], parallel(theirs, x), oracle=AUTHORS)


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunkwise"])
@pytest.mark.parametrize("normaliser", [False, True])
def test_every_form_once_the_norm_has_taken_the_scale_away(
    form: str, normaliser: bool, session_seed: int, agrees: Callable[..., None]
) -> None:
    ours, theirs = pair(0.0, normaliser=normaliser, chunk_size=7)
    x = inputs(session_seed)
    forms = {"parallel": parallel, "recurrent": recurrent, "chunkwise": lambda net, x: chunkwise(net, x, 5)}
    agrees("retention", f"layer against its {form} form", ours(x)[0], forms[form](theirs, x), oracle=AUTHORS)


def test_our_steps_against_their_steps(session_seed: int, agrees: Callable[..., None]) -> None:
    ours, theirs = pair(0.0)
    x = inputs(session_seed)
    with torch.no_grad():
        state, outputs = ours.init_state(BATCH), []
        for n in range(LENGTH):
            y, state = ours(x[:, n : n + 1], state)
            outputs.append(y)
        got, want = torch.cat(outputs, dim=1), recurrent(theirs, x)
        agrees("retention", "layer in cached steps", got, want, oracle=AUTHORS)


def test_gradients_of_the_parallel_form(session_seed: int, agrees: Callable[..., None]) -> None:
    """Without the normaliser: torchscale detaches its scale, and a norm of epsilon 0 has no gradient along it."""
    ours, theirs = pair(0.0)
    x, weights = inputs(session_seed), inputs(session_seed + 1)
    gradients = []
    for run in (lambda x: ours(x)[0], lambda x: parallel(theirs, x)):
        leaf = x.clone().requires_grad_()
        (run(leaf) * weights).sum().backward()
        gradients.append(leaf.grad)
    agrees("retention", "gradients of the layer", *gradients, oracle=AUTHORS)


def test_the_comparison_can_fail(session_seed: int) -> None:
    """Another decay schedule is another function."""
    ours, theirs = pair(0.0, decay="experiments")
    x = inputs(session_seed)
    assert (ours(x)[0] - parallel(theirs, x)).abs().max() > 1e-3


def naive_form() -> ModuleType:
    """fla-core's file alone: its package needs Triton."""
    package = importlib.util.find_spec("fla")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "ops" / "retention" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive_retention", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_scan_against_fla_core_s_naive_form(session_seed: int, agrees: Callable[..., None]) -> None:
    """It computes in float32, whatever it is given."""
    generator = torch.Generator().manual_seed(session_seed)
    q, k, v = (torch.randn(BATCH, HEADS, LENGTH, size, generator=generator) for size in (8, 8, 16))
    log_decay = torch.tensor(retention_log_decay(HEADS, "paper"))[None, :, None]
    found, _ = decayed_scan(q, k * 8**-0.5, v, log_decay, None, None, 6, False)
    want = naive_form().naive_retention(q, k, v)
    agrees("retention", "scan", found, want, oracle="fla-core naive_retention")
