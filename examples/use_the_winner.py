"""Opens a finished study from Python and translates unseen test sentences with its candidate of highest quality.

python examples/use_the_winner.py demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trilemma

SENTENCES = 3


def main(study: Path) -> None:
    """Prints source and translation; what the reference says stands behind it."""
    report = json.loads((study / "report.json").read_text(encoding="utf-8"))
    plan = json.loads((study / "plan.json").read_text(encoding="utf-8"))
    winner = max(report["candidates"], key=lambda candidate: candidate["quality"]["mean"])["name"]
    run = next(run["name"] for run in plan["runs"] if run["candidate"] == winner and run["stage"] == "final")
    documents = json.loads((study / "runs" / run / "documents.json").read_text(encoding="utf-8"))

    predictor = trilemma.load(study / "runs" / run)
    samples = documents["samples"][:SENTENCES]
    translations = predictor.translate([sample["source"] for sample in samples])
    print(f"{SENTENCES} test sentences that {winner} has never seen:")
    for sample, translation in zip(samples, translations, strict=True):
        mark = "right" if translation == sample["reference"] else f"the reference says {sample['reference']}"
        print(f"  {sample['source']} -> {translation} ({mark})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
