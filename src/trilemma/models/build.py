"""From a configuration to a model."""

from __future__ import annotations

from typing import Any

from trilemma.config import ModelConfig, parse
from trilemma.errors import CapabilityError
from trilemma.models.layouts import DecoderOnly, EncoderDecoder, EncoderOnly
from trilemma.models.model import SequenceModel
from trilemma.models.packing import quantize

_LAYOUTS: dict[str, type[SequenceModel]] = {
    "encoder-decoder": EncoderDecoder,
    "decoder-only": DecoderOnly,
    "encoder-only": EncoderOnly,
}


def build_model(config: ModelConfig | dict[str, Any]) -> SequenceModel:
    """A freshly initialised model.

    Args:
        config: the `model` section, or a mapping with its keys; `vocab_size` must be set.

    Raises:
        ConfigError: unknown key or unfit value. CapabilityError: the mixer or layout cannot do what is asked.
    """
    if isinstance(config, dict):
        config = parse(ModelConfig, config, "model")
    if config.prefix and config.layout != "decoder-only":
        raise CapabilityError(f"model.prefix is for decoder-only models; the layout is {config.layout}")
    if config.num_labels is not None and config.layout != "encoder-only":
        raise CapabilityError(f"model.num_labels is for encoder-only models; the layout is {config.layout}")
    if config.head_transform and config.layout != "encoder-only":
        raise CapabilityError(f"model.head_transform is for encoder-only models; the layout is {config.layout}")
    model = _LAYOUTS[config.layout](config)
    return model if config.quantization is None else quantize(model, config.quantization)
