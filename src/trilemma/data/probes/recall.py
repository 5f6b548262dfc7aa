"""Recall: what was shown must be found again.

"mqar": multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927, section 3 and appendix; the
harder form of Mamba-2, arXiv 2405.21060, section 9.1, is a matter of options).
"induction": one marked token is asked for (Gu and Dao 2023, "Mamba", arXiv 2312.00752, section 4.1.2).
"needle": a number hidden in noise (Hsieh et al. 2024, "RULER", arXiv 2404.06654, section 3: single and multi-key NIAH).
"fuzzy-recall": keys and values of several tokens (Poli et al. 2024, "MAD", arXiv 2403.17844, section 3).
"""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from trilemma.data.batch import IGNORE
from trilemma.data.order import Draws
from trilemma.data.probes.base import Example, Probe, answered, continued, numbers


class MultiQueryRecall(Probe):
    """Key-value pairs, then every key once more; at each repeated key its value is to be said.

        tokens   k1 v1 k2 v2  .  .  k2  .  .  .  k1  .
        labels    -  -  -  -  -  -  v2  -  -  -  v1  -

    Token 0 is the filler, keys are 1 to vocab_size / 2 - 1, values the upper half; both are drawn without repetition.
    With D pairs, key i stands again at position 2 D + 2 g_i. The gaps g are drawn without repetition from the
    (length - 2 D) / 2 places, place j = 1, 2, ... with a weight of j^(power - 1): recent pairs are asked for sooner, by
    a power law as in real text; 1 is uniform.

    The form of Mamba-2: `pairs: length / 4`, `random_fillers: true`, and training on a mixture of sources with
    length / 32, length / 16, length / 8 and length / 4 pairs.

    Args:
        length: L, even; 4 D <= L.
        pairs: D.
        vocab_size: V.
        power: a of the power law.
        random_fillers: fillers are random entries of the whole vocabulary, which may look like keys; False: all 0.
    """

    name = "mqar"

    length: int = Field(64, ge=4)
    pairs: int = Field(4, ge=1)
    vocab_size: int = Field(8192, ge=8)
    power: float = Field(0.01, gt=0)
    random_fillers: bool = True

    @model_validator(mode="after")
    def _fits(self) -> MultiQueryRecall:
        if self.length % 2:
            raise ValueError(f"length {self.length} must be even")
        if 4 * self.pairs > self.length:
            raise ValueError(f"{self.pairs} pairs, shown and asked for, need a length of {4 * self.pairs}")
        if self.pairs > self.vocab_size // 2 - 1:
            raise ValueError(f"vocab_size {self.vocab_size} has only {self.vocab_size // 2 - 1} keys")
        return self

    def symbols(self) -> list[str]:
        return numbers(self.vocab_size)

    def chance(self) -> float:
        """One of the values shown."""
        return 1 / self.pairs

    def draw(self, draws: Draws) -> Example:
        shown, half = 2 * self.pairs, self.vocab_size // 2
        keys = 1 + draws.sample(self.pairs, half - 1)
        values = half + draws.sample(self.pairs, self.vocab_size - half)
        places = np.arange(1, (self.length - shown) // 2 + 1, dtype=np.float64)
        asked = shown + 2 * draws.weighted_sample(self.pairs, places ** (self.power - 1))
        tokens = np.zeros(self.length, dtype=np.int64)
        tokens[0:shown:2], tokens[1:shown:2], tokens[asked] = keys, values, keys
        labels = np.full(self.length, IGNORE, dtype=np.int64)
        labels[asked] = values
        if self.random_fillers:
            tokens = np.where(tokens == 0, draws.integers(self.length, self.vocab_size), tokens)
        return Example(tokens, labels)


class Induction(Probe):
    """Random tokens; a marker stands once among them and once at the end, where the token after the first one is asked.

    Args:
        length: of the row.
        vocab_size: the marker, which is the last entry, included.
    """

    name = "induction"

    length: int = Field(256, ge=3)
    vocab_size: int = Field(16, ge=3)

    def symbols(self) -> list[str]:
        return [*numbers(self.vocab_size - 1), "[marker]"]

    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def draw(self, draws: Draws) -> Example:
        tokens = draws.integers(self.length, self.vocab_size - 1)
        place = draws.integer(0, self.length - 3)
        tokens[[place, -1]] = self.vocab_size - 1
        return answered(tokens, int(tokens[place + 1]))


class Needle(Probe):
    """Keys with numbers of several digits, hidden at random places of a haystack of noise; at the end one key is asked.

        noise ... [key] k d1 d2 d3 ... noise ... [ask] k -> d1 d2 d3

    All digits of the answer are scored, each after those before it.

    Args:
        length: of the row.
        needles: keys that are hidden; more than one is RULER's multi-key form.
        digits: of a number.
        keys: different keys.
        noise: different noise tokens.
    """

    name = "needle"

    length: int = Field(256, ge=8)
    needles: int = Field(1, ge=1)
    digits: int = Field(5, ge=1)
    keys: int = Field(16, ge=1)
    noise: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Needle:
        if self.needles > self.keys:
            raise ValueError(f"{self.needles} needles need as many keys, found {self.keys}")
        if self.hay < 1:
            raise ValueError(f"length {self.length} leaves no room for noise around the needles")
        return self

    @property
    def hay(self) -> int:
        """Noise tokens of a row."""
        return self.length - self.needles * (2 + self.digits) - (1 + self.digits)

    def symbols(self) -> list[str]:
        keys = [f"k{number}" for number in range(self.keys)]
        noise = [f"n{number}" for number in range(self.noise)]
        return [*numbers(10), *keys, *noise, "[key]", "[ask]"]

    def chance(self) -> float:
        return 0.1

    def draw(self, draws: Draws) -> Example:
        mark, ask = 10 + self.keys + self.noise, 11 + self.keys + self.noise
        keys = 10 + draws.sample(self.needles, self.keys)
        values = draws.integers(self.needles * self.digits, 10).reshape(self.needles, self.digits)
        hay = 10 + self.keys + draws.integers(self.hay, self.noise)
        needles = np.concatenate([np.full((self.needles, 1), mark), keys[:, None], values], axis=1)
        places = np.sort(draws.integers(self.needles, self.hay + 1))
        context = np.insert(hay, np.repeat(places, needles.shape[1]), needles.ravel())
        wanted = draws.integer(0, self.needles - 1)
        text = np.concatenate([context, [ask, keys[wanted]], values[wanted]])
        return continued(text, np.arange(len(text)) >= len(text) - self.digits)


class FuzzyRecall(Probe):
    """Keys of one to `key_size` tokens, each followed by its value of one to `value_size`; a key may come again, and
    its value is then scored. The row ends with a key that was shown before; the front is padded.

    The lower half of the vocabulary is for keys, the upper for values, the last entry pads. A motif holds no token
    twice. MAD trains on every token (`score_all`) with keys of all sizes, and tests with the longest keys only
    (`longest_keys`).

    Args:
        length: of the row.
        vocab_size: V.
        key_size, value_size: longest motifs.
        longest_keys: all keys have `key_size` tokens.
        score_all: every token is to be predicted.
    """

    name = "fuzzy-recall"

    length: int = Field(128, ge=24)
    vocab_size: int = Field(16, ge=8)
    key_size: int = Field(3, ge=1, le=4)
    value_size: int = Field(3, ge=1, le=4)
    longest_keys: bool = False
    score_all: bool = False

    @model_validator(mode="after")
    def _fits(self) -> FuzzyRecall:
        if self.key_size > self.key_count or self.value_size > self.vocab_size - 1 - self.key_count:
            raise ValueError(f"vocab_size {self.vocab_size} is too small for motifs of that size")
        return self

    @property
    def key_count(self) -> int:
        """Tokens that keys are made of."""
        return (self.vocab_size - 1) // 2

    def symbols(self) -> list[str]:
        keys = [f"k{number}" for number in range(self.key_count)]
        values = [f"v{number}" for number in range(self.vocab_size - 1 - self.key_count)]
        return [*keys, *values, "[pad]"]

    def chance(self) -> float:
        return 1 / (self.vocab_size - 1 - self.key_count)

    def draw(self, draws: Draws) -> Example:
        wanted, answer = self._key(draws), self._value(draws)
        ending = len(wanted) + len(answer)
        # The asked pair is shown once at least: as soon as `turn` tokens are written.
        limit = self.length - ending - self.key_size - self.value_size
        turn = draws.integer(0, max(0, min(self.length - 2 * ending, limit) - 1))
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        text: list[int] = []
        scored: list[bool] = []
        while len(text) < limit:
            last = len(text) + self.key_size + self.value_size >= limit
            if wanted not in known and (len(text) >= turn or last):
                key = wanted
            else:
                key = self._key(draws)
            value = known.get(key) or (answer if key == wanted else self._value(draws))
            text += [*key, *value]
            scored += [False] * len(key) + [key in known] * len(value)
            known[key] = value
        text += [*wanted, *answer]
        scored += [False] * len(wanted) + [True] * len(answer)
        if self.score_all:
            scored = [True] * len(text)
        missing = self.length + 1 - len(text)
        return continued([self.vocab_size - 1] * missing + text, [False] * missing + scored)

    def _key(self, draws: Draws) -> tuple[int, ...]:
        size = self.key_size if self.longest_keys else draws.integer(1, self.key_size)
        return tuple(draws.sample(size, self.key_count).tolist())

    def _value(self, draws: Draws) -> tuple[int, ...]:
        size = draws.integer(1, self.value_size)
        values = draws.sample(size, self.vocab_size - 1 - self.key_count)
        return tuple((self.key_count + values).tolist())
