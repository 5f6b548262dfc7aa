"""Runs the laws over a mixer and writes down what they found."""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trilemma.errors import ConfigError, nearest
from trilemma.laws.causality import causality
from trilemma.laws.compiling import compiling
from trilemma.laws.cost import cost
from trilemma.laws.raggedness import raggedness
from trilemma.laws.report import FAIL, NOT_APPLICABLE, PASS, LawResult, NotApplicableError, Report, ViolationError
from trilemma.laws.split import split
from trilemma.laws.states import states
from trilemma.laws.subject import Subject
from trilemma.laws.training import training
from trilemma.laws.truth import truth
from trilemma.mixers.base import Mixer
from trilemma.state import CacheKind

LAWS: dict[str, Callable[[Subject], None]] = {
    "split": split,
    "causality": causality,
    "raggedness": raggedness,
    "state": states,
    "cost": cost,
    "training": training,
    "compile": compiling,
    "truth": truth,
}
# What is asked of keys and values in 8 bits, through which no gradient passes: past and future follow from the split.
CACHE_LAWS = ("split", "raggedness", "state", "cost")


def check(
    factory: Callable[[], Mixer],
    *,
    laws: Iterable[str] | None = None,
    level: str = "quick",
    seed: int | None = None,
    subject: str | None = None,
    command: str | None = None,
    slow: bool = True,
    device: str = "cpu",
    cache: CacheKind = None,
) -> Report:
    """Holds a mixer to the laws.

    Args:
        factory: builds a fresh mixer, float32, d_model of 32 or so (the laws randomise its weights); called often.
        laws: names out of `LAWS`; None: all that say something about this kind of cache.
        level: quick (about ten seconds for the mixers here) or full (a minute).
        seed: of all draws; None: a random one, which the report names.
        subject: what the report calls the mixer; None: its class's name.
        command: a command that runs this check with `--law ... --seed ...` appended; None: this function's call.
        slow: at level quick too, compile and run long sequences.
        device: where the mixer runs.
        cache: how keys and values are held, see `Mixer.cache`.

    Returns:
        The report; a failure names law, first token and tensor, the size of the error, and how to see it again.

    Raises:
        ConfigError: unknown law or level, or the factory gives no mixer.
    """
    known = LAWS if cache is None else CACHE_LAWS
    chosen = list(known if laws is None else laws)
    for name in chosen:
        if name not in LAWS:
            raise ConfigError(f'unknown law "{name}"{nearest(name, LAWS)}')
        if name not in known:
            raise ConfigError(f"the law of {name} says nothing about a cache in 8 bits; it has: {', '.join(known)}")
    seed = secrets.randbelow(2**31) if seed is None else seed
    results = []
    with _placed(device):
        subject = subject or Subject(factory, seed, level, slow, cache).title
    for name in chosen:
        if command is None:
            held = "" if cache is None else f', cache="{cache}"'
            again = f'trilemma.laws.check(factory, laws=["{name}"], seed={seed}, level="{level}"{held})'
        else:
            again = f"{command} --law {name} --seed {seed} --level {level}"
        with _placed(device):
            results.append(_try(name, Subject(factory, seed, level, slow, cache), again))
    return Report(subject, seed, level, tuple(results))


@contextmanager
def _placed(device: str) -> Iterator[None]:
    """New tensors live on `device`, and float32 is float32 there: no TF32 in products, convolutions and recurrences.

    Nothing at all for the CPU, since torch's context keeps the compiler out.
    """
    if torch.device(device).type == "cpu":
        yield
        return
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.device(device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(products)


def _try(name: str, subject: Subject, again: str) -> LawResult:
    begin = time.perf_counter()
    found: dict[str, Any]
    try:
        LAWS[name](subject)
        found = {"outcome": PASS, "error": subject.trace.error, "worst": subject.trace.worst}
    except NotApplicableError as why:
        found = {"outcome": NOT_APPLICABLE, "reason": str(why)}
    except ViolationError as broken:
        found = {
            "outcome": FAIL,
            "reason": broken.text(),
            "error": broken.error,
            "tensor": broken.tensor,
            "token": broken.token,
            "row": broken.row,
            "case": subject.trace.case,
            "reproduce": again,
        }
    except Exception as error:  # the mixer under trial raised: that is a finding, not our crash
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        found = {"outcome": FAIL, "reason": reason, "case": subject.trace.case, "reproduce": again}
    return LawResult(law=name, seconds=time.perf_counter() - begin, **found)
