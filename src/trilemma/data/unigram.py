"""Makes a unigram vocabulary repeatable.

The trainer of `tokenizers` finds the same pieces each time, but sums in an order that changes from run to run, so
that scores differ in the second digit and entries change places. Here the scores are estimated again, in a fixed
order, by hard expectation-maximisation: segment with the present scores, count, take log relative frequencies (Kudo
2018, "Subword Regularization", section 3.2, with the best segmentation instead of the expectation).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import tokenizers

_TEXTS = 100_000  # texts whose words are counted
_ROUNDS = 4
_UNSEEN = 0.5  # count given to a piece that no segmentation uses


class WordCounter:
    """Passes texts on and counts the words of the first of them, as the tokenizer splits them."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.words: Counter[str] = Counter()
        self._normalizer, self._splitter = tokenizer.normalizer, tokenizer.pre_tokenizer

    def passing(self, texts: Iterable[str]) -> Iterator[str]:
        stream = iter(texts)
        for text in islice(stream, _TEXTS):
            plain = self._normalizer.normalize_str(text) if self._normalizer is not None else text
            self.words.update(word for word, _ in self._splitter.pre_tokenize_str(plain))
            yield text
        yield from stream


def repeatable(tokenizer: tokenizers.Tokenizer, words: Counter[str], specials: int) -> tokenizers.Tokenizer:
    """The tokenizer with scores, and the order of its entries, that depend on its pieces and `words` alone.

    The first `specials` entries stay where they are.
    """
    values: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary: list[tuple[str, float]] = [(piece, score) for piece, score in values["model"]["vocab"]]
    pieces = sorted(piece for piece, _ in vocabulary[specials:])
    ordered = sorted(words.items())
    counts = _occurrences(pieces, ordered)
    for _ in range(_ROUNDS):
        scores = _log_frequencies(pieces, counts)
        model = tokenizers.models.Unigram([(piece, scores[piece]) for piece in pieces], 0, False)
        counts = Counter()
        for word, times in ordered:
            for token in model.tokenize(word):
                counts[token.value] += times
    scores = _log_frequencies(pieces, counts)
    pieces.sort(key=lambda piece: (-scores[piece], piece))
    kept = [[piece, 0.0] for piece, _ in vocabulary[:specials]]
    values["model"]["vocab"] = kept + [[piece, scores[piece]] for piece in pieces]
    return tokenizers.Tokenizer.from_str(json.dumps(values))


def _occurrences(pieces: list[str], words: list[tuple[str, int]]) -> Counter[str]:
    """How often each piece occurs in the words, overlaps included: where the first round starts from."""
    known, longest = set(pieces), max(map(len, pieces))
    counts: Counter[str] = Counter()
    for word, times in words:
        for start in range(len(word)):
            for stop in range(start + 1, min(len(word), start + longest) + 1):
                if word[start:stop] in known:
                    counts[word[start:stop]] += times
    return counts


def _log_frequencies(pieces: list[str], counts: Counter[str]) -> dict[str, float]:
    total = math.log(sum(max(_UNSEEN, counts[piece]) for piece in pieces))
    return {piece: round(math.log(max(_UNSEEN, counts[piece])) - total, 6) for piece in pieces}
