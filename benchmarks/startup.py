"""How long commands take as a user waits for them: whole processes in turns, beside a bare interpreter and torch.

python benchmarks/startup.py             # --help, and the first translation of a small model from a cold command
python benchmarks/startup.py --tiny      # does everything run? Nothing is stored
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import provenance, store
from trilemma.config import RunConfig, parse
from trilemma.data.tokenizer import symbol_tokenizer
from trilemma.models import build_model
from trilemma.runs import RunDirectory
from trilemma.runs.tensors import model_tensors

RUNS = 10
SENTENCE = " ".join(str(number) for number in range(20)) + "\n"


def seconds(command: list[str]) -> float:
    """Wall-clock time of a whole process that reads a sentence, if it reads."""
    start = time.perf_counter()
    subprocess.run(command, input=SENTENCE, text=True, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def small_run(folder: Path) -> Path:
    """A run of Transformer-Tiny's size (4+4 layers, 128 wide), of random weights."""
    torch.manual_seed(0)
    tokenizer = symbol_tokenizer([str(number) for number in range(8000)])
    model = {"vocab_size": tokenizer.vocab_size, "d_model": 128, "d_ff": 256, "num_layers": 4, "num_heads": 4}
    config = parse(RunConfig, {"model": model, "decoding": {"max_length": 20}, "training": {"precision": "float32"}})
    run = RunDirectory.create(folder, config, tokenizer.serialize().encode())
    run.publish_model(model_tensors(build_model(config.model)))
    return run.path


def main() -> None:
    """Prints and stores the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one round; nothing is stored")
    tiny = parser.parse_args().tiny
    runs = 1 if tiny else RUNS
    program = str(Path(sys.executable).parent / "trilemma")
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "bare interpreter": [sys.executable, "-c", "pass"],
            "import torch": [sys.executable, "-c", "import torch"],
            "import trilemma": [sys.executable, "-c", "import trilemma"],
            "trilemma --help": [program, "--help"],
            "trilemma --version": [program, "--version"],
            "trilemma doctor --help": [program, "doctor", "--help"],
            "first translation": [program, "generate", str(small_run(Path(folder) / "run"))],
        }
        # in turns; the first round fills the file cache
        rounds = [{name: seconds(command) for name, command in commands.items()} for _ in range(runs + 1)][1:]
    measured = {name: statistics.median(times[name] for times in rounds) for name in commands}
    if not tiny:
        store("startup", {"benchmark": "startup", "median_seconds": measured, "rounds": rounds, **provenance()})
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
