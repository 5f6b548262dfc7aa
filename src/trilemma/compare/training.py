"""One run of a study, trained by the public verb in a process of its own.

A process of its own keeps runs apart: its peak memory is its own, nothing of one run can reach the next, and a crash of
the trainer leaves the study alive. `trilemma train --resume` goes on where an earlier, killed attempt was.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from trilemma.errors import Interrupted, TrainingError, TrilemmaError
from trilemma.registry import loaded_plugins


def train_in_process(config: Path, out: Path) -> None:
    """Trains, or goes on with, the run in `out`; its progress goes to this process's stderr.

    Raises:
        TrainingError: the trainer gave up (a loss that is not a number, a full disk); its message stands on stderr.
        Interrupted: it was asked to stop, and saved its state. TrilemmaError: it crashed.
    """
    plugins = [argument for plugin in loaded_plugins() for argument in ("--plugin", str(plugin))]
    command = [sys.executable, "-m", "trilemma.compare.child", str(os.getpid()), *plugins]
    command += ["train", str(config), "--out", str(out), "--resume"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
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
    if code == TrilemmaError.exit_code:
        raise TrainingError(f"{out}: training failed; the reason stands above")
    if code != 0:
        raise TrilemmaError(f"{out}: the trainer crashed (exit code {code}); what it said stands above")
