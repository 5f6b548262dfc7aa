"""Models: the three layouts from the same blocks."""

from trilemma.models.build import build_model
from trilemma.models.layouts import DecoderOnly, EncoderDecoder, EncoderOnly, ModelState, SequenceModel

__all__ = ["DecoderOnly", "EncoderDecoder", "EncoderOnly", "ModelState", "SequenceModel", "build_model"]
