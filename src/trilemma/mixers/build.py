"""Mixers from names and options, as configurations and the command line give them."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from trilemma.errors import ConfigError, nearest
from trilemma.mixers.base import Mixer
from trilemma.registry import mixer_class


def build_mixer(name: str, d_model: int, causal: bool = True, num_heads: int | None = None, **options: Any) -> Mixer:
    """A mixer by name.

    Args:
        name: see `available_mixers`.
        d_model: width.
        causal: False for encoders.
        num_heads: passed on if the mixer has heads.
        options: the mixer's own options.

    Raises:
        ConfigError: unknown name or option (the nearest is named), or a value that does not fit.
        CapabilityError: the mixer cannot work in that direction.
    """
    cls = mixer_class(name)
    known = _option_names(cls)
    for option in options:
        if option not in known:
            raise ConfigError(f'mixer "{name}": unknown option "{option}"{nearest(option, known)}')
    options = _of_their_types(cls, options)
    if num_heads is not None and "num_heads" in known:
        options["num_heads"] = num_heads
    try:
        return cls(d_model=d_model, causal=causal, **options)
    except TypeError as error:
        raise ConfigError(f'mixer "{name}": {error}') from None


def build_from_spec(
    spec: str | dict[str, Any], d_model: int, causal: bool, num_heads: int | None, producer: bool = True
) -> Mixer:
    """A mixer as a configuration names it.

    Args:
        spec: a name, or a mapping with "name" and options.
        d_model, causal: as in `build_mixer`.
        num_heads: the model's; the options may give another number.
        producer: passed on if layers of its kind share values, see `Mixer.publishes`.

    Raises:
        ConfigError, CapabilityError: as `build_mixer`.
    """
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f'a mixer with options needs the key "name", found {", ".join(map(str, options))}')
    for fixed in ("d_model", "causal", "producer"):
        if fixed in options:
            raise ConfigError(f'mixer "{name}": {fixed} follows from the model, it is no option')
    cls = mixer_class(name)
    known = _option_names(cls)
    if "num_heads" in options:
        if "num_heads" not in known:
            raise ConfigError(f'mixer "{name}" has no heads: unknown option "num_heads"{nearest("num_heads", known)}')
        num_heads = _of_their_types(cls, {"num_heads": options.pop("num_heads")})["num_heads"]
    if "producer" in known:
        options["producer"] = producer
    return build_mixer(name, d_model, causal, num_heads, **options)


def _option_names(cls: type[Mixer]) -> list[str]:
    parameters = inspect.signature(cls.__init__).parameters
    return [name for name in parameters if name not in ("self", "d_model", "causal")]


def _of_their_types(cls: type[Mixer], options: dict[str, Any]) -> dict[str, Any]:
    """The options as the class's annotations have them; text such as "8" or "false" becomes what it means."""
    hints = get_type_hints(cls.__init__)
    result = {}
    for option, value in options.items():
        try:
            result[option] = TypeAdapter(hints.get(option, Any)).validate_python(value)
        except ValidationError as error:
            messages = " or ".join(dict.fromkeys(str(item["msg"]) for item in error.errors()))
            raise ConfigError(f'mixer "{cls.name}": option {option}: {messages}, found {value!r}') from None
    return result
