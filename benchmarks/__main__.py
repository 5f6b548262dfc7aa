"""Reruns the set, one benchmark after another, and makes the pages that show its results anew.

    python -m benchmarks                        # hours on two cores; leave the machine alone
    python -m benchmarks --only startup,growth  # these, in the order given here
    python -m benchmarks --tiny                 # does everything run? Minutes; stores nothing
    python -m benchmarks --list

Each benchmark is a process. One that fails is named at the end, and the exit code is then 1; one that this machine
cannot run, as those of a GPU where there is none, says why and is skipped.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

SKIPPED = 77  # as in common.py, which takes seconds to import
HERE = Path(__file__).parent
PAGES = (HERE / "speed_page.py", HERE.parent / "docs" / "mixer_pages.py")

# name -> what it answers, options of the measurement, options of a trial
SET: dict[str, tuple[str, list[str], list[str]]] = {
    "startup": ("start-up of the command", [], ["--tiny"]),
    "train_step_lm": ("training step of a language model", [], ["--tiny", "--rounds", "1"]),
    "train_step_seq2seq": ("training step of an encoder-decoder", [], ["--tiny", "--rounds", "1"]),
    "translation_speed": ("translation", ["--rounds", "5"], ["--tiny", "--rounds", "1"]),
    "decode_lm": ("one token of a language model", [], ["--tiny", "--rounds", "1"]),
    "mixers_speed": ("one layer of each mixer", [], ["--tiny", "--rounds", "1"]),
    "growth": ("growth with the length", [], ["--tiny", "--rounds", "1", "--mixers", "attention,retention,lstm"]),
    "data_speed": ("text preparation, loading, padding", [], ["--tiny", "--rounds", "1"]),
    "multi30k_marian": ("quality in a given time, of a peer", [], ["--tiny"]),
    "gpu_laws": ("laws on a GPU", [], ["--tiny"]),
    "gpu_training": ("training on a GPU, 124 M to 1.3 B weights", [], ["--tiny"]),
    "gpu_decode": ("decoding on a GPU, 1.3 B and 6.7 B weights", [], ["--tiny"]),
}


def run(name: str, tiny: bool) -> int:
    """The benchmark's exit code."""
    _, full, trial = SET[name]
    command = [sys.executable, str(HERE / f"{name}.py"), *(trial if tiny else full)]
    print(f"\n== {name}: {shlex.join(command[1:])}", flush=True)
    start = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    ended = {0: "done", SKIPPED: "skipped"}.get(code, f"exit code {code}")
    print(f"== {name}: {ended} after {time.perf_counter() - start:.0f} s", flush=True)
    return code


def main() -> int:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SET), metavar="NAME,...", help="these, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes; nothing is stored")
    parser.add_argument("--list", action="store_true", help="says what there is")
    arguments = parser.parse_args()
    if arguments.list:
        for name, (answers, _, _) in SET.items():
            print(f"{name:20} {answers}")
        return 0
    if unknown := [name for name in arguments.only.split(",") if name not in SET]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(SET)}")
    chosen = [name for name in SET if name in arguments.only.split(",")]
    codes = {name: run(name, arguments.tiny) for name in chosen}
    skipped = [name for name, code in codes.items() if code == SKIPPED]
    failed = [name for name, code in codes.items() if code not in (0, SKIPPED)]
    if not arguments.tiny:
        for maker in PAGES:
            subprocess.run([sys.executable, str(maker)], check=True)
    ends = [f"; {what}: {', '.join(names)}" for what, names in (("skipped", skipped), ("failed", failed)) if names]
    print(f"\n{len(chosen) - len(failed) - len(skipped)} of {len(chosen)} ran{''.join(ends)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
