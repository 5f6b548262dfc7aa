"""Models: the three layouts from the same blocks."""

from trilemma.models.build import build_model
from trilemma.models.layouts import DecoderOnly, EncoderDecoder, EncoderOnly, ModelState, SequenceModel
from trilemma.models.packing import pack, products, quantize

__all__ = [
    "DecoderOnly",
    "EncoderDecoder",
    "EncoderOnly",
    "ModelState",
    "SequenceModel",
    "build_model",
    "pack",
    "products",
    "quantize",
]
