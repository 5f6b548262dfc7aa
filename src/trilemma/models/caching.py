"""How a model in use holds keys and values, and how it names the path that it runs on."""

from __future__ import annotations

from collections.abc import Iterable

from trilemma.errors import ConfigError, nearest
from trilemma.mixers.base import Mixer
from trilemma.models.model import SequenceModel
from trilemma.models.packing import products
from trilemma.ops import backends
from trilemma.state import CacheKind


def cache_kind(value: str | None) -> CacheKind:
    """A user's word for how keys and values are held; None: as activations are.

    Raises:
        ConfigError: another word than int8.
    """
    if value is None:
        return None
    if value != "int8":
        raise ConfigError(f'unknown cache "{value}"{nearest(value, ("int8",))}')
    return "int8"


def hold_cache(model: SequenceModel, kind: CacheKind) -> None:
    """Chooses how the mixers that carry a State hold keys and values from now on, in place.

    With 8 bits the model is for inference only, and whole sequences read what a State would give back, so that they and
    steps stay one function. Mixers without keys and values stay as they are, and so does an encoder.
    """
    for mixer in model.mixers():
        able = mixer.capabilities
        if able.keeps_keys and (mixer.causal or able.reads_memory):
            mixer.cache = kind


def cache_notes(mixers: Iterable[Mixer]) -> list[str]:
    """What to say, once a cache in 8 bits was chosen, of those that it changes nothing for."""
    mixers = list(mixers)
    if all(mixer.cache is None for mixer in mixers):
        return ["no layer of this model keeps keys and values: a cache in 8 bits changes nothing"]
    others = sorted({mixer.name for mixer in mixers if mixer.causal and mixer.cache is None})
    return [f"without keys and values, and as before: {', '.join(others)}"] if others else []


def path_of(model: SequenceModel) -> str:
    """How a model is executed: form, device, weights and cache, as in "plain/cpu/packed-float32+cache-int8"."""
    kinds = {mixer.cache for mixer in model.mixers()} - {None}
    held = "".join(f"+cache-{kind}" for kind in sorted(map(str, kinds)))
    return f"{backends.path()}/{model.device.type}/{products(model)}{held}"
