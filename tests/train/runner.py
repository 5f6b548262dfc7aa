"""A program that trains in forked children, so that killing one costs a fork and not an import of torch.

It reads one JSON order a line and answers each with one JSON line. An order: "arguments" of `trilemma train`; also

    "kill_call": n            SIGKILL before the n-th call to the disk
    "kill_call_outside": n    SIGKILL before the n-th of those that save no checkpoint
    "kill_after_saves": n     SIGKILL once n checkpoints were saved and the next is begun
    "kill_after": seconds
    "signals": [[seconds, number], ...]
    "signal_call", "signal_batch": [n, number, times] at the n-th call to the disk, or micro-batch
    "fail": [k, errno]        for the k-th call to the disk
    "defect": name            a fault planted into the product

The answer: the exit code, the seconds it took, and what the disk was doing when the kill landed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported before the forks, as every first step imports it (a second and more)
import typer  # noqa: F401

import trilemma.cli.train
import trilemma.train.api  # noqa: F401
from trilemma.cli.main import main
from trilemma.registry import available_mixers
from trilemma.runs import files
from trilemma.train import loop
from trilemma.train.optimizer import Optimizer

PRIMITIVES = ("open", "read", "write", "truncate", "sync", "close", "rename", "make_folder", "remove", "remove_folder")


def watch_disk(order: dict[str, Any], report: int) -> None:
    """Counts the calls that change something; at the ordered one, reports what is going on and kills this process."""
    count, outside, saves = 0, 0, 0
    saving = False
    real = files.Disk()

    class Watched(files.Disk):
        def __getattribute__(self, name: str) -> Any:
            value = object.__getattribute__(self, name)
            return wrapped(name) if name in PRIMITIVES else value

    def wrapped(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal count, outside, saves, saving
            path = str(arguments[-1])
            if name in ("make_folder", "rename") and "checkpoints" in path:
                saving = name == "make_folder" and ".partial" in path
                saves += saving
            changes = name not in ("read", "close")
            count += changes
            outside += changes and not saving
            calls = (count, outside) == (order.get("kill_call", count), order.get("kill_call_outside", outside))
            ordered = calls and order.keys() & {"kill_call", "kill_call_outside"}
            if ordered or (saving and saves > order.get("kill_after_saves", count)):
                os.write(report, json.dumps({"call": name, "saving": saving}).encode())
                os.kill(os.getpid(), signal.SIGKILL)
            strike_at("signal_call", count, order)
            if name in ("write", "sync", "rename") and count == order.get("fail", [0, 0])[0]:
                raise OSError(order["fail"][1], os.strerror(order["fail"][1]))
            return getattr(real, name)(*arguments)

        return call

    files.disk = Watched()


def strike_at(kind: str, count: int, order: dict[str, Any]) -> None:
    """Sends this process the ordered signal, if its moment has come."""
    moment, number, times = order.get(kind, [0, 0, 0])
    if count == moment:
        order.pop(kind)
        for _ in range(times):
            os.kill(os.getpid(), number)


def watch_batches(order: dict[str, Any]) -> None:
    """Counts micro-batches, for signals in the middle of a step."""
    real, count = loop.reseed, 0

    def counted(*place: int) -> None:
        nonlocal count
        count += 1
        strike_at("signal_batch", count, order)
        real(*place)

    loop.reseed = counted


def plant(order: dict[str, Any]) -> None:
    """Faults that the tests must notice."""
    defect = order.get("defect")
    if defect == "dropout depends on history":
        loop.reseed = lambda seed, step, microbatch: None
    elif defect == "optimizer forgets its step":
        Optimizer.set_step = lambda self, number: None  # type: ignore[method-assign]
    elif defect is not None:
        raise ValueError(defect)


def child(order: dict[str, Any], report: int) -> None:
    """Never returns."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    watch_disk(order, report)
    watch_batches(order)
    plant(order)
    try:
        code = main(["train", *order["arguments"]])
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def obey(order: dict[str, Any]) -> dict[str, Any]:
    """Runs one child to its end."""
    reader, writer = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        child(order, writer)
    os.close(writer)
    blows = [*order.get("signals", [])]
    if "kill_after" in order:
        blows.append([order["kill_after"], int(signal.SIGKILL)])
    done = threading.Event()

    def strike() -> None:
        for seconds, number in sorted(blows):
            if done.wait(max(0.0, started + seconds - time.monotonic())):
                return
            os.kill(pid, number)

    striker = threading.Thread(target=strike)
    striker.start()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # the number stays the child's until nobody may strike any more
    done.set()
    striker.join()
    _, status = os.waitpid(pid, 0)
    note = os.read(reader, 1000)
    os.close(reader)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - started,
        "killed_in": json.loads(note) if note else None,
    }


def serve() -> None:
    """Until the input ends."""
    torch.set_num_threads(1)
    available_mixers()
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line))), flush=True)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    serve()
