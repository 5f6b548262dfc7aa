"""One run of a study, trained by the public verb in a process of its own.

A process of its own keeps runs apart: its peak memory is its own, nothing of one run can reach the next, and a crash of
the trainer leaves the study alive. `trilemma train --resume` goes on where an earlier, killed attempt was.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from trilemma.errors import Interrupted, TrainingError
from trilemma.registry import loaded_plugins

_PARENT_DEATH = 1  # prctl's PR_SET_PDEATHSIG


def train_in_process(config: Path, out: Path) -> None:
    """Trains, or goes on with, the run in `out`; its progress goes to this process's stderr.

    Raises:
        TrainingError: the trainer gave up; its message stands on stderr.
        Interrupted: it was asked to stop, and saved its state.
    """
    plugins = [argument for plugin in loaded_plugins() for argument in ("--plugin", str(plugin))]
    command = [sys.executable, "-m", "trilemma", *plugins, "train", str(config), "--out", str(out), "--resume"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=_end_with_parent) as child:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            # Ctrl-C reached the child as well: it saves and ends. A second one ends both at once.
            child.wait()
            raise Interrupted("interrupted; run the same command again to go on", signal.SIGINT) from None
        except BaseException:
            child.terminate()
            raise
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) or code < 0:
        raise Interrupted(f"{out}: training was stopped; run the same command again to go on", signal.SIGTERM)
    if code != 0:
        raise TrainingError(f"{out}: training failed (exit code {code}); its message stands above")


def _end_with_parent() -> None:
    """Linux: a study that is killed takes its trainer with it, which saves and ends, so that the run is free again."""
    if sys.platform == "linux" and os.getppid() != 1:
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGTERM)
