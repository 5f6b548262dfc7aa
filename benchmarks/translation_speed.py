"""Translation with an encoder-decoder Transformer: ours against transformers' generate and CTranslate2.

    python benchmarks/translation_speed.py                     # 256 sentences a process
    python benchmarks/translation_speed.py --full              # 1,000
    python benchmarks/translation_speed.py --tiny              # does everything run?
    python benchmarks/translation_speed.py --systems ours-bfloat16,transformers-bfloat16 --cases 32x4

6+6 layers, 512 wide, of random weights, the same for all: one run of ours, written by `trilemma export` as a
MarianMTModel and for CTranslate2. The gains of the decoder's last norm are random too: otherwise a random model with
tied embeddings repeats its last token. Every sentence has 20 tokens, and every translation too: end-of-sequence is made
impossible by its bias. A case is rows x beam. Each process loads its model, translates a few sentences to warm up, then
all of them, batch by batch, in token ids. In float32 all must find the same tokens, but for near-ties.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common import among, options, provenance, run_worker, say, store
from trilemma import machine
from trilemma.measure.memory import PeakMemory

PACKAGES = ("torch", "transformers", "ctranslate2", "trilemma")
SYSTEMS = (
    "ours-float32",
    "ours-bfloat16",
    "ours-int8",
    "transformers-float32",
    "transformers-bfloat16",
    "ctranslate2-float32",
    "ctranslate2-int8",
)
REFERENCE = "ours-float32"  # whose tokens the others are compared with
CASES = ("1x1", "1x4", "32x1", "32x4")
LENGTH = 20  # tokens of a source and of its translation, without special ones
WARM_UP = 2  # batches
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a weight
NEVER = -1e9  # bias of end-of-sequence

Ids = list[list[int]]
Translate = Callable[[Ids], Ids]


@dataclass(frozen=True)
class Size:
    """Of the model, and how many sentences."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    sentences: int


GATE = Size(layers=6, width=512, heads=8, vocabulary=32_000, sentences=256)
TINY = Size(layers=1, width=32, heads=2, vocabulary=100, sentences=33)


def prepare(size: Size, folder: Path) -> tuple[int, int]:
    """One model in all formats: folders run, hf, ctranslate2-float32 and ctranslate2-int8.

    Returns:
        weights that a sentence reads once (the encoder's, and the keys' and values' of its output), and those that each
        of its tokens reads (the rest of the decoder, and the output).
    """
    from trilemma.config import RunConfig, parse
    from trilemma.data.tokenizer import symbol_tokenizer
    from trilemma.interop import export_ctranslate2, export_hf
    from trilemma.interop.target import ExportOptions, new_folder
    from trilemma.models import build_model
    from trilemma.runs import RunDirectory
    from trilemma.runs.load import load_run
    from trilemma.runs.tensors import model_tensors

    torch.manual_seed(0)
    tokenizer = symbol_tokenizer([str(number) for number in range(size.vocabulary - 6)])
    model = {
        "vocab_size": tokenizer.vocab_size, "d_model": size.width, "num_layers": size.layers, "num_heads": size.heads,
        "norm_position": "post", "positions": "sinusoidal-halves", "logit_bias": True, "max_length": 512,
    }  # fmt: skip
    config = parse(RunConfig, {"model": model, "training": {"precision": "float32"}})
    built = build_model(config.model)
    assert built.logit_bias is not None
    with torch.no_grad():
        built.logit_bias[tokenizer.eos] = NEVER
        dict(built.stack.named_parameters())[f"blocks.{size.layers - 1}.parts.2.norm.weight"].normal_()
    run = RunDirectory.create(folder / "run", config, tokenizer.serialize().encode())
    run.publish_model(model_tensors(built))
    loaded = load_run(run.path)
    with new_folder(folder / "hf") as target:
        export_hf.write(loaded, target, ExportOptions())
    for name, quantization in (("float32", None), ("int8", "int8")):
        with new_folder(folder / f"ctranslate2-{name}") as target:
            export_ctranslate2.write(loaded, target, ExportOptions(quantization=quantization))
    encoder, decoder = (sum(part.numel() for part in stack.parameters()) for stack in (built.encoder, built.stack))
    memory = built.stack.memory_flops(1) // 2  # a weight is one multiplication and one addition
    return encoder + memory, decoder - memory + built.embedding.tokens.weight.numel()


def ours(folder: Path, precision: str, rows: int, beam: int) -> Translate:
    """As `trilemma generate` decodes; int8 as with --dtype int8."""
    import trilemma
    from trilemma.decode import Request, decode

    predictor = trilemma.load(folder / "run", device="cpu", dtype=precision)
    tokenizer = predictor.tokenizer
    settings = predictor.decoding(
        method="beam" if beam > 1 else "greedy", beam_size=beam, max_length=LENGTH,
        batch_tokens=rows * beam * (LENGTH + 2),
    )  # fmt: skip

    def translate(sources: Ids) -> Ids:
        requests = [Request([tokenizer.bos], LENGTH, [*source, tokenizer.eos]) for source in sources]
        found = decode(predictor.model, requests, settings, eos=tokenizer.eos, pad=tokenizer.pad)
        return [outputs[0].tokens for outputs in found]

    return translate


def transformers(folder: Path, precision: str, rows: int, beam: int) -> Translate:
    """MarianMTModel.generate."""
    from transformers import MarianMTModel

    model = MarianMTModel.from_pretrained(folder / "hf", dtype=getattr(torch, precision)).eval()
    eos = model.generation_config.eos_token_id
    search = {"num_beams": beam, "do_sample": False, "max_new_tokens": LENGTH, "length_penalty": 0.6}

    def translate(sources: Ids) -> Ids:
        found: Ids = []
        for begin in range(0, len(sources), rows):
            ids = torch.tensor([[*source, eos] for source in sources[begin : begin + rows]])
            with torch.inference_mode():
                outputs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **search)
            found += outputs[:, 1:].tolist()  # after the token that decoding starts with
        return found

    return translate


def ctranslate2(folder: Path, precision: str, rows: int, beam: int) -> Translate:
    """Translator.translate_batch, which speaks in names of tokens."""
    from ctranslate2 import Translator

    model = Translator(
        str(folder / f"ctranslate2-{precision}"), compute_type=precision, intra_threads=torch.get_num_threads()
    )

    words = json.loads((folder / f"ctranslate2-{precision}" / "shared_vocabulary.json").read_text())
    numbers = {word: index for index, word in enumerate(words)}

    def translate(sources: Ids) -> Ids:
        found = model.translate_batch(
            [[words[index] for index in source] for source in sources],
            beam_size=beam, length_penalty=0.6, max_batch_size=rows, min_decoding_length=0, max_decoding_length=LENGTH,
        )  # fmt: skip
        return [[numbers[token] for token in result.hypotheses[0]] for result in found]

    return translate


LOADERS: dict[str, Callable[[Path, str, int, int], Translate]] = {
    "ours": ours,
    "transformers": transformers,
    "ctranslate2": ctranslate2,
}


def sentences(size: Size, count: int, seed: int) -> Ids:
    """Random text tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids: Ids = torch.randint(6, size.vocabulary, (count, LENGTH), generator=generator).tolist()
    return ids


def work(system: str, case: str, size: Size, folder: Path) -> dict[str, Any]:
    """One process: loads, warms up, translates."""
    name, _, precision = system.partition("-")
    rows, beam = (int(part) for part in case.split("x"))
    with PeakMemory("cpu") as memory:
        begin = time.perf_counter()
        translate = LOADERS[name](folder, precision, rows, beam)
        loaded = time.perf_counter() - begin
        translate(sentences(size, WARM_UP * rows, seed=1))
        text = sentences(size, size.sentences, seed=2)
        begin = time.perf_counter()
        outputs = translate(text)
        seconds = time.perf_counter() - begin
    assert all(len(output) == LENGTH for output in outputs), "every translation has the same length"
    return {
        "system": system,
        "case": case,
        "seconds": seconds,
        "ms_per_sentence": seconds * 1e3 / len(outputs),
        "tokens_per_second": len(outputs) * LENGTH / seconds,
        "load_seconds": loaded,
        "memory_growth_bytes": memory.growth_bytes,  # beyond a process that has imported torch
        "threads": torch.get_num_threads(),
        "outputs": outputs,
    }


def study(arguments: argparse.Namespace, size: Size, folder: Path) -> dict[str, Any]:
    """All cases; in each, the systems in turns."""
    weights = prepare(size, folder)
    command = [sys.executable, __file__, "--folder", str(folder), "--sentences", str(size.sentences)]
    command += ["--tiny"] * arguments.tiny
    systems = arguments.systems
    rows = []
    for case in arguments.cases.split(","):
        found: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
        for at in range(arguments.rounds):
            for system in systems:
                result = run_worker([*command, "--worker", system, "--case", case], timeout=3600)
                found[system].append(result)
                say(f"{case}, round {at + 1}/{arguments.rounds}: {system} {result['ms_per_sentence']:.2f} ms/sentence")
        rows += summary(case, found)
    origin = provenance(PACKAGES)
    for row in rows:
        if row["case"] == "1x1":
            row["floor_ms"] = floor_ms(weights, row["system"].partition("-")[2], machine.Ceilings(**origin["ceilings"]))
    return {"benchmark": "translation_speed", "size": asdict(size), "length": LENGTH, "rows": rows, **origin}


def floor_ms(weights: tuple[int, int], precision: str, ceilings: machine.Ceilings) -> float:
    """What reading the weights takes, of one sentence alone: the encoder's once, the decoder's for each token."""
    encoder, decoder = (count * BYTES[precision] for count in weights)
    return (encoder + LENGTH * decoder) / ceilings.bandwidth_gbps(decoder) / 1e6


def summary(case: str, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a system: medians; of others the ratio to ours in the same precision, round by round; the share of
    sentences with our float32 tokens."""
    outputs = {system: results[0].pop("outputs") for system, results in found.items()}
    rows = []
    for system, results in found.items():
        name, _, precision = system.partition("-")
        own = f"ours-{precision}"
        ratios = [
            peer["seconds"] / mine["seconds"] for peer, mine in zip(results, found.get(own, []), strict=own in found)
        ]
        same = None
        if REFERENCE in outputs:
            pairs = list(zip(outputs[system], outputs[REFERENCE], strict=True))
            same = sum(one == other for one, other in pairs) / len(pairs)
        rows.append({
            "case": case,
            "system": system,
            "ms_per_sentence": statistics.median(result["ms_per_sentence"] for result in results),
            "tokens_per_second": statistics.median(result["tokens_per_second"] for result in results),
            "memory_growth_bytes": statistics.median(result["memory_growth_bytes"] for result in results),
            "compared_with": own if name != "ours" and ratios else None,
            "speedup": statistics.median(ratios) if name != "ours" and ratios else None,
            "same_outputs": same,
            "processes": [{key: value for key, value in result.items() if key != "outputs"} for result in results],
        })  # fmt: skip
    return rows


def table(result: dict[str, Any]) -> str:
    """The medians as a Markdown table; a ratio above 1 says that ours is faster."""
    lines = [
        "| rows x beam | system | ms/sentence | tokens/s | MB | ours is faster | same outputs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ratio = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x ({row['compared_with']})"
        same = "-" if row["same_outputs"] is None else f"{row['same_outputs']:.1%}"
        lines.append(
            f"| {row['case']} | {row['system']} | {row['ms_per_sentence']:.2f} | {row['tokens_per_second']:.0f} | "
            f"{row['memory_growth_bytes'] / 1e6:.0f} | {ratio} | {same} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Worker or study."""
    parser = options(__doc__, SYSTEMS, "translation_speed", rounds=3)
    parser.add_argument("--case", default="1x1", help="of the worker")
    parser.add_argument("--folder", type=Path, help="of the worker: the model in all formats")
    parser.add_argument("--systems", type=among(SYSTEMS), default=",".join(SYSTEMS))
    parser.add_argument("--cases", default=",".join(CASES), help="rows x beam, separated by commas")
    parser.add_argument("--sentences", type=int, help="translated by each process")
    parser.add_argument("--full", action="store_true", help="1,000 sentences")
    arguments = parser.parse_args()
    values = asdict(TINY if arguments.tiny else GATE)
    size = Size(**{**values, "sentences": arguments.sentences or (1000 if arguments.full else values["sentences"])})
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments.case, size, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = study(arguments, size, Path(folder))
    print(table(result))
    if not arguments.tiny:
        store(arguments.name, result)


if __name__ == "__main__":
    main()
