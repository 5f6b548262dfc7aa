"""mLSTM: the scan against transformers' xLSTM in float64, the block against numbers of its authors' code.

tests/assets/mlstm-layer.safetensors says how it was made. The authors add 1e-6 to denominators; we do not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.xlstm.modeling_xlstm import mlstm_chunkwise_native_autograd, mlstm_recurrent_sequence_native

from trilemma.mixers.build import build_mixer
from trilemma.mixers.mlstm import MLSTM
from trilemma.ops.exponential_scan import exponential_scan, exponential_step
from trilemma.ragged import Ragged

BATCH, HEADS, LENGTH, WIDTH, WIDE = 2, 3, 24, 4, 5
NUMBERS = Path(__file__).parents[1] / "assets" / "mlstm-layer.safetensors"
LAYER = "numbers stored from NX-AI/xlstm@032a6fb, mLSTMLayer"
SCANS = {
    "recurrent": "transformers mlstm_recurrent_sequence_native",
    "chunkwise": "transformers mlstm_chunkwise_native_autograd",
}


def drawn(strength: float, length: int = LENGTH) -> tuple[Tensor, ...]:
    """q, k, v, and what goes into the gates."""
    q, k = torch.randn(2, BATCH, HEADS, length, WIDTH, dtype=torch.float64)
    v = torch.randn(BATCH, HEADS, length, WIDE, dtype=torch.float64)
    i, f = strength * torch.randn(2, BATCH, HEADS, length, dtype=torch.float64)
    return q, k, v, i, f + 1


def theirs(form: str, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, **state: Tensor) -> tuple[Tensor, ...]:
    """Output, matrix, normaliser and maximum; their scale of q is taken away."""
    given = {"query": q * WIDTH**0.5, "key": k, "value": v, "igate": i, "fgate": f}
    if form == "recurrent":
        options = {"dtype_state": torch.float64}
        run = mlstm_recurrent_sequence_native
    else:
        options = {"chunk_size": 6}
        run = mlstm_chunkwise_native_autograd
    out, (matrix, n, m) = run(**given, **state, **options, return_last_states=True, eps=0.0)
    return out, matrix, n, m[..., 0]


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
@pytest.mark.parametrize("strength", [0.1, 2.0, 10.0])
@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_the_scan_and_its_state(form: str, strength: float, chunk_size: int, agrees: Callable[..., None]) -> None:
    q, k, v, i, f = drawn(strength)
    out, state = exponential_scan(q, k, v, i, torch.nn.functional.logsigmoid(f), None, None, chunk_size, True)
    assert state is not None
    got, want = (out, state[0][..., :-1], state[0][..., -1], state[1]), theirs(form, q, k, v, i, f)
    agrees("mlstm", "scan and its state", got, want, oracle=SCANS[form])


def test_gradients_of_the_scan_through_a_carried_state(agrees: Callable[..., None]) -> None:
    """Ours hold m constant, theirs differentiate it: the answer does not depend on it."""
    given = drawn(2.0)
    weights = torch.randn(BATCH, HEADS, LENGTH, WIDE, dtype=torch.float64)
    results = []
    for ours in (True, False):
        leaves = [value.clone().requires_grad_() for value in given]
        if ours:
            q, k, v, i, f = leaves
            gates = i, torch.nn.functional.logsigmoid(f)
            first, second = ([value[:, :, part] for value in (q, k, v, *gates)] for part in (slice(7), slice(7, None)))
            out, state = exponential_scan(*first, None, None, 3, True)
            out = torch.cat([out, exponential_scan(*second, state, None, 4)[0]], dim=2)
        else:
            out = theirs("recurrent", *leaves)[0]
        results.append(torch.autograd.grad((out * weights).sum(), leaves))
    agrees("mlstm", "gradients of the scan", *results, oracle=SCANS["recurrent"])


def test_steps_and_their_maximum(agrees: Callable[..., None]) -> None:
    q, k, v, i, f = drawn(3.0)
    log_forget = torch.nn.functional.logsigmoid(f)
    _, state = exponential_scan(*(value[:, :, :5] for value in (q, k, v, i, log_forget)), None, None, 4, True)
    assert state is not None
    outs = []
    with torch.no_grad():
        for t in range(5, LENGTH):
            out, state = exponential_step(*(value[:, :, t : t + 1] for value in (q, k, v, i, log_forget)), state)
            outs.append(out)
    want = theirs("recurrent", q, k, v, i, f)
    got = torch.cat(outs, dim=2), state[1]
    want = want[0][:, :, 5:], want[3]
    agrees("mlstm", "scan in steps", got, want, oracle=SCANS["recurrent"])


def block() -> tuple[MLSTM, dict[str, Tensor]]:
    """Our mixer with the recorded weights, in float64, and the record."""
    numbers = load_file(NUMBERS)
    ours = build_mixer("mlstm", 8, num_heads=2, chunk_size=4)
    assert isinstance(ours, MLSTM)
    theirs = {name.removeprefix("weight."): value for name, value in numbers.items() if name.startswith("weight.")}
    cell = "mlstm_cell."
    ours.load_state_dict(
        {
            "project.weight": theirs["proj_up.weight"],
            "conv.weight": theirs["conv1d.conv.weight"][:, 0].t(),
            "conv.bias": theirs["conv1d.conv.bias"],
            **{f"{name}.weight": theirs[f"{name}_proj.weight"] for name in "qkv"},
            "gates.weight": torch.cat([theirs[cell + "igate.weight"], theirs[cell + "fgate.weight"]]),
            "gates.bias": torch.cat([theirs[cell + "igate.bias"], theirs[cell + "fgate.bias"]]),
            "norm_weight": 1 + theirs[cell + "outnorm.weight"],
            "skip": theirs["learnable_skip"],
            "out.weight": theirs["proj_down.weight"],
        }
    )
    return ours.double(), numbers


def test_the_block_against_its_authors(agrees: Callable[..., None]) -> None:
    ours, numbers = block()
    x = numbers["x"].double().requires_grad_()
    y, _ = ours(x)
    agrees("mlstm", "layer", y, numbers["y"], oracle=LAYER, share=1e-5)
    (gradient,) = torch.autograd.grad((y * numbers["w"]).sum(), x)
    agrees("mlstm", "gradients of the layer", gradient, numbers["grad_x"], oracle=LAYER, share=1e-5)


def test_the_comparison_can_fail() -> None:
    ours, numbers = block()
    with torch.no_grad():
        ours.gates.bias.add_(0.1)
        assert (ours(numbers["x"].double())[0] - numbers["y"]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [-1e4, -200.0, 200.0, 1e4])
@pytest.mark.parametrize("forget", [-1e3, 0.0, 50.0])
def test_extreme_gates_stay_finite(size: float, forget: float) -> None:
    """Weights of e^10000 and e^-10000, remembered or forgotten, in float32 with gradients; some tokens are zero."""
    q, k, v, i, f = (value.float() for value in drawn(1.0, 200))
    q, k = q.masked_fill(torch.rand(200)[:, None] < 0.1, 0), k.masked_fill(torch.rand(200)[:, None] < 0.1, 0)
    q, k, v, i, f = (value.requires_grad_() for value in (q, k, v, i + size, f + forget))
    out, state = exponential_scan(q, k, v, i, torch.nn.functional.logsigmoid(f), None, None, 64, True)
    assert state is not None
    for value in (out, *state, *torch.autograd.grad(out.sum(), (q, k, v, i, f))):
        assert value.isfinite().all()


def test_a_packed_sequence_after_one_with_large_gates() -> None:
    """A maximum that crossed the border would erase it."""
    ours = build_mixer("mlstm", 8, num_heads=2, chunk_size=16)
    x = torch.randn(1, 12, 8)
    with torch.no_grad():
        ours.gates.weight.normal_()
        ours.gates.weight[:2].mul_(100 * torch.sign(ours.gates.weight[:2]))
        packed, _ = ours(x, None, Ragged(segments=torch.tensor([[0] * 6 + [1] * 6])))
        alone, _ = ours(x[:, 6:])
    torch.testing.assert_close(packed[:, 6:], alone, rtol=1e-4, atol=1e-5)


def test_memory_of_the_chunk_form_grows_linearly() -> None:
    largest = []
    for length in (512, 1024):
        with _Largest() as seen:
            q, k, v, i, f = drawn(1.0, length)
            exponential_scan(q, k, v, i, -f.abs(), None, None, 64, True)
        largest.append(seen.numel)
    assert largest[1] <= 2.1 * largest[0]


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result
