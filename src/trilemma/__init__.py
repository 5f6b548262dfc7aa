"""Trilemma: which sequence architecture, and at what price?

    import trilemma

    trilemma.available_mixers()
    model = trilemma.build_model({"layout": "decoder-only", "mixer": "retention", "vocab_size": 8000})
    predictor = trilemma.load("runs/demo")
    predictor.translate(["twenty-one"])

Importing the package is cheap: torch is imported when one of these names is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trilemma import laws as laws
    from trilemma.decode import Line as Line
    from trilemma.mixers.build import build_mixer as build_mixer
    from trilemma.models import build_model as build_model
    from trilemma.predictor import load as load
    from trilemma.registry import available_mixers as available_mixers
    from trilemma.train import train as train

# name -> (module, attribute); None: the module itself. `trilemma.train` is a package that can be called.
_LAZY: dict[str, tuple[str, str | None]] = {
    "Line": ("trilemma.decode", "Line"),
    "available_mixers": ("trilemma.registry", "available_mixers"),
    "build_mixer": ("trilemma.mixers.build", "build_mixer"),
    "build_model": ("trilemma.models", "build_model"),
    "laws": ("trilemma.laws", None),
    "load": ("trilemma.predictor", "load"),
    "train": ("trilemma.train", None),
}

__all__ = ["Line", "__version__", "available_mixers", "build_mixer", "build_model", "laws", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f'module "trilemma" has no attribute "{name}"')
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    return module if attribute is None else getattr(module, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
