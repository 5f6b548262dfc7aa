"""The families of models that can be imported and exported, one file each."""

from trilemma.interop.families.base import Family
from trilemma.interop.families.bert import BERT
from trilemma.interop.families.gpt2 import GPT2
from trilemma.interop.families.kimi_linear import KIMI_LINEAR
from trilemma.interop.families.llama import LLAMA
from trilemma.interop.families.mamba import MAMBA
from trilemma.interop.families.marian import MARIAN
from trilemma.interop.families.qwen3_next import QWEN3_NEXT
from trilemma.interop.families.t5 import T5

FAMILIES: tuple[Family, ...] = (LLAMA, GPT2, BERT, MARIAN, T5, MAMBA, QWEN3_NEXT, KIMI_LINEAR)

__all__ = ["FAMILIES", "Family"]
