"""Small models for the laws: every layout times every kind of mixer, in float64 with weights that matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilemma.models import ModelState, SequenceModel, build_model

VOCABULARY = 23
PAD = 0

MIXERS: dict[str, Any] = {
    "attention": "attention",
    "rotary-grouped": {"name": "attention", "position": "rotary", "num_kv_heads": 1, "qk_norm": True},
    "window": {"name": "attention", "window": 3, "position": "alibi"},
    "t5-shared": {"name": "attention", "position": "t5-shared"},
    "retention": {"name": "retention", "chunk_size": 3},
    "lstm": "lstm",
    "gru": "gru",
    "hybrid": ["retention", {"name": "attention", "window": 2}, "lstm"],
    "yoco": ["gru", {"name": "attention", "window": 3}, *[{"name": "yoco", "num_kv_heads": 1}] * 2],
}

# What the layouts are varied in, so that each switch meets each law somewhere.
STYLES: dict[str, dict[str, Any]] = {
    "attention": {"norm_position": "post", "logit_bias": True},
    "rotary-grouped": {"positions": "none", "norm": "rmsnorm", "activation": "swiglu", "bias": False},
    "window": {"positions": "none", "embedding_norm": True},
    "t5-shared": {"positions": "none", "tie_embeddings": False, "embedding_scale": False},
    "retention": {"positions": "none", "activation": "gelu"},
    "lstm": {"positions": "learned", "max_length": 40},
    "gru": {"positions": "sinusoidal-t2t", "norm_position": "post"},
    "hybrid": {"positions": "sinusoidal"},
    "yoco": {"positions": "none", "norm": "rmsnorm", "activation": "swiglu"},
}
GENERATORS = ("encoder-decoder", "decoder-only")


def build(layout: str, mixer: str, **changes: Any) -> SequenceModel:
    """A float64 model in evaluation mode; every weight is drawn, so that biases, norms and tables cannot hide."""
    values: dict[str, Any] = {"layout": layout, "vocab_size": VOCABULARY, "d_model": 8, "d_ff": 12, "num_layers": 4}
    values |= {"num_heads": 2, "dropout": 0.3, "mixer": MIXERS[mixer], **STYLES[mixer], **changes}
    if layout == "encoder-decoder":
        values.setdefault("encoder_layers", 2)
    model = build_model(values).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def tokens(rows: int, length: int) -> Tensor:
    """[rows, length] random tokens, padding's number included: only lengths say what is padding."""
    return torch.randint(0, VOCABULARY, (rows, length))


def source_of(model: SequenceModel, rows: int, length: int = 5) -> dict[str, Tensor]:
    """Keyword arguments that give an encoder its source, ragged; nothing for other layouts."""
    if model.layout != "encoder-decoder":
        return {}
    lengths = torch.randint(1, length + 1, (rows,))
    lengths[0] = length
    return {"source": tokens(rows, length), "source_lengths": lengths}


def logits(model: SequenceModel, inputs: Tensor, lengths: Tensor | None = None, **given: Tensor) -> Tensor:
    """[rows, length, vocabulary] by the whole-sequence form."""
    return model.head(model(inputs, lengths, **given))


def run_steps(model: SequenceModel, inputs: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
    """[rows, length, vocabulary], token by token."""
    out = []
    for i in range(inputs.shape[1]):
        y, state = model.step(inputs[:, i : i + 1], state)
        out.append(y)
    return torch.cat(out, dim=1), state


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal within 1e-10, the tolerance of the laws in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
