"""What an encoder with a classification head says about texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from trilemma.data import Tokenizer
from trilemma.decode import Request, collate, plan_batches, require_numbers
from trilemma.models import SequenceModel


@torch.no_grad()
def class_log_probabilities(
    model: SequenceModel,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    *,
    device: torch.device | str | None = None,
    batch_tokens: int = 8192,
) -> NDArray[np.float64]:
    """Natural log-probabilities of the classes for token rows, each read as `[bos] text [eos]`.

    Args:
        rows: token ids without special ones.

    Returns:
        [texts, classes].
    """
    assert model.config.num_labels is not None
    requests = [Request([tokenizer.bos, *row, tokenizer.eos], 1) for row in rows]
    result = np.zeros((len(rows), model.config.num_labels))
    for positions in plan_batches(requests, batch_tokens):
        batch = collate([requests[i] for i in positions], tokenizer.pad, device)
        logits = model.head(model(batch.inputs, batch.lengths))
        result[positions] = require_numbers(torch.log_softmax(logits.cpu().double(), dim=-1)).numpy()
    return result
