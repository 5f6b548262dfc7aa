"""The models that are measured on a GPU, what their training costs, and what a step of theirs must read.

FLOPs are those that the model asks for, whatever is executed: matrix parameters, the output's included and look-ups
not, and mixing over the past alone (half of all pairs). Forward counts once, backward twice, recomputation not at all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from train_step import System
from train_step_lm import Size, ours

from trilemma import machine
from trilemma.measure.cost import parameter_bytes_read
from trilemma.mixers.attention import Attention
from trilemma.mixers.base import Mixer
from trilemma.mixers.gated_deltanet import GatedDeltaNet
from trilemma.mixers.mamba2 import Mamba2
from trilemma.mixers.retention import Retention
from trilemma.models import SequenceModel

KV_HEADS = 8  # of grouped-query attention
WIDE_HEAD = 256  # head_dim of retention and, at most, of gated DeltaNet


@dataclass(frozen=True)
class Shape:
    """A Transformer; the other mixers are given as many weights.

    Attributes:
        mamba_layers: Mamba-2 has no feed-forward layers, and about twice as many of its own.
    """

    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    mamba_layers: int
    vocab_size: int = 50304


SHAPES = {
    "124m": Shape(768, 12, 12, 2048, 23),
    "350m": Shape(1024, 24, 16, 2688, 45),
    "1.3b": Shape(2048, 24, 16, 5376, 46),
    "6.7b": Shape(4096, 32, 32, 11008, 63),
    "tiny": Shape(128, 2, 16, 384, 3, vocab_size=256),
}
MIXERS = ("attention", "attention-gqa8", "retention", "mamba2", "gated_deltanet")


def options_of(shape: Shape, mixer: str) -> dict[str, Any]:
    """What distinguishes a mixer's model: its mixer section, and sizes of the layers."""
    width, rotary = shape.d_model, {"name": "attention", "position": "rotary", "bias": False}
    if mixer == "attention":
        return {"mixer": rotary}
    if mixer == "attention-gqa8":  # the keys and values that are saved go into the feed-forward layer
        saved = 2 * width * (shape.num_heads - KV_HEADS) // shape.num_heads // 3
        return {"mixer": {**rotary, "num_kv_heads": KV_HEADS}, "d_ff": shape.d_ff + saved // 64 * 64}
    if mixer == "retention":
        heads = max(1, width // WIDE_HEAD)
        return {"mixer": {"name": "retention"}, "num_heads": heads, "d_ff": shape.d_ff - 4 * width // 3 // 32 * 32}
    if mixer == "mamba2":
        return {"mixer": {"name": "mamba2"}, "num_layers": shape.mamba_layers, "feed_forward": False}
    assert mixer == "gated_deltanet"
    heads = math.ceil(3 * width / 4 / WIDE_HEAD)
    return {"mixer": {"name": "gated_deltanet"}, "num_heads": heads, "d_ff": shape.d_ff - 2 * width // 3 // 32 * 32}


def system(size: str, mixer: str, length: int, rows: int, compiled: bool, device: str) -> System:
    """A decoder-only model with float32 weights, drawn on its device, and its training step."""
    shape = SHAPES[size]
    options = {"tie_embeddings": True, **options_of(shape, mixer)}
    sizes = Size(
        shape.vocab_size, shape.d_model, options.pop("d_ff", shape.d_ff), options.pop("num_layers", shape.num_layers),
        options.pop("num_heads", shape.num_heads), length, rows,
    )  # fmt: skip
    return ours(sizes, options.pop("mixer"), compiled, device, **options)


def decoder(size: str, mixer: str, device: str, dtype: torch.dtype) -> SequenceModel:
    """The same model for inference; its weights are drawn in `dtype` on its device and never exist otherwise."""
    with _default_dtype(dtype):
        model = system(size, mixer, 1, 1, False, device)[0]
    assert isinstance(model, SequenceModel)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def parameters(model: nn.Module) -> int:
    """Their number; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_flops(model: SequenceModel, length: int) -> float:
    """FLOPs that training on one token of a row of `length` asks for."""
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    if model.output is None:
        linear += model.embedding.tokens.weight.numel()
    return 3 * (2 * linear + sum(mixing_flops(mixer, length) for mixer in model.mixers()))


def mixing_flops(mixer: Mixer, length: int) -> float:
    """Forward FLOPs a token, beyond projections.

    Attention compares each token with those before it and itself. The others: 2 for each element of the State written
    and read, and within chunks of C half of all pairs; the delta rule also reads what it corrects, and inverts a
    triangle.
    """
    if isinstance(mixer, Attention):
        return 2 * mixer.num_heads * mixer.head_dim * (length + 1)
    if isinstance(mixer, Retention):
        keys, values = mixer.head_dim, mixer.value_dim
        return mixer.num_heads * (4 * keys * values + mixer.chunk_size * (keys + values))
    if isinstance(mixer, Mamba2):
        written = 4 * mixer.d_state * mixer.inner
        return written + mixer.chunk_size * (mixer.num_groups * mixer.d_state + mixer.inner)
    assert isinstance(mixer, GatedDeltaNet)
    keys, values, chunk = mixer.head_dim, mixer.value_dim, mixer.chunk_size
    return mixer.num_value_heads * (6 * keys * values + 1.5 * chunk * (keys + values) + chunk**2)


@torch.no_grad()
def step_bytes(model: SequenceModel, context: int, rows: int) -> dict[str, int]:
    """What one token of each row must move: weights and State that are read, State that is written back.

    Weights are counted from the operations of a step. A recurrence writes its whole State, attention one token's.
    """
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    weights = parameter_bytes_read(model, lambda: model.step(tokens, model.begin(1, capacity=2)))
    held, longer = (model.state_bytes(length, dtype=model.dtype) for length in (context, context + 1))
    constant = longer == held
    return {
        "weight_bytes": weights,
        "state_bytes": rows * held,
        "written_bytes": rows * (held if constant else longer - held),
    }


def of_bandwidth(moved: int, milliseconds: float, ceilings: dict[str, Any]) -> float:
    """The time that moving so many bytes takes at the measured bandwidth, as a share of the time taken."""
    return moved / (machine.Ceilings(**ceilings).bandwidth_gbps(moved) * 1e6) / milliseconds


def utilisation(row: dict[str, Any], run: dict[str, Any]) -> dict[str, float | None]:
    """FLOPs that a measured training asked for in a second, as shares of the data sheet's peak and of the measured
    ceiling of matrix products, both in bfloat16."""
    rate = row["tokens_per_second"] * row["flops_per_token"]
    board = run["board"]
    return {
        "peak": None if board is None else rate / board["flops"]["bfloat16"],
        "ceiling": rate / (run["ceilings"]["bfloat16_gflops"] * 1e9),
    }
