"""Text preparation and data loading: throughput of a core, memory by size, share of a training step, share of padding.

    python benchmarks/data_speed.py                          # on text that is generated
    python benchmarks/data_speed.py --pairs a.en.gz a.de.gz  # padding and loading on these pairs
    python benchmarks/data_speed.py --tiny                   # does everything run? Nothing is stored
    python benchmarks/data_speed.py --worker prepare --task seq2seq --megabytes 16      # one process

`prepare`: from a file of raw text to a dataset, with the training of its tokenizer and without: bytes by processor time
of all threads, and what the process grew by at its highest. Four times the text should take little more: an index of
some dozen bytes an example, and, where a tokenizer is trained, a count of every different word. `loading`: the time in
which the training loop of recipes/multi30k.yaml waits for its batches, as a share of the whole step. `padding`: share
of an epoch's tokens, both sides, at several budgets.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml

from common import ROOT, options, provenance, run_worker, say, store
from trilemma.config import RunConfig, parse
from trilemma.data import Batch, Dataset, Tokenizer, prepare
from trilemma.measure.memory import PeakMemory
from trilemma.train import train

MEGABYTES, TINY_MEGABYTES = (32, 128), (0.25, 1)
PAIRS, TINY_PAIRS = 29_000, 400
STEPS, TINY_STEPS, WARMUP = 300, 8, 3
BUDGETS = (1024, 2048, 4096, 8192, 16384)
TASKS = ("language-model", "seq2seq")
LAYOUTS = {"language-model": "decoder-only", "seq2seq": "encoder-decoder"}
TOKENIZER = {"kind": "bpe", "vocab_size": 8000}
PACKAGES = ("tokenizers", "numpy", "torch", "trilemma")
RECIPE = ROOT / "recipes" / "multi30k.yaml"
Lines = list[str]


class Writer:
    """Lines of made-up words whose frequencies fall as 1 / rank; lengths as in Multi30k, of pairs correlated."""

    def __init__(self, seed: int, words: int = 100_000) -> None:
        self.random = np.random.default_rng(seed)
        letters = self.random.choice(list("etaoinshrdlucmfwypvbgkjqxz"), size=(words, 12))
        sizes = self.random.integers(2, 13, size=words)
        self.words = ["".join(row[:size]) for row, size in zip(letters, sizes, strict=True)]
        self.shares = np.cumsum(1 / np.arange(1, words + 1))

    def pairs(self, count: int) -> tuple[Lines, Lines]:
        """Lines and their partners."""
        common, own = self.random.normal(size=(2, count))
        return self._lines(np.exp(2.35 + 0.30 * common)), self._lines(np.exp(2.35 + 0.24 * common + 0.18 * own))

    def _lines(self, lengths: Any) -> Lines:
        sizes = np.maximum(1, np.rint(lengths)).astype(int)
        ranks = np.searchsorted(self.shares, self.random.random(sizes.sum()) * self.shares[-1])
        drawn = [self.words[rank] for rank in ranks]
        ends = np.cumsum(sizes)
        return [" ".join(drawn[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def write(folder: Path, megabytes: float | None, pairs: int = 10_000) -> tuple[Path, Path]:
    """Two aligned files of `pairs` lines, or as many more as make `megabytes` in both; written part by part."""
    writer, files = Writer(seed=0), (folder / "source.txt", folder / "target.txt")
    with files[0].open("w") as source, files[1].open("w") as target:
        while True:
            first, second = writer.pairs(pairs)
            source.writelines(f"{line}\n" for line in first)
            target.writelines(f"{line}\n" for line in second)
            if megabytes is None or source.tell() + target.tell() >= megabytes * 1e6:
                return files


def settings(task: str, source: Path, target: Path, batch_tokens: int = 4096) -> RunConfig:
    """What `prepare` needs to know."""
    train: Any = {"source": str(source), "target": str(target)} if task == "seq2seq" else {"path": str(source)}
    limits = {"max_source_length": batch_tokens // 2, "max_target_length": batch_tokens // 2}
    data = {"task": task, "train": train, "context_length": 256, **(limits if task == "seq2seq" else {})}
    training = {"batch_tokens": batch_tokens}
    model = {"layout": LAYOUTS[task]}
    return parse(RunConfig, {"data": data, "tokenizer": TOKENIZER, "model": model, "training": training})


def preparation(task: str, megabytes: float) -> dict[str, Any]:
    """One process: a file of this size, from its text to a dataset; with a tokenizer that is there, and without."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    tokenizer = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, size in (("first", min(megabytes, 1)), ("measured", megabytes)):  # libraries are loaded by the first
            (folder / part).mkdir()
            source, target = write(folder / part, size if task == "seq2seq" else 2 * size, pairs=2_000)
            config = settings(task, source, target)
            seconds, growth, dataset = timed_preparation(config, folder / part / "cache", tokenizer)
            tokenizer = dataset.tokenizer
        whole, whole_growth, _ = timed_preparation(config, folder / "again", None)
        read = source.stat().st_size + (target.stat().st_size if task == "seq2seq" else 0)
    return {
        "task": task,
        "bytes": read,
        "examples": dataset.sizes["train"],
        "gb_per_hour_core": read / 1e9 / (whole / 3600),
        "memory_growth_bytes": whole_growth,
        "tokens_gb_per_hour_core": read / 1e9 / (seconds / 3600),
        "tokens_memory_growth_bytes": growth,
    }


def timed_preparation(config: RunConfig, cache: Path, tokenizer: Tokenizer | None) -> tuple[float, int, Dataset]:
    """Processor seconds of all threads, what the process grew by, and the dataset."""
    start = time.process_time()
    with PeakMemory("cpu") as memory:
        dataset, _ = prepare(config, tokenizer, cache)
    return time.process_time() - start, memory.growth_bytes, dataset


def loading(pairs: int, steps: int, files: list[Path] | None) -> dict[str, Any]:
    """One process: the training loop as it is, with a clock around the call that makes a batch."""
    calls: list[tuple[float, float]] = []
    make = Dataset.micro_batch

    def timed(dataset: Dataset, k: int) -> Batch:
        start = time.perf_counter()
        batch = make(dataset, k)
        calls.append((start, time.perf_counter()))
        return batch

    base = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["base"]
    with tempfile.TemporaryDirectory() as name:
        os.environ["TRILEMMA_CACHE"] = name
        source, target = files or write(Path(name), None, pairs)
        base["data"] = {"task": "seq2seq", "train": {"source": str(source), "target": str(target)}}
        base["training"] |= {"steps": steps, "checkpoint_every": steps}
        with mock.patch.object(Dataset, "micro_batch", timed):
            train(base, out=Path(name) / "run", quiet=True)
    measured = calls[WARMUP:steps]
    waited = sum(end - start for start, end in measured[:-1])
    whole = measured[-1][0] - measured[0][0]
    return {"share": waited / whole, "ms_per_batch": 1e3 * waited / (len(measured) - 1), "steps": len(measured) - 1}


def padding(pairs: int, files: list[Path] | None) -> dict[str, float]:
    """Budget -> share of padding."""
    with tempfile.TemporaryDirectory() as name:
        source, target = files or write(Path(name), None, pairs)
        made = {budget: prepare(settings("seq2seq", source, target, budget), cache_dir=name)[0] for budget in BUDGETS}
    return {str(budget): dataset.padding() for budget, dataset in made.items()}


def measure(arguments: list[str], rounds: int, field: str) -> dict[str, Any]:
    """The worker with these arguments, `rounds` times: its last result, `field` as the median, and every value."""
    found = [run_worker([sys.executable, __file__, *arguments]) for _ in range(rounds)]
    values = [result[field] for result in found]
    result = {**found[-1], field: statistics.median(values), f"{field}_all": values}
    say(f"  {' '.join(arguments)}: {field} {result[field]:.4g}")
    return result


def main() -> None:
    """Prints and stores the medians."""
    parser = options(__doc__, ("prepare", "loading", "padding"), "data_speed")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument("--megabytes", type=float, default=MEGABYTES[0], help="of raw text")
    parser.add_argument("--pairs", nargs=2, type=Path, metavar="FILE", help="aligned text instead of generated")
    given = parser.parse_args()
    count, steps = (TINY_PAIRS, TINY_STEPS) if given.tiny else (PAIRS, STEPS)
    workers: dict[str, Callable[[], dict[str, Any]]] = {
        "prepare": lambda: preparation(given.task, given.megabytes),
        "loading": lambda: loading(count, steps, given.pairs),
        "padding": lambda: padding(count, given.pairs),
    }
    if given.worker:
        print(json.dumps(workers[given.worker]()))
        return
    rest = [*(["--tiny"] if given.tiny else []), *(["--pairs", *map(str, given.pairs)] if given.pairs else [])]
    prepared = [
        measure(["--worker", "prepare", "--task", task, "--megabytes", str(size)], given.rounds, "gb_per_hour_core")
        for task in TASKS
        for size in (TINY_MEGABYTES if given.tiny else MEGABYTES)
    ]
    result = {
        "benchmark": "data_speed",
        "rounds": given.rounds,
        "prepare": prepared,
        "loading": measure(["--worker", "loading", *rest], given.rounds, "share"),
        "padding": run_worker([sys.executable, __file__, "--worker", "padding", *rest]),
    }
    if not given.tiny:
        store(given.name, {**result, **provenance(PACKAGES)})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
