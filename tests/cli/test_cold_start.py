"""What a cold command waits for: the first translation imports no package that only other jobs need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[1] / "assets" / "run-v1"
# Metrics, generated data, compilers, plots, tables: each took from 20 ms to a second of the start.
OTHER_JOBS = (
    "sacrebleu", "num2words", "babel", "torch._dynamo", "torch._inductor", "sympy", "networkx", "matplotlib",
    "jinja2", "pyarrow", "transformers", "sentencepiece", "rich",
)  # fmt: skip


def imported_by(code: str) -> list[str]:
    command = [
        sys.executable,
        "-c",
        f"{code}\nimport sys; print('FOUND', *(n for n in {OTHER_JOBS!r} if n in sys.modules))",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    found = done.stdout.splitlines()[-1].split()
    assert found[0] == "FOUND"
    return found[1:]


def test_a_first_translation_imports_nothing_of_other_jobs() -> None:
    """Whether a mixer has a law record is not asked here: without one, laws run once and import what they need."""
    translated = f"import trilemma.cli.generate, trilemma.laws; print(trilemma.load({str(RUN)!r}).translate(['1 2']))"
    assert imported_by(translated) == []


def test_the_check_can_fail() -> None:
    assert imported_by("from trilemma.measure.quality import chrf; chrf(['a'], ['a'])") == ["sacrebleu"]
