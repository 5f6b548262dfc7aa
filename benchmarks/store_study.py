"""Keeps what the docs quote of a study: its report, plan and tables as they are, and its pictures.

    python benchmarks/store_study.py studies/multi30k multi30k

Writes benchmarks/results/NAME/ (report.json, study.yaml, plan.json, the tables as CSV) and docs/images/NAME-*.png.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ("report.json", "study.yaml", "plan.json")
PICTURES = ("quality", "triangle", "curves", "inference")


def store(study: Path, name: str) -> list[Path]:
    """Copies; returns what was written."""
    results, images = ROOT / "benchmarks" / "results" / name, ROOT / "docs" / "images"
    results.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    pairs = [(study / file, results / file) for file in KEPT]
    pairs += [(table, results / table.name) for table in sorted((study / "tables").glob("*.csv"))]
    pairs += [(study / "plots" / f"{picture}.png", images / f"{name}-{picture}.png") for picture in PICTURES]
    return [Path(shutil.copyfile(source, target)) for source, target in pairs]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/store_study.py STUDY NAME")
    for path in store(Path(sys.argv[1]), sys.argv[2]):
        print(path.relative_to(ROOT))
