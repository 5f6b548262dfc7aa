"""Native sparse attention against loops written from the paper's equations, and what must hold beyond the laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trilemma.errors import ConfigError
from trilemma.mixers.block_sparse_attention import BlockSparseAttention
from trilemma.mixers.build import build_mixer

WIDTH, HEADS, LENGTH = 16, 4, 77  # longer than what is masked, so that both forms of the selected branch run
NO_LAYER = "published layers need a GPU or leave out parts of the paper's equations"
SMALL: dict[str, Any] = {
    "compress_size": 6,
    "compress_stride": 2,
    "select_size": 4,
    "num_selected": 4,
    "window": 5,
    "chunk_size": 8,
}


def build(**options: Any) -> BlockSparseAttention:
    mixer = build_mixer("block_sparse_attention", WIDTH, num_heads=HEADS, **{**SMALL, **options})
    assert isinstance(mixer, BlockSparseAttention)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer.double()


def turned(vector: Tensor, position: int) -> Tensor:
    """Pairs of neighbours as complex numbers, turned by position / 10000^(2 i / D)."""
    pairs = torch.view_as_complex(vector.view(-1, 2).contiguous())
    angles = [position / 10000 ** (2 * i / len(vector)) for i in range(len(pairs))]
    turn = torch.tensor([complex(math.cos(angle), math.sin(angle)) for angle in angles], dtype=torch.complex128)
    return torch.view_as_real(pairs * turn).flatten()


def weighed(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query, and its probabilities; nothing from no keys."""
    if not keys:
        return torch.zeros_like(query), torch.zeros(0)
    probabilities = torch.stack([query @ key / math.sqrt(len(query)) for key in keys]).exp()
    probabilities = probabilities / probabilities.sum()
    return sum(p * value for p, value in zip(probabilities, values, strict=True)), probabilities


def as_the_paper_writes_it(mixer: BlockSparseAttention, x: Tensor) -> Tensor:
    """y [L, d_model] of one sequence x, token by token."""
    sizes, groups, dim = mixer.sizes, mixer.num_kv_heads, mixer.head_dim
    turn = turned if mixer.position == "rotary" else lambda vector, position: vector
    parts = mixer.project(x).split([HEADS * dim, *[groups * dim] * 6, 3 * HEADS], dim=-1)
    q, k_slc, k_win, v_slc, v_win, k_cmp, v_cmp = (part.unflatten(-1, (-1, dim)) for part in parts[:7])
    gates = torch.sigmoid(parts[7]).view(len(x), HEADS, 3)

    def pooled(network: Any, tokens: Tensor, begin: int, group: int) -> Tensor:
        block = torch.cat([tokens[begin + j, group] + network.position[j, group] for j in range(sizes.compress)])
        inner = network.up.weight @ block
        gelu = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        return network.down.weight @ gelu

    blocks = range(sizes.ended(len(x)))
    all_keys, all_values = (
        [[pooled(network, part, i * sizes.stride, g) for i in blocks] for g in range(groups)]
        for network, part in ((mixer.compress_keys, k_cmp), (mixer.compress_values, v_cmp))
    )
    rows = []
    for t in range(len(x)):
        seen = max((t + 1 - sizes.compress) // sizes.stride + 1, 0)  # floor((t - l) / d) with t counted from 1
        heads = []
        for g in range(groups):
            keys = [turn(key, i * sizes.stride) for i, key in enumerate(all_keys[g][:seen])]
            values = all_values[g][:seen]
            mine = range(g * HEADS // groups, (g + 1) * HEADS // groups)
            queries = {h: turn(q[t, h], t) for h in mine}
            coarse = {h: weighed(queries[h], keys, values) for h in mine}
            total = sum(coarse[h][1] for h in mine)
            # Equation 9: blocks are counted from 1, here and there.
            importance = {}
            for j in range(1, t // sizes.select + 2):
                terms = [
                    sizes.select // sizes.stride * j - m - n
                    for m in range(sizes.select // sizes.stride)
                    for n in range(sizes.compress // sizes.stride)
                ]
                importance[j - 1] = sum(float(total[i - 1]) for i in terms if 1 <= i <= seen)
            own = t // sizes.select
            fixed = [j for j in importance if j < sizes.initial or j > own - sizes.local]
            free = sorted((j for j in importance if j not in fixed), key=lambda j: -importance[j])
            chosen = [*fixed, *free[: sizes.count - len(fixed)]]
            fine = [s for j in chosen for s in range(j * sizes.select, (j + 1) * sizes.select) if s <= t]
            near = range(max(t - sizes.window + 1, 0), t + 1)
            for h in mine:
                outs = [coarse[h][0]]
                for k, v, tokens in ((k_slc, v_slc, fine), (k_win, v_win, near)):
                    outs.append(weighed(queries[h], [turn(k[s, g], s) for s in tokens], [v[s, g] for s in tokens])[0])
                heads.append(sum(gate * out for gate, out in zip(gates[t, h], outs, strict=True)))
        rows.append(mixer.out(torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2, "position": "rotary", "bias": True},
        {"num_kv_heads": 1},
        {"num_kv_heads": 4, "compress_size": 2, "select_size": 6, "num_selected": 3, "window": 1, "chunk_size": 100},
        {"compress_size": 4, "compress_stride": 4, "num_selected": 3, "initial_blocks": 0, "local_blocks": 1},
        {"compress_size": 8, "compress_stride": 1, "select_size": 3, "num_selected": 6, "initial_blocks": 2},
    ],
)
def test_the_whole_mixer_against_the_equations(options: dict[str, Any], agrees: Callable[..., None]) -> None:
    mixer = build(**options)
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        want = as_the_paper_writes_it(mixer, x)
        got = mixer(x[None])[0][0]
    agrees("block_sparse_attention", "layer", got, want, no_oracle=NO_LAYER)


def test_the_comparison_sees_a_choice() -> None:
    """One block more is another function: the free choice matters at these sizes."""
    few, more = build(), build(num_selected=5)
    more.load_state_dict(few.state_dict())
    x = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    assert (few(x)[0] - more(x)[0]).abs().max() > 1e-3


def test_the_papers_defaults() -> None:
    mixer = build_mixer("block_sparse_attention", 256, num_heads=64)
    assert isinstance(mixer, BlockSparseAttention)
    sizes = mixer.sizes
    assert (sizes.compress, sizes.stride, sizes.select, sizes.count, sizes.window) == (32, 16, 64, 16, 512)
    assert (sizes.initial, sizes.local, mixer.num_kv_heads) == (1, 2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_blocks_are_chosen_alike_however_the_sequence_is_cut(dtype: torch.dtype) -> None:
    """Without compressed keys all free blocks tie, and their values differ."""
    mixer = build().to(dtype)
    with torch.no_grad():
        mixer.compress_keys.down.weight.zero_()
        x = torch.randn(1, LENGTH, WIDTH, dtype=dtype)
        whole, _ = mixer(x)
        for size in (1, 2, 7):
            state, parts = mixer.init_state(1), []
            for part in x.split(size, dim=1):
                y, state = mixer(part, state)
                parts.append(y)
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=tolerance, atol=tolerance)


def test_large_scores_stay_finite() -> None:
    mixer = build().float()
    x = (1e3 * torch.randn(2, LENGTH, WIDTH)).requires_grad_()
    y, _ = mixer(x)
    gradients = torch.autograd.grad(y.sum(), [x, *mixer.parameters()])
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_memory_of_a_whole_sequence_grows_linearly() -> None:
    """Chunks see L / d compressed blocks each; nothing is [length x length], forwards or backwards."""
    mixer, largest = build(), []
    for length in (256, 512, 1024):
        with _Largest() as seen:
            mixer(torch.randn(1, length, WIDTH, dtype=torch.float64, requires_grad=True))[0].sum().backward()
        largest.append(seen.numel)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[2] <= 2.1 * largest[1]


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "no multiple of num_kv_heads 3"),
        ({"head_dim": 3, "position": "rotary"}, "even head_dim, found 3"),
        ({"compress_size": 5}, "compress_size 5 is no multiple of compress_stride 2"),
        ({"select_size": 7}, "select_size 7 is no multiple of compress_stride 2"),
        ({"num_selected": 2}, "num_selected 2 does not hold the 3 that are always selected"),
        ({"local_blocks": 0}, "local_blocks and window must be at least 1"),
        ({"window": 0}, "local_blocks and window must be at least 1"),
        ({"num_heads": 3}, "no multiple of num_heads 3; give head_dim"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_mixer("block_sparse_attention", WIDTH, **{"num_heads": HEADS, **SMALL, **options})
