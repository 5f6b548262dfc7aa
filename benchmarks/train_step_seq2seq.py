"""The training step of an encoder-decoder Transformer: ours against OpenNMT-py, JoeyNMT, Marian and torch's own.

    python benchmarks/train_step_seq2seq.py                 # the whole study, in the size of the gate
    python benchmarks/train_step_seq2seq.py --tiny          # does everything run?
    python benchmarks/train_step_seq2seq.py --worker ours --mode eager     # one process

Every system trains the same shape on the same random tokens: 6+6 layers, 512 wide, d_ff 2,048, 8 heads, a joint
vocabulary of 16,000 with one table for source, target and output, 64 rows of 32+32 tokens; how a step is timed:
train_step.py. Norms come first where a system offers it, dropout and label smoothing are off, rows are full, and every
system is called with what its users' batches give it: lengths or masks. Tokens of both sides count.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from train_step import Benchmark, System, autocast, main

from common import stand_in

PACKAGES = ("torch", "OpenNMT-py", "joeynmt", "transformers", "trilemma")
UNKNOWN, PAD, BOS, EOS = range(4)
SPECIALS = ("<unk>", "<pad>", "<s>", "</s>")


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


GATE = Size(vocab_size=16_000, d_model=512, d_ff=2048, num_layers=6, num_heads=8, length=32, batch=64)
TINY = Size(vocab_size=256, d_model=128, d_ff=512, num_layers=1, num_heads=4, length=8, batch=4)


def ours(size: Size, compiled: bool, device: str) -> System:
    """Our model, run and compiled as the trainer does it."""
    from trilemma.data import Batch
    from trilemma.machine import keep_freed_memory
    from trilemma.models import build_model
    from trilemma.train import objective
    from trilemma.train.loop import run_model

    keep_freed_memory()
    model = build_model(
        {
            "vocab_size": size.vocab_size, "d_model": size.d_model, "d_ff": size.d_ff, "num_layers": size.num_layers,
            "num_heads": size.num_heads, "dropout": 0.0,
        }
    ).to(device)  # fmt: skip
    if compiled:
        for block in (block for stack in model.stacks() for block in stack.blocks):
            block.compile(dynamic=True)

    def step(source: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        lengths = torch.full((len(source),), size.length, device=device)
        count = labels.numel()
        batch = Batch(inputs, labels, lengths, source, lengths, None, None, 0, count, 2 * count)
        with autocast(device):
            hidden = run_model(model, batch)
            total = objective.backward(model.head, hidden, labels, 0.0, 1 / count, size.vocab_size)
        return total / count

    return model, step


def opennmt(size: Size, compiled: bool, device: str) -> System:
    """OpenNMT-py's NMTModel with its LossCompute, which counts the right tokens too."""
    # what its transforms of text import
    stand_in("spacy", "ahocorasick", "rapidfuzz", "fasttext", "pyonmttok")
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.cuda.amp
    from onmt.decoders import TransformerDecoder
    from onmt.encoders import TransformerEncoder
    from onmt.models import NMTModel
    from onmt.modules import Embeddings
    from onmt.utils.loss import LossCompute

    def embeddings() -> Any:
        return Embeddings(size.d_model, size.vocab_size, PAD, position_encoding=True)

    shape = {
        "num_layers": size.num_layers, "d_model": size.d_model, "heads": size.num_heads, "d_ff": size.d_ff,
        "dropout": 0.0, "attention_dropout": 0.0, "max_relative_positions": 0, "relative_positions_buckets": 0,
    }  # fmt: skip
    encoder = TransformerEncoder(**shape, embeddings=embeddings())
    decoder = TransformerDecoder(
        **shape, embeddings=embeddings(), copy_attn=False, self_attn_type="scaled-dot-flash", aan_useffn=False,
        full_context_alignment=False, alignment_layer=0, alignment_heads=0,
    )  # fmt: skip
    model = NMTModel(encoder, decoder)
    model.generator = nn.Linear(size.d_model, size.vocab_size)
    for name, parameter in model.named_parameters():  # as its build_model; they are left empty
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    table = encoder.embeddings.word_lut.weight
    decoder.embeddings.word_lut.weight = model.generator.weight = table
    model = model.to(device)
    run = torch.compile(model) if compiled else model
    loss_of = LossCompute(nn.CrossEntropyLoss(ignore_index=PAD, reduction="sum"), model.generator)

    def step(source: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        lengths = torch.full((len(source),), size.length, device=device)
        target = torch.cat([inputs, labels[:, -1:]], dim=1)[..., None]
        with autocast(device):
            hidden, attentions = run(source[..., None], target, lengths)
            loss: Tensor = loss_of({"tgt": target, "srclen": lengths}, hidden, attentions)[0] / labels.numel()
        loss.backward()
        return loss.detach()

    return model, step


def joeynmt(size: Size, compiled: bool, device: str) -> System:
    """JoeyNMT's Model with its own loss, which counts the right tokens too."""
    from joeynmt.model import build_model
    from joeynmt.vocabulary import Vocabulary

    names = ("unk", "pad", "bos", "eos")
    special: dict[str, Any] = {f"{name}_token": SPECIALS[index] for index, name in enumerate(names)}
    special |= {f"{name}_id": index for index, name in enumerate(names)}
    words = [str(index) for index in range(len(SPECIALS), size.vocab_size)]
    vocabulary = Vocabulary(words, SimpleNamespace(**special, sep_token=None, lang_tags=[]))
    stack = {
        "type": "transformer", "num_layers": size.num_layers, "num_heads": size.num_heads, "hidden_size": size.d_model,
        "ff_size": size.d_ff, "dropout": 0.0, "layer_norm": "pre",
        "embeddings": {"embedding_dim": size.d_model, "scale": True, "dropout": 0.0},
    }  # fmt: skip
    config = {"encoder": stack, "decoder": stack, "tied_embeddings": True, "tied_softmax": True}
    model = build_model({**config, "initializer": "xavier_uniform"}, vocabulary, vocabulary).to(device)
    model.loss_function = ("crossentropy", 0.0)
    run = torch.compile(model) if compiled else model

    def step(source: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        with autocast(device):
            total = run(
                return_type="loss", src=source, src_mask=(source != PAD)[:, None], trg_input=inputs, trg=labels,
                src_length=torch.full((len(source),), size.length, device=device), trg_mask=(labels != PAD)[:, None],
            )[0]  # fmt: skip
        loss: Tensor = total / labels.numel()
        loss.backward()
        return loss.detach()

    return model, step


def marian(size: Size, compiled: bool, device: str) -> System:
    """Hugging Face's MarianMTModel with its own loss; its norms come last."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=size.vocab_size, d_model=size.d_model, encoder_layers=size.num_layers,
        decoder_layers=size.num_layers, encoder_attention_heads=size.num_heads, decoder_attention_heads=size.num_heads,
        encoder_ffn_dim=size.d_ff, decoder_ffn_dim=size.d_ff, max_position_embeddings=512, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, activation_function="relu", scale_embedding=True,
        pad_token_id=PAD, eos_token_id=EOS, forced_eos_token_id=EOS, decoder_start_token_id=BOS,
        share_encoder_decoder_embeddings=True, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = MarianMTModel(config).to(device)
    run = torch.compile(model) if compiled else model

    def step(source: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        with autocast(device):
            loss: Tensor = run(
                input_ids=source, attention_mask=(source != PAD).long(), decoder_input_ids=inputs, labels=labels
            ).loss
        loss.backward()
        return loss.detach()

    return model, step


class TorchTransformer(nn.Module):
    """torch.nn.Transformer with what its tutorial puts around it: embeddings, sinusoids, an output layer, masks."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.table = nn.Embedding(size.vocab_size, size.d_model, padding_idx=PAD)
        nn.init.normal_(self.table.weight, std=size.d_model**-0.5)
        self.transformer = nn.Transformer(
            size.d_model, size.num_heads, size.num_layers, size.num_layers, size.d_ff, dropout=0.0, batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.positions: Tensor
        angles = torch.arange(512)[:, None] * torch.exp(
            torch.arange(0, size.d_model, 2) * (-math.log(10000.0) / size.d_model)
        )
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, d_model]."""
        scaled: Tensor = self.table(tokens) * math.sqrt(self.table.embedding_dim)
        return scaled + self.positions[: tokens.shape[1]]

    def forward(self, source: Tensor, inputs: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        length = inputs.shape[1]
        padding = source == PAD
        future = torch.ones(length, length, dtype=torch.bool, device=inputs.device).triu(1)
        hidden = self.transformer(
            self.embed(source), self.embed(inputs), tgt_mask=future, src_key_padding_mask=padding,
            tgt_key_padding_mask=inputs == PAD, memory_key_padding_mask=padding, tgt_is_causal=True,
        )  # fmt: skip
        return nn.functional.linear(hidden, self.table.weight)


def torch_transformer(size: Size, compiled: bool, device: str) -> System:
    """torch.nn.Transformer."""
    model = TorchTransformer(size).to(device)
    run = torch.compile(model) if compiled else model

    def step(source: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        with autocast(device):
            logits = run(source, inputs)
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=PAD)
        loss.backward()
        return loss.detach()

    return model, step


SYSTEMS: dict[str, Callable[[Size, bool, str], System]] = {
    "ours": ours,
    "opennmt": opennmt,
    "joeynmt": joeynmt,
    "marian": marian,
    "torch": torch_transformer,
}


def batch(size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random source, the decoder's inputs after a first token, and their labels; none is padding."""
    shape = (2, size.batch, size.length)
    source, labels = torch.randint(len(SPECIALS), size.vocab_size, shape, generator=generator)
    inputs = torch.cat([labels.new_full((size.batch, 1), BOS), labels[:, :-1]], dim=1)
    return source, inputs, labels


BENCHMARK = Benchmark(
    name="train_step_seq2seq",
    script=__file__,
    description=__doc__,
    gate=GATE,
    tiny=TINY,
    systems=SYSTEMS,
    pairs=[("ours", peer) for peer in SYSTEMS if peer != "ours"],
    batch=batch,
    tokens=lambda size: 2 * size.batch * size.length,
    flops=lambda model, size: size.batch * model.flops(size.length, size.length),
    packages=PACKAGES,
)

if __name__ == "__main__":
    main(BENCHMARK)
