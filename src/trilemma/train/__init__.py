"""Training. The package can be called: `trilemma.train(config)` is `trilemma.train.train(config)`."""

import sys
from types import ModuleType
from typing import Any

from trilemma.runs.load import LoadedRun
from trilemma.train.api import train
from trilemma.train.loop import Callback, Event
from trilemma.train.schedules import learning_rate

__all__ = ["Callback", "Event", "LoadedRun", "learning_rate", "train"]


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> LoadedRun:
        return train(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
