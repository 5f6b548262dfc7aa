"""Subword dropout: text as other pieces of the same vocabulary, drawn anew for each copy of it.

BPE-dropout (Provilkov et al. 2020, arXiv 1910.13267, algorithm 1): at each step of encoding a word, every merge that is
possible now is left out with probability `rate`; of the others the one learned first is made; where none is left, the
word is done. `tokenizers` has the same, but draws from a generator of its thread that cannot be seeded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import Any

from tokenizers import pre_tokenizers

from trilemma.data.backends import HuggingFace
from trilemma.data.order import Draws
from trilemma.data.tokenizer import Tokenizer
from trilemma.errors import ConfigError

COPY_VERSION = 1  # of the draws: a change makes the cache draw again
_DRAWN = 128  # decisions drawn at once
_WORDS = 1 << 16  # distinct words whose plain pieces are kept
_EXTRAS = {"continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges", "dropout"}


class SubwordDropout:
    """Encodes text as `tokenizer` does, but for the merges that are left out.

    For every draw `tokenizer.decode(encode(text)) == text`; with rate 0 the ids are the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float) -> None:
        """
        Args:
            tokenizer: BPE over bytes, as trained here.
            rate: probability in [0, 1) that a merge is left out.

        Raises:
            ConfigError: another kind of tokenizer.
        """
        model = _byte_pairs(tokenizer)
        assert isinstance(tokenizer.backend, HuggingFace)
        self.rate, self._tokenizer, self._vocabulary = rate, tokenizer.backend.tokenizer, model["vocab"]
        self._merges = {
            (self._vocabulary[left], self._vocabulary[right]): (rank, self._vocabulary[left + right])
            for rank, (left, right) in enumerate(model["merges"])
        }
        self._whole = lru_cache(_WORDS)(self._merge_all)

    def encode(self, text: str, draws: Draws) -> list[int]:
        """Ids of one text, without special ids."""
        skips = _Skips(draws, self.rate)
        ids: list[int] = []
        for word in self._words(text):
            whole, merges = self._whole(word)
            ids += whole if skips.none_of(merges) else self._merge(word, skips)
        return ids

    def encoder(self, purpose: str) -> Callable[[Sequence[str]], list[list[int]]]:
        """A function that encodes texts in their order, call after call; text n has the draws of (purpose, n)."""
        count = 0

        def encode_batch(texts: Sequence[str]) -> list[list[int]]:
            nonlocal count
            first, count = count, count + len(texts)
            return [self.encode(text, Draws(0, purpose, first + place)) for place, text in enumerate(texts)]

        return encode_batch

    def _words(self, text: str) -> Iterator[str]:
        """What merges do not cross, with each byte written as one character."""
        normalizer = self._tokenizer.normalizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return (word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text))

    def _merge_all(self, word: str) -> tuple[list[int], int]:
        """The word's ids without dropout, and how many merges make them."""
        ids = self._merge(word, None)
        return ids, len(word) - len(ids)

    def _merge(self, word: str, skips: _Skips | None) -> list[int]:
        """A word's ids. Possible merges wait in a heap, by rank and place; the left part of a merge keeps its place."""
        ids: list[int | None] = [self._vocabulary[character] for character in word]
        after, before = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))

        def found(place: int) -> tuple[int, int, int] | None:
            """(rank, place, id) of the merge of a place and the next one."""
            if place < 0 or after[place] == len(ids):
                return None
            merge = self._merges.get((ids[place], ids[after[place]]))
            return None if merge is None else (merge[0], place, merge[1])

        waiting = [merge for merge in map(found, range(len(ids))) if merge is not None]
        heapify(waiting)
        left_out: list[tuple[int, int, int]] = []
        while waiting:
            merge = heappop(waiting)
            place = merge[1]
            if ids[place] is None or found(place) != merge:
                continue  # one of its parts was merged otherwise
            if skips is not None and skips.next():
                left_out.append(merge)
                continue
            taken = after[place]
            ids[place], ids[taken], after[place] = merge[2], None, after[taken]
            if after[place] < len(ids):
                before[after[place]] = place
            for new in (found(before[place]), found(place)):
                if new is not None:
                    heappush(waiting, new)
            for merge in left_out:  # at the next step they are drawn for again
                heappush(waiting, merge)
            left_out.clear()
        return [index for index in ids if index is not None]


class _Skips:
    """Decisions, one after another, each to leave a merge out with probability `rate`."""

    def __init__(self, draws: Draws, rate: float) -> None:
        self._draws, self._rate = draws, rate
        self._drawn, self._at = b"", 0  # a byte for each decision, 1 to leave out; those before `_at` are taken

    def none_of(self, merges: int) -> bool:
        """Whether the next `merges` decisions leave none out; if so they are taken, otherwise they stay to come."""
        self._draw(merges)
        if self._drawn.find(1, self._at, self._at + merges) >= 0:
            return False
        self._at += merges
        return True

    def next(self) -> bool:
        """The next decision: whether the merge is left out."""
        self._draw(1)
        self._at += 1
        return self._drawn[self._at - 1] == 1

    def _draw(self, count: int) -> None:
        missing = count - (len(self._drawn) - self._at)
        if missing > 0:
            more = self._draws.uniform(max(missing, _DRAWN)) < self._rate
            self._drawn, self._at = self._drawn[self._at :] + more.tobytes(), 0


def _byte_pairs(tokenizer: Tokenizer) -> dict[str, Any]:
    """The model of a plain BPE over bytes."""
    values = json.loads(tokenizer.serialize()) if isinstance(tokenizer.backend, HuggingFace) else {}
    model: dict[str, Any] = values.get("model", {})
    usable = (
        model.get("type") == "BPE"
        and model.get("merges")
        and not any(model.get(key) for key in _EXTRAS)
        and all(character in model["vocab"] for character in pre_tokenizers.ByteLevel.alphabet())
        and '"ByteLevel"' in json.dumps(values["pre_tokenizer"])
    )
    if not usable:
        raise ConfigError(
            "training.subword_dropout leaves out merges of a BPE over bytes, and this tokenizer has none: set "
            "tokenizer.kind=bpe, or leave training.subword_dropout out"
        )
    return model
