"""Names that users write, resolved to the classes that serve them.

Discovery is automatic: every module of the package `trilemma.mixers` is imported once, and a class registers itself
with `@register_mixer("name")`. A plug-in file given on the command line does the same. Nothing in a run, a config or a
data file can name code: names resolve here only.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from trilemma.errors import ConfigError, TrilemmaError, nearest

if TYPE_CHECKING:
    from trilemma.mixers.base import Mixer

_MIXERS: dict[str, type[Mixer]] = {}
_PLUGINS: dict[Path, list[str]] = {}  # file -> the mixers that it registered
_discovered = False

MixerClass = TypeVar("MixerClass", bound="type[Mixer]")


def register_mixer(name: str) -> Callable[[MixerClass], MixerClass]:
    """Class decorator: makes a mixer available under `name` in configs, the command line and the laws."""

    def add(cls: MixerClass) -> MixerClass:
        known = _MIXERS.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ConfigError(f'the mixer name "{name}" is taken by {known.__module__}.{known.__qualname__}')
        cls.name = name
        _MIXERS[name] = cls
        return cls

    return add


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    _discovered = True
    package = importlib.import_module("trilemma.mixers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"trilemma.mixers.{module.name}")


def available_mixers() -> list[str]:
    """Sorted names of all registered mixers."""
    _discover()
    return sorted(_MIXERS)


def mixer_class(name: str) -> type[Mixer]:
    """The class registered as `name`; `ConfigError` names the nearest valid name otherwise."""
    _discover()
    if name not in _MIXERS:
        raise ConfigError(f'unknown mixer "{name}"{nearest(name, _MIXERS)}')
    return _MIXERS[name]


def loaded_plugins() -> list[Path]:
    """Plug-in files that this process has loaded, in order: a process that it starts must load them too."""
    return list(_PLUGINS)


def load_plugin(path: str | Path) -> list[str]:
    """Imports a Python file given on the command line; returns the names of the mixers that it registers.

    A file that was loaded before is not run again. One that fails leaves nothing behind.

    Args:
        path: FILE, or FILE:CLASS for a mixer class that its file does not register: its name is then its `name`
            attribute, or the class's own name in lower case.

    Raises:
        ConfigError: no such file, no Python, no mixer in it, a name that is taken, or whatever its code raises.
    """
    file, class_name = Path(path), ""
    if not file.is_file() and ":" in file.name:
        text, _, class_name = str(path).rpartition(":")
        file = Path(text)
    if not file.is_file():
        raise ConfigError(f"plug-in {file}: no such file")
    place = file.resolve()
    key = Path(f"{place}:{class_name}") if class_name else place
    if key in _PLUGINS:
        return list(_PLUGINS[key])
    _discover()
    name = f"trilemma_plugin_{len(_PLUGINS)}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise ConfigError(f"plug-in {file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    before = dict(_MIXERS)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        if class_name:
            _register_class(module, class_name)
        if _MIXERS.keys() == before.keys():
            raise ConfigError("registers no mixer; decorate a Mixer subclass with @register_mixer(name)")
    except Exception as error:
        _MIXERS.clear()
        _MIXERS.update(before)
        del sys.modules[name]
        text = str(error) if isinstance(error, TrilemmaError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"plug-in {file}{_line_in(place, error)}: {text}") from error
    _PLUGINS[key] = sorted(_MIXERS.keys() - before.keys())
    return list(_PLUGINS[key])


def _register_class(module: ModuleType, class_name: str) -> None:
    """Registers a class of a plug-in file that the file does not register itself."""
    base = importlib.import_module("trilemma.mixers.base").Mixer
    classes = {name: item for name, item in vars(module).items() if isinstance(item, type) and issubclass(item, base)}
    if class_name not in classes:
        raise ConfigError(f'holds no mixer class "{class_name}"{nearest(class_name, classes)}')
    cls = classes[class_name]
    if cls not in _MIXERS.values():
        register_mixer(cls.__dict__.get("name") or class_name.lower())(cls)


def _line_in(file: Path, error: Exception) -> str:
    """`:line` of the file where the error arose, if it did there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f":{lines[-1]}" if lines else ""
