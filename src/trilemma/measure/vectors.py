"""One vector a text: what a model's layers make of it, pooled over its tokens.

(Reimers and Gurevych 2019, "Sentence-BERT", arXiv 1908.10084, section 3: mean over the tokens, or the first one.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilemma.config import RunConfig
from trilemma.data import Tokenizer
from trilemma.decode import Prompts, Request, collate, plan_batches, require_numbers
from trilemma.errors import CapabilityError, ConfigError, LengthError, nearest
from trilemma.models import SequenceModel

Pooling = Literal["mean", "cls", "last"]
_LAYOUTS = {"cls": "encoder-only", "last": "decoder-only"}  # where a text's first token sees all of it, where its last


def check_pooling(config: RunConfig, pooling: str) -> None:
    """Raises `ConfigError` for an unknown pooling, `CapabilityError` for one that the run has not."""
    if pooling not in get_args(Pooling):
        raise ConfigError(f'unknown pooling "{pooling}"{nearest(pooling, get_args(Pooling))}')
    if config.data.task == "probe":
        raise CapabilityError("a probe's run reads no text; use trilemma evaluate")
    needed = _LAYOUTS.get(pooling, config.model.layout)
    if config.model.layout != needed:
        raise CapabilityError(f"pooling {pooling} is for {needed} models; this one is {config.model.layout}: use mean")


@torch.no_grad()
def text_vectors(
    model: SequenceModel,
    tokenizer: Tokenizer,
    config: RunConfig,
    texts: Sequence[str],
    *,
    pooling: Pooling = "mean",
    normalise: bool = False,
    device: torch.device | str = "cpu",
    batch_tokens: int = 8192,
    first_line: int = 1,
) -> NDArray[np.float64]:
    """Vectors [texts, d_model] of the last layer, after its norm.

    A text is read as in training, special tokens included: an empty one is these alone. An encoder-decoder's vectors
    are its encoder's. Batch-mates change a vector by rounding only.

    Args:
        pooling: "mean" over all tokens but padding; "cls", the first token (encoder-only); "last" (decoder-only).
        normalise: to length 1.
        first_line: the number of the first text, for messages.

    Raises:
        ConfigError, CapabilityError: see `check_pooling`.
        LengthError: a text is longer than the model's positions; names the line.
    """
    check_pooling(config, pooling)
    shown = [text.lower() for text in texts] if config.data.lowercase else list(texts)
    rows = [_read(ids, tokenizer, config) for ids in tokenizer.encode_batch(shown)]
    positions = config.model.max_length
    for number, row in enumerate(rows, start=first_line):
        if positions is not None and len(row) > positions:
            raise LengthError(
                f"line {number}: {len(row)} tokens, special ones counted, more than model.max_length = {positions}; "
                "split the line"
            )
    requests = [Request(row, 1) for row in rows]
    result = np.zeros((len(rows), config.model.d_model))
    for chosen in plan_batches(requests, batch_tokens):
        batch = collate([requests[i] for i in chosen], tokenizer.pad, device)
        lengths = torch.tensor([len(rows[i]) for i in chosen], device=device)
        hidden = model.encode(batch.inputs, batch.lengths).double()
        result[chosen] = require_numbers(_pooled(hidden, lengths, pooling)).cpu().numpy()
    if normalise:
        result /= np.maximum(np.linalg.norm(result, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return result


def _read(ids: list[int], tokenizer: Tokenizer, config: RunConfig) -> list[int]:
    """A text with the special tokens that stood around it in training."""
    if config.model.layout == "encoder-only":
        return [tokenizer.bos, *ids, tokenizer.eos]
    request = Prompts(tokenizer, config).context(ids)
    return request.source or request.prompt


def _pooled(hidden: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
    """[B, L, d_model], zero at padding -> [B, d_model]."""
    if pooling == "mean":
        return hidden.sum(1) / lengths[:, None]
    return hidden[torch.arange(len(hidden), device=hidden.device), 0 if pooling == "cls" else lengths - 1]
