"""One mixer layer alone against the neighbour's: training step, one recurrent step, and growth with the length.

    python benchmarks/mixers_speed.py                        # all cases
    python benchmarks/mixers_speed.py --cases mamba2         # only these, separated by commas
    python benchmarks/mixers_speed.py --tiny                 # does everything run?
    python benchmarks/mixers_speed.py --worker ours --case mamba2 --task train     # one process

Tasks: `train` is forward and backward of a random batch under bf16 autocast; `step` is one token with a State in
float32 without autograd, after a prompt; `growth` is our own training time per token at 8,192 tokens against 1,024.
Both systems keep freed memory, as `trilemma train` does; the peers gain more by it than we.
To add a case, add a row to CASES: options of ours, and a function that builds the peer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common import WorkerError, among, duel, options, provenance, run_worker, same_size, say, store, without_timm
from trilemma import machine

GATE = {"width": 512, "heads": 8, "length": 2048, "batch": 1}
TINY = {"width": 64, "heads": 2, "length": 128, "batch": 1}
PACKAGES = ("torch", "transformers", "torchscale", "trilemma")
TASKS = ("train", "step", "growth")
SHORT, LONG = 1024, 8192  # of the task growth


@dataclass(frozen=True)
class Size:
    """What every system is built for."""

    width: int
    heads: int
    length: int
    batch: int


@dataclass(frozen=True)
class System:
    """A layer, as its users call it.

    Attributes:
        module: the weights.
        whole: [B, L, width] -> [B, L, width].
        step: reads a prompt [B, L, width] and returns a function of one token [B, 1, width].
    """

    module: nn.Module
    whole: Callable[[Tensor], Tensor]
    step: Callable[[Tensor], Callable[[Tensor], Tensor]]


def ours(size: Size, options: dict[str, Any]) -> System:
    """Our mixer."""
    from trilemma.mixers.build import build_mixer

    mixer = build_mixer(d_model=size.width, num_heads=size.heads, **options)

    def step(prompt: Tensor) -> Callable[[Tensor], Tensor]:
        _, state = mixer(prompt, mixer.init_state(size.batch))

        def token(x: Tensor) -> Tensor:
            nonlocal state
            y, state = mixer(x, state)
            return y

        return token

    return System(mixer, lambda x: mixer(x)[0], step)


def cached(layer: nn.Module, config: Any, cache_name: str) -> System:
    """A layer of Hugging Face's with its own cache, which it takes under `cache_name`."""
    from transformers import DynamicCache

    def step(prompt: Tensor) -> Callable[[Tensor], Tensor]:
        given = {cache_name: DynamicCache(config=config)}
        layer(prompt, **given)
        return lambda x: layer(x, **given)

    return System(layer, layer, step)


def transformers_mamba2(size: Size) -> System:
    """Hugging Face's Mamba2Mixer on its torch path, with its own cache."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    head_dim = 64 if size.width >= 64 else size.width
    config = Mamba2Config(
        hidden_size=size.width, expand=2, head_dim=head_dim, num_heads=2 * size.width // head_dim, state_size=128,
        n_groups=1, num_hidden_layers=1,
    )  # fmt: skip
    mixer = Mamba2Mixer(config, layer_idx=0)
    return cached(mixer, config, "cache_params")


def torchscale_retention(size: Size) -> System:
    """torchscale's retention: its chunkwise form (chunks of 512, its default) and its recurrent form."""
    without_timm()
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetRelPos
    from torchscale.component.multiscale_retention import MultiScaleRetention

    config = RetNetConfig(
        decoder_embed_dim=size.width, decoder_retention_heads=size.heads,
        recurrent_chunk_size=min(512, size.length), vocab_size=8,
    )  # fmt: skip
    positions, layer = (
        RetNetRelPos(config),
        MultiScaleRetention(config, size.width, 2 * size.width, size.heads),
    )

    def whole(x: Tensor) -> Tensor:
        y: Tensor = layer(x, positions(x.shape[1], chunkwise_recurrent=True), chunkwise_recurrent=True)
        return y

    def step(prompt: Tensor) -> Callable[[Tensor], Tensor]:
        state: dict[str, Tensor] = {}
        read = 0

        def token(x: Tensor) -> Tensor:
            nonlocal read
            read += 1
            y: Tensor = layer(x, positions(read, activate_recurrent=True), incremental_state=state)
            return y

        for x in prompt.split(1, dim=1):
            token(x)
        return token

    return System(layer, whole, step)


def transformers_gated_deltanet(size: Size) -> System:
    """Hugging Face's Qwen3NextGatedDeltaNet on its torch path, with its own cache, in the paper's widths."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    head_dim = 3 * size.width // (4 * size.heads)
    config = Qwen3NextConfig(
        hidden_size=size.width, linear_num_key_heads=size.heads, linear_num_value_heads=size.heads,
        linear_key_head_dim=head_dim, linear_value_head_dim=2 * head_dim, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    layer = Qwen3NextGatedDeltaNet(config, 0)
    return cached(layer, config, "cache_params")


def transformers_mamba(size: Size) -> System:
    """Hugging Face's MambaMixer on its torch path, with its own cache."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=size.width, num_hidden_layers=1, use_mambapy=False)
    layer = MambaMixer(config, layer_idx=0)
    return cached(layer, config, "cache_params")


def transformers_kda(size: Size) -> System:
    """Hugging Face's KimiLinearDeltaAttention on its torch path, with its own cache."""
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=size.width, num_hidden_layers=1, linear_num_heads=size.heads,
        linear_head_dim=size.width // size.heads, layer_types=["linear_attention"],
    )  # fmt: skip
    layer = KimiLinearDeltaAttention(config, 0)
    for parameter in (layer.forget_gate.A_log, layer.forget_gate.dt_bias):  # left empty without its whole model
        nn.init.normal_(parameter, std=0.02)
    return cached(layer, config, "past_key_values")


def transformers_rglru(size: Size) -> System:
    """Hugging Face's RecurrentGemmaRecurrentBlock, which keeps its own State."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    config = RecurrentGemmaConfig(hidden_size=size.width, lru_width=size.width, num_attention_heads=size.heads)
    layer = RecurrentGemmaRecurrentBlock(config, layer_idx=0)
    for parameter in layer.rg_lru.parameters():  # left empty without its whole model
        nn.init.normal_(parameter, std=0.02)

    def run(x: Tensor, first: int, use_cache: bool) -> Tensor:
        positions = torch.arange(first, first + x.shape[1]).expand(len(x), -1)
        y: Tensor = layer(x, positions, None, use_cache=use_cache)[0]
        return y

    def step(prompt: Tensor) -> Callable[[Tensor], Tensor]:
        run(prompt, 0, True)
        return lambda x: run(x, prompt.shape[1], True)

    return System(layer, lambda x: run(x, 0, False), step)


# name -> options of ours, and the peer (None: only the growth is measured)
CASES: dict[str, tuple[dict[str, Any], Callable[[Size], System] | None]] = {
    "retention": ({"name": "retention"}, torchscale_retention),
    "gated_retention": ({"name": "gated_retention"}, None),
    "mamba2": ({"name": "mamba2"}, transformers_mamba2),
    "gated_deltanet": ({"name": "gated_deltanet"}, transformers_gated_deltanet),
    "deltanet": ({"name": "deltanet"}, None),
    "mamba": ({"name": "mamba"}, transformers_mamba),
    "gla": ({"name": "gla"}, None),
    "kda": ({"name": "kda"}, transformers_kda),
    "gdn2": ({"name": "gdn2"}, None),
    "rwkv7": ({"name": "rwkv7"}, None),
    "mlstm": ({"name": "mlstm"}, None),
    "rglru": ({"name": "rglru"}, transformers_rglru),
    "mamba3": ({"name": "mamba3"}, None),
    "mamba3_mimo": ({"name": "mamba3", "mimo_rank": 4}, None),
}


def build(worker: str, case: str, size: Size) -> System:
    """One of the two systems of a case."""
    options, peer = CASES[case]
    if worker == "ours":
        return ours(size, options)
    assert peer is not None
    return peer(size)


def work(worker: str, case: str, task: str, size: Size, repeats: int) -> dict[str, Any]:
    """One process: builds a system and times it."""
    machine.keep_freed_memory()
    torch.manual_seed(0)
    system = build(worker, case, size)
    times = step_times(system, size, repeats) if task == "step" else train_times(system, size, repeats)
    seconds = statistics.median(times)
    tokens = size.batch * (1 if task == "step" else size.length)
    return {
        "system": worker,
        "case": case,
        "task": task,
        "length": size.length,
        "ms": seconds * 1e3,
        "us_per_token": seconds * 1e6 / tokens,
        "parameters": sum(parameter.numel() for parameter in system.module.parameters()),
        "threads": torch.get_num_threads(),
    }


def train_times(system: System, size: Size, repeats: int) -> list[float]:
    """Seconds of forward and backward; the optimizer, which is not timed, shows that the layer learns."""
    optimizer = torch.optim.AdamW(system.module.parameters(), lr=1e-3)
    x, target = torch.randn(2, size.batch, size.length, size.width)
    times, losses = [], []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (system.whole(x).float() - target).square().mean()
        loss.backward()
        times.append(time.perf_counter() - start)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}"
    return times[2:]


@torch.no_grad()
def step_times(system: System, size: Size, repeats: int) -> list[float]:
    """Seconds of one token, each the mean of 20, after a prompt of 64 tokens."""
    token = system.step(torch.randn(size.batch, 64, size.width))
    xs = torch.randn(20, size.batch, 1, size.width)
    times = []
    for _ in range(10 * repeats + 5):
        start = time.perf_counter()
        for x in xs:
            token(x)
        times.append((time.perf_counter() - start) / len(xs))
    return times[5:]


def study(arguments: argparse.Namespace, size: Size) -> dict[str, Any]:
    """All cases and tasks, in turns."""
    base = [sys.executable, __file__, "--repeats", str(arguments.repeats)] + ["--tiny"] * arguments.tiny
    rows = []
    for case in arguments.cases:
        for task in arguments.tasks:
            own = [*base, "--case", case, "--task", task, "--worker", "ours"]
            if task == "growth":
                short, long = (size.length, 2 * size.length) if arguments.tiny else (SHORT, LONG)
                commands = [*own, "--length", str(short)], [*own, "--length", str(long)]
            elif CASES[case][1] is None:
                continue
            else:
                commands = own, [*base, "--case", case, "--task", task, "--worker", "peer"]
            say(f"{case}, {task}")
            try:
                if task != "growth":
                    same_size(*(run_worker(command) for command in commands))
                field = "us_per_token" if task == "growth" else "ms"
                result = duel(*commands, field, arguments.rounds)
                rows.append({"case": case, "task": task, **result})
            except WorkerError as error:
                say(f"  not measured: {error}")
                rows.append({"case": case, "task": task, "speedup": None, "reason": str(error)})
    return {"benchmark": "mixers_speed", "size": asdict(size), "rows": rows, **provenance(PACKAGES)}


def table(result: dict[str, Any]) -> str:
    """The medians as a Markdown table; of the growth, time per token at the longer length over the shorter."""
    lines = ["| case | task | ours | peer | ratio |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        numbers = "- | - | not measured"
        if row["speedup"] is not None:
            unit = "us/token" if row["task"] == "growth" else "ms"
            numbers = f"{row['ours_median']:.3g} {unit} | {row['peer_median']:.3g} {unit} | {row['speedup']:.2f}x"
        lines.append(f"| {row['case']} | {row['task']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Worker or study."""
    parser = options(__doc__, ("ours", "peer"), "mixers_speed")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--cases", type=among(CASES), default=",".join(CASES), help="only these, separated by commas")
    parser.add_argument("--tasks", type=among(TASKS), default=",".join(TASKS))
    parser.add_argument("--length", type=int, help="of the sequences")
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    values = TINY if arguments.tiny else GATE
    size = Size(**{**values, "length": arguments.length or values["length"]})
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments.case, arguments.task, size, arguments.repeats)))
        return
    result = study(arguments, size)
    print(table(result))
    if not arguments.tiny:
        store(arguments.name, result)


if __name__ == "__main__":
    main()
