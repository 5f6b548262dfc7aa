"""One run of a study, trained by the public verb in a process of its own.

A process of its own keeps runs apart: its peak memory is its own, nothing of one run can reach the next, and a crash of
the trainer leaves the study alive. `trilemma train --resume` goes on where an earlier, killed attempt was.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO

from trilemma.errors import Interrupted, TrilemmaError
from trilemma.registry import loaded_plugins
from trilemma.runs import RunDirectory


def train_in_process(config: Path, out: Path, share: int = 1) -> None:
    """Trains, or goes on with, the run in `out`; its progress goes to this process's stderr.

    Args:
        config: the file of its configuration. out: the run directory.
        share: how many such runs share the machine: each gets its part of the cores and, if there are several, writes
            its progress to a file under `logs/` beside the folder of the runs.

    Raises:
        TrainingError: the loss is not a number.
        Interrupted: it was asked to stop, and saved its state.
        TrilemmaError: it gave up (a full disk) or crashed; its message stands on stderr.
    """
    plugins = [argument for plugin in loaded_plugins() for argument in ("--plugin", str(plugin))]
    command = [sys.executable, "-m", "trilemma.compare.child", str(os.getpid()), *plugins]
    command += ["train", str(config), "--out", str(out), "--resume"]
    environment = dict(os.environ)
    with contextlib.ExitStack() as stack:
        log: IO[bytes] | None = None
        if share > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // share)))
            file = out.parent.parent / "logs" / f"{out.name}.log"
            file.parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(file.open("ab"))
        child = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment))
        try:
            code = child.wait()
        except KeyboardInterrupt:
            # Ctrl-C reached the child as well: it saves and ends. A second one ends both at once.
            child.wait()
            raise Interrupted("interrupted; run the same command again to go on", signal.SIGINT) from None
        except BaseException:
            child.terminate()
            raise
    said = "above" if log is None else f"in {log.name}"
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) or code < 0:
        raise Interrupted(f"{out}: training was stopped; run the same command again to go on", signal.SIGTERM)
    if code == TrilemmaError.exit_code:
        failure = RunDirectory(out).read_failure()
        raise failure or TrilemmaError(f"{out}: training failed; the reason stands {said}")
    if code != 0:
        raise TrilemmaError(f"{out}: the trainer crashed (exit code {code}); what it said stands {said}")


def in_parallel(
    calls: Sequence[Callable[[], None]], workers: int
) -> Generator[tuple[int, Exception | None], None, None]:
    """Makes the calls, `workers` at a time, and yields the place of each as it ends, with the error that it ended with.

    One worker calls in this thread. When the iterator is closed, no further call is begun, and those under way are
    waited for.

    Raises:
        Interrupted: Ctrl-C, which the processes under way got as well.
    """
    stopped = threading.Event()

    def made(call: Callable[[], None]) -> Exception | None:
        if stopped.is_set():
            return Interrupted("not begun: another run was interrupted", signal.SIGINT)
        try:
            call()
        except Exception as error:  # handed to the thread that asked
            if isinstance(error, Interrupted):
                stopped.set()
            return error
        return None

    if workers == 1:
        for at, call in enumerate(calls):
            yield at, made(call)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        places: dict[Future[Exception | None], int] = {pool.submit(made, call): at for at, call in enumerate(calls)}
        for future in as_completed(places):
            yield places[future], future.result()
    except KeyboardInterrupt:
        raise Interrupted("interrupted; run the same command again to go on", signal.SIGINT) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
