"""`trilemma doctor`: what this machine offers, its measured ceilings, what will be used and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Annotated, Any

import typer

from trilemma.cli.common import Device, Json, print_json, say

# package -> what it is for; looked up, never imported
OPTIONAL = {
    "sentencepiece": "SentencePiece vocabularies",
    "zstandard": "reading .zst files",
    "tensorboard": "training curves in TensorBoard",
    "transformers": "the Hugging Face peers in benchmarks/",
    "fla": "GPU kernels of flash-linear-attention (fla-core)",
}
REQUIRED = ("torch", "numpy", "tokenizers", "safetensors", "sacrebleu", "pydantic", "typer", "matplotlib")


def command(
    device: Device = "auto",
    refresh: Annotated[
        bool, typer.Option("--refresh", help="measure again instead of using the cached ceilings")
    ] = False,
    json: Json = False,
) -> None:
    """What this machine offers, its measured ceilings, what will be used and why."""
    import torch

    from trilemma import machine
    from trilemma.nn import kernels
    from trilemma.ops import backends

    chosen, device_reason = machine.choose_device(device)
    if refresh or not machine.ceilings_are_cached(chosen):
        say("measuring ceilings (three to ten seconds; cached afterwards)")
    ceilings = machine.ceilings(chosen, refresh=refresh)
    precision, precision_reason = machine.choose_precision(chosen)
    pairs, kind = [backend.pair for backend in backends.BACKENDS], getattr(torch, precision)
    report = {
        "machine": vars(machine.describe()),
        "ceilings": vars(ceilings),
        "chosen": {
            "device": {"value": chosen, "reason": device_reason},
            "precision": {"value": precision, "reason": precision_reason},
            "threads": {"value": machine.describe().threads, "reason": "torch's default; OMP_NUM_THREADS changes it"},
        },
        "backends": [choice._asdict() for choice in backends.choose("auto", pairs, device=chosen, dtype=kind, say=say)],
        "weights_on_the_cpu": kernels.explained(),
        "environment": machine.environment(chosen, precision),
        "versions": {name: importlib.metadata.version(name) for name in REQUIRED},
        "optional": {name: importlib.util.find_spec(name) is not None for name in OPTIONAL},
        "cache": str(machine.cache_file()),
    }
    if json:
        print_json(report)
    else:
        print(_text(report))


def _text(report: dict[str, Any]) -> str:
    hardware, ceilings, chosen = report["machine"], report["ceilings"], report["chosen"]
    gpu = f"{hardware['gpu']}, {_gib(hardware['gpu_memory_bytes'])}" if hardware["gpu"] else "none that torch finds"
    bandwidth = ", ".join(f"{rate:.0f} GB/s on {size >> 20} MiB" for size, rate in ceilings["bandwidth"])
    sections = {
        "This machine": {
            "cpu": f"{hardware['cpu']}, {hardware['cores']} usable cores, {hardware['threads']} threads",
            "memory": _gib(hardware["memory_bytes"]),
            "instructions": " ".join(hardware["isa"]) or "none of those that matter here",
            "gpu": gpu,
            "platform": hardware["platform"],
        },
        f"Measured ceilings ({ceilings['device']})": {
            "float32 matrix product": f"{ceilings['float32_gflops']:,.0f} GFLOP/s",
            "bfloat16 matrix product": f"{ceilings['bfloat16_gflops']:,.0f} GFLOP/s",
            "memory bandwidth": bandwidth,
            "one tiny operation": f"{ceilings['overhead_us']:.1f} µs",
            "autocast training step": f"{ceilings['autocast_gain']:.2f} times as fast as float32",
        },
        "What `auto` will use": {name: f"{item['value']}: {item['reason']}" for name, item in chosen.items()},
        "Backends of operators": {item["operator"]: f"{item['runs']} ({item['why']})" for item in report["backends"]},
        "Weights in use on the CPU": report["weights_on_the_cpu"],
        "Versions": {
            "trilemma": f"{report['environment']['trilemma']} (commit {report['environment']['commit'] or 'unknown'})",
            "python": report["environment"]["python"],
            **report["versions"],
        },
        "Optional packages": {
            name: f"{'installed' if there else 'not installed'}: {OPTIONAL[name]}"
            for name, there in report["optional"].items()
        },
    }
    lines = []
    for title, rows in sections.items():
        width = max(map(len, rows))
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""]
    return "\n".join([*lines, f"ceilings cached in {report['cache']}"])


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
