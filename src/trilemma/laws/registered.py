"""The laws over mixers by name: each in all the variants that its class declares."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from trilemma.errors import ConfigError
from trilemma.laws.report import Report
from trilemma.laws.sharing import Behind
from trilemma.laws.trial import check
from trilemma.mixers.base import Mixer
from trilemma.mixers.build import build_mixer
from trilemma.registry import mixer_class
from trilemma.state import CacheKind

_D_MODEL, _NUM_HEADS = 32, 4
_PLUGIN_PREFIX = "trilemma_plugin_"


def verify(
    name: str,
    *,
    laws: Iterable[str] | None = None,
    level: str = "quick",
    seed: int | None = None,
    variant: int | None = None,
    device: str = "cpu",
    cache: CacheKind = None,
    progress: Callable[[Report], None] | None = None,
) -> list[Report]:
    """Holds a registered mixer to the laws, in each of its variants (`Mixer.law_variants`).

    Args:
        name: see `trilemma.available_mixers`.
        laws, level, seed, device, cache: as in `check`.
        variant: the number of one variant; None: all. At level quick the slow parts (compile, long sequences) run for
            the first variant, for one that the seed picks, and for one asked for by number.
        progress: told each report as it is made.

    Raises:
        ConfigError: unknown mixer, law, level or variant; a kind of cache for a mixer that keeps no keys and values.
    """
    cls = mixer_class(name)
    if cache is not None and not cls.capabilities.keeps_keys:
        raise ConfigError(f'mixer "{name}" keeps no keys and values: there is nothing to hold in 8 bits')
    variants = cls.law_variants()
    seed = secrets.randbelow(2**31) if seed is None else seed
    if variant is not None and not 0 <= variant < len(variants):
        raise ConfigError(f'mixer "{name}" has the variants 0 to {len(variants) - 1}; {variant} is none of them')
    laws = None if laws is None else list(laws)
    place = ("" if device == "cpu" else f" --device {device}") + ("" if cache is None else f" --cache {cache}")
    reports = []
    for number in range(len(variants)) if variant is None else [variant]:
        slow = variant is not None or number in (0, seed % len(variants))
        report = check(
            _factory(cls, variants[number]),
            laws=laws,
            level=level,
            seed=seed,
            subject=f"{name} {describe(variants[number])}".strip(),
            command=f"trilemma verify {name}{_plugin(cls)} --variant {number}{place}",
            slow=slow,
            device=device,
            cache=cache,
        )
        reports.append(report)
        if progress is not None:
            progress(report)
    return reports


def describe(variant: dict[str, Any]) -> str:
    """A variant's options in words."""
    return " ".join(f"{option}={value}" for option, value in variant.items())


def is_plugin(cls: type[Mixer]) -> bool:
    """Whether a mixer came from a file given with --plugin."""
    return cls.__module__.startswith(_PLUGIN_PREFIX)


def _factory(cls: type[Mixer], variant: dict[str, Any]) -> Callable[[], Mixer]:
    options = dict(variant)
    able = cls.capabilities
    causal = options.pop("causal", able.causal or able.reads_memory)
    heads = options.pop("num_heads", _NUM_HEADS)

    def build(**role: bool) -> Mixer:
        return build_mixer(cls.name, _D_MODEL, causal, heads, **options | role)

    def factory() -> Mixer:
        mixer = build()
        alone = all(isinstance(kind, tuple) for kind in mixer.reads().values())
        return mixer if alone else Behind(build(producer=True), mixer)

    return factory


def _plugin(cls: type[Mixer]) -> str:
    if not is_plugin(cls):
        return ""
    file = inspect.getsourcefile(cls)
    # The same words also load a class that its file registers.
    return f" --plugin {file}:{cls.__qualname__}"
