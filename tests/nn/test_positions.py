"""Encodings of positions, by their formulas and by what others compute."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from trilemma.nn.positions import rotate, rotation_frequencies, sinusoid, xpos_scale

CPU = torch.device("cpu")


def test_the_papers_sinusoids() -> None:
    encoded = sinusoid(torch.tensor([0, 1, 100]), 512, dtype=torch.float64)
    for row, position in enumerate((0, 1, 100)):
        for pair in (0, 1, 77, 255):
            angle = position / 10000 ** (2 * pair / 512)
            assert encoded[row, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert encoded[row, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)


def test_tensor2tensors_layout_has_halves_and_an_end_point() -> None:
    encoded = sinusoid(torch.arange(5), 8, "tensor2tensor", torch.float64)
    rates = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 3)
    angles = torch.arange(5)[:, None] * rates
    torch.testing.assert_close(encoded, torch.cat([angles.sin(), angles.cos()], dim=1), rtol=0, atol=1e-12)


def test_marian_has_the_papers_rates_in_halves() -> None:
    theirs = MarianSinusoidalPositionalEmbedding(20, 8).create_weight()
    ours = sinusoid(torch.arange(20), 8)
    halves = torch.cat([ours[:, 0::2], ours[:, 1::2]], dim=1)
    torch.testing.assert_close(halves, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_rotation_keeps_lengths_and_depends_on_distance(interleaved: bool) -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind(0)
    frequencies = rotation_frequencies(8, 1e4, False, CPU, torch.float64)

    def at(vector: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(vector, torch.tensor([[[float(position)]]]) * frequencies, interleaved)

    torch.testing.assert_close(at(q, 13).norm(), q.norm())
    for shift in (1, 40, 3000):
        torch.testing.assert_close((at(q, 5) * at(k, 2)).sum(), (at(q, 5 + shift) * at(k, 2 + shift)).sum())


@pytest.mark.parametrize("interleaved", [True, False])
def test_fewer_angles_leave_the_last_pairs_as_they_are(interleaved: bool) -> None:
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 3)
    whole = torch.cat([angles, torch.zeros(2, 5, 1)], dim=-1)
    assert torch.equal(rotate(x, angles, interleaved), rotate(x, whole, interleaved))


def test_frequencies_with_and_without_the_end_point() -> None:
    open_end = rotation_frequencies(8, 1e4, False, CPU, torch.float64)
    closed = rotation_frequencies(8, 1e4, True, CPU, torch.float64)
    torch.testing.assert_close(open_end, torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64))
    torch.testing.assert_close(closed, 1e4 ** -torch.linspace(0, 1, 4, dtype=torch.float64))
    assert rotation_frequencies(2, 1e4, True, CPU, torch.float64).tolist() == [1.0]


def test_xpos_scales_cancel_at_distance_zero() -> None:
    positions = torch.arange(50)
    up, down = (xpos_scale(positions, 8, 512.0, sign, torch.float64) for sign in (1, -1))
    torch.testing.assert_close(up * down, torch.ones_like(up))
    assert (up[1:] < up[:-1]).all()  # zeta < 1: later queries weigh less against the same key
