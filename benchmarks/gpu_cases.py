"""Cases measured one after another on a GPU that may be taken away at any time: nothing that was measured is lost.

A stored result holds `runs`, where each process that measured says on what, and `rows`, one for each case with the
number of its run. The file is written when a case begins and when it is done. A later call goes on with what is
missing; `--again` measures once more what failed. After an error that is not one of memory the process is replaced,
since a GPU that has failed once may fail at everything.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, SKIPPED, options, provenance, say, without_folders, write
from trilemma.errors import TrilemmaError
from trilemma.measure import hardware

INTERRUPTED = "the process ended while it ran"
BROKEN = 70  # exit code of a process that leaves what is missing to its successor
PATIENCE = 30.0  # seconds beyond the allowed ones after which a process that hangs is ended

Case = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """One benchmark.

    Attributes:
        name: of the stored result. script: the file that is run. description: of its options.
        cases: whether at toy size -> all cases, the most wanted first.
        measure: a case and the device -> what was measured, or a "reason" why nothing was.
        table: a result as Markdown.
        packages: whose versions are stored.
        case_seconds: what one case may take, unless the command line says otherwise.
    """

    name: str
    script: str
    description: str | None
    cases: Callable[[bool], list[Case]]
    measure: Callable[[Case, str], Row]
    table: Callable[[dict[str, Any]], str]
    packages: Sequence[str] = ("torch", "trilemma")
    case_seconds: float = 120.0


class Ledger:
    """A stored result that grows case by case.

    Args:
        name: of the file, without its ending. folder: where it is or will be.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        file = folder / f"{name}.json"
        self.result: dict[str, Any] = {"benchmark": name, "runs": [], "rows": []}
        if file.exists():
            self.result = json.loads(file.read_text(encoding="utf-8"))

    def begin_run(self, origin: dict[str, Any]) -> None:
        """What follows is measured here and now.

        Raises:
            SystemExit: the rows that are there come from another GPU.
        """
        gpu = origin["environment"]["gpu"]
        others = {run["environment"]["gpu"] for run in self.result["runs"]} - {gpu}
        if others:
            raise SystemExit(f"{self.name} holds results of {', '.join(map(str, others))}, this is {gpu}: use --name")
        self.result["runs"].append(origin)

    def pending(self, cases: Iterable[Case]) -> list[Case]:
        """Those without a row."""
        known = [row["case"] for row in self.result["rows"]]
        return [case for case in cases if case not in known]

    def put(self, case: Case, row: Row) -> None:
        """Stores a case's row in place of an earlier one."""
        self._without(lambda old: old["case"] == case)
        self.result["rows"].append({"case": case, "run": len(self.result["runs"]) - 1, **row})
        write(self.name, self.result, self.folder)

    def drop(self, case: Case) -> None:
        """Forgets that a case was begun."""
        self._without(lambda old: old["case"] == case)
        write(self.name, self.result, self.folder)

    def drop_failed(self) -> None:
        """Forgets what failed."""
        self._without(lambda old: bool(old["reason"]))
        write(self.name, self.result, self.folder)

    def _without(self, unwanted: Callable[[Row], bool]) -> None:
        self.result["rows"] = [row for row in self.result["rows"] if not unwanted(row)]


class TooLongError(Exception):
    """A case took longer than it may."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """`TooLongError` in this, the main, thread after so many seconds."""

    def stop(*_: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(measure: Callable[[], Row], seconds: float) -> tuple[Row, bool]:
    """What was measured, or the reason why nothing was; and whether this process can be trusted any longer."""
    start = time.monotonic()
    try:
        with time_limit(seconds):
            return {"reason": "", **measure()}, True
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"reason": f"out of memory: {first_line(error)}"}, True
    except TrilemmaError as error:
        return {"reason": str(error)}, True
    except Exception as error:
        if time.monotonic() - start >= seconds:  # compilers wrap the error in one of theirs
            return {"reason": f"longer than {seconds:.0f} s"}, False
        return {"reason": f"{type(error).__name__}: {first_line(error)}"}, False


def first_line(error: BaseException) -> str:
    """Of its text, without folders of this machine."""
    return without_folders(str(error).strip().partition("\n")[0])[:300]


def release() -> None:
    """Memory that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def work(study: Study, ledger: Ledger, cases: list[Case], seconds: float, case_seconds: float) -> int:
    """Measures what is missing; no case begins after `seconds`, and one that is cut off by them counts as missing.

    Returns:
        The exit code of this process.
    """
    deadline = time.monotonic() + seconds
    for case in ledger.pending(cases):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        say(label(case))
        ledger.put(case, {"reason": INTERRUPTED})
        row, sound = attempt(lambda case=case: study.measure(case, place()), min(left, case_seconds))  # type: ignore[misc]
        if row["reason"] and time.monotonic() >= deadline:
            ledger.drop(case)
            break
        ledger.put(case, row)
        if row["reason"]:
            say(f"  not measured: {row['reason']}")
        if not sound:
            return BROKEN
        release()
    return 0


def oversee(command: list[str], missing: Callable[[], int], seconds: float) -> int:
    """Runs workers until one ends well, or none gets on, or the time is over.

    Args:
        command: of a worker, without its `--seconds`. missing: counts the cases that are.
    """
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        before = missing()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker = [*command, "--seconds", f"{left:.0f}"]
            code = subprocess.run(worker, timeout=left + PATIENCE, check=False).returncode
            if code == 0 or missing() == before:
                return code
    return 0


def place() -> str:
    """cuda, or cpu for trials."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def label(case: Case) -> str:
    """A case in words."""
    return ", ".join(f"{name} {value}" for name, value in case.items())


def chosen(cases: list[Case], filters: Sequence[str]) -> list[Case]:
    """The cases that every filter, such as "size=124m,350m", lets pass.

    Raises:
        ValueError: a name or value that no case has.
    """
    for text in filters:
        name, _, values = text.partition("=")
        wanted = values.split(",")
        known = {str(case[name]) for case in cases if name in case}
        if unknown := [value for value in wanted if value not in known]:
            names = sorted({key for case in cases for key in case})
            there = f"{name} is {', '.join(sorted(known))}" if known else f"there are {', '.join(names)}"
            raise ValueError(f"--only {text}: no case has {name} {', '.join(unknown)}; {there}")
        cases = [case for case in cases if str(case[name]) in wanted]
    return cases


def origin(study: Study, filters: Sequence[str], tiny: bool) -> dict[str, Any]:
    """Provenance with the data sheet's peak of the card, if the table has it."""
    found = provenance(study.packages, quick=tiny)
    gpu = found["environment"]["gpu"]
    board = None if gpu is None else hardware.of_board(gpu)
    only = [part for text in filters for part in ("--only", text)]
    return {
        **found,
        "board": None if board is None else asdict(board),
        "command": shlex.join(["python", f"benchmarks/{Path(study.script).name}", *only]),  # not the worker's
    }


def arguments_of(study: Study, workers: Sequence[str] = ("cases",)) -> argparse.Namespace:
    """The command line; ends the process where there is no GPU."""
    parser = options(study.description, workers, study.name, rounds=None)
    parser.add_argument("--only", action="append", default=[], metavar="NAME=VALUE,...", help="these cases; repeatable")
    parser.add_argument("--out", type=Path, help="folder of the result; default: benchmarks/results, with --tiny none")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no case begins later")
    parser.add_argument("--case-seconds", type=float, default=study.case_seconds, help="what one case may take")
    parser.add_argument("--again", action="store_true", help="measure once more what failed")
    arguments = parser.parse_args()
    if not arguments.tiny and place() == "cpu":
        say(f"{study.name}: skipped: it measures a GPU, and torch finds no CUDA here; --tiny tries it on the CPU")
        raise SystemExit(SKIPPED)
    try:
        arguments.cases = chosen(study.cases(arguments.tiny), arguments.only)
    except ValueError as error:
        parser.error(str(error))
    return arguments


@contextlib.contextmanager
def folder_of(arguments: argparse.Namespace) -> Iterator[Path]:
    """Where the result lies: a trial leaves none unless it is told where."""
    with tempfile.TemporaryDirectory() as temporary:
        yield arguments.out or (Path(temporary) if arguments.tiny else RESULTS)


def main(study: Study) -> None:
    """Worker or study."""
    arguments = arguments_of(study)
    with folder_of(arguments) as folder:
        if arguments.worker:
            ledger = Ledger(arguments.name, folder)
            ledger.begin_run(origin(study, arguments.only, arguments.tiny))
            raise SystemExit(work(study, ledger, arguments.cases, arguments.seconds, arguments.case_seconds))
        if arguments.again:
            Ledger(arguments.name, folder).drop_failed()
        command = [sys.executable, study.script, "--worker", "cases", "--name", arguments.name, "--out", str(folder)]
        command += ["--case-seconds", str(arguments.case_seconds), *["--tiny"] * arguments.tiny]
        command += [part for text in arguments.only for part in ("--only", text)]
        code = oversee(command, lambda: len(Ledger(arguments.name, folder).pending(arguments.cases)), arguments.seconds)
        result = Ledger(arguments.name, folder)
        print(study.table(result.result))
        if left := len(result.pending(arguments.cases)):
            say(f"{left} of {len(arguments.cases)} cases are missing; run it again")
        raise SystemExit(code)
