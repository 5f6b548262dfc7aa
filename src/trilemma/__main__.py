"""`python -m trilemma`: the command line, for `torchrun -m trilemma train ...`."""

from __future__ import annotations

import sys

from trilemma.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
