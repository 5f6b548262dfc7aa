"""One writer a run; a dead one does not keep the others out."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trilemma.config import RunConfig
from trilemma.errors import RunInUseError
from trilemma.runs import RunDirectory

HOLDER = """
import sys, time
from trilemma.runs import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", RunConfig(), b"{}")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RunInUseError, match=f"in use by process {holder.pid} on {socket.gethostname()}"),
            run.lock(),
        ):
            pass
        with pytest.raises(RunInUseError):
            run.append_metrics({}) or run.publish({"card.md": b"x"})
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close() if holder.stdout else None
    assert json.loads((run.path / ".lock").read_text())["pid"] == holder.pid, "the kill left its name behind"
    with run.lock():  # a dead process of this host holds nothing
        assert json.loads((run.path / ".lock").read_text())["pid"] == os.getpid()
    assert (run.path / ".lock").read_text() == ""


def test_another_host_is_respected(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", RunConfig(), b"{}")
    (run.path / ".lock").write_text('{"pid": 77, "host": "elsewhere"}')
    with pytest.raises(RunInUseError, match=r"process 77 on elsewhere; if that process is gone, remove .*\.lock"):
        run.publish({"card.md": b"x"})
    (run.path / ".lock").unlink()
    run.publish({"card.md": b"x"})


@pytest.mark.parametrize("text", ["garbage", "[]", "{}", '{"pid": {}}'])
def test_a_garbled_lock_file_does_not_shut_the_run(tmp_path: Path, text: str) -> None:
    run = RunDirectory.create(tmp_path / "run", RunConfig(), b"{}")
    (run.path / ".lock").write_text(text)
    with run.lock():
        pass


def test_the_lock_is_nested_and_released_on_errors(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", RunConfig(), b"{}")
    with pytest.raises(ValueError, match="x"), run.lock(), run.lock():
        raise ValueError("x")
    with RunDirectory(run.path).lock():
        pass
