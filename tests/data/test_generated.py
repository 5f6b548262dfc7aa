"""Generated tasks: disjoint splits, the same pairs for the same arguments, right answers."""

from __future__ import annotations

from typing import Any

import pytest
from num2words import num2words

from trilemma.data import generate, generated_names
from trilemma.data.spoken import KINDS
from trilemma.errors import ConfigError, DataError

SMALL: dict[str, dict[str, Any]] = {"numbers": {"limit": 1000}, "copy": {}, "reverse": {}, "associative-recall": {}}


@pytest.mark.parametrize("name", generated_names())
def test_splits_share_no_source(name: str) -> None:
    found = {split: list(generate(name, split, 300, SMALL[name])) for split in ("train", "valid", "test")}
    sources = {split: {source for source, _ in pairs} for split, pairs in found.items()}
    assert all(len(pairs) == 300 for pairs in found.values())
    assert len(sources["valid"]) == len(sources["test"]) == 300
    assert not sources["train"] & (sources["valid"] | sources["test"])
    assert not sources["valid"] & sources["test"]


@pytest.mark.parametrize("name", generated_names())
def test_a_value_stays_in_its_split_whatever_the_seed(name: str) -> None:
    train = {s for seed in range(3) for s, _ in generate(name, "train", 2000, {**SMALL[name], "seed": seed})}
    test = {s for seed in range(3) for s, _ in generate(name, "test", 50, {**SMALL[name], "seed": seed})}
    assert len(train) > 1000 and not train & test


@pytest.mark.parametrize("name", generated_names())
def test_same_arguments_same_pairs(name: str) -> None:
    first, again = (list(generate(name, "train", 50, SMALL[name])) for _ in range(2))
    other = list(generate(name, "train", 50, {**SMALL[name], "seed": 1}))
    assert first == again != other


def test_ordinals_and_years_keep_the_split_of_the_number() -> None:
    """Else a test cardinal would be a training ordinal."""
    options = {"limit": 2000, "kinds": ["cardinal"]}
    test = {german for _, german in generate("numbers", "test", None, options)}
    trained = {target for _, target in generate("numbers", "train", 1500, {"limit": 2000, "kinds": ["year"]})}
    values = {value for value in range(1100, 2000) if num2words(value, lang="de") in test}
    years = {f"das Jahr {num2words(value, lang='de', to='year')}" for value in values}
    assert values and not years & trained


def test_cardinals_cover_their_range_and_are_right() -> None:
    options = {"kinds": ["cardinal"], "limit": 1000}
    pairs = [pair for split in ("train", "valid", "test") for pair in generate("numbers", split, None, options)]
    assert sorted(pairs) == sorted((num2words(v, lang="en"), num2words(v, lang="de")) for v in range(1000))


GOLDEN = [
    ("cardinal", 6835, False, "six thousand, eight hundred and thirty-five", "sechstausendachthundertfünfunddreißig"),
    ("cardinal", 6835, True, "6,835", "sechstausendachthundertfünfunddreißig"),
    ("ordinal", 813, False, "eight hundred and thirteenth", "achthundertdreizehnte"),
    ("ordinal", 813, True, "813th", "achthundertdreizehnte"),
    ("year", 1959, False, "the year nineteen fifty-nine", "das Jahr neunzehnhundertneunundfünfzig"),
    ("date", 59, False, "the first of March nineteen hundred", "der erste März neunzehnhundert"),
    ("date", 59, True, "March 1, 1900", "der erste März neunzehnhundert"),
    ("time", 0, True, "12:00 a.m.", "null Uhr"),
    ("time", 65, False, "one oh five a.m.", "ein Uhr fünf"),
    ("time", 1439, False, "eleven fifty-nine p.m.", "dreiundzwanzig Uhr neunundfünfzig"),
    ("money", 1707, True, "€17.07", "siebzehn Euro und sieben Cent"),
]


@pytest.mark.parametrize(("kind", "value", "digits", "english", "german"), GOLDEN)
def test_known_pairs(kind: str, value: int, digits: bool, english: str, german: str) -> None:
    assert KINDS[kind].speak(value=value, digits=digits) == (english, german)


def test_training_pairs_repeat_where_values_run_out_and_test_pairs_do_not() -> None:
    options = {"kinds": ["cardinal"], "limit": 100}
    assert len(list(generate("numbers", "train", 500, options))) == 500
    with pytest.raises(DataError, match=r"test has only . different values, not 50"):
        list(generate("numbers", "test", 50, options))
    with pytest.raises(DataError, match='"copy": valid has only'):
        list(generate("copy", "valid", 900, {"symbols": 2, "min_length": 1, "max_length": 4}))


def test_lists_and_recall_are_right() -> None:
    for source, target in generate("reverse", "train", 20, {"min_length": 3, "max_length": 5}):
        assert source.split() == target.split()[::-1] and 3 <= len(source.split()) <= 5
    assert all(source == target for source, target in generate("copy", "train", 20))
    for source, target in generate("associative-recall", "train", 20, {"pairs": 5}):
        shown, key = source.split(" ? ")
        words = shown.split()
        assert len(words) == 10 and dict(zip(words[::2], words[1::2], strict=True))[key] == target


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("number", {}, 'unknown generated task "number"; did you mean "numbers"'),
        ("numbers", {"kind": []}, 'unknown option "kind"; did you mean "kinds"'),
        ("numbers", {"kinds": ["cardinals"]}, 'unknown kind "cardinals"; did you mean "cardinal"'),
        ("numbers", {"kinds": []}, "kinds: a list of names is needed"),
        ("numbers", {"limit": "10"}, "limit: an integer from 100"),
        ("numbers", {"form": "word"}, 'unknown form "word"; did you mean "words"'),
        ("copy", {"symbols": 1}, "symbols: an integer from 2 to 26 is needed, found 1"),
        ("copy", {"seed": True}, "seed: an integer"),
    ],
)
def test_wrong_options_name_the_nearest(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(generate(name, "train", 1, options))
    with pytest.raises(ConfigError, match='unknown split "tests"'):
        generate("copy", "tests")
