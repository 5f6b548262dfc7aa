"""Inputs to padded batches and back: sorted by length, results in input order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.decode.hypothesis import Request


@dataclass(frozen=True)
class DecodingBatch:
    """Requests side by side, right-padded.

    Attributes:
        inputs: [batch, length] prompts; lengths: [batch], or None if all are equally long.
        source: [batch, source length] and source_lengths: [batch] (None if equal); both None without an encoder.
        prefix: [batch] or None.
        limits, indices: [batch] most new tokens and input numbers, on the CPU.
        requests: what was asked for, in the same order.
    """

    inputs: Tensor
    lengths: Tensor | None
    source: Tensor | None
    source_lengths: Tensor | None
    prefix: Tensor | None
    limits: Tensor
    indices: Tensor
    requests: Sequence[Request]

    @property
    def size(self) -> int:
        return int(self.inputs.shape[0])


def plan_batches(requests: Sequence[Request], batch_tokens: int, hypotheses: int = 1) -> Iterator[list[int]]:
    """Positions in `requests` of the inputs that are decoded together, longest inputs first.

    A batch holds at most `batch_tokens` padded input tokens, each input counted once per hypothesis, and at least one
    input. Encoder inputs and prompts are counted. Inputs of different layouts never meet.
    """
    order = sorted(range(len(requests)), key=lambda position: (-requests[position].num_tokens, position))
    batch: list[int] = []
    longest = 0
    for position in order:
        longest = max(longest, requests[position].num_tokens)
        if batch and longest * (len(batch) + 1) * hypotheses > batch_tokens:
            yield batch
            batch, longest = [], requests[position].num_tokens
        batch.append(position)
    if batch:
        yield batch


def collate(requests: Sequence[Request], pad: int, device: torch.device | str | None = None) -> DecodingBatch:
    """Pads requests of one layout to a batch on `device`."""
    sources = [request.source for request in requests]
    prefixes = [request.prefix for request in requests]
    inputs, lengths = _pad([request.prompt for request in requests], pad, device)
    source, source_lengths = None, None
    if sources[0] is not None:
        assert all(tokens is not None for tokens in sources), "one layout a batch"
        source, source_lengths = _pad([tokens or [] for tokens in sources], pad, device)
    prefix = None
    if prefixes[0] is not None:
        assert all(length is not None for length in prefixes), "one layout a batch"
        prefix = torch.tensor([length or 0 for length in prefixes], device=device)
    limits = torch.tensor([request.limit for request in requests])
    indices = torch.tensor([request.index for request in requests])
    return DecodingBatch(inputs, lengths, source, source_lengths, prefix, limits, indices, requests)


def _pad(rows: list[list[int]], pad: int, device: torch.device | str | None) -> tuple[Tensor, Tensor | None]:
    """[rows, longest] and the lengths; None where nothing is padded: the path without masks is faster."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    padded = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], dtype=torch.long, device=device)
    padded = padded.reshape(len(rows), longest)
    return padded, None if min(lengths) == longest else torch.tensor(lengths, device=device)
