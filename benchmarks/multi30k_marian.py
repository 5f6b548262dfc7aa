"""The peer of recipes/multi30k.yaml: Hugging Face's MarianMTModel, trained from scratch for a given wall-clock.

    python benchmarks/multi30k_marian.py --seconds 1800             # a measurement on two threads
    python benchmarks/multi30k_marian.py --tiny                     # does it run?

What a competent user writes in an afternoon: a joint BPE vocabulary, batches of like length by token budget padded
dynamically, bf16 autocast, AdamW, a linear warm-up and a linear decay that reaches zero when the time is over, label
smoothing, the weights of the best validation loss, and `generate` with five beams. The clock counts the training loop
with its validations; tokenizer, decoding and scoring are reported apart.
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sacrebleu.metrics import BLEU, CHRF
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import MarianConfig, MarianMTModel
from transformers.utils import logging as transformers_logging

from common import provenance, say, store

PAD, EOS, UNK = 0, 1, 2
SPECIALS = ["<pad>", "</s>", "<unk>"]
DEFAULT_DATA = Path(__file__).parents[2] / "shared" / "data"
SPLITS = ("train", "val", "test_2016_flickr")
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Preset:
    """Sizes and recipe; each field is an option of the command line too."""

    layers: int
    d_model: int
    d_ff: int
    heads: int
    vocabulary: int = 8000
    dropout: float = 0.1
    learning_rate: float = 1e-3
    warmup: int = 400
    batch_tokens: int = 4096


PRESETS = {
    "tiny": Preset(layers=2, d_model=64, d_ff=256, heads=2, vocabulary=2000, learning_rate=3e-3, warmup=50),
    "narrow": Preset(layers=3, d_model=128, d_ff=512, heads=4, vocabulary=4000, learning_rate=2e-3, warmup=200),
    "small": Preset(layers=3, d_model=256, d_ff=1024, heads=4),
    "deep": Preset(layers=4, d_model=256, d_ff=1024, heads=8, dropout=0.2),
}


def find_data(given: str | None) -> Path | None:
    """The folder of Multi30k: as given, else TRILEMMA_DATA (or its folder multi30k), else beside the checkout."""
    root = Path(given or os.environ.get("TRILEMMA_DATA") or DEFAULT_DATA)
    for folder in (root, root / "multi30k"):
        if (folder / "train.en.gz").is_file():
            return folder
    return None


def read_lines(folder: Path, split: str, language: str) -> list[str]:
    """Raw lines of one side."""
    with gzip.open(folder / f"{split}.{language}.gz", "rt", encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\n") for line in file]


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """A joint BPE vocabulary in SentencePiece's manner: spaces are part of the words, text comes back as it was."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIALS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids, each ended by </s> as Marian's tokenizers do."""
    return [[*encoding.ids, EOS] for encoding in tokenizer.encode_batch(texts)]


def batches(pairs: list[Pair], budget: int, shuffle: random.Random | None) -> list[list[Pair]]:
    """Neighbours in length under a budget of padded source and target tokens; shuffled, or in order of length."""
    order = list(pairs)
    if shuffle is not None:
        shuffle.shuffle(order)
    pool = 100 * max(budget // 32, 1)
    result: list[list[Pair]] = []
    for begin in range(0, len(order), pool):
        group: list[Pair] = []
        longest = (0, 0)
        for pair in sorted(order[begin : begin + pool], key=lambda pair: (len(pair[0]), len(pair[1]))):
            wider = max(longest[0], len(pair[0])), max(longest[1], len(pair[1]))
            if group and sum(wider) * (len(group) + 1) > budget:
                result.append(group)
                group, wider = [], (len(pair[0]), len(pair[1]))
            group.append(pair)
            longest = wider
        result.append(group)
    if shuffle is not None:
        shuffle.shuffle(result)
    return result


def padded(rows: list[list[int]], value: int) -> Tensor:
    """[batch, longest] int64."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def endless(pairs: list[Pair], budget: int, seed: int) -> Iterator[list[Pair]]:
    """Epoch after epoch, each in an order of its own."""
    shuffle = random.Random(seed)
    while True:
        yield from batches(pairs, budget, shuffle)


def build(preset: Preset, vocabulary: int) -> MarianMTModel:
    """Marian from scratch. Its traps: decoding starts with <pad>, every special id must be told, and the default of
    `forced_eos_token_id` (0) would force <pad> here."""
    config = MarianConfig(
        vocab_size=vocabulary,
        max_position_embeddings=512,
        encoder_layers=preset.layers,
        decoder_layers=preset.layers,
        encoder_attention_heads=preset.heads,
        decoder_attention_heads=preset.heads,
        encoder_ffn_dim=preset.d_ff,
        decoder_ffn_dim=preset.d_ff,
        d_model=preset.d_model,
        dropout=preset.dropout,
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        decoder_start_token_id=PAD,
        forced_eos_token_id=EOS,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
    )
    return MarianMTModel(config)


def loss_of(model: MarianMTModel, batch: list[Pair], smoothing: float, precision: torch.dtype) -> tuple[Tensor, int]:
    """Summed cross-entropy over the target tokens, and their number; the model shifts the labels itself."""
    source = padded([pair[0] for pair in batch], PAD)
    labels = padded([pair[1] for pair in batch], PAD)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        # Marian replaces -100 by <pad> when it shifts; it is given <pad> at once.
        shifted = model.prepare_decoder_input_ids_from_labels(labels)
        mask = torch.arange(source.shape[1]) < torch.tensor([len(pair[0]) for pair in batch])[:, None]
        logits = model(input_ids=source, attention_mask=mask.long(), decoder_input_ids=shifted).logits
    count = int((labels != PAD).sum())
    flat = logits.float().flatten(0, 1)
    loss = cross_entropy(flat, labels.flatten(), ignore_index=PAD, label_smoothing=smoothing, reduction="sum")
    return loss, count


@torch.no_grad()
def validate(model: MarianMTModel, pairs: list[Pair], precision: torch.dtype) -> float:
    """Mean negative log-likelihood of a target token, in nats, without smoothing."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches(pairs, 8192, None):
        loss, tokens = loss_of(model, batch, 0.0, precision)
        total, count = total + float(loss), count + tokens
    model.train()
    return total / count


def rate(step: int, used: float, preset: Preset) -> float:
    """Linear warm-up in steps, then a linear decay to zero over the time that is left."""
    return preset.learning_rate * min((step + 1) / preset.warmup, 1.0) * max(1.0 - used, 0.0)


def train(
    model: MarianMTModel, data: dict[str, list[Pair]], preset: Preset, args: argparse.Namespace
) -> dict[str, Any]:
    """The loop, for `args.seconds`; leaves the weights of the best validation in the model."""
    precision = PRECISIONS[args.precision]
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    stream = endless(data["train"], preset.batch_tokens, args.seed)
    begin = time.perf_counter()
    step, tokens, padded_tokens = 0, 0, 0
    best, kept = math.inf, model.state_dict()
    validations: list[dict[str, float]] = []
    next_validation = 1
    model.train()
    while (used := (time.perf_counter() - begin) / args.seconds) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, used, preset)
        batch = next(stream)
        loss, count = loss_of(model, batch, args.label_smoothing, precision)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + count
        padded_tokens += len(batch) * (max(len(s) for s, _ in batch) + max(len(t) for _, t in batch))
        if used >= next_validation / (args.validations + 1):
            next_validation += 1
            value = validate(model, data["val"], precision)
            seconds = time.perf_counter() - begin
            validations.append({"step": step, "seconds": seconds, "loss": value})
            say(f"{seconds:6.0f} s  step {step}  train {float(loss.detach()) / count:.3f}  valid {value:.3f}")
            if value < best:
                best, kept = value, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seconds = time.perf_counter() - begin
    value = validate(model, data["val"], precision)
    validations.append({"step": step, "seconds": seconds, "loss": value})
    if value > best:
        model.load_state_dict(kept)
    return {
        "steps": step,
        "seconds": seconds,
        "target_tokens": tokens,
        "target_tokens_per_second": tokens / seconds,
        "padded_tokens_per_second": padded_tokens / seconds,
        "epochs": tokens / sum(len(target) for _, target in data["train"]),
        "valid_loss": min(best, value),
        "validations": validations,
    }


@torch.no_grad()
def translate(model: MarianMTModel, tokenizer: Tokenizer, sources: list[list[int]], beams: int) -> list[str]:
    """Beam search, rows of like length together."""
    model.eval()
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    result = [""] * len(sources)
    for begin in range(0, len(order), 32):
        rows = order[begin : begin + 32]
        ids = padded([sources[i] for i in rows], PAD)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(sources[i]) for i in rows])[:, None]
        outputs = model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            num_beams=beams,
            max_new_tokens=ids.shape[1] + 50,
            bad_words_ids=[[PAD]],
            do_sample=False,
        )
        for i, output in zip(rows, outputs.tolist(), strict=True):
            result[i] = tokenizer.decode([token for token in output if token not in (PAD, EOS)])
    return result


def score(hypotheses: list[str], references: list[str]) -> dict[str, dict[str, Any]]:
    """sacreBLEU's BLEU (13a) and chrF with their signatures, on raw text."""
    scores = {}
    for name, metric in (("bleu", BLEU(tokenize="13a")), ("chrf", CHRF())):
        value = metric.corpus_score(hypotheses, [references])
        scores[name] = {"score": value.score, "signature": str(metric.get_signature())}
    return scores


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Preset]:
    """Options, and the preset with what they change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0, help="wall-clock of the training loop")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    for name, kind in Preset.__annotations__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type={"int": int, "float": float}[kind], help="preset's")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--validations", type=int, default=10, help="during training; the best weights are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--data", help="folder of Multi30k; else TRILEMMA_DATA, else ../shared/data beside the checkout"
    )
    parser.add_argument("--limit", type=int, help="score the first lines only; for trying out")
    parser.add_argument("--name", default="multi30k_marian", help="of the file in benchmarks/results")
    parser.add_argument("--tiny", action="store_true", help="seconds of the smallest model; nothing is stored")
    args = parser.parse_args(arguments)
    if args.tiny:
        args.preset, args.seconds, args.limit = "tiny", 10.0, 8
    given = {name: value for name in Preset.__annotations__ if (value := getattr(args, name)) is not None}
    return args, replace(PRESETS[args.preset], **given)


def main(arguments: list[str] | None = None) -> int:
    """Trains, translates test_2016_flickr, scores, stores."""
    args, preset = parse(arguments)
    folder = find_data(args.data)
    if folder is None:
        say("skipped: Multi30k is not here; give --data FOLDER or set TRILEMMA_DATA (train.en.gz and its companions)")
        return 0
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    raw = {split: (read_lines(folder, split, "en"), read_lines(folder, split, "de")) for split in SPLITS}
    begin = time.perf_counter()
    tokenizer = train_tokenizer(raw["train"][0] + raw["train"][1], preset.vocabulary)
    data = {
        split: list(zip(encode(tokenizer, english), encode(tokenizer, german), strict=True))
        for split, (english, german) in raw.items()
    }
    prepared = time.perf_counter() - begin
    model = build(preset, tokenizer.get_vocab_size())
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    say(f"{parameters:,} weights, vocabulary {tokenizer.get_vocab_size()}, {len(data['train'])} pairs")
    training = train(model, data, preset, args)
    begin = time.perf_counter()
    test = data["test_2016_flickr"][: args.limit]
    hypotheses = translate(model, tokenizer, [source for source, _ in test], args.beams)
    decoding = time.perf_counter() - begin
    sources, references = (side[: args.limit] for side in raw["test_2016_flickr"])
    result = {
        "system": "transformers MarianMTModel, from scratch, plain loop",
        "task": "Multi30k en-de, raw text, test_2016_flickr",
        "size": len(references),
        "scores": score(hypotheses, references),
        "parameters": parameters,
        "recipe": {**vars(preset), **{key: value for key, value in vars(args).items() if key in RECIPE}},
        "training": training,
        "prepare_seconds": prepared,
        "decode_seconds": decoding,
        "samples": [list(row) for row in zip(sources[:5], references[:5], hypotheses[:5], strict=True)],
        **provenance(["torch", "transformers", "tokenizers", "sacrebleu"]),
    }
    if not args.tiny:
        store(args.name, result)
    values = ", ".join(f"{name} {entry['score']:.2f}" for name, entry in result["scores"].items())
    say(f"{values} after {training['seconds']:.0f} s, {training['epochs']:.1f} epochs")
    return 0


RECIPE = ("preset", "seconds", "label_smoothing", "precision", "beams", "validations", "threads", "seed")

if __name__ == "__main__":
    sys.exit(main())
