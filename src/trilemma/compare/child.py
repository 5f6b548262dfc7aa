"""`python -m trilemma.compare.child PARENT VERB ...`: a verb that ends when the study that started it ends.

On Linux the kernel sends SIGTERM when the parent is gone, however it went; a trainer then saves and stops, so that its
run is free when the study is started again. Elsewhere the verb just runs.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PARENT_DEATH = 1  # prctl's PR_SET_PDEATHSIG


def main() -> None:
    """Ties this process to its parent, then becomes `trilemma VERB ...`."""
    parent = int(sys.argv.pop(1))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)  # it died before the kernel was told
    runpy.run_module("trilemma", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
