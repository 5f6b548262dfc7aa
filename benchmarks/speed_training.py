"""The sections of docs/speed.md about training steps. See speed_page.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from speed_parts import (
    NOT_MEASURED,
    Promise,
    Result,
    Section,
    median,
    megabytes,
    origin,
    promise,
    reason,
    spread,
    table,
)

MODES = ("eager", "compiled")

Key = tuple[str, str, str]  # ours, peer, mode


def train_lm(result: Result | None) -> Section:
    """train_step_lm.json."""
    attention = [("ours-attention", peer, mode) for mode in MODES for peer in ("llama", "litgpt")]
    retention = [("ours-retention", "torchscale", mode) for mode in MODES]
    mamba2 = [("ours-mamba2", "mamba2", mode) for mode in MODES]
    keys = attention + retention + mamba2
    duels = measured_duels(result)
    both = each(duels, attention + retention, ratio)
    compiled = [key for key in keys if key[2] == "compiled"]
    shares = each(duels, compiled[:3], lambda duel: share(result, duel))
    promises = [
        promise("gate", "attention and retention faster than every peer, in the same mode", both, 1),
        promise("gate", "Mamba-2 2x as fast as transformers'", each(duels, mamba2, ratio), 2),
        promise("goal", "attention and retention 1.25x as fast", both, 1.25),
        promise("goal", "Mamba-2 3x as fast", each(duels, mamba2, ratio), 3),
        promise("goal", "attention and retention, compiled, at 0.70 of the bfloat16 ceiling", shares, 0.7),
        promise("goal", "less memory for training than every peer, theirs over ours", each(duels, keys, memory), 1),
        promise("goal", "the first compiled step within 15 s", each(duels, compiled, cold), most=15),
    ]  # fmt: skip
    about = (
        "Decoder-only: vocabulary 8,192, d_model 384, 6 layers, 6 heads, length 512, batch 8, bfloat16 over float32 "
        "weights, AdamW. Peers: transformers' Llama and Mamba-2, litgpt, torchscale's RetNet."
    )
    return training("Training step of a language model", about, promises, result)


def train_seq2seq(result: Result | None) -> Section:
    """train_step_seq2seq.json."""
    duels = measured_duels(result)
    opennmt = each(duels, [("ours", "opennmt", mode) for mode in MODES], ratio)
    promises = [
        promise("gate", "faster than OpenNMT-py, in the same mode", opennmt, 1),
        promise("goal", "1.15x as fast as OpenNMT-py", opennmt, 1.15),
    ]
    about = (
        "Encoder-decoder: 6+6 layers, 512 wide, d_ff 2,048, vocabulary 16,000, 64 rows of 32+32 tokens, bfloat16 over "
        "float32 weights, AdamW; tokens of both sides count. Peers: OpenNMT-py, JoeyNMT, transformers' Marian, "
        "torch.nn.Transformer."
    )
    return training("Training step of an encoder-decoder", about, promises, result)


def training(title: str, about: str, promises: list[Promise], result: Result | None) -> Section:
    """A section made of duels."""
    section = Section(title, about, promises)
    if result is None:
        return section
    rows = []
    for duel in result["duels"]:
        head = (duel["mode"], duel["ours"].removeprefix("ours-"), duel["peer"])
        if duel["speedup"] is None:
            rows.append((*head, *[""] * 6, reason(duel)))
            continue
        section.bars[f"{head[1]} against {head[2]}, {head[0]}"] = duel["speedups"]
        own, peer = duel["ours_runs"], duel["peer_runs"]
        of_ceiling = share(result, duel)
        theirs = None if of_ceiling is None else of_ceiling * duel["ours_median"] / duel["peer_median"]
        rows.append(
            (
                *head,
                *(f"{median(runs, 'tokens_per_second'):,.0f}" for runs in (own, peer)),
                *(NOT_MEASURED if value is None else f"{value:.0%}" for value in (of_ceiling, theirs)),
                *(megabytes(median(runs, "memory_growth_bytes")) for runs in (own, peer)),
                spread(duel["speedups"]),
            )
        )
    heads = (
        "mode", "ours", "peer", "tokens/s, ours", "peer's", "of the ceiling, ours", "peer's", "memory, MB, ours",
        "peer's", "ratio (range)",
    )  # fmt: skip
    section.table, section.origin = table(heads, rows), origin(result)
    return section


def measured_duels(result: Result | None) -> dict[Key, Result]:
    """Those that have a ratio."""
    duels = [] if result is None else result["duels"]
    return {(duel["ours"], duel["peer"], duel["mode"]): duel for duel in duels if duel["speedup"] is not None}


def each(duels: dict[Key, Result], keys: Sequence[Key], value: Callable[[Result], Any]) -> list[Any]:
    """The value of each duel; None for what was not measured."""
    return [value(duels[key]) if key in duels else None for key in keys]


def ratio(duel: Result) -> float:
    return float(duel["speedup"])


def memory(duel: Result) -> float | None:
    """Theirs over ours."""
    own, peer = (median(duel[side], "memory_growth_bytes") for side in ("ours_runs", "peer_runs"))
    return None if own is None or peer is None else peer / own


def cold(duel: Result) -> float | None:
    """Seconds of our first step with nothing compiled yet."""
    times = duel.get("cold_first_step_s")
    return None if times is None else float(times[0])


def share(result: Result | None, duel: Result) -> float | None:
    """Our matrix products a second, of the bfloat16 ceiling of the same run."""
    flops = duel["ours_runs"][0].get("flops")
    if result is None or flops is None:
        return None
    return float(flops / duel["ours_median"] / 1e6 / result["ceilings"]["bfloat16_gflops"])
