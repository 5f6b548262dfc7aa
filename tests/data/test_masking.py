"""Masks of a masked language model: what is chosen, what becomes of it, and from which numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trilemma.config import TokenizerConfig
from trilemma.data import IGNORE, Batch, train_tokenizer
from trilemma.data.batch import mask_batch, stream_batch

TOKENIZER = train_tokenizer([], TokenizerConfig(kind="byte"))


def packed(index: int = 3, rows: int = 40) -> Batch:
    """Rows of `[bos] text [eos] [bos] text [eos]`, of unequal lengths, `unk` and `sep` among the text."""
    generator = np.random.default_rng(index)

    def piece(length: int) -> tuple[np.ndarray, np.ndarray]:
        text = generator.integers(len(TOKENIZER.special_ids), 262, length)
        text[::7], text[1::9] = TOKENIZER.unk, TOKENIZER.sep
        row = np.concatenate([[TOKENIZER.bos], text, [TOKENIZER.eos]])
        return row, row

    batch = [[piece(int(generator.integers(0, 40))), piece(5)] for _ in range(rows)]
    return stream_batch(batch, TOKENIZER, packed=True, index=index)


@pytest.mark.parametrize("masking", ["bert", "all"])
@pytest.mark.parametrize("fraction", [0.15, 0.3])
def test_a_share_of_the_text_is_chosen_and_nothing_else(masking: str, fraction: float) -> None:
    batch = packed(rows=2000)
    masked = mask_batch(batch, TOKENIZER, fraction, masking, seed=1)
    chosen = masked.labels != IGNORE
    text = ~torch.isin(batch.inputs, torch.tensor(sorted(TOKENIZER.special_ids)))
    assert not bool((chosen & ~text).any()), "special tokens and padding are never chosen"
    assert int(chosen.sum()) == masked.num_targets
    assert masked.num_targets / int(text.sum()) == pytest.approx(fraction, rel=0.04)
    assert torch.equal(masked.labels[chosen], batch.inputs[chosen])
    assert torch.equal(masked.inputs[~chosen], batch.inputs[~chosen])
    shown = masked.inputs[chosen]
    hidden = float((shown == TOKENIZER.mask).double().mean())
    assert hidden == (1.0 if masking == "all" else pytest.approx(0.8, abs=0.02))
    if masking == "bert":
        assert float((shown == masked.labels[chosen]).double().mean()) == pytest.approx(0.1, abs=0.015)
    others = set(shown.tolist()) - {TOKENIZER.mask}
    assert not others & TOKENIZER.special_ids


def test_the_choice_is_a_function_of_seed_and_batch() -> None:
    first, again = (mask_batch(packed(), TOKENIZER, 0.15, "bert", seed=1) for _ in range(2))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.labels, again.labels)
    other = mask_batch(packed(), TOKENIZER, 0.15, "bert", seed=2)
    assert not torch.equal(first.labels, other.labels)
    alike = mask_batch(packed(), TOKENIZER, 0.15, "all", seed=1)
    assert torch.equal(first.labels, alike.labels), "the same tokens are predicted, whatever becomes of them"
    row = packed(rows=1)
    moved = mask_batch(Batch(**{**vars(row), "index": 4}), TOKENIZER, 0.5, "bert", seed=1)
    assert not torch.equal(moved.labels, mask_batch(row, TOKENIZER, 0.5, "bert", seed=1).labels)


def test_a_batch_always_scores_something_if_there_is_text() -> None:
    row = np.array([TOKENIZER.bos, 70, 71, TOKENIZER.eos])
    masked = mask_batch(stream_batch([[(row, row)]], TOKENIZER, packed=True), TOKENIZER, 1e-9, "all", seed=1)
    assert masked.labels.tolist() == [[IGNORE, 70, IGNORE, IGNORE]]
    empty = np.array([TOKENIZER.bos, TOKENIZER.eos])
    assert mask_batch(stream_batch([[(empty, empty)]], TOKENIZER, True), TOKENIZER, 0.5, "all", seed=1).num_targets == 0
