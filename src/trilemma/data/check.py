"""`trilemma data check`: what is in the files, what is wrong with them, and what a training run would make of them.

Nothing stops at the first mistake: unreadable lines are counted and the first ones named. Memory is about 60 bytes a
line (hashes and lengths), never the text.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilemma.config import Source, TokenizerConfig
from trilemma.data.cache import Progress
from trilemma.data.readers import FIELDS, Example, read_attempts, source_files
from trilemma.data.tokenizer import Tokenizer, train_tokenizer
from trilemma.errors import DataError

SHOWN = 10  # lines named for each finding
_SAMPLE = 10_000  # lines from which tokens are estimated
_ESTIMATE_VOCABULARY = 8000
_RATIO = 3.0  # a pair is an outlier when its length ratio is this many times the median ratio, or its inverse
_SMOOTHING = 10  # characters added to both sides, so that short pairs do not stand out by chance
_QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}
_BINS = 12


@dataclass
class Finding:
    """Lines of one kind: how many, and the first of them (as file:line where there are several files)."""

    count: int = 0
    lines: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def add(self, line: str, message: str = "") -> None:
        self.count += 1
        if len(self.lines) < SHOWN:
            self.lines.append(line)
            if message:
                self.messages.append(message)


@dataclass(frozen=True)
class Lengths:
    """Distribution of a length over the lines: the sum, quantiles, and a histogram (edges: one more than counts)."""

    total: int
    mean: float
    quantiles: dict[str, float]
    edges: list[float]
    counts: list[int]


@dataclass
class FieldReport:
    """One side of the data. `tokens` is exact with a tokenizer, otherwise estimated from `bytes_per_token`.

    `unknown`: lines with characters or words that the given tokenizer does not have and training would not see.
    """

    characters: Lengths
    words: Lengths
    bytes: Lengths
    tokens: Lengths
    bytes_per_token: float
    over_limit: Finding
    limit: int
    unknown: Finding


@dataclass
class SplitReport:
    """One split. `unreadable`: lines that training would stop at, with the messages that it would give."""

    name: str
    files: list[str]
    examples: int = 0
    unreadable: Finding = field(default_factory=Finding)
    empty: dict[str, Finding] = field(default_factory=dict)
    replacement_characters: Finding = field(default_factory=Finding)
    duplicates: Finding = field(default_factory=Finding)
    duplicate_sources: Finding = field(default_factory=Finding)
    identical_sides: Finding = field(default_factory=Finding)
    ratio_outliers: Finding = field(default_factory=Finding)
    median_ratio: float | None = None
    labels: dict[str, int] = field(default_factory=dict)
    fields: dict[str, FieldReport] = field(default_factory=dict)


@dataclass
class Overlap:
    """Lines of `split` that occur in the training data: whole examples, and each side alone."""

    split: str
    examples: Finding
    sides: dict[str, Finding]


@dataclass
class CheckReport:
    """Everything that `check_data` found."""

    task: str
    tokenizer: str
    splits: list[SplitReport]
    overlaps: list[Overlap]
    tokens_per_epoch: int
    seconds_per_epoch: float | None

    @property
    def errors(self) -> int:
        """Lines at which training would stop."""
        return sum(split.unreadable.count for split in self.splits)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "errors": self.errors}


def check_data(
    splits: dict[str, list[Source]],
    task: str,
    tokenizer: Tokenizer | None = None,
    limits: dict[str, int] | None = None,
    tokens_per_second: float | None = None,
) -> CheckReport:
    """Reads all files of all splits once and reports on them.

    Args:
        splits: "train" first, then "valid", "test" where there are any; sources of files.
        task: a key of `FIELDS`. tokenizer: None: tokens are estimated with a small BPE trained on the first lines.
        limits: for each field, the tokens of a text that training allows.
        tokens_per_second: of training, for the time estimate.

    Raises:
        DataError: a file is missing, empty, or damaged as a whole.
    """
    limits = limits or {}
    described = f"{tokenizer.vocab_size:,} entries, given" if tokenizer else ""
    if tokenizer is None:
        tokenizer = _estimating_tokenizer(splits["train"], task)
        described = f"estimated with a BPE of {tokenizer.vocab_size:,} entries from the first {_SAMPLE:,} lines"
        exact = False
    else:
        exact = True
    scans = {name: _scan(name, sources, task, tokenizer, exact) for name, sources in splits.items()}
    for scan in scans.values():
        scan.finish(limits)
    overlaps = [_overlap(name, scans["train"], scan) for name, scan in scans.items() if name != "train"]
    tokens = sum(report.tokens.total for report in scans["train"].report.fields.values())
    seconds = tokens / tokens_per_second if tokens_per_second else None
    return CheckReport(task, described, [scan.report for scan in scans.values()], overlaps, tokens, seconds)


def _texts(sources: list[Source], task: str) -> Iterable[str]:
    fields = FIELDS[task]
    count = 0
    for source in sources:
        for attempt in read_attempts(source, task):
            if isinstance(attempt, DataError):
                continue
            count += 1
            if count > _SAMPLE:
                return
            yield from (text for name, text in zip(fields, attempt, strict=True) if name != "label")


def _estimating_tokenizer(sources: list[Source], task: str) -> Tokenizer:
    return train_tokenizer(_texts(sources, task), TokenizerConfig(kind="bpe", vocab_size=_ESTIMATE_VOCABULARY))


class _Column:
    """Per-line numbers of one field."""

    def __init__(self) -> None:
        self.characters, self.words, self.bytes, self.tokens = (array("q") for _ in range(4))
        self.hashes = array("Q")
        self.sampled_bytes = self.sampled_tokens = 0
        self.unknown = Finding()


class _Scan:
    """What is gathered from one split while its lines pass."""

    def __init__(self, name: str, files: list[str], task: str) -> None:
        self.report = SplitReport(name, files)
        self.fields = FIELDS[task]
        self.columns = {field: _Column() for field in self.fields if field != "label"}
        self.hashes = array("Q")
        self.lines, self.sources = array("q"), array("q")
        self.source_names: list[str] = []
        self.labels: Counter[str] = Counter()

    def place(self, index: int) -> str:
        """Where an example stands."""
        return self.name_line(self.sources[index], self.lines[index])

    def name_line(self, source: int, line: int) -> str:
        return f"{self.source_names[source]}:{line}" if len(self.source_names) > 1 else str(line)

    def add(self, source: int, number: int, example: Example) -> None:
        """Takes in the example of line `number` of a source."""
        report, line = self.report, self.name_line(source, number)
        report.examples += 1
        self.lines.append(number)
        self.sources.append(source)
        self.hashes.append(_hash("\x1f".join(example)))
        for name, text in zip(self.fields, example, strict=True):
            if name == "label":
                self.labels[text] += 1
                continue
            column = self.columns[name]
            column.characters.append(len(text))
            column.words.append(len(text.split()))
            column.bytes.append(len(text.encode("utf-8")))
            column.hashes.append(_hash(text))
            if not text.strip():
                report.empty.setdefault(name, Finding()).add(line)
            if "\ufffd" in text:
                report.replacement_characters.add(line)
        if self.fields == ("source", "target") and example[0] == example[1] and example[0].strip():
            report.identical_sides.add(line)

    def add_tokens(self, name: str, encoded: list[list[int]], size: int, tokenizer: Tokenizer | None) -> None:
        """Takes in the tokens of the examples that follow those tokenised so far; `tokenizer`: the given one."""
        column = self.columns[name]
        for index, ids in enumerate(encoded, start=len(column.tokens)):
            if tokenizer is not None and (unknown := tokenizer.count_unknown(ids)):
                column.unknown.add(self.place(index), f"{unknown} of {len(ids)} tokens")
        lengths = [len(ids) for ids in encoded]
        column.tokens.extend(lengths)
        column.sampled_tokens += sum(lengths)
        column.sampled_bytes += size

    def finish(self, limits: dict[str, int]) -> None:
        """Turns the gathered numbers into the report."""
        report = self.report
        report.labels = dict(self.labels.most_common())
        self._find_repeats(_numbers(self.hashes), report.duplicates)
        for rank, (name, column) in enumerate(self.columns.items()):
            if rank == 0 and len(self.fields) > 1:
                self._find_repeats(_numbers(column.hashes), report.duplicate_sources)
            report.fields[name] = self._field(column, limits.get(name, 0))
        if self.fields == ("source", "target"):
            self._ratios()

    def _field(self, column: _Column, limit: int) -> FieldReport:
        size = _numbers(column.bytes)
        rate = column.sampled_bytes / max(1, column.sampled_tokens)
        tokens = _numbers(column.tokens)
        if len(tokens) < len(size):  # only the first lines were tokenised
            rest = np.ceil(size[len(tokens) :] / max(rate, 1e-9)).astype(np.int64)
            tokens = np.concatenate([tokens, rest])
        over = Finding()
        if limit:
            for index in np.flatnonzero(tokens > limit):
                over.add(self.place(int(index)))
        characters, words = _lengths(_numbers(column.characters)), _lengths(_numbers(column.words))
        return FieldReport(characters, words, _lengths(size), _lengths(tokens), rate, over, limit, column.unknown)

    def _ratios(self) -> None:
        source, target = (_numbers(self.columns[name].characters) for name in self.fields)
        both = (source > 0) & (target > 0)
        if not both.any():
            return
        self.report.median_ratio = float(np.median(target[both] / source[both]))
        ratio = (target + _SMOOTHING) / (source + _SMOOTHING)
        relative = np.abs(np.log(ratio / np.median(ratio[both])))
        for index in np.flatnonzero(both & (relative > np.log(_RATIO))):
            message = f"{source[index]} and {target[index]} characters"
            self.report.ratio_outliers.add(self.place(int(index)), message)

    def _find_repeats(self, hashes: NDArray[Any], finding: Finding) -> None:
        """Every occurrence after the first; empty lines are reported elsewhere."""
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        repeated = np.sort(order[1:][(ordered[1:] == ordered[:-1]) & (ordered[1:] != _BLANK)])
        for index in repeated:
            finding.add(self.place(int(index)))


_BLANK = np.uint64(0)


def _hash(text: str) -> int:
    """64 bits; 0 stands for every text without a visible character."""
    if not text.strip("\x1f \t\n"):
        return 0
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def _numbers(values: array[int]) -> NDArray[Any]:
    return np.frombuffer(values, dtype=np.uint64 if values.typecode == "Q" else np.int64)


def _scan(name: str, sources: list[Source], task: str, tokenizer: Tokenizer, exact: bool) -> _Scan:
    scan = _Scan(name, [str(path) for source in sources for path in source_files(source)], task)
    scan.source_names = [str(source_files(source)[0]) for source in sources]
    progress = Progress(f"checking {name}")
    waiting: list[Example] = []
    for rank, source in enumerate(sources):
        first = 2 if source.options.get("header", False) else 1
        for line, attempt in enumerate(read_attempts(source, task), start=first):
            progress.add(1)
            if isinstance(attempt, DataError):
                scan.report.unreadable.add(scan.name_line(rank, line), str(attempt))
                continue
            scan.add(rank, line, attempt)
            if exact or scan.report.examples <= _SAMPLE:
                waiting.append(attempt)
            if len(waiting) >= 1000:
                _count_tokens(scan, waiting, tokenizer, exact)
                waiting = []
    _count_tokens(scan, waiting, tokenizer, exact)
    return scan


def _count_tokens(scan: _Scan, examples: list[Example], tokenizer: Tokenizer, exact: bool) -> None:
    for index, name in enumerate(scan.fields):
        if name in scan.columns:
            texts = [example[index] for example in examples]
            size = sum(len(text.encode("utf-8")) for text in texts)
            scan.add_tokens(name, tokenizer.encode_batch(texts), size, tokenizer if exact else None)


def _overlap(name: str, train: _Scan, other: _Scan) -> Overlap:
    def common(seen: array[int], asked: array[int]) -> Finding:
        finding = Finding()
        found = np.isin(_numbers(asked), _numbers(seen)) & (_numbers(asked) != _BLANK)
        for index in np.flatnonzero(found):
            finding.add(other.place(int(index)))
        return finding

    sides = {
        field: common(train.columns[field].hashes, column.hashes)
        for field, column in other.columns.items()
        if len(other.columns) > 1
    }
    return Overlap(name, common(train.hashes, other.hashes), sides)


def _lengths(values: NDArray[Any]) -> Lengths:
    if len(values) == 0:
        return Lengths(0, 0.0, dict.fromkeys(_QUANTILES, 0.0), [0.0, 1.0], [0])
    quantiles = {name: float(np.quantile(values, share, method="nearest")) for name, share in _QUANTILES.items()}
    # The histogram ends at the 99 % quantile and its last bin takes the rest, so that one long line hides nothing.
    top = max(1.0, quantiles["p99"])
    counts, edges = np.histogram(np.minimum(values, top), bins=min(_BINS, int(top) + 1), range=(0.0, top))
    return Lengths(int(values.sum()), float(values.mean()), quantiles, [float(edge) for edge in edges], counts.tolist())
