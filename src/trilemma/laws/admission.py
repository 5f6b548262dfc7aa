"""Which backends a model's operators may have: those that pass the self-check and, on their path, the laws."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from trilemma.errors import LawError
from trilemma.laws.records import require
from trilemma.mixers.base import Mixer
from trilemma.ops import backends
from trilemma.ops.truth import TruthPair


def operators_of(mixers: Iterable[Mixer]) -> list[TruthPair]:
    """The operators that these mixers and those within them stand on, each once."""
    inner = [module for mixer in mixers for module in mixer.modules() if isinstance(module, Mixer)]
    return list({pair.name: pair for mixer in inner for pair in mixer.truth_pairs()}.values())


def admit(mixers: Iterable[Mixer], backend: str, *, device: str, dtype: torch.dtype, say: Callable[[str], None]) -> str:
    """Chooses backends for these mixers and requires the law records of the path that results.

    Args:
        mixers: all of a model.
        backend: "auto", "plain" or a backend's name, as in `backends.choose`.
        device, dtype: where the model runs, and in which type.
        say: told what a backend runs, and when laws have to run.

    Returns:
        The path: "plain", or with the backends' names.

    Raises:
        BackendError: a backend that is asked for by name cannot serve.
        LawError: a law does not hold; with "auto" and a backend in use plain PyTorch takes its place, which is said.
    """
    mixers = list(mixers)
    backends.choose(backend, operators_of(mixers), device=device, dtype=dtype, say=say)
    for choice in backends.running():
        say(str(choice))
    try:
        require(mixers, backends.path(), device=device, say=say)
    except LawError as error:
        if backend != "auto" or backends.path() == "plain":
            raise
        say(f"{error}\nplain PyTorch runs instead (--backend plain saves the laws' time)")
        return admit(mixers, "plain", device=device, dtype=dtype, say=say)
    return backends.path()
