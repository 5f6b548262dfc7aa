"""The laws on a GPU: every mixer, every variant, with float32 that is float32.

    python benchmarks/gpu_laws.py                      # what is missing, eight mixers at a time
    python benchmarks/gpu_laws.py --only mixer=attention,retention
    python benchmarks/gpu_laws.py --tiny               # does it run? On a CPU too

What `trilemma verify --all --device cuda` does, one process a mixer, so that each one's record is stored as soon as it
is known, and a mixer that breaks the GPU breaks itself alone. A second call goes on with the rest.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
from gpu_cases import Case, Ledger, Row, Study, arguments_of, folder_of, origin, place

from common import WorkerError, run_worker, say
from trilemma import laws
from trilemma.laws import records
from trilemma.registry import available_mixers

AT_ONCE = 8
SEED = 20261130
# These take longest: they begin first.
SLOWEST = ("block_sparse_attention", "yoco", "rwkv7", "mlstm", "gdn2", "mamba3", "kda", "mamba2", "deltanet")
TINY = ("gru", "rnn")


def cases(tiny: bool) -> list[Case]:
    """One a mixer."""
    names = TINY if tiny else sorted(available_mixers(), key=lambda name: (name not in SLOWEST, name))
    return [{"mixer": name} for name in names]


def measure(case: Case, device: str) -> Row:
    """All variants of one mixer, level quick."""
    name = case["mixer"]
    prints = {path: laws.fingerprint(name, path, device) for path in records.PATHS}
    reports = laws.verify(name, level="quick", seed=SEED, device=device, progress=lambda report: say(report.subject))
    held = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    assert held or device != "cuda", "nothing was computed on the GPU"
    return {
        "ok": all(report.ok for report in reports),
        "variants": len(reports),
        "seconds": sum(report.seconds for report in reports),
        "gpu_memory_bytes": held,
        "records": records.records_of(prints, reports, device),
        "failures": [
            {"subject": report.subject, "law": law.law, "found": law.reason, "case": law.case, "again": law.reproduce}
            for report in reports
            for law in report.failures
        ],
    }


def study(ledger: Ledger, pending: list[Case], tiny: bool, seconds: float, case_seconds: float) -> None:
    """Several processes at once; a mixer that the end of `seconds` cuts off counts as missing."""
    deadline = time.monotonic() + seconds

    def one(case: Case) -> Row:
        left = deadline - time.monotonic()
        command = [sys.executable, __file__, "--worker", case["mixer"], *["--tiny"] * tiny]
        return run_worker(command, timeout=max(1.0, min(left, case_seconds)))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {pool.submit(one, case): case for case in pending}
        for done in as_completed(running):
            case = running[done]
            try:
                row = {"reason": "", **done.result()}
            except WorkerError as error:
                if time.monotonic() >= deadline:
                    continue
                row = {"reason": str(error)}
            ledger.put(case, row)
            say(f"{case['mixer']}: {row['reason'] or ('lawful' if row['ok'] else 'UNLAWFUL')}")


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| mixer | variants | lawful | s |", "|---|---|---|---|"]
    for row in result["rows"]:
        found = f"not verified: {row['reason']} | | |"
        if not row["reason"]:
            broken = "; ".join(f"{one['subject']}: {one['law']}: {one['found']}" for one in row["failures"])
            found = f"{row['variants']} | {'yes' if row['ok'] else broken} | {row['seconds']:.0f} |"
        lines.append(f"| {row['case']['mixer']} | {found}")
    return "\n".join(lines)


# the slowest mixers take minutes where every small operation is a launch
STUDY = Study("gpu_laws", __file__, __doc__, cases, measure, table, case_seconds=400.0)


def main() -> None:
    """Worker or study."""
    arguments = arguments_of(STUDY, workers=available_mixers())
    if arguments.worker:
        print(json.dumps(measure({"mixer": arguments.worker}, place())))
        return
    with folder_of(arguments) as folder:
        ledger = Ledger(arguments.name, folder)
        if arguments.again:
            ledger.drop_failed()
        ledger.begin_run(origin(STUDY, arguments.only, arguments.tiny))
        pending = ledger.pending(arguments.cases)
        study(ledger, pending, arguments.tiny, arguments.seconds, arguments.case_seconds)
        print(table(ledger.result))
        if left := len(ledger.pending(arguments.cases)):
            say(f"{left} of {len(arguments.cases)} mixers are missing; run it again")


if __name__ == "__main__":
    main()
