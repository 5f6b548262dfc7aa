"""Embedded tasks: pairs that are made, not downloaded, any number of them, from a seed.

"numbers": English to German spoken numbers, ordinals, years, dates, times and money. "copy", "reverse": lists of
letters.
"associative-recall": keys with values, then one key again; its value is the answer (Graves et al. 2014, "Neural Turing
Machines", section 4.3; in the form of Arora et al. 2023, "Zoology").

No value of one split occurs in another: a hash of the value, not the seed, decides its split (90 % train, 5 % valid,
5 % test).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from trilemma.data.order import integers, uniform
from trilemma.data.spoken import NUMBER_OPTIONS, spoken_pairs
from trilemma.errors import ConfigError, DataError, nearest

GENERATOR_VERSION = 1
SPLITS = ("train", "valid", "test")
DEFAULT_SIZES = {"train": 20_000, "valid": 1_000, "test": 1_000}
Pair = tuple[str, str]

_LETTERS = [chr(ord("a") + index) for index in range(26)]
_LIST_OPTIONS = ("min_length", "max_length", "symbols")
_RECALL_OPTIONS = ("pairs", "keys", "values")


def generated_names() -> list[str]:
    """Names of the embedded tasks."""
    return sorted(_TASKS)


def generate(name: str, split: str, size: int | None = None, options: dict[str, Any] | None = None) -> Iterator[Pair]:
    """Pairs (source, target) of an embedded task, in a shuffled order.

    Args:
        name: one of `generated_names()`.
        split: "train", "valid" or "test".
        size: number of pairs; None: every value of the split once, at most `DEFAULT_SIZES[split]`. Training pairs
            repeat where more are asked for than there are values.
        options: for all tasks `seed` (0): decides which values are taken and their order, never their split.
            "numbers": `kinds` (list), `limit` (largest number, exclusive), `form` (words or digits on the English
            side); "copy", "reverse": `min_length`, `max_length`, `symbols`; "associative-recall": `pairs`, `keys`,
            `values`.

    Raises:
        ConfigError: unknown name, split or option.
        DataError: valid or test has fewer values than `size`.
    """
    options = options or {}
    if name not in _TASKS:
        raise ConfigError(f'unknown generated task "{name}"{nearest(name, _TASKS)}')
    if split not in SPLITS:
        raise ConfigError(f'unknown split "{split}"{nearest(split, SPLITS)}')
    make, known = _TASKS[name]
    for option in options:
        if option not in ("seed", *known):
            raise ConfigError(f'generated task "{name}": unknown option "{option}"{nearest(option, ("seed", *known))}')
    return make(split, size, _number(options, "seed", 0, 0, 2**63 - 1), options)


def _number(options: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = options.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"generated task: option {name}: an integer from {low} to {high} is needed, found {value!r}")
    return value


def _split_of(text: str) -> str:
    bucket = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()[0] % 20
    return "test" if bucket == 0 else "valid" if bucket == 1 else "train"


def _sampled(split: str, size: int | None, draw: Callable[[int], Pair | None], name: str) -> Iterator[Pair]:
    """Draws by counter until `size` pairs of the split are found; valid and test never repeat a source."""
    wanted = DEFAULT_SIZES[split] if size is None else size
    seen: set[str] = set()
    counter = found = misses = 0
    while found < wanted:
        pair = draw(counter)
        counter += 1
        if pair is None or (split != "train" and pair[0] in seen):
            misses += 1
            if misses > 20_000:
                if size is None and found:
                    return
                raise DataError(f'generated task "{name}": {split} has only {found} different examples, not {wanted}')
            continue
        if split != "train":
            seen.add(pair[0])
        found, misses = found + 1, 0
        yield pair


def _lists(task: str) -> Callable[[str, int | None, int, dict[str, Any]], Iterator[Pair]]:
    def make(split: str, size: int | None, seed: int, options: dict[str, Any]) -> Iterator[Pair]:
        symbols = _number(options, "symbols", 26, 2, 26)
        low = _number(options, "min_length", 4, 1, 10_000)
        high = _number(options, "max_length", 16, low, 10_000)

        def draw(counter: int) -> Pair | None:
            length = low + int(integers(seed, f"{task}.length", counter, 1, high - low + 1)[0])
            items = [_LETTERS[index] for index in integers(seed, f"{task}.items", counter, length, symbols)]
            source = " ".join(items)
            if _split_of(source) != split:
                return None
            return source, source if task == "copy" else " ".join(reversed(items))

        return _sampled(split, size, draw, task)

    return make


def _associative_recall(split: str, size: int | None, seed: int, options: dict[str, Any]) -> Iterator[Pair]:
    pairs = _number(options, "pairs", 6, 1, 10_000)
    keys = _number(options, "keys", max(26, pairs), pairs, 100_000)
    values = _number(options, "values", 10, 2, 100_000)

    def draw(counter: int) -> Pair | None:
        order = uniform(seed, "recall.keys", counter, keys).argsort(kind="stable")[:pairs]
        chosen = integers(seed, "recall.values", counter, pairs, values)
        asked = int(integers(seed, "recall.query", counter, 1, pairs)[0])
        names = [_LETTERS[key] if keys <= 26 else f"k{key}" for key in order]
        shown = " ".join(f"{name} {value}" for name, value in zip(names, chosen, strict=True))
        source = f"{shown} ? {names[asked]}"
        return (source, str(chosen[asked])) if _split_of(source) == split else None

    return _sampled(split, size, draw, "associative-recall")


def _numbers(split: str, size: int | None, seed: int, options: dict[str, Any]) -> Iterator[Pair]:
    return spoken_pairs(split, size, DEFAULT_SIZES[split], seed, options)


_Maker = Callable[[str, int | None, int, dict[str, Any]], Iterator[Pair]]
_TASKS: dict[str, tuple[_Maker, tuple[str, ...]]] = {
    "numbers": (_numbers, NUMBER_OPTIONS),
    "copy": (_lists("copy"), _LIST_OPTIONS),
    "reverse": (_lists("reverse"), _LIST_OPTIONS),
    "associative-recall": (_associative_recall, _RECALL_OPTIONS),
}
