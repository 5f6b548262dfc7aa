"""Answers that an encoder with a span head finds in passages, and their scores against right ones.

References: Rajpurkar et al. 2016, "SQuAD" (arXiv 1606.05250), section 6.1, whose definition of exact match and F1 this
is; So et al. 2022, "JaQuAD" (arXiv 2202.01764), and Lewis et al. 2020, "MLQA" (arXiv 1910.07475), for characters where
words are not divided by spaces.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from trilemma.config import RunConfig
from trilemma.data import Tokenizer
from trilemma.data.backends import Offsets
from trilemma.data.questions import no_room, windows
from trilemma.decode import Request, collate, plan_batches, require_numbers
from trilemma.errors import CapabilityError, LengthError
from trilemma.measure.spans import best_spans, span_log_probabilities
from trilemma.models import SequenceModel

DEFAULT_LONGEST = 30  # tokens of an answer


@dataclass(frozen=True)
class Answer:
    """A part of a passage.

    Attributes:
        text: `passage[start:end]`, never with white space at its ends; empty only where the passage holds no text.
        probability: of its first and last place, in the window where it was found.
    """

    text: str
    start: int
    end: int
    probability: float


@dataclass(frozen=True)
class _Row:
    """One window of one pair, as the model reads it."""

    pair: int
    ids: list[int]
    passage: int  # the window's first place in `ids`
    first: int  # the passage's token that stands there


@torch.no_grad()
def find_answers(
    model: SequenceModel,
    tokenizer: Tokenizer,
    config: RunConfig,
    pairs: Sequence[tuple[str, str]],
    *,
    longest: int | None = None,
    device: torch.device | str = "cpu",
    batch_tokens: int = 8192,
    first_line: int = 1,
) -> list[Answer]:
    """The likeliest answer to each (question, passage), over all windows of the passage.

    Args:
        longest: tokens of an answer; None: `DEFAULT_LONGEST`.
        first_line: the number of the first pair, for messages.

    Raises:
        CapabilityError: the run answers no questions.
        LengthError: a question leaves no room for its passage; names the line.
    """
    if config.data.task != "question-answering":
        raise CapabilityError(f"this run's task is {config.data.task}, not question-answering")
    encode = lru_cache(maxsize=1)(tokenizer.encode_with_offsets)  # questions about one passage stand together
    encoded = [encode(passage) for _, passage in pairs]
    rows = [
        row
        for index, (question, _) in enumerate(pairs)
        for row in _rows(index, tokenizer.encode(question), encoded[index][0], tokenizer, config, first_line)
    ]
    best: dict[int, tuple[float, int, int]] = {}
    visible = [_visible(passage, offsets) for (_, passage), (_, offsets) in zip(pairs, encoded, strict=True)]
    requests = [Request(row.ids, 1) for row in rows]
    for chosen in plan_batches(requests, batch_tokens):
        held = [rows[i] for i in chosen]
        batch = collate([requests[i] for i in chosen], tokenizer.pad, device)
        for row, (first, last, score) in zip(held, _spans(model, batch.inputs, held, visible, longest), strict=True):
            if score > best.get(row.pair, (-torch.inf, 0, 0))[0]:
                shift = row.first - row.passage
                best[row.pair] = (score, first + shift, last + shift)
    return [_answer(pair[1], encoded[i][1], best.get(i)) for i, pair in enumerate(pairs)]


def _rows(
    pair: int, asked: list[int], ids: list[int], tokenizer: Tokenizer, config: RunConfig, first_line: int
) -> Iterator[_Row]:
    found = windows(len(asked), len(ids), config.data)
    if not found:
        raise LengthError(f"line {first_line + pair}: {no_room(len(asked), config.data)}; shorten the question")
    for window in found:
        row = [tokenizer.bos, *asked, tokenizer.sep, *ids[window.first : window.stop], tokenizer.eos]
        yield _Row(pair, row, len(asked) + 2, window.first)


def _visible(passage: str, offsets: Offsets) -> list[bool]:
    """Whether each token stands for more than white space."""
    return [bool(passage[start:end].strip()) for start, end in offsets]


def _spans(
    model: SequenceModel, inputs: Tensor, rows: list[_Row], visible: list[list[bool]], longest: int | None
) -> list[tuple[int, int, float]]:
    """First and last place of each row's best span, and its log-probability."""
    passage = torch.tensor([row.passage for row in rows], device=inputs.device)
    lengths = torch.tensor([len(row.ids) for row in rows], device=inputs.device)
    types = (torch.arange(inputs.shape[1], device=inputs.device) >= passage[:, None]).long()
    given = None if bool((lengths == inputs.shape[1]).all()) else lengths
    hidden = model(inputs, given, types=types if model.config.token_types > 1 else None)
    scores = span_log_probabilities(require_numbers(model.head(hidden).double()), passage, lengths)
    allowed = torch.zeros(inputs.shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        size = len(row.ids) - 1 - row.passage
        allowed[number, row.passage : row.passage + size] = torch.tensor(
            visible[row.pair][row.first : row.first + size], dtype=torch.bool
        )
    allowed = allowed.to(inputs.device)
    first, last, best = best_spans(scores, allowed, allowed, longest or DEFAULT_LONGEST)
    return list(zip(first.tolist(), last.tolist(), best.tolist(), strict=True))


def _answer(passage: str, offsets: Offsets, found: tuple[float, int, int] | None) -> Answer:
    if found is None:  # no text in the passage
        return Answer("", 0, 0, 0.0)
    score, first, last = found
    start, end = offsets[first][0], offsets[last][1]
    start += len(passage[start:end]) - len(passage[start:end].lstrip())
    end -= len(passage[start:end]) - len(passage[start:end].rstrip())
    return Answer(passage[start:end], start, end, math.exp(score))


# Scores


def normalised(text: str, characters: bool) -> list[str]:
    """The units that are compared: SQuAD's words (lower case, without ASCII punctuation and English articles), or
    characters (lower case, without punctuation of any script and white space)."""
    text = text.lower()
    if characters:
        return [c for c in text if not c.isspace() and not unicodedata.category(c).startswith("P")]
    text = "".join(c for c in text if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact(answer: str, right: Sequence[str], characters: bool) -> bool:
    """Whether the answer is one of the right ones, after normalisation."""
    return any(normalised(answer, characters) == normalised(one, characters) for one in right)


def f1(answer: str, right: Sequence[str], characters: bool) -> float:
    """The highest harmonic mean of precision and recall of units over the right answers, 0 to 1."""
    return max(_f1(normalised(answer, characters), normalised(one, characters)) for one in right)


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))
