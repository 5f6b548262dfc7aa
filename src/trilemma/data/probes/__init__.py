"""Probes: generated tasks that ask for one ability each. Token rows, labels at some positions, a fixed vocabulary."""

from __future__ import annotations

from typing import Any

from trilemma.config import Source, parse
from trilemma.data.probes.base import Example, Probe
from trilemma.data.probes.copying import Compression, Copying, PrefixNGram, SelectiveCopying, SuffixNGram
from trilemma.data.probes.listops import ListOps
from trilemma.data.probes.recall import FuzzyRecall, Induction, MultiQueryRecall, Needle
from trilemma.data.probes.states import ModularArithmetic, ModularArithmeticBrackets, Parity, WordProblem
from trilemma.errors import ConfigError, nearest

__all__ = ["Example", "Probe", "build_probe", "probe_names", "probe_of"]

_KINDS: tuple[type[Probe], ...] = (
    MultiQueryRecall, Induction, Needle, FuzzyRecall, Copying, PrefixNGram, SuffixNGram, SelectiveCopying, Compression,
    Parity, ModularArithmetic, ModularArithmeticBrackets, WordProblem, ListOps,
)  # fmt: skip
_PROBES = {kind.name: kind for kind in _KINDS}


def probe_names() -> list[str]:
    """Names of the probes."""
    return sorted(_PROBES)


def build_probe(name: str, options: dict[str, Any] | None = None) -> Probe:
    """A probe with some of its options set.

    Raises:
        ConfigError: unknown name or option (the nearest is named), or values that do not fit.
    """
    if name not in _PROBES:
        raise ConfigError(f'unknown probe "{name}"{nearest(name, _PROBES)}')
    return parse(_PROBES[name], options or {}, f'probe "{name}"')


def probe_of(source: Source) -> Probe:
    """The probe that a source of `data.task: probe` names.

    Raises:
        ConfigError: as `build_probe`, or the source names files.
    """
    if source.generated is None:
        raise ConfigError("data.task probe is generated: give {generated: NAME, size: N, options: {...}}, no files")
    return build_probe(source.generated, source.options)
