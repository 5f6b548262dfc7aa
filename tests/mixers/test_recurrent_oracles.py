"""RNN, LSTM and GRU against their equations written out, token by token, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trilemma.mixers.base import Mixer
from trilemma.mixers.gru import GRU
from trilemma.mixers.lstm import LSTM
from trilemma.mixers.rnn import RNN
from trilemma.ragged import Ragged

ROWS, LENGTH, D_MODEL, HIDDEN = 2, 9, 6, 5
NONE = "it runs torch's own kernel, and no other implementation is installed; its equations are written out"


def rnn_by_hand(mixer: RNN, x: Tensor) -> Tensor:
    """h_t = act(W x + U h + b)."""
    kernel = mixer.kernel
    activation = {"tanh": torch.tanh, "relu": torch.relu}[kernel.nonlinearity]
    h = torch.zeros(len(x), mixer.hidden, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        bias = kernel.bias_ih_l0 + kernel.bias_hh_l0
        h = activation(x[:, t] @ kernel.weight_ih_l0.T + h @ kernel.weight_hh_l0.T + bias)
        outputs.append(h)
    y = torch.stack(outputs, dim=1)
    return y if mixer.out is None else mixer.out(y)


def lstm_by_hand(mixer: LSTM, x: Tensor) -> Tensor:
    """c_t = s(f) c + s(i) tanh(g), h_t = s(o) tanh(c_t); torch orders the gates i, f, g, o."""
    kernel = mixer.kernel
    h = c = torch.zeros(len(x), mixer.hidden, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        gates = kernel.weight_ih_l0 @ x[:, t].T + (kernel.bias_ih_l0 + kernel.bias_hh_l0)[:, None]
        i, f, g, o = (gates + kernel.weight_hh_l0 @ h.T).T.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    y = torch.stack(outputs, dim=1)
    return y if mixer.out is None else mixer.out(y)


def gru_by_hand(mixer: GRU, x: Tensor) -> Tensor:
    """n = tanh(W x + b + r (U h + c)), h_t = (1 - z) n + z h; torch orders the gates r, z, n."""
    kernel = mixer.kernel
    h = torch.zeros(len(x), mixer.hidden, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        r_x, z_x, n_x = (x[:, t] @ kernel.weight_ih_l0.T + kernel.bias_ih_l0).chunk(3, dim=1)
        r_h, z_h, n_h = (h @ kernel.weight_hh_l0.T + kernel.bias_hh_l0).chunk(3, dim=1)
        r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
        n = (n_x + r * n_h).tanh()
        h = (1 - z) * n + z * h
        outputs.append(h)
    y = torch.stack(outputs, dim=1)
    return y if mixer.out is None else mixer.out(y)


KINDS = {
    "rnn": lambda hidden: RNN(D_MODEL, hidden=hidden),
    "rnn relu": lambda hidden: RNN(D_MODEL, hidden=hidden, activation="relu"),
    "lstm": lambda hidden: LSTM(D_MODEL, hidden=hidden),
    "gru": lambda hidden: GRU(D_MODEL, hidden=hidden),
}


def by_hand(mixer: Mixer, x: Tensor) -> Tensor:
    if isinstance(mixer, RNN):
        return rnn_by_hand(mixer, x)
    if isinstance(mixer, LSTM):
        return lstm_by_hand(mixer, x)
    assert isinstance(mixer, GRU)
    return gru_by_hand(mixer, x)


@pytest.mark.parametrize("hidden", [None, HIDDEN])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_sequences_and_gradients(kind: str, hidden: int | None, agrees: Callable[..., None]) -> None:
    mixer = KINDS[kind](hidden).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(ROWS, LENGTH, D_MODEL, dtype=torch.float64, requires_grad=True)
    want = by_hand(mixer, x)
    got, _ = mixer(x)
    agrees(mixer.name, "layer", got, want, no_oracle=NONE)
    weights = torch.randn_like(want)
    wanted = torch.autograd.grad((want * weights).sum(), [x, *mixer.parameters()])
    found = torch.autograd.grad((got * weights).sum(), [x, *mixer.parameters()])
    agrees(mixer.name, "gradients of the layer", found, wanted, no_oracle=NONE)


def test_the_forget_gate_starts_open() -> None:
    """Its bias, torch's two summed, is 1; the others are 0."""
    mixer = LSTM(D_MODEL, hidden=HIDDEN, forget_bias=1.0)
    bias = mixer.kernel.bias_ih_l0 + mixer.kernel.bias_hh_l0
    assert torch.equal(bias, torch.tensor([0.0] * HIDDEN + [1.0] * HIDDEN + [0.0] * 2 * HIDDEN))


@pytest.mark.parametrize("grad", [False, True])
def test_a_relu_net_in_calls_and_packed(grad: bool) -> None:
    """What the laws show for tanh; they leave relu out, whose random nets explode."""
    mixer = RNN(D_MODEL, hidden=HIDDEN, activation="relu").double()
    x = torch.randn(ROWS, LENGTH, D_MODEL, dtype=torch.float64)
    lengths = torch.tensor([LENGTH, 4])
    with torch.set_grad_enabled(grad):
        want = mixer(x)[0]
        first, state = mixer(x[:, :5], mixer.init_state(ROWS), Ragged(lengths=lengths.clamp(max=5)))
        torch.testing.assert_close(first[0], want[0, :5])
        torch.testing.assert_close(first[1, :4], want[1, :4])
        second, _ = mixer(x[:, 4:5], state)
        torch.testing.assert_close(second[1], want[1, 4:5])
        segments = torch.tensor([[0] * 3 + [1] * (LENGTH - 3)] * ROWS)
        packed = mixer(x, None, Ragged(segments=segments))[0]
        alone = torch.cat([mixer(x[:, :3])[0], mixer(x[:, 3:])[0]], dim=1)
        torch.testing.assert_close(packed, alone)
