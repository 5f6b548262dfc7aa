"""Gated convolution against torch's conv1d and glu, put together as ConvS2S's code (fairseq) does: the decoder pads the
left, the encoder both sides, padding is zeroed before. The n-gram net against its equation, token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.build import build_mixer
from trilemma.mixers.conv import Conv
from trilemma.mixers.ngram import Ngram
from trilemma.ragged import Ragged

ROWS, LENGTH, D_MODEL, HIDDEN = 3, 11, 6, 5
TIGHT = {"rtol": 0.0, "atol": 1e-12}
NO_CONV = "no installed package has the layer; torch's conv1d and glu are put together as in its authors' code"
NO_NGRAM = "no installed package has it; its equation is written out token by token"


def inputs() -> Tensor:
    return torch.randn(ROWS, LENGTH, D_MODEL, dtype=torch.float64, requires_grad=True)


def randomised(mixer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))


def convolved(mixer: Conv, x: Tensor) -> Tensor:
    left = mixer.kernel_size - 1 if mixer.causal else (mixer.kernel_size - 1) // 2
    right = 0 if mixer.causal else mixer.kernel_size // 2
    line = nn.functional.pad(x.transpose(1, 2), (left, right))
    y = nn.functional.glu(
        nn.functional.conv1d(line, mixer.convolution.weight, mixer.convolution.bias), dim=1
    ).transpose(1, 2)
    return y if mixer.out is None else mixer.out(y)


@pytest.mark.parametrize("hidden", [None, HIDDEN])
@pytest.mark.parametrize("kernel_size", [2, 3, 4, 7, 15])
@pytest.mark.parametrize("causal", [True, False])
def test_gated_convolution_is_conv1d_and_glu(
    causal: bool, kernel_size: int, hidden: int | None, agrees: Callable[..., None]
) -> None:
    mixer = Conv(D_MODEL, causal, kernel_size, hidden).double()
    randomised(mixer)
    x = inputs()
    want, (got, _) = convolved(mixer, x), mixer(x)
    agrees("conv", "layer", got, want, no_oracle=NO_CONV)
    weights = torch.randn_like(want)
    leaves = [x, *mixer.parameters()]
    wanted = torch.autograd.grad((want * weights).sum(), leaves)
    found = torch.autograd.grad((got * weights).sum(), leaves)
    agrees("conv", "gradients of the layer", found, wanted, no_oracle=NO_CONV)


def test_a_padded_batch_is_that_of_zeros() -> None:
    mixer = Conv(D_MODEL, False, 5).double()
    randomised(mixer)
    lengths = torch.tensor([LENGTH, 4, 1])
    valid = torch.arange(LENGTH) < lengths[:, None]
    x = inputs().detach()
    want = convolved(mixer, x * valid[..., None])
    got, _ = mixer(x.masked_fill(~valid[..., None], torch.nan), None, Ragged(lengths=lengths))
    torch.testing.assert_close(got[valid], want[valid], **TIGHT)


def test_a_fresh_layer_keeps_its_inputs_variance() -> None:
    """The claim of the initialisation (arXiv 1705.03122, section 3.5)."""
    x = torch.randn(4, 512, 256)
    with torch.no_grad():
        for hidden in (None, 300):
            assert 0.8 < float(Conv(256, hidden=hidden)(x)[0].var()) < 1.6


def ngram_by_hand(mixer: Ngram, x: Tensor) -> Tensor:
    """Every token's n inputs gathered one by one."""
    outputs = []
    for t in range(x.shape[1]):
        hidden = mixer.up.bias.expand(len(x), -1)
        for place, weight in zip(range(t - mixer.n + 1, t + 1), mixer.up.weight.unbind(2), strict=True):
            if place >= 0:
                hidden = hidden + x[:, place] @ weight.T
        hidden = hidden.tanh() if mixer.activation is torch.tanh else hidden.clamp(min=0)
        outputs.append(hidden @ mixer.down.weight.T + mixer.down.bias)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("n", [2, 5, 13])
def test_an_ngram_net_is_its_equation(n: int, activation: str, agrees: Callable[..., None]) -> None:
    mixer = build_mixer("ngram", D_MODEL, n=n, hidden=HIDDEN, activation=activation).double()
    assert isinstance(mixer, Ngram)
    randomised(mixer)
    x = inputs()
    want, (got, _) = ngram_by_hand(mixer, x), mixer(x)
    agrees("ngram", "layer", got, want, no_oracle=NO_NGRAM)
    weights = torch.randn_like(want)
    leaves = [x, *mixer.parameters()]
    wanted = torch.autograd.grad((want * weights).sum(), leaves)
    found = torch.autograd.grad((got * weights).sum(), leaves)
    agrees("ngram", "gradients of the layer", found, wanted, no_oracle=NO_NGRAM)


def test_a_start_vector_is_a_shift_of_the_inputs() -> None:
    """Why there is none: s before the first token is zeros before x - s, with W_1 [s; ...; s] in the bias."""
    mixer = Ngram(D_MODEL, n=4).double()
    randomised(mixer)
    x, start = inputs().detach(), torch.randn(D_MODEL, dtype=torch.float64)
    with torch.no_grad():
        want, _ = mixer(torch.cat([start.expand(ROWS, 3, -1), x], dim=1))
        mixer.up.bias.add_(mixer.up.weight.sum(2) @ start)
        got, _ = mixer(x - start)
    torch.testing.assert_close(got, want[:, 3:], **TIGHT)


@pytest.mark.parametrize(("name", "option"), [("conv", "kernel_size"), ("ngram", "n")])
def test_a_window_of_one_is_refused(name: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} must be at least 2"):
        build_mixer(name, D_MODEL, **{option: 1})
