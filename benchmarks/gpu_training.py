"""Training on a GPU: model-FLOP utilisation, tokens a second and peak memory, by size, mixer and length.

    python benchmarks/gpu_training.py                                  # everything that is missing
    python benchmarks/gpu_training.py --only size=1.3b --only mode=compiled
    python benchmarks/gpu_training.py --tiny                           # does everything run? On a CPU too

A step is that of train_step.py: bfloat16 autocast over float32 weights, the trainer's own loss, clipping, fused AdamW,
no recomputation. A Transformer, RetNet, Mamba-2 and gated DeltaNet of equal numbers of weights, with the same tokens a
step; where they do not fit, half as many, and so on. FLOPs are those of gpu_models.py. Cases are stored one by one and
a second call goes on with the rest: gpu_cases.py. Where flash-linear-attention is installed its kernels are measured
too.
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_cases import Case, Row, Study, main, release
from gpu_models import SHAPES, parameters, system, training_flops, utilisation
from train_step import timed_steps
from train_step_lm import Size, batch

from common import say
from trilemma import laws
from trilemma.models import SequenceModel
from trilemma.ops import backends

MIXERS = ("attention", "retention", "mamba2", "gated_deltanet")
LENGTHS = (2048, 8192)
TOKENS = {"124m": 32768, "350m": 32768, "1.3b": 16384, "tiny": 128}  # of a step
STEPS, WARM_UP = 5, 2


def cases(tiny: bool) -> list[Case]:
    """Compiled before eager, and other people's kernels last; a trial compiles attention alone."""
    sizes, lengths = (("tiny",), (32,)) if tiny else (("124m", "350m", "1.3b"), LENGTHS)
    theirs = sorted({backend.name for backend in backends.BACKENDS if not backend.missing()})
    kinds = [("plain", "compiled"), ("plain", "eager"), *((name, "eager") for name in theirs)]
    return [
        {"size": size, "mixer": mixer, "length": length, "mode": mode, "backend": backend}
        for backend, mode in kinds
        for size in sizes
        for length in lengths
        for mixer in MIXERS
        if mixer != "attention" or backend == "plain"
        if mixer == "attention" or not (tiny and mode == "compiled")
    ]


def measure(case: Case, device: str) -> Row:
    """As many rows as fit."""
    rows = max(1, TOKENS[case["size"]] // case["length"])
    while True:
        try:
            return measure_rows(case, rows, device)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows //= 2
        say(f"  out of memory: {rows} rows instead")
        release()


def measure_rows(case: Case, rows: int, device: str) -> Row:
    """One training."""
    torch.compiler.reset()
    torch.manual_seed(0)
    length = case["length"]
    model, step = system(case["size"], case["mixer"], length, rows, case["mode"] == "compiled", device)
    assert isinstance(model, SequenceModel)
    if case["backend"] != "plain":
        laws.admit(model.mixers(), case["backend"], device=device, dtype=torch.bfloat16, say=say)
    shape = SHAPES[case["size"]]
    size = Size(shape.vocab_size, shape.d_model, shape.d_ff, shape.num_layers, shape.num_heads, length, rows)
    tokens = [part.to(device) for part in batch(size, torch.Generator().manual_seed(1))]
    try:
        found = timed_steps(model.train(), step, tokens, STEPS, WARM_UP, device)
    finally:
        backends.reset()
    return {
        **found,
        "rows": rows,
        "parameters": parameters(model),
        "flops_per_token": training_flops(model, length),
        "tokens_per_second": rows * length / found["step_ms"] * 1e3,
    }


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| case | tokens/s | of the peak | of the ceiling | peak memory, GB |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        name = ", ".join(map(str, row["case"].values()))
        if row["reason"]:
            lines.append(f"| {name} | not measured: {row['reason']} | | | |")
            continue
        shares = utilisation(row, result["runs"][row["run"]])
        peak, ceiling = ("" if share is None else f"{share:.1%}" for share in shares.values())
        memory = f"{row['peak_memory_bytes'] / 1e9:.1f}"
        lines.append(f"| {name} | {row['tokens_per_second']:,.0f} | {peak} | {ceiling} | {memory} |")
    return "\n".join(lines)


STUDY = Study("gpu_training", __file__, __doc__, cases, measure, table, ("torch", "triton", "fla-core", "trilemma"))

if __name__ == "__main__":
    main(STUDY)
