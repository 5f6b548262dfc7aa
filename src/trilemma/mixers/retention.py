"""Multi-scale retention (RetNet, Sun et al. 2023, arXiv 2307.08621).

    parallel     Ret(X) = (Q K^T * D) V,  D_nm = gamma^(n-m) for n >= m, else 0;  Q, K rotated by position
    recurrent    S_n = gamma S_{n-1} + K_n^T V_n,  Ret(X)_n = Q_n S_n
    y            (swish(X W_G) * GroupNorm_h(Ret_h(X))) W_O

The chunkwise form runs both: parallel within chunks, recurrent between them. One parameter set, one answer.

Legend: B rows, L length, H heads, E key head dimension, F value head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.base import Capabilities, Mixer
from trilemma.nn.constants import constant
from trilemma.nn.positions import rotate, rotation_frequencies
from trilemma.ops.decayed_scan import DECAYED_SCAN, decayed_scan, decayed_scan_flops
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, call_positions, zero_padding
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class RetentionState(State):
    """What retention remembers.

    Attributes:
        matrix: [B, H, E, F], float32 at least; with the normaliser one more column, the decayed sum of keys.
        lengths: [B] tokens read, for the rotation.
    """

    matrix: Tensor
    lengths: Tensor


def retention_log_decay(num_heads: int, schedule: str) -> list[float]:
    """log(gamma) of each head.

    "paper": gamma = 1 - 2^(-5-i), equation 8. "experiments": 1 - exp(linspace(log 1/32, log 1/512, heads)), the values
    that the paper's experiments used.
    """
    if schedule == "paper":
        gaps = [2.0 ** (-5 - i) for i in range(num_heads)]
    else:
        first, last = math.log(1 / 32), math.log(1 / 512)
        gaps = [math.exp(first + (last - first) * i / max(num_heads - 1, 1)) for i in range(num_heads)]
    return [math.log1p(-gap) for gap in gaps]


@register_mixer("retention")
class Retention(Mixer):
    """Retention with its gate, group norm and normaliser, each of which can be switched off for ablations.

    Args:
        d_model: width.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        num_heads: heads; the paper's head_dim is 256.
        head_dim: E; None: d_model / num_heads.
        value_factor: F = value_factor * E; the paper's is 2.
        decay: paper, experiments (see `retention_log_decay`), one (a single gamma of 127/128, the ablation "-
            multi-scale decay") or none (gamma = 1, the ablation "- gamma decay").
        gate: the swish gate.
        group_norm: rms (the published code's, without weights), layer (the paper's GroupNorm, without weights) or none.
        normaliser: the paper's three rescalings (section 2.4). With a group norm they change numerics only.
        chunk_size: of the chunkwise form; changes speed, never the answer.
        bias: of the projections.
        epsilon: of the group norm.
    """

    capabilities = Capabilities(constant_state=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        num_heads: int = 4,
        head_dim: int | None = None,
        value_factor: int = 2,
        decay: Literal["paper", "experiments", "one", "none"] = "paper",
        gate: bool = True,
        group_norm: Literal["rms", "layer", "none"] = "rms",
        normaliser: bool = False,
        chunk_size: int = 64,
        bias: bool = False,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__(d_model, causal)
        if head_dim is None and d_model % num_heads:
            raise ConfigError(f"retention: d_model {d_model} is no multiple of num_heads {num_heads}; give head_dim")
        if decay not in ("paper", "experiments", "one", "none") or group_norm not in ("rms", "layer", "none"):
            raise ConfigError(f'retention: unknown decay "{decay}" or group_norm "{group_norm}"')
        self.num_heads, self.head_dim = num_heads, head_dim or d_model // num_heads
        if self.head_dim % 2:
            raise ConfigError(f"retention: the rotation needs an even head_dim, found {self.head_dim}")
        self.value_dim = value_factor * self.head_dim
        self.group_norm, self.normaliser = group_norm, normaliser
        self.chunk_size, self.epsilon = chunk_size, epsilon
        inner = num_heads * self.head_dim
        self.widths = [inner, inner, num_heads * self.value_dim] + [num_heads * self.value_dim] * gate
        self.gated = gate
        self.project = nn.Linear(d_model, sum(self.widths), bias=bias)
        self.out = nn.Linear(num_heads * self.value_dim, d_model, bias=bias)
        if decay in ("paper", "experiments"):
            self.log_decay = tuple(retention_log_decay(num_heads, decay))
        else:
            self.log_decay = (math.log1p(-1 / 128) if decay == "one" else 0.0,) * num_heads
        # The published code's initialisation (arXiv 2203.00555's gains).
        for weight in self.project.weight.split(self.widths):
            nn.init.xavier_uniform_(weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out.weight, gain=2**-1)
        for layer in (self.project, self.out) if bias else ():
            nn.init.zeros_(layer.bias)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Each schedule, each ablation, chunks of 1, 7, 64 and longer than any sequence of the laws."""
        return [
            {},
            {"chunk_size": 7, "decay": "experiments", "group_norm": "layer", "bias": True},
            {"chunk_size": 7, "normaliser": True},
            {"chunk_size": 1, "normaliser": True, "group_norm": "none"},
            {"chunk_size": 1000, "gate": False, "value_factor": 1},
            {"chunk_size": 5, "decay": "none", "normaliser": True},
            {"chunk_size": 3, "decay": "one", "group_norm": "none", "gate": False, "head_dim": 6},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The decayed scan."""
        return (DECAYED_SCAN,)

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> RetentionState:
        """Zeros."""
        shape = (rows, self.num_heads, self.head_dim, self.value_dim + int(self.normaliser))
        precise = torch.promote_types(dtype, torch.float32)
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        return RetentionState(torch.zeros(shape, dtype=precise, device=device), lengths)

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        batch, length, _ = x.shape
        assert state is None or isinstance(state, RetentionState)
        valid = ragged.valid(length) if ragged is not None else None
        positions = call_positions(length, ragged, 0 if state is None else state.lengths, x.device)
        pairs, *others = self.project(x).split([2 * self.widths[0], *self.widths[2:]], dim=-1)
        pairs = pairs.unflatten(-1, (2 * self.num_heads, -1)).transpose(1, 2)  # queries, then keys
        v = others[0].unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        precise = torch.promote_types(x.dtype, torch.float32)
        angles = positions[..., None].to(precise) * rotation_frequencies(self.head_dim, 1e4, True, x.device, precise)
        q, k = rotate(pairs, angles).chunk(2, dim=1)
        k = k * self.head_dim**-0.5
        k, v = zero_padding(k, valid, 2), zero_padding(v, valid, 2)
        if self.normaliser:  # one more value, constantly 1, sums the scores
            v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], dim=-1)
        log_decay = constant(self.log_decay, precise, x.device)[None, :, None]
        matrix = None
        if state is not None:
            matrix = state.matrix
            if valid is not None:  # padding leaves the State untouched
                log_decay = zero_padding(log_decay.expand(batch, -1, length), valid, 2)
        starts = ragged.starts if ragged is not None else None
        retained, final = decayed_scan(q, k, v, log_decay, matrix, starts, self.chunk_size, state is not None)
        mixed = self._normalised(retained, positions)
        if self.gated:
            mixed = nn.functional.silu(others[1]) * mixed
        y: Tensor = self.out(mixed)
        if state is None:
            return y, None
        assert final is not None
        added = length if ragged is None or ragged.lengths is None else ragged.lengths
        lengths = updated(state.lengths, state.lengths + added)
        return y, RetentionState(updated(state.matrix, final), lengths)

    def _normalised(self, retained: Tensor, positions: Tensor) -> Tensor:
        """[B, H, L, F (+ 1)] -> [B, L, H * F]: the paper's rescalings, then the norm of each head."""
        if self.normaliser:
            retained, sums = retained[..., :-1], retained[..., -1:]
            scale = self._mask_row_sums(positions).to(retained.dtype).sqrt()
            retained = retained / scale / (sums / scale).abs().clamp(min=1)
        if self.group_norm == "rms":
            retained = nn.functional.rms_norm(retained, (self.value_dim,), eps=self.epsilon)
        elif self.group_norm == "layer":
            retained = nn.functional.layer_norm(retained, (self.value_dim,), eps=self.epsilon)
        return retained.transpose(1, 2).flatten(2)

    def _mask_row_sums(self, positions: Tensor) -> Tensor:
        """[B or 1, H, L, 1] sum of the decay mask's row, 1 + gamma + ... + gamma^position."""
        log_decay = constant(self.log_decay, torch.float64, positions.device)[:, None]
        count = (positions[:, None] + 1).double()
        series = torch.expm1(count * log_decay) / torch.expm1(log_decay)
        return torch.where(log_decay == 0, count, series)[..., None]

    def count_parameters(self) -> int:
        """2 d h E + (1 + gate) d h F + h F d, and biases."""
        bias = self.project.bias is not None
        inner, outer = sum(self.widths), self.num_heads * self.value_dim
        return self.d_model * (inner + outer) + (inner + self.d_model if bias else 0)

    def flops(self, length: int, context: int = 0) -> int:
        """Projections, and the form that a call of this length runs: chunkwise as executed, or one step."""
        outer = self.num_heads * self.value_dim
        projections = 2 * length * self.d_model * (sum(self.widths) + outer)
        keys, values = (self.num_heads, self.head_dim), (self.num_heads, self.value_dim + int(self.normaliser))
        return projections + decayed_scan_flops(length, context, keys, values, self.chunk_size)

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """h E F elements whatever the length."""
        element = torch.promote_types(dtype, torch.float32).itemsize
        return self.num_heads * self.head_dim * (self.value_dim + int(self.normaliser)) * element
