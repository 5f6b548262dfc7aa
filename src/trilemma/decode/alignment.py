"""Which source token an output's token comes from: the attention of one layer, after the output is written.

An encoder-decoder has cross-attention. In a decoder-only model the same is read from the mixing matrix of a layer
(`trilemma.ops.mixing`): attention's weights, or what a linear recurrence stands for, by its absolute values.

Links are the argmax over the source for each token or word of the output (Garg et al. 2019, arXiv 1909.02074, section
3), from the step that predicts it.

Legend: R rows, H heads, L length, K positions of a map, S source tokens without special ones, N output tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from trilemma.decode.attention import chosen_layer, cross_weights, listening, over_heads, readers
from trilemma.decode.batching import DecodingBatch, collate, plan_batches
from trilemma.decode.ensemble import AnyModel, members
from trilemma.decode.hypothesis import Request
from trilemma.errors import CapabilityError
from trilemma.mixers.base import Mixer
from trilemma.models import SequenceModel

Link = tuple[int, int]  # source, output; both from 0


@torch.no_grad()
def source_attention(
    model: AnyModel,
    requests: Sequence[Request],
    outputs: Sequence[Sequence[int]],
    *,
    pad: int,
    layer: int | None = None,
    head: int | None = None,
    device: torch.device | str | None = None,
    batch_tokens: int = 4096,
) -> list[Tensor]:
    """How much each output token takes from each source token; the members of an ensemble are averaged.

    Args:
        requests: of a run that turns a source into a target.
        outputs: tokens of an output of each request, without end-of-sequence.
        layer, head: from 1; None: `chosen_layer`, and the mean over heads.

    Returns:
        [N, S] for each output, on the CPU; rows need not sum to 1, since special tokens are left out.

    Raises:
        CapabilityError: the layer has no such map. ConfigError: there is no such layer or head.
    """
    rows = [
        Request([*request.prompt, *output[:-1]], 1, request.source, request.prefix)
        for request, output in zip(requests, outputs, strict=True)
    ]
    found = [torch.zeros(0, 0)] * len(rows)
    for positions in plan_batches(rows, batch_tokens):
        batch = collate([rows[i] for i in positions], pad, device)
        maps = torch.stack([_map(one, batch, layer, head) for one in members(model)]).mean(0).cpu()
        for row, i in enumerate(positions):
            first = len(requests[i].prompt) - 1
            source = requests[i].source
            columns = slice(0, len(source) - 1) if source is not None else slice(1, first)
            found[i] = maps[row, first : first + len(outputs[i]), columns]
    return found


def _map(model: SequenceModel, batch: DecodingBatch, layer: int | None, head: int | None) -> Tensor:
    """[R, L, K] of one call of a model."""
    mixers: list[Mixer] = [*readers(model)]
    if mixers:
        mixers = [mixers[chosen_layer(len(mixers), layer)]]
    else:
        parts = [next(part for part in parts if isinstance(part, Mixer)) for parts in model.stack.parts()]
        mixers = [parts[chosen_layer(len(parts), layer)]]
    with listening(mixers) as heard:
        model(
            batch.inputs,
            batch.lengths,
            source=batch.source,
            source_lengths=batch.source_lengths,
            prefix=batch.prefix,
        )
    rows, length = batch.inputs.shape
    if readers(model):
        return over_heads(cross_weights(heard[0][0], rows), head)
    for call in heard[0]:
        matrix = call.matrix()
        if matrix.shape[2:] == (length, length):
            return over_heads(matrix.abs(), head)
    raise CapabilityError(
        f'alignments: a layer of "{mixers[0].name}" has no map from token to token; '
        "name another layer with decoding.alignment_layer"
    )


def token_links(weights: Tensor) -> list[Link]:
    """For each output token its source token: [N, S] -> N links, none without a source."""
    return list(zip(weights.argmax(1).tolist(), range(len(weights)), strict=True)) if weights.numel() else []


def word_links(weights: Tensor, source: Sequence[int | None], output: Sequence[int | None]) -> list[Link]:
    """For each output word the source word that its tokens attend to most, summed over tokens.

    Args:
        weights: [N, S].
        source, output: the word of each token, or None.
    """
    sums: dict[int, dict[int, float]] = {}
    for row, target in zip(weights.tolist(), output, strict=True):
        for value, word in zip(row, source, strict=True):
            if word is not None and target is not None:
                own = sums.setdefault(target, {})
                own[word] = own.get(word, 0.0) + value
    return [(max(own, key=lambda word: own[word]), target) for target, own in sorted(sums.items())]


def words_of_spans(text: str, spans: Sequence[tuple[int, int]]) -> list[int | None]:
    """The word (between white space) in which each span of a text begins, None for white space alone."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    found: list[int | None] = []
    for start, end in spans:
        inside = [number for number, (first, last) in enumerate(words) if first < end and start < last]
        found.append(inside[0] if inside else None)
    return found


def words_of_pieces(prefixes: Sequence[str]) -> list[int | None]:
    """The word in which each token of an output ends.

    Args:
        prefixes: the output's text up to and with each token.
    """
    counts = [len(text.split()) for text in prefixes]
    return [count - 1 if count else None for count in counts]
