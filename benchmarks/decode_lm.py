"""One token of a decoder-only language model: ours against the neighbours' cached steps and a plain loop.

    python benchmarks/decode_lm.py                                    # all pairs, contexts and batches
    python benchmarks/decode_lm.py --tiny                             # does everything run?
    python benchmarks/decode_lm.py --worker ours-attention            # one process

The models are those of train_step_lm.py. A State of `context` tokens is filled, then single tokens are read, each the
most likely after the last; the time is the median of the steps. Attention is compared with Hugging Face's Llama and
with a loop written by hand over a preallocated cache, retention with torchscale, Mamba-2 with transformers. Beside ours
stands its floor: bytes of weights and State that a step reads, over this machine's measured bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from train_step_lm import GATE, PACKAGES, SYSTEMS, TINY, Size

from common import WorkerError, among, duel, options, provenance, run_worker, same_size, say, store
from trilemma import machine
from trilemma.models import pack

PAIRS = [
    ("ours-attention", "loop"), ("ours-attention", "llama"), ("ours-retention", "torchscale"),
    ("ours-mamba2", "mamba2"),
]  # fmt: skip

# reads tokens [B, 1], returns logits [B, 1, V]; it keeps its own State
Reader = Callable[[Tensor], Tensor]


def ours(model: Any, prompt: Tensor, batch: int, room: int) -> Reader:
    """As `trilemma generate` decodes, with packed weights; one row is read, and selected `batch` times."""
    pack(model)
    _, state = model.prefill(prompt, capacity=prompt.shape[1] + room)
    state = state.select(torch.zeros(batch, dtype=torch.long))

    def read(tokens: Tensor) -> Tensor:
        nonlocal state
        logits, state = model.step(tokens, state)
        return logits

    return read


def transformers_model(model: Any, prompt: Tensor, batch: int, room: int) -> Reader:
    """With the cache of Hugging Face's own choice; at each step the logits of the new token alone."""
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(batch)
    return lambda tokens: model(tokens, past_key_values=cache, use_cache=True).logits


def transformers_mamba2(model: Any, prompt: Tensor, batch: int, room: int) -> Reader:
    """Its State does not grow, so it is made at the size of the batch from short prompts."""
    cache = model(prompt[:, :64].expand(batch, -1), use_cache=True).cache_params
    return lambda tokens: model(tokens, cache_params=cache, use_cache=True).logits


def torchscale(model: Any, prompt: Tensor, batch: int, room: int) -> Reader:
    """Its recurrent form; it takes all tokens so far, to know the position, and reads the last."""
    state: dict[Any, Any] = {}
    read_tokens = prompt.expand(batch, -1)
    for at in range(1, 65):  # State is constant: a short prompt fills it
        model(read_tokens[:, :at], incremental_state=state)

    def read(tokens: Tensor) -> Tensor:
        logits: Tensor = model(torch.cat([read_tokens[:, :-1], tokens], dim=1), incremental_state=state)[0]
        return logits

    return read


def loop(model: Any, prompt: Tensor, batch: int, room: int) -> Reader:
    """What a careful user writes: Llama's own weights, keys and values in one preallocated tensor a layer."""
    config, inner = model.config, model.model
    heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    length = prompt.shape[1]
    shape = (config.num_hidden_layers, 2, batch, heads, length + room, dim)
    caches = torch.zeros(shape, dtype=inner.embed_tokens.weight.dtype)
    caches[..., :length, :].normal_()
    steps = torch.arange(length + room).float()
    angles = steps[:, None] / 10000.0 ** (torch.arange(0, dim, 2).float() / dim)
    cosine, sine = (table.repeat(1, 2).to(caches.dtype) for table in (angles.cos(), angles.sin()))
    position = length

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine[position] + torch.cat([-second, first], dim=-1) * sine[position]

    def read(tokens: Tensor) -> Tensor:
        nonlocal position
        x = inner.embed_tokens(tokens)
        for block, (keys, values) in zip(inner.layers, caches, strict=True):
            h = block.input_layernorm(x)
            attention = block.self_attn
            q, k, v = (
                layer(h).view(batch, 1, heads, dim).transpose(1, 2)
                for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys[:, :, position : position + 1], values[:, :, position : position + 1] = turn(k), v
            mixed = nn.functional.scaled_dot_product_attention(
                turn(q), keys[:, :, : position + 1], values[:, :, : position + 1]
            )
            x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.post_attention_layernorm(x))
        position += 1
        logits: Tensor = model.lm_head(inner.norm(x))
        return logits

    return read


# worker -> the system of train_step_lm.py whose model it takes, and how it reads
WORKERS: dict[str, tuple[str, Callable[[Any, Tensor, int, int], Reader]]] = {
    "ours-attention": ("ours-attention", ours),
    "ours-retention": ("ours-retention", ours),
    "ours-mamba2": ("ours-mamba2", ours),
    "loop": ("llama", loop),
    "llama": ("llama", transformers_model),
    "torchscale": ("torchscale", torchscale),
    "mamba2": ("mamba2", transformers_mamba2),
}


@torch.no_grad()
def work(name: str, size: Size, context: int, batch: int, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """One process: fills a State and times steps."""
    torch.manual_seed(0)
    system, reader = WORKERS[name]
    model = SYSTEMS[system](size, False, "cpu")[0].eval().to(dtype)
    prompt = torch.randint(0, size.vocab_size, (1, context))
    read = reader(model, prompt, batch, steps + 1)
    tokens, times = prompt[:, -1:].expand(batch, -1), []
    for _ in range(steps):
        start = time.perf_counter()
        tokens = read(tokens)[:, -1:].argmax(dim=-1)
        times.append(time.perf_counter() - start)
    result = {
        "system": name, "context": context, "batch": batch, "dtype": str(dtype).removeprefix("torch."),
        "ms": statistics.median(times[steps // 4 :]) * 1e3,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    if name.startswith("ours"):
        embedded = model.embedding.tokens.weight.nbytes  # of which a step reads one row
        held = sum(parameter.nbytes for parameter in model.parameters()) - embedded
        held += batch * model.state_bytes(context, dtype=dtype)
        result["bytes_read"] = held
    return result


def study(arguments: argparse.Namespace, size: Size) -> dict[str, Any]:
    """All pairs, contexts and batches, in turns."""
    base = [sys.executable, __file__, "--dtype", arguments.dtype, "--steps", str(arguments.steps)]
    base += ["--tiny"] * arguments.tiny
    rows = []
    for own, peer in PAIRS:
        if peer not in arguments.peers:
            continue
        for batch in arguments.batches.split(","):
            for context in arguments.contexts.split(","):
                say(f"{own} against {peer}, batch {batch}, context {context}")
                commands = [
                    [*base, "--worker", name, "--batches", batch, "--contexts", context] for name in (own, peer)
                ]
                try:
                    same_size(*(run_worker([*command, "--steps", "8"]) for command in commands))
                    result = duel(*commands, "ms", arguments.rounds)
                except WorkerError as error:
                    say(f"  not measured: {error}")
                    result = {"speedup": None, "reason": str(error)}
                case = {"pair": [own, peer], "batch": int(batch), "context": int(context)}
                rows.append({**case, **result})
    origin = provenance(PACKAGES)
    ceilings = machine.Ceilings(**origin["ceilings"])
    for row in rows:
        if row["speedup"] is not None:
            held = row["ours"][0]["bytes_read"]
            row["floor_ms"] = held / ceilings.bandwidth_gbps(held) / 1e6
    return {"benchmark": "decode_lm", "size": asdict(size), "dtype": arguments.dtype, "rows": rows, **origin}


def table(result: dict[str, Any]) -> str:
    """The medians as a Markdown table."""
    lines = [
        "| ours | peer | batch | context | ours ms | floor ms | peer ms | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        numbers = "- | - | - | not measured"
        if row["speedup"] is not None:
            numbers = (
                f"{row['ours_median']:.2f} | {row['floor_ms']:.2f} | {row['peer_median']:.2f} | {row['speedup']:.2f}x"
            )
        lines.append(f"| {' | '.join(row['pair'])} | {row['batch']} | {row['context']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Worker or study."""
    parser = options(__doc__, WORKERS, "decode_lm")
    parser.add_argument("--contexts", default="", help="separated by commas; default: 128,512,2048,8192")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    peers = dict.fromkeys(peer for _, peer in PAIRS)
    parser.add_argument("--peers", type=among(peers), default=",".join(peers), help="only these, separated by commas")
    parser.add_argument("--steps", type=int, default=48)
    arguments = parser.parse_args()
    arguments.contexts = arguments.contexts or ("32,64" if arguments.tiny else "128,512,2048,8192")
    longest = max(int(context) for context in arguments.contexts.split(","))
    size = Size(**{**(TINY if arguments.tiny else GATE), "length": longest + arguments.steps + 1})
    if arguments.worker:
        context, batch, dtype = int(arguments.contexts), int(arguments.batches), getattr(torch, arguments.dtype)
        print(json.dumps(work(arguments.worker, size, context, batch, dtype, arguments.steps)))
        return
    result = study(arguments, size)
    print(table(result))
    if not arguments.tiny:
        store(arguments.name, result)


if __name__ == "__main__":
    main()
