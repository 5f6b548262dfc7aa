"""The families of models that can be imported and exported, one file each."""

from trilemma.interop.families.base import Family
from trilemma.interop.families.llama import LLAMA

FAMILIES: tuple[Family, ...] = (LLAMA,)

__all__ = ["FAMILIES", "Family"]
