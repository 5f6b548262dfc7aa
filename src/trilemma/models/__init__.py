"""Models: the three layouts from the same blocks."""

from trilemma.models.build import build_model
from trilemma.models.caching import cache_kind, cache_notes, hold_cache, path_of
from trilemma.models.layouts import DecoderOnly, EncoderDecoder, EncoderOnly
from trilemma.models.model import ModelState, SequenceModel
from trilemma.models.packing import pack, products, quantize

__all__ = [
    "DecoderOnly",
    "EncoderDecoder",
    "EncoderOnly",
    "ModelState",
    "SequenceModel",
    "build_model",
    "cache_kind",
    "cache_notes",
    "hold_cache",
    "pack",
    "path_of",
    "products",
    "quantize",
]
