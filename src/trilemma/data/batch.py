"""Micro-batches as tensors: what each layout is given for each task.

Legend: ids are int64 tensors [batch, length], right-padded with `pad`; labels hold IGNORE where nothing is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilemma.data.order import integers, uniform
from trilemma.data.plan import as_padded
from trilemma.data.tokenizer import Tokenizer

IGNORE = -100

Ids = NDArray[np.int32]
Row = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        inputs: [batch, length] token ids.
        labels: [batch, length], IGNORE where not scored; for classification [batch]; for question answering [batch, 2],
            the answer's first and last place, 0 where the row does not hold it.
        lengths: [batch] valid tokens of `inputs`.
        source, source_lengths: encoder side of an encoder-decoder: [batch, source length], [batch].
        prefix: [batch] length of the source part of a decoder-only sequence-to-sequence row; for question answering the
            place where the passage starts.
        segments: [batch, length] document number of each token of a packed row, -1 at padding.
        index: the k of "batch k".
        num_targets: scored labels. num_tokens: valid input and source tokens.
        examples: the dataset's example index of each row (empty for rows cut from a stream).
        types: [batch, length] 0 for a question, 1 for its passage; None elsewhere.
    """

    inputs: Tensor
    labels: Tensor
    lengths: Tensor
    source: Tensor | None
    source_lengths: Tensor | None
    prefix: Tensor | None
    segments: Tensor | None
    index: int
    num_targets: int
    num_tokens: int
    examples: tuple[int, ...] = ()
    types: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def twice(self) -> Batch:
        """All rows, then all again in the same order, which dropout will treat differently."""
        values: dict[str, Any] = {
            name: torch.cat([value, value]) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        for name in ("num_targets", "num_tokens", "examples"):
            values[name] = 2 * getattr(self, name)
        return replace(self, **values)


def _pad(rows: Sequence[Row], value: int) -> tuple[Tensor, Tensor]:
    """Right-padded [batch, longest `as_padded`] and the lengths [batch]."""
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    padded = np.full((len(rows), int(as_padded(lengths.max(initial=0)))), value, dtype=np.int64)
    valid = np.arange(padded.shape[1]) < lengths[:, None]
    padded[valid] = np.concatenate(rows) if len(rows) else 0
    return torch.from_numpy(padded), torch.from_numpy(lengths)


def _row(*parts: Ids | int) -> Row:
    return np.concatenate([part if isinstance(part, np.ndarray) else (part,) for part in parts], dtype=np.int64)


def _batch(inputs: list[Row], labels: list[Row], pad: int, index: int, examples: Sequence[int]) -> Batch:
    padded, lengths = _pad(inputs, pad)
    wanted, _ = _pad(labels, IGNORE)
    return Batch(
        inputs=padded,
        labels=wanted,
        lengths=lengths,
        source=None,
        source_lengths=None,
        prefix=None,
        segments=None,
        index=index,
        num_targets=int((wanted != IGNORE).sum()),
        num_tokens=int(lengths.sum()),
        examples=tuple(int(example) for example in examples),
    )


def encoder_decoder_batch(
    pairs: Sequence[tuple[Ids, Ids]], tokenizer: Tokenizer, index: int = 0, examples: Sequence[int] = ()
) -> Batch:
    """source = src [eos]; inputs = [bos] tgt; labels = tgt [eos]."""
    inputs = [_row(tokenizer.bos, target) for _, target in pairs]
    labels = [_row(target, tokenizer.eos) for _, target in pairs]
    batch = _batch(inputs, labels, tokenizer.pad, index, examples)
    source, source_lengths = _pad([_row(source, tokenizer.eos) for source, _ in pairs], tokenizer.pad)
    tokens = batch.num_tokens + int(source_lengths.sum())
    return replace(batch, source=source, source_lengths=source_lengths, num_tokens=tokens)


def concatenated_batch(
    pairs: Sequence[tuple[Ids, Ids]], tokenizer: Tokenizer, index: int = 0, examples: Sequence[int] = ()
) -> Batch:
    """inputs = [bos] src [sep] tgt; labels score tgt [eos] only, the first of them at the place of [sep]."""
    inputs = [_row(tokenizer.bos, source, tokenizer.sep, target) for source, target in pairs]
    labels = [_row(np.full(len(source) + 1, IGNORE, dtype=np.int32), target, tokenizer.eos) for source, target in pairs]
    batch = _batch(inputs, labels, tokenizer.pad, index, examples)
    prefix = torch.tensor([len(source) + 2 for source, _ in pairs], dtype=torch.int64)
    return replace(batch, prefix=prefix)


def classification_batch(
    pairs: Sequence[tuple[Ids, Ids]], tokenizer: Tokenizer, index: int = 0, examples: Sequence[int] = ()
) -> Batch:
    """inputs = [bos] text [eos]; labels [batch] = class ids, which stand in the second side."""
    inputs = [_row(tokenizer.bos, text, tokenizer.eos) for text, _ in pairs]
    batch = _batch(inputs, [], tokenizer.pad, index, examples)
    labels = torch.tensor([int(label[0]) for _, label in pairs], dtype=torch.int64)
    return replace(batch, labels=labels, num_targets=len(pairs))


def labelled_batch(
    rows: Sequence[tuple[Ids, Ids]], tokenizer: Tokenizer, index: int = 0, examples: Sequence[int] = ()
) -> Batch:
    """inputs = tokens; labels as they are, IGNORE where nothing is scored."""
    inputs = [tokens.astype(np.int64) for tokens, _ in rows]
    return _batch(inputs, [labels.astype(np.int64) for _, labels in rows], tokenizer.pad, index, examples)


def question_batch(
    rows: Sequence[tuple[Ids, Ids]], tokenizer: Tokenizer, index: int = 0, examples: Sequence[int] = ()
) -> Batch:
    """inputs = [bos] question [sep] window [eos]; see `data.questions.rows_of` for the rows."""
    inputs = [_row(tokenizer.bos, tokens, tokenizer.eos) for tokens, _ in rows]
    batch = _batch(inputs, [], tokenizer.pad, index, examples)
    places = torch.tensor(np.stack([place for _, place in rows]), dtype=torch.int64) + 1  # after [bos]; NONE becomes 0
    types = (torch.arange(batch.inputs.shape[1]) >= places[:, :1]).long()
    return replace(batch, labels=places[:, 1:], prefix=places[:, 0], types=types, num_targets=len(rows))


def stream_batch(
    rows: Sequence[Sequence[tuple[Row, Row]]], tokenizer: Tokenizer, packed: bool, index: int = 0
) -> Batch:
    """Rows of pieces (inputs, labels); `packed`: each piece of a row is a segment of its own."""
    inputs = [np.concatenate([piece for piece, _ in row]) for row in rows]
    labels = [np.concatenate([piece for _, piece in row]) for row in rows]
    batch = _batch(inputs, labels, tokenizer.pad, index, ())
    if not packed:
        return batch
    numbers = [np.repeat(np.arange(len(row)), [len(piece) for piece, _ in row]) for row in rows]
    return replace(batch, segments=_pad(numbers, -1)[0])


def mask_batch(batch: Batch, tokenizer: Tokenizer, fraction: float, masking: str, seed: int) -> Batch:
    """A masked-language-model batch: `fraction` of the text tokens is chosen, never special ones or padding.

    Of the chosen, with `masking` "bert", 80 % become `mask`, 10 % a random token, 10 % stay (Devlin et al. 2019,
    "BERT", section 3.1); with "all" all become `mask` (Wettig et al. 2023, arXiv 2202.08005, section 5). Labels are the
    chosen tokens, IGNORE elsewhere.

    The choice depends on (seed, batch.index) alone. A batch in which chance chose nothing scores its first text token.
    """
    ids = batch.inputs.numpy()
    special = np.array(sorted(tokenizer.special_ids), dtype=np.int64)
    text = ~np.isin(ids, special) & (np.arange(ids.shape[1]) < batch.lengths.numpy()[:, None])
    draw = uniform(seed, "mask.choice", batch.index, ids.size).reshape(ids.shape)
    chosen = text & (draw < fraction)
    if not chosen.any() and text.any():
        chosen.flat[int(np.argmax(text))] = True
    if masking == "all":
        return _masked(batch, ids, chosen, tokenizer.mask)
    kind = uniform(seed, "mask.kind", batch.index, ids.size).reshape(ids.shape)
    ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), special)
    other = ordinary[integers(seed, "mask.token", batch.index, ids.size, len(ordinary))].reshape(ids.shape)
    return _masked(batch, ids, chosen, np.where(kind < 0.8, tokenizer.mask, np.where(kind < 0.9, other, ids)))


def _masked(batch: Batch, ids: Row, chosen: NDArray[np.bool_], shown: Row | int) -> Batch:
    """The batch with `shown` in place of the chosen ids, which are its labels."""
    return replace(
        batch,
        inputs=torch.from_numpy(np.where(chosen, shown, ids)),
        labels=torch.from_numpy(np.where(chosen, ids, IGNORE)),
        num_targets=int(chosen.sum()),
    )
