"""Adapters to the Triton kernels of flash-linear-attention (fla-core 0.6.0), for NVIDIA GPUs in bfloat16.

    decayed_scan   chunk_simple_gla         a decay for each head
    vector_scan    chunk_gla                a decay for each key channel
    delta_rule     chunk_gated_delta_rule   with a decay, chunk_delta_rule without
    vector_delta   chunk_dplr_delta_rule    S_t = (Diag(a_t) + b_t c_t^T) S_{t-1} + k_t v_t^T,  c = a r, b = -p

Their tensors are [B, L, H, *], ours [B, H, L, *]; their queries are scaled unless told otherwise; packed sequences are
laid end to end in one row. They multiply float32 in TF32, short of our tolerances: bfloat16 alone is served.

They have not been run on a GPU by us: tests put their authors' naive forms in the kernels' place. The self-check in
`backends` decides on the user's machine.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trilemma.ops.decayed_scan import DECAYED_SCAN
from trilemma.ops.delta_rule import DELTA_RULE
from trilemma.ops.dispatch import Backend
from trilemma.ops.truth import drawn_normal, drawn_uniform
from trilemma.ops.vector_decay import VECTOR_SCAN
from trilemma.ops.vector_delta import VECTOR_DELTA

WIDEST = 256
"""Head dimensions above this exceed what some of the kernels hold."""


def missing() -> str:
    """Why the kernels cannot be had, or ""."""
    if any(importlib.util.find_spec(name) is None for name in ("fla", "triton")):
        return "flash-linear-attention or Triton is not installed: pip install 'trilemma[gpu]'"
    return ""


def kernel(module: str, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A function of the package, imported when it is first called."""
    found: Callable[..., tuple[Tensor, Tensor | None]] = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    return found


def _decayed_scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, rank: int, **rest: Any) -> Any:
    shared = v.shape[1] // k.shape[1]
    q, k = (t.repeat_interleave(shared, dim=1) for t in (q, k))
    g = log_decay.float().expand(v.shape[:3])
    return _run(kernel("simple_gla", "chunk_simple_gla"), {"q": q, "k": k, "v": v, "g": g}, **rest)


def _vector_scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **rest: Any) -> Any:
    return _run(kernel("gla", "chunk_gla"), {"q": q, "k": k, "v": v, "g": log_decay.float()}, **rest)


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, **rest: Any) -> Any:
    given = {"q": q, "k": k, "v": v, "beta": beta.float()}
    if log_decay is None:
        return _run(kernel("delta_rule", "chunk_delta_rule"), given, **rest)
    decay = {"g": log_decay.float().expand(v.shape[:3])}
    return _run(kernel("gated_delta_rule", "chunk_gated_delta_rule"), given | decay, **rest)


def _vector_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, r: Tensor, p: Tensor | None, **rest: Any) -> Any:
    gk = log_decay.float()
    given = {"q": q, "k": k, "v": v, "a": r * gk.exp(), "b": -(k if p is None else p), "gk": gk}
    return _run(kernel("generalized_delta_rule.dplr", "chunk_dplr_delta_rule"), given, **rest)


def _run(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    given: dict[str, Tensor],
    state: Tensor | None,
    starts: Tensor | None,
    want_state: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Calls a kernel with [B, H, L, *] tensors, by its names; gates in float32, all else in v's type."""
    rows, kind = given["v"].shape[0], given["v"].dtype
    given = {name: (t if name in ("g", "gk", "beta") else t.to(kind)).transpose(1, 2) for name, t in given.items()}
    limits = None
    if starts is not None:
        begins = starts.clone()
        begins[:, 0] = True
        limits = torch.cat([begins.flatten().nonzero()[:, 0], begins.new_tensor([begins.numel()], dtype=torch.long)])
        given = {name: t.flatten(0, 1)[None] for name, t in given.items()}
    out, final = function(
        **given,
        scale=1.0,
        initial_state=None if state is None else state.float(),
        output_final_state=want_state,
        cu_seqlens=limits,
    )
    return out.reshape(rows, -1, *out.shape[2:]).transpose(1, 2).to(kind), final


def _refuses(
    k: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None, want_state: bool, rank: int = 1, **_: Any
) -> str:
    if rank > 1:
        return f"{rank} writes a token"
    if max(k.shape[-1], v.shape[-1]) > WIDEST:
        return f"heads wider than {WIDEST}"
    if starts is not None and (state is not None or want_state):
        return "packed sequences with a State"
    return ""


def _drawn(generator: torch.Generator, dtype: torch.dtype, names: tuple[str, ...], channels: bool) -> dict[str, Any]:
    """Two rows of three chunks and a rest, two heads of 64, a State; keys of norm 1, gates from 0 to 1, usual decays.

    Args:
        names: of the arguments that the operator has beside q, k, v and the decay.
        channels: a decay for each of them.
    """
    shape = (2, 2, 200, 64)
    k = normalize(drawn_normal(generator, dtype, *shape), dim=-1)
    drawn = {
        "q": drawn_normal(generator, dtype, *shape) / 8,
        "k": k,
        "v": drawn_normal(generator, dtype, *shape),
        "log_decay": -0.1 * drawn_uniform(generator, dtype, *shape[: 4 if channels else 3]),
        "state": drawn_normal(generator, dtype, 2, 2, 64, 64),
        "beta": drawn_uniform(generator, dtype, *shape[:3]),
        "r": k * drawn_uniform(generator, dtype, *shape),
        "p": k * drawn_uniform(generator, dtype, *shape),
    }
    common = ("q", "k", "v", "log_decay", "state")
    return {name: drawn[name] for name in (*common, *names)} | {"chunk_size": 64}


_backend = partial(
    Backend,
    name="fla",
    refuses=_refuses,
    missing=missing,
    version=partial(importlib.metadata.version, "fla-core"),
    devices=("cuda",),
    dtypes=(torch.bfloat16,),
)
_scalar, _vector = partial(_drawn, names=(), channels=False), partial(_drawn, names=(), channels=True)

BACKENDS = (
    _backend(pair=DECAYED_SCAN, call=_decayed_scan, draw=_scalar),
    _backend(pair=VECTOR_SCAN, call=_vector_scan, draw=_vector),
    _backend(pair=DELTA_RULE, call=_delta_rule, draw=partial(_drawn, names=("beta",), channels=False)),
    _backend(pair=VECTOR_DELTA, call=_vector_delta, draw=partial(_drawn, names=("r", "p"), channels=True)),
)
