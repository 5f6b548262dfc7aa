"""The training step of a decoder-only language model: ours against Hugging Face's, litgpt and torchscale.

    python benchmarks/train_step_lm.py                 # the whole study, in the size of the gate
    python benchmarks/train_step_lm.py --tiny          # does everything run?
    python benchmarks/train_step_lm.py --worker ours-attention --mode eager     # one process

Every system trains the same shape on the same random tokens: vocabulary 8,192, d_model 384, 6 layers, 6 heads, length
512, batch 8, bf16 autocast over float32 weights, gradient clipping, fused AdamW. A step is: forward, loss, backward,
clip, optimizer, gradients dropped. Attention is compared with attention, retention with retention, Mamba-2 with
Mamba-2; the numbers of weights must agree within 1 %. Each system is called as its users call it; ours as `trilemma
train` does.
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

from common import WorkerError, duel, options, provenance, run_worker, same_size, say, store, without_timm

# d_ff of the gated feed-forward layer, 8/3 d_model
GATE = {"vocab_size": 8192, "d_model": 384, "d_ff": 1024, "num_layers": 6, "num_heads": 6, "length": 512, "batch": 8}
TINY = {"vocab_size": 128, "d_model": 48, "d_ff": 128, "num_layers": 2, "num_heads": 2, "length": 64, "batch": 2}

# pairs that are compared: ours, peer
PAIRS = [
    ("ours-attention", "llama"),
    ("ours-attention", "litgpt"),
    ("ours-retention", "torchscale"),
    ("ours-mamba2", "mamba2"),
]
PACKAGES = ("torch", "transformers", "litgpt", "torchscale", "trilemma")


@dataclass(frozen=True)
class Size:
    """The shape that every system trains."""

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    length: int
    batch: int


# A system: its module, and a function that runs forward, loss and backward and returns the loss.
Step = Callable[[Tensor, Tensor], Tensor]
System = tuple[nn.Module, Step]


def ours(size: Size, mixer: dict[str, Any], compiled: bool, device: str, **options: Any) -> System:
    """Our model with the trainer's own loss; blocks are compiled as the trainer compiles them."""
    from trilemma.machine import keep_freed_memory
    from trilemma.models import build_model
    from trilemma.train import objective

    keep_freed_memory()
    model = build_model(
        {
            "layout": "decoder-only", "mixer": mixer, "vocab_size": size.vocab_size, "d_model": size.d_model,
            "d_ff": size.d_ff, "num_layers": size.num_layers, "num_heads": size.num_heads, "norm": "rmsnorm",
            "norm_position": "pre", "activation": "swiglu", "bias": False, "positions": "none", "tie_embeddings": False,
            "embedding_scale": False, "dropout": 0.0, **options,
        }
    ).to(device)  # fmt: skip
    if compiled:
        for block in model.stack.blocks:
            block.compile(dynamic=None)

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        with autocast(device):
            hidden = model(tokens)
            total = objective.backward(model.head, hidden, labels, 0.0, 1 / labels.numel(), size.vocab_size)
        return total / labels.numel()

    return model, step


def llama(size: Size, compiled: bool, device: str) -> System:
    """Hugging Face's Llama with its own loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocab_size, hidden_size=size.d_model, intermediate_size=size.d_ff,
        num_hidden_layers=size.num_layers, num_attention_heads=size.num_heads, num_key_value_heads=size.num_heads,
        max_position_embeddings=size.length, tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    run = torch.compile(model) if compiled else model

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        with autocast(device):
            # labels stand at their own positions: Hugging Face shifts them unless it is given them shifted
            loss: Tensor = run(input_ids=tokens, shift_labels=labels, labels=labels).loss
        loss.backward()
        return loss.detach()

    return model, step


def litgpt(size: Size, compiled: bool, device: str) -> System:
    """litgpt's GPT with the loss of its pre-training script."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=size.length, vocab_size=size.vocab_size, padded_vocab_size=size.vocab_size, n_layer=size.num_layers,
        n_head=size.num_heads, n_embd=size.d_model, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", norm_eps=1e-5, mlp_class_name="LLaMAMLP", intermediate_size=size.d_ff,
    )  # fmt: skip
    model = GPT(config)
    model.apply(model._init_weights)
    model = model.to(device)
    run = torch.compile(model) if compiled else model

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        with autocast(device):
            loss: Tensor = chunked_cross_entropy(run(tokens), labels, chunk_size=0)
        loss.backward()
        return loss.detach()

    return model, step


def torchscale(size: Size, compiled: bool, device: str) -> System:
    """torchscale's RetNet, in its parallel form (what it trains with by default)."""
    without_timm()
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    config = RetNetConfig(
        vocab_size=size.vocab_size, decoder_embed_dim=size.d_model, decoder_value_embed_dim=2 * size.d_model,
        decoder_retention_heads=size.num_heads, decoder_ffn_embed_dim=size.d_ff, decoder_layers=size.num_layers,
        activation_fn="swish",
    )  # fmt: skip
    model = RetNetDecoder(config, embed_tokens=nn.Embedding(size.vocab_size, size.d_model)).to(device)
    run = torch.compile(model) if compiled else model

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        with autocast(device):
            logits = run(tokens)[0]
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        return loss.detach()

    return model, step


def mamba2(size: Size, compiled: bool, device: str) -> System:
    """Hugging Face's Mamba-2 on its torch path, with its own loss; blocks without feed-forward layers."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    head_dim = min(64, size.d_model)
    config = Mamba2Config(
        vocab_size=size.vocab_size, hidden_size=size.d_model, num_hidden_layers=size.num_layers, state_size=128,
        expand=2, head_dim=head_dim, num_heads=2 * size.d_model // head_dim, n_groups=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = Mamba2ForCausalLM(config).to(device)
    run = torch.compile(model) if compiled else model

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        with autocast(device):
            logits = run(input_ids=tokens, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        return loss.detach()

    return model, step


SYSTEMS: dict[str, Callable[[Size, bool, str], System]] = {
    "ours-attention": lambda size, compiled, device: ours(
        size, {"name": "attention", "position": "rotary", "bias": False}, compiled, device
    ),
    "ours-retention": lambda size, compiled, device: ours(size, {"name": "retention"}, compiled, device),
    "ours-mamba2": lambda size, compiled, device: ours(
        size, {"name": "mamba2", "head_dim": min(64, size.d_model)}, compiled, device, feed_forward=False
    ),
    "mamba2": mamba2,
    "llama": llama,
    "litgpt": litgpt,
    "torchscale": torchscale,
}


def autocast(device: str) -> torch.autocast:
    """bf16 over float32 weights."""
    return torch.autocast(device, dtype=torch.bfloat16)


def work(name: str, mode: str, size: Size, steps: int, warm_up: int) -> dict[str, Any]:
    """One process: builds the system, trains it, and times whole steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model, step = SYSTEMS[name](size, mode == "compiled", device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(0, size.vocab_size, (size.batch, size.length + 1), generator=generator).to(device)
    tokens, labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
    times, losses = [], []
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        losses.append(step(tokens, labels))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    first, last = float(losses[0]), float(losses[-1])
    # it really trains: random weights start near ln(vocabulary), and the same batch again is learned
    assert last < first, f"{name}: the loss went from {first:.3f} to {last:.3f}"
    seconds = statistics.median(times[warm_up:])
    return {
        "system": name,
        "mode": mode,
        "step_ms": seconds * 1e3,
        "tokens_per_second": size.batch * size.length / seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "first_loss": first,
        "last_loss": last,
        "first_step_s": times[0],
        "threads": torch.get_num_threads(),
    }


def study(arguments: argparse.Namespace, size: Size) -> dict[str, Any]:
    """All pairs, eager against eager and compiled against compiled."""
    base = [sys.executable, __file__, "--steps", str(arguments.steps), "--warm-up", str(arguments.warm_up)]
    base += ["--tiny"] if arguments.tiny else []
    duels = []
    for mode in arguments.modes.split(","):
        for own, peer in PAIRS:
            if arguments.peers and peer not in arguments.peers.split(","):
                continue
            say(f"{own} against {peer}, {mode}")
            commands = [[*base, "--worker", name, "--mode", mode] for name in (own, peer)]
            try:
                same_size(*(run_worker([*command, "--steps", "1", "--warm-up", "1"]) for command in commands))
                result = duel(commands[0], commands[1], "step_ms", arguments.rounds)
            except WorkerError as error:
                say(f"  not measured: {error}")
                result = {"speedup": None, "reason": str(error)}
            duels.append(
                {
                    "ours": own,
                    "peer": peer,
                    "mode": mode,
                    **{f"{k}_runs" if k in ("ours", "peer") else k: v for k, v in result.items()},
                }
            )
    return {"benchmark": "train_step_lm", "size": asdict(size), "duels": duels, **provenance(PACKAGES)}


def table(result: dict[str, Any]) -> str:
    """The medians as a Markdown table."""
    lines = ["| ours | peer | mode | ours ms | peer ms | speed-up |", "|---|---|---|---|---|---|"]
    for item in result["duels"]:
        if item["speedup"] is None:
            numbers = f"- | - | not measured: {item['reason'].splitlines()[0]}"
        else:
            numbers = f"{item['ours_median']:.1f} | {item['peer_median']:.1f} | {item['speedup']:.2f}x"
        lines.append(f"| {item['ours']} | {item['peer']} | {item['mode']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Worker or study."""
    parser = options(__doc__, SYSTEMS, "train_step_lm")
    parser.add_argument("--mode", choices=["eager", "compiled"], default="eager")
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--peers", default="", help="only these peers, separated by commas")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2)
    arguments = parser.parse_args()
    size = Size(**(TINY if arguments.tiny else GATE))
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments.mode, size, arguments.steps, arguments.warm_up)))
        return
    result = study(arguments, size)
    print(table(result))
    if not arguments.tiny:
        store(arguments.name, result)


if __name__ == "__main__":
    main()
