"""The training step of a decoder-only language model: ours against Hugging Face's, litgpt and torchscale.

    python benchmarks/train_step_lm.py                 # the whole study, in the size of the gate
    python benchmarks/train_step_lm.py --tiny          # does everything run?
    python benchmarks/train_step_lm.py --worker ours-attention --mode eager     # one process

Every system trains the same shape on the same random tokens: vocabulary 8,192, d_model 384, 6 layers, 6 heads, length
512, batch 8; how a step is timed: train_step.py. Attention is compared with attention, retention with retention,
Mamba-2 with Mamba-2; the numbers of weights must agree within 1 %. Each system is called as its users call it; ours as
`trilemma train` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from train_step import Benchmark, System, autocast, main

from common import without_timm

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


def ours(size: Size, mixer: dict[str, Any], compiled: bool, device: str, **options: Any) -> System:
    """Our model with the trainer's own loss; blocks are compiled as the trainer compiles them."""
    from trilemma.machine import keep_freed_memory
    from trilemma.models import build_model
    from trilemma.train import objective

    keep_freed_memory()
    config = {
        "layout": "decoder-only", "mixer": mixer, "vocab_size": size.vocab_size, "d_model": size.d_model,
        "d_ff": size.d_ff, "num_layers": size.num_layers, "num_heads": size.num_heads, "norm": "rmsnorm",
        "norm_position": "pre", "activation": "swiglu", "bias": False, "positions": "none", "tie_embeddings": False,
        "embedding_scale": False, "dropout": 0.0, **options,
    }  # fmt: skip
    with torch.device(device):  # large models are drawn where they run
        model = build_model(config)
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


def batch(size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random tokens and, shifted by one, their labels."""
    stream = torch.randint(0, size.vocab_size, (size.batch, size.length + 1), generator=generator)
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


BENCHMARK = Benchmark(
    name="train_step_lm",
    script=__file__,
    description=__doc__,
    gate=Size(**GATE),
    tiny=Size(**TINY),
    systems=SYSTEMS,
    pairs=PAIRS,
    batch=batch,
    tokens=lambda size: size.batch * size.length,
    flops=lambda model, size: size.batch * model.flops(size.length),
    packages=PACKAGES,
)

if __name__ == "__main__":
    main(BENCHMARK)
