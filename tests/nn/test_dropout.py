"""Dropout: the right share, nothing but zeros and scaled values, a function of the seed, the same mask backwards."""

from __future__ import annotations

import math

import pytest
import torch

from trilemma.nn.dropout import Dropout

SIZE = 400_003  # no multiple of the four elements that share a draw


def masked(p: float, size: int = SIZE, seed: int = 7) -> torch.Tensor:
    torch.manual_seed(seed)
    return Dropout(p)(torch.ones(size)) == 0


@pytest.mark.parametrize("p", [0.0001, 0.1, 0.3, 0.5, 0.97])
def test_the_share_that_is_dropped(p: float) -> None:
    deviation = math.sqrt(p * (1 - p) / SIZE)
    assert abs(float(masked(p).float().mean()) - p) < 5 * deviation + 2**-17


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_neighbours_are_independent(step: int) -> None:
    """Also those that share a draw of the generator."""
    dropped = masked(0.3).float() - 0.3
    correlation = float((dropped[:-step] * dropped[step:]).mean()) / 0.21
    assert abs(correlation) < 5 / math.sqrt(SIZE)


@pytest.mark.parametrize("place", range(4))
def test_each_part_of_a_draw_has_the_right_share(place: int) -> None:
    share = masked(0.1)[place::4].float().mean()
    assert abs(float(share) - 0.1) < 5 * math.sqrt(0.09 / (SIZE / 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_rest_is_scaled_and_gradients_pass_the_same_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 5, 7, dtype=dtype).requires_grad_()
    y = Dropout(0.25)(x)
    y.sum().backward()
    kept, factor = y != 0, torch.tensor(1 / 0.75, dtype=dtype)
    assert y.dtype == dtype
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(y, torch.where(kept, x * factor, 0))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(kept, factor, 0))


def test_a_function_of_the_seed_whatever_the_threads() -> None:
    threads = torch.get_num_threads()
    first = masked(0.3)
    try:
        torch.set_num_threads(2)
        assert torch.equal(masked(0.3), first)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(masked(0.3, seed=8), first)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (1, 1, 3)])
def test_awkward_shapes(shape: tuple[int, ...]) -> None:
    assert Dropout(0.5)(torch.ones(shape)).shape == shape


def test_nothing_happens_outside_training_or_at_zero() -> None:
    x = torch.randn(4)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_a_rate_next_to_one_stays_finite() -> None:
    assert Dropout(1 - 1e-9)(torch.ones(100_000)).isfinite().all()


def test_compiled_code_has_no_graph_break() -> None:
    compiled = torch.compile(Dropout(0.5), fullgraph=True, backend="aot_eager")
    y = compiled(torch.ones(1000))
    assert set(y.unique().tolist()) == {0.0, 2.0}
