"""How long `trilemma --help` takes, as a user waits for it: whole processes, beside a bare interpreter.

python benchmarks/startup.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import provenance, store

RUNS = 10


def seconds(command: list[str]) -> list[float]:
    """Wall-clock times of whole processes, after one that fills the file cache."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> None:
    """Prints and stores the medians."""
    program = str(Path(sys.executable).parent / "trilemma")
    commands = {
        "bare interpreter": [sys.executable, "-c", "pass"],
        "trilemma --help": [program, "--help"],
        "trilemma --version": [program, "--version"],
        "trilemma doctor --help": [program, "doctor", "--help"],
    }
    measured = {name: statistics.median(seconds(command)) for name, command in commands.items()}
    store("startup", {"benchmark": "startup", "median_seconds": measured, "runs": RUNS, **provenance()})
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
