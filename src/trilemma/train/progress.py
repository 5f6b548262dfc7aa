"""What a person sees of a running training: one line, rewritten on a terminal, else a plain line now and then."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from trilemma.errors import ConfigError

_PLAIN_SECONDS = 10.0  # between plain lines


class Display:
    """Progress and messages on a stream (stderr); silent when `quiet`."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self._width = 0
        self._last = -_PLAIN_SECONDS

    def say(self, message: str) -> None:
        """A message that stays."""
        if self._quiet:
            return
        self._wipe()
        print(message, file=self._stream, flush=True)

    def step(self, record: Mapping[str, Any], total: float, seconds_left: float | None, quality: str = "") -> None:
        """A training record: rewritten in place on a terminal, else a line at most every ten seconds.

        `quality`: what `training.quality` found last.
        """
        if self._quiet:
            return
        of = f"/{total:,.0f}" if total < float("inf") else ""
        left = f", {clock(seconds_left)} left" if seconds_left is not None else ""
        quality = f"{quality}  " if quality else ""
        line = (
            f"step {record['step']:,}{of}  loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  {quality}"
            f"{record['tokens_per_second']:,.0f} tokens/s{left}"
        )
        if self._live:
            self._wipe()
            self._stream.write(f"\r{line}")
            self._stream.flush()
            self._width = len(line)
        elif time.monotonic() - self._last >= _PLAIN_SECONDS:
            self._last = time.monotonic()
            self.say(line)

    def close(self) -> None:
        """Ends the live line."""
        if self._live and self._width:
            print(file=self._stream, flush=True)
            self._width = 0

    def _wipe(self) -> None:
        if self._live and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0


def clock(seconds: float) -> str:
    """Seconds as "1 h 05 min", "3 min 20 s" or "12 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


class Tracker(Protocol):
    """Something that follows the metrics of a run."""

    def add(self, record: Mapping[str, Any]) -> None:
        """One record of metrics.jsonl."""

    def close(self) -> None:
        """The end of the run."""


class NoTracker:
    """Follows nothing."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TensorBoard:
    """Scalars under RUN/tensorboard; records after `step` from an interrupted start are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, record: Mapping[str, Any]) -> None:
        """Every number of the record against its step."""
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Writes what is buffered."""
        self._writer.close()


def tracker(choice: str, run: Path, step: int) -> Tracker:
    """TensorBoard where `choice` and the installed packages say so.

    Raises:
        ConfigError: "on", and the package is missing.
    """
    found = importlib.util.find_spec("tensorboard") is not None
    if choice == "on" and not found:
        raise ConfigError("training.tensorboard is on, but the package is missing: pip install tensorboard")
    return TensorBoard(run / "tensorboard", step) if found and choice != "off" else NoTracker()
