"""English-German spoken numbers, ordinals, years, dates, times and money, from num2words and Babel.

Both are imported where they are used: every command imports this room, hardly one needs them.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trilemma.data.order import Indices, hash_values, permutation
from trilemma.errors import ConfigError, DataError, nearest

NUMBER_OPTIONS = ("kinds", "limit", "form")
FORMS = ("words", "digits")
_DEFAULT_LIMIT = 10_000
_LARGEST_LIMIT = 10_000_000
_EPOCH = datetime.date(1900, 1, 1)
_DAYS = (datetime.date(2100, 1, 1) - _EPOCH).days


class _Speak(Protocol):
    def __call__(self, value: int, digits: bool) -> tuple[str, str]: ...


@dataclass(frozen=True)
class _Kind:
    """Values first <= value < last; `family`: kinds that share one split of their values."""

    first: int
    last: int | None  # None: the option `limit`
    family: str
    speak: _Speak


def _words(value: int, language: str, to: str = "cardinal") -> str:
    from num2words import num2words

    return str(num2words(value, lang=language, to=to))


def _euros(amount: float, language: str) -> str:
    from num2words import num2words

    return str(num2words(amount, lang=language, to="currency", currency="EUR"))


def _cardinal(value: int, digits: bool) -> tuple[str, str]:
    from babel.numbers import format_decimal

    english = format_decimal(value, locale="en") if digits else _words(value, "en")
    return english, _words(value, "de")


def _ordinal(value: int, digits: bool) -> tuple[str, str]:
    return _words(value, "en", "ordinal_num" if digits else "ordinal"), _words(value, "de", "ordinal")


def _year(value: int, digits: bool) -> tuple[str, str]:
    return f"the year {value if digits else _words(value, 'en', 'year')}", f"das Jahr {_words(value, 'de', 'year')}"


def _date(value: int, digits: bool) -> tuple[str, str]:
    from babel.dates import get_month_names

    date = _EPOCH + datetime.timedelta(days=value)
    month_en = get_month_names("wide", locale="en")[date.month]
    month_de = get_month_names("wide", locale="de")[date.month]
    german = f"der {_words(date.day, 'de', 'ordinal')} {month_de} {_words(date.year, 'de', 'year')}"
    if digits:
        return f"{month_en} {date.day}, {date.year}", german
    return f"the {_words(date.day, 'en', 'ordinal')} of {month_en} {_words(date.year, 'en', 'year')}", german


def _time(value: int, digits: bool) -> tuple[str, str]:
    hour, minute = divmod(value, 60)
    half, twelve = ("a.m." if hour < 12 else "p.m."), (hour + 11) % 12 + 1
    spoken_hour = "ein" if hour == 1 else _words(hour, "de")
    german = f"{spoken_hour} Uhr" + (f" {_words(minute, 'de')}" if minute else "")
    if digits:
        return f"{twelve}:{minute:02d} {half}", german
    past = "" if minute == 0 else f" oh {_words(minute, 'en')}" if minute < 10 else f" {_words(minute, 'en')}"
    return f"{_words(twelve, 'en')}{past} {half}", german


def _money(value: int, digits: bool) -> tuple[str, str]:
    from babel.numbers import format_currency

    amount = value / 100
    return format_currency(amount, "EUR", locale="en") if digits else _euros(amount, "en"), _euros(amount, "de")


KINDS: dict[str, _Kind] = {
    "cardinal": _Kind(0, None, "number", _cardinal),
    "ordinal": _Kind(1, None, "number", _ordinal),
    "year": _Kind(1100, 2100, "number", _year),
    "date": _Kind(0, _DAYS, "date", _date),
    "time": _Kind(0, 24 * 60, "time", _time),
    "money": _Kind(0, None, "money", _money),
}


def _values(kind: _Kind, limit: int, split: str) -> Indices:
    """All values of a kind that belong to a split."""
    values = np.arange(kind.first, limit if kind.last is None else kind.last, dtype=np.int64)
    bucket = hash_values(values, kind.family) % np.uint64(20)
    wanted = {"test": bucket == 0, "valid": bucket == 1, "train": bucket >= 2}[split]
    return np.asarray(values[wanted])


def _read_options(options: dict[str, Any]) -> tuple[list[str], int, bool]:
    kinds = options.get("kinds", list(KINDS))
    if not isinstance(kinds, list) or not kinds:
        raise ConfigError(f"numbers: kinds: a list of names is needed; valid: {', '.join(KINDS)}")
    for name in kinds:
        if name not in KINDS:
            raise ConfigError(f'numbers: unknown kind "{name}"{nearest(str(name), KINDS)}')
    limit = options.get("limit", _DEFAULT_LIMIT)
    if not isinstance(limit, int) or isinstance(limit, bool) or not 100 <= limit <= _LARGEST_LIMIT:
        raise ConfigError(f"numbers: limit: an integer from 100 to {_LARGEST_LIMIT:,} is needed, found {limit!r}")
    form = options.get("form", "words")
    if form not in FORMS:
        raise ConfigError(f'numbers: unknown form "{form}"{nearest(str(form), FORMS)}')
    return list(dict.fromkeys(kinds)), limit, form == "digits"


def _shares(available: list[int], size: int, repeat: bool) -> list[int]:
    """How many examples each kind gives: equal shares; what a small kind lacks, the others give, unless it may
    repeat."""
    if repeat:
        return [size // len(available) + (rank < size % len(available)) for rank in range(len(available))]
    shares = [0] * len(available)
    for left in range(len(available), 0, -1):  # smallest kinds first
        rank = sorted(range(len(available)), key=lambda index: (available[index], index))[len(available) - left]
        shares[rank] = min(available[rank], (size - sum(shares)) // left)
    return shares


def spoken_pairs(
    split: str, size: int | None, default_size: int, seed: int, options: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """Pairs (English, German) of the asked kinds; see `trilemma.data.generated.generate`."""
    kinds, limit, digits = _read_options(options)
    pools = [_values(KINDS[name], limit, split) for name in kinds]
    available = [len(pool) for pool in pools]
    wanted = min(sum(available), default_size) if size is None else size
    if split != "train" and wanted > sum(available):
        raise DataError(f'generated task "numbers": {split} has only {sum(available)} different values, not {wanted}')
    shares = _shares(available, wanted, repeat=wanted > sum(available))
    ranks, values = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for rank, (pool, share) in enumerate(zip(pools, shares, strict=True)):
        for turn in range(-(-share // len(pool))):
            order = permutation(seed, f"numbers.{kinds[rank]}.{split}", turn, len(pool))
            values.append(pool[order[: share - turn * len(pool)]])
            ranks.append(np.full(len(values[-1]), rank))
    all_ranks, all_values = np.concatenate(ranks), np.concatenate(values)
    for index in permutation(seed, f"numbers.{split}", 0, len(all_values)):
        yield KINDS[kinds[all_ranks[index]]].speak(value=int(all_values[index]), digits=digits)
