"""Probes: their papers' rules and statistics, answers found another way, splits, the same rows from the same seed."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilemma.config import RunConfig, parse
from trilemma.data import IGNORE, build_probe, prepare, probe_names
from trilemma.data.order import Draws
from trilemma.data.probes.base import Example, Probe
from trilemma.data.probes.states import group_table
from trilemma.errors import CapabilityError, ConfigError, DataError

SMALL: dict[str, dict[str, Any]] = {
    "mqar": {"length": 16, "pairs": 2, "vocab_size": 64},
    "induction": {"length": 24},
    "needle": {"length": 40, "needles": 2, "digits": 3},
    "fuzzy-recall": {"length": 40},
    "copying": {"min_length": 5, "max_length": 8},
    "prefix-ngram": {"min_length": 6, "max_length": 10, "answer": 2},
    "suffix-ngram": {"min_length": 6, "max_length": 10},
    "selective-copying": {"length": 32, "tokens": 5},
    "compression": {"length": 8},
    "parity": {"min_length": 12, "max_length": 20},
    "modular-arithmetic": {"min_length": 8, "max_length": 20},
    "modular-arithmetic-brackets": {"min_length": 8, "max_length": 20},
    "word-problem": {"group": "S3"},
    "listops": {"min_length": 8, "max_length": 40, "max_depth": 3, "max_arguments": 4},
}


def rows(probe: Probe, count: int) -> list[Example]:
    return [probe.draw(Draws(probe.seed, "test", at)) for at in range(count)]


def shown(probe: Probe, example: Example) -> tuple[str, str]:
    """Tokens and labels as text; `_` where nothing is scored."""
    symbols = probe.symbols()
    labels = ["_" if label == IGNORE else symbols[label] for label in example.labels]
    return " ".join(symbols[token] for token in example.tokens), " ".join(labels)


# --- all --------------------------------------------------------------------------------------------------------------


def test_every_probe_is_tested() -> None:
    assert sorted(SMALL) == probe_names()


@pytest.mark.parametrize("name", probe_names())
def test_rows_and_labels_are_of_the_vocabulary(name: str) -> None:
    probe = build_probe(name, SMALL[name])
    symbols = probe.symbols()
    assert len(set(symbols)) == len(symbols)
    assert not any(re.search(r"\s|^_$|^$", symbol) for symbol in symbols)
    assert 0 < probe.chance() < 1
    for example in rows(probe, 50):
        scored = example.labels[example.labels != IGNORE]
        assert example.tokens.shape == example.labels.shape
        assert len(scored)
        for values in (example.tokens, scored):
            assert values.min() >= 0
            assert values.max() < len(symbols)


@pytest.mark.parametrize("name", probe_names())
def test_splits_share_no_row_and_seeds_change_the_rows(name: str) -> None:
    def texts(split: str, seed: int) -> list[bytes]:
        probe = build_probe(name, {**SMALL[name], "seed": seed})
        return [example.tokens.tobytes() + example.labels.tobytes() for example in probe.examples(split, 30)]

    found = {split: {text for seed in range(2) for text in texts(split, seed)} for split in ("train", "valid", "test")}
    assert not found["train"] & (found["valid"] | found["test"])
    assert not found["valid"] & found["test"]
    assert len(set(texts("test", 0))) == 30
    assert texts("train", 0) == texts("train", 0) != texts("train", 1)


def test_a_split_that_holds_too_few_rows_says_so() -> None:
    probe = build_probe("parity", {"min_length": 3, "max_length": 4})
    with pytest.raises(DataError, match=r'probe "parity": test has only \d different rows, not 50'):
        list(probe.examples("test", 50))
    assert len(list(probe.examples("train", 50))) == 50


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mqarr", {}, 'unknown probe "mqarr"; did you mean "mqar"'),
        ("mqar", {"lenght": 3}, 'probe "mqar": unknown key "lenght"; did you mean "length"'),
        ("mqar", {"length": 64, "pairs": 17}, "17 pairs, shown and asked for, need a length of 68"),
        ("mqar", {"length": 63}, "length 63 must be even"),
        ("mqar", {"vocab_size": 8}, "vocab_size 8 has only 3 keys"),
        ("needle", {"needles": 20}, "20 needles need as many keys, found 16"),
        ("needle", {"length": 12, "digits": 5}, "length 12 leaves no room"),
        ("fuzzy-recall", {"vocab_size": 8, "key_size": 4}, "too small for motifs"),
        ("copying", {"min_length": 9, "max_length": 8}, "min_length 9 is above max_length 8"),
        ("copying", {"context": 43}, "context 43 does not hold a string of 20 letters twice"),
        ("prefix-ngram", {"answer": 2}, r"min_length 5 must be above size \+ answer"),
        ("selective-copying", {"length": 32}, "16 tokens, shown and answered, need a length of 33"),
        ("modular-arithmetic", {"min_length": 3, "max_length": 3}, "no even length from 3 to 3"),
        ("modular-arithmetic", {"operators": "/"}, "operators"),
        ("word-problem", {"group": "S9"}, '"S9" is no group'),
        ("word-problem", {"group": "A5xB2"}, '"B2" is no group'),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_probe(name, options)


# --- recall -----------------------------------------------------------------------------------------------------------


@given(data=st.data(), seed=st.integers(0, 2**31))
def test_mqar_keeps_zoologys_rules(data: st.DataObject, seed: int) -> None:
    pairs = data.draw(st.integers(1, 12))
    length = 4 * pairs + 2 * data.draw(st.integers(0, 20))
    vocabulary = data.draw(st.integers(2 * pairs + 2, 300))
    vocabulary = max(8, vocabulary)
    power, fillers = data.draw(st.sampled_from([0.01, 1.0])), data.draw(st.booleans())
    options = {"length": length, "pairs": pairs, "vocab_size": vocabulary, "power": power, "random_fillers": fillers}
    example = build_probe("mqar", options).draw(Draws(seed, "test", 0))
    keys, values = example.tokens[0 : 2 * pairs : 2], example.tokens[1 : 2 * pairs : 2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert keys.min() >= 1
    assert keys.max() < vocabulary // 2 <= values.min()
    asked = np.flatnonzero(example.labels != IGNORE)
    assert len(asked) == pairs, "every key is asked for once"
    assert (asked >= 2 * pairs).all()
    assert (asked % 2 == 0).all()
    shown_pairs = dict(zip(keys.tolist(), values.tolist(), strict=True))
    assert {int(example.tokens[at]): int(example.labels[at]) for at in asked} == shown_pairs
    if not fillers:
        others = np.setdiff1d(np.arange(2 * pairs, length), asked)
        assert (example.tokens[others] == 0).all()


def test_mqar_by_hand() -> None:
    """Zoology's own illustration: two keys, asked for at places 6 and 12."""
    probe = build_probe("mqar", {"length": 16, "pairs": 2, "vocab_size": 12, "random_fillers": False})

    class Given(Draws):
        def __init__(self) -> None:
            self.answers = [[1, 3], [2, 1], [1, 4]]  # keys less 1, values less 6, gaps of the keys 2 and 4

        def sample(self, count: int, bound: int) -> Any:
            return np.array(self.answers.pop(0))

        def weighted_sample(self, count: int, weights: Any) -> Any:
            assert len(weights) == 6
            return self.sample(count, len(weights))

    tokens, labels = shown(probe, probe.draw(Given()))
    assert tokens == "2 8 4 7 0 0 2 0 0 0 0 0 4 0 0 0"
    assert labels == "_ _ _ _ _ _ 8 _ _ _ _ _ 7 _ _ _"


def test_gaps_follow_the_power_law() -> None:
    """P(first gap = j) ~ j^(a - 1); without repetition P(j among two) = p_j + sum over i of p_i p_j / (1 - p_i)."""
    probe = build_probe("mqar", {"length": 40, "pairs": 2, "vocab_size": 64, "random_fillers": False})
    weights = np.arange(1, 19) ** (0.01 - 1)
    p = weights / weights.sum()
    first, among = np.zeros(18), np.zeros(18)
    count = 6000
    for example in rows(probe, count):
        places = [np.flatnonzero(example.tokens == key)[1] for key in example.tokens[[0, 2]]]
        gaps = [(int(place) - 4) // 2 for place in places]
        first[gaps[0]] += 1
        among[gaps] += 1
    both = p + np.array([sum(p[i] * p[j] / (1 - p[i]) for i in range(18) if i != j) for j in range(18)])
    for found, expected in ((first, p), (among, both)):
        deviation = (found - count * expected) / np.sqrt(count * expected * (1 - expected))
        assert np.abs(deviation).max() < 4


def test_fillers_are_drawn_from_the_whole_vocabulary() -> None:
    probe = build_probe("mqar", {"length": 64, "pairs": 2, "vocab_size": 16})
    fillers = Counter(
        int(t) for e in rows(probe, 300) for t, lab in zip(e.tokens[4:], e.labels[4:], strict=True) if lab < 0
    )
    assert set(fillers) == set(range(16))
    assert max(fillers.values()) / min(fillers.values()) < 1.4


def test_mamba2s_form_asks_at_every_place() -> None:
    example = rows(build_probe("mqar", {"length": 64, "pairs": 16, "vocab_size": 8192}), 1)[0]
    assert np.flatnonzero(example.labels != IGNORE).tolist() == list(range(32, 64, 2))


def test_induction_asks_for_what_followed_the_marker() -> None:
    probe = build_probe("induction", {"length": 12})
    places = Counter()
    for example in rows(probe, 2000):
        first, last = np.flatnonzero(example.tokens == 15)
        assert last == 11
        assert np.flatnonzero(example.labels != IGNORE).tolist() == [11]
        assert example.labels[11] == example.tokens[first + 1]
        places[int(first)] += 1
    assert set(places) == set(range(10)), "the marker may stand anywhere before the last two"


def test_a_needle_is_asked_for_by_its_key() -> None:
    probe = build_probe("needle", {"length": 60, "needles": 3, "digits": 4, "keys": 5, "noise": 9})
    depths = []
    for example in rows(probe, 300):
        tokens, labels = shown(probe, example)
        found = dict(re.findall(r"\[key\] (k\d+) (\d \d \d \d)", tokens))
        assert len(found) == 3
        asked, digits = re.fullmatch(r".*\[ask\] (k\d+)((?: \d){3})", tokens).groups()  # type: ignore[union-attr]
        assert found[asked].startswith(digits.strip())
        assert labels.split()[-4:] == found[asked].split()
        assert set(labels.split()[:-4]) == {"_"}
        assert len(example.tokens) == 60
        depths.append(tokens.split().index("[key]"))
    assert min(depths) == 0
    assert max(depths) > 15


@given(seed=st.integers(0, 2**31), longest=st.booleans())
def test_fuzzy_recall_scores_values_of_keys_seen_before(seed: int, longest: bool) -> None:
    probe = build_probe("fuzzy-recall", {"length": 64, "longest_keys": longest})
    tokens, labels = (text.split() for text in shown(probe, probe.draw(Draws(seed, "test", 0))))
    assert len(tokens) == 64
    # a motif is a run of keys or of values; what follows the last token is the end of the answer
    full = [*tokens[next(i for i, t in enumerate(tokens) if t != "[pad]") :], labels[-1]]
    scored = ["_", *labels][len(tokens) + 1 - len(full) :]
    parts = re.findall(r"(?:k\d+ )+(?:v\d+ )+", " ".join(full) + " ")
    assert " ".join(full) + " " == "".join(parts)
    known: dict[tuple[str, ...], list[str]] = {}
    at = 0
    for part in parts:
        words = part.split()
        key = tuple(word for word in words if word[0] == "k")
        value = words[len(key) :]
        assert len(set(words)) == len(words), "no token twice in a motif"
        assert len(key) == 3 or not longest
        given_labels = scored[at : at + len(words)]
        assert given_labels == ["_"] * len(key) + (value if key in known else ["_"] * len(value))
        assert known.setdefault(key, value) == value
        at += len(words)
    assert labels[-1] != "_"


def test_fuzzy_recall_may_score_everything() -> None:
    probe = build_probe("fuzzy-recall", {"length": 64, "score_all": True})
    for example in rows(probe, 10):
        real = example.tokens[1:] != 15
        assert (example.labels[:-1][real] == example.tokens[1:][real]).all()


# --- copying ----------------------------------------------------------------------------------------------------------


def test_copying_by_hand() -> None:
    probe = build_probe("copying", {"min_length": 3, "max_length": 3, "letters": 3})
    for example in rows(probe, 30):
        tokens, labels = shown(probe, example)
        a, b, c = re.fullmatch(r"\$ (\w) (\w) (\w) \| \1 \2 \3", tokens).groups()  # type: ignore[union-attr]
        assert labels == f"_ _ _ _ {a} {b} {c} ."


def test_a_filled_context_holds_one_text_after_another() -> None:
    probe = build_probe("copying", {"min_length": 3, "max_length": 9, "context": 60})
    for example in rows(probe, 30):
        tokens, labels = shown(probe, example)
        assert len(example.tokens) == 59
        whole = list(re.finditer(r"\$ ([\w ]+) \| \1 \.", tokens))
        assert len(whole) >= 2
        assert labels.count(".") in (len(whole), len(whole) + 1), "the last full stop may be the token after the row"
        for found in whole:
            first = len(tokens[: found.start()].split())
            string = found[1].split()
            expected = ["_"] * (len(string) + 1) + [*string, "."]
            assert labels.split()[first : first + len(expected)] == expected


@pytest.mark.parametrize("name", ["prefix-ngram", "suffix-ngram"])
@pytest.mark.parametrize("answer", [None, 2])
def test_ngrams_are_looked_up(name: str, answer: int | None) -> None:
    options = {"min_length": 8, "max_length": 12, "size": 2, "letters": 4, "answer": answer}
    probe = build_probe(name, options)
    for example in rows(probe, 200):
        tokens, labels = shown(probe, example)
        if name == "prefix-ngram":
            gram, string, said = re.fullmatch(r"\$ (\w \w) \| ([\w ]+) \|([\w ]*)", tokens).groups()  # type: ignore[union-attr]
        else:
            string, gram, said = re.fullmatch(r"\$ ([\w ]+) \| (\w \w)([\w ]*)", tokens).groups()  # type: ignore[union-attr]
        windows = [string[at : at + 3] for at in range(0, len(string) - 2, 2)]
        assert windows.count(gram) == 1
        after = string[string.index(gram) + 4 :].split()
        after = after if answer is None else after[:answer]
        assert after
        assert said.split() == after
        assert labels.split()[-len(after) - 1 :] == [*after, "."]
        assert set(labels.split()[: -len(after) - 1]) == {"_"}


@pytest.mark.parametrize("form", ["mad", "mamba"])
def test_selective_copying_keeps_the_order(form: str) -> None:
    probe = build_probe("selective-copying", {"length": 40, "tokens": 5, "vocab_size": 8, "form": form})
    for example in rows(probe, 200):
        tokens, labels = (text.split() for text in shown(probe, example))
        assert len(tokens) == 40
        assert [token for token in tokens if token.isdecimal()] == labels[-5:]
        assert set(labels[:-5]) == {"_"}
        if form == "mad":
            assert tokens[-6:] == ["[copy]", *["."] * 5]
            assert tokens[-7].isdecimal(), "blanks are put before data tokens"
        else:
            assert tokens[-5:] == ["[copy]"] * 5
            assert "[copy]" not in tokens[:-5]


def test_blanks_are_spread_evenly() -> None:
    """MAD inserts each blank before a random data token, Mamba chooses places: both are uniform, in their own way."""
    mad = [
        np.flatnonzero(e.tokens < 14)[0]
        for e in rows(build_probe("selective-copying", {"length": 73, "tokens": 16}), 3000)
    ]
    assert np.mean(mad) == pytest.approx(40 / 16, abs=0.15)
    options = {"length": 72, "tokens": 16, "form": "mamba"}
    mamba = np.mean([(e.tokens[:-16] < 14) for e in rows(build_probe("selective-copying", options), 3000)], axis=0)
    assert mamba.min() > 16 / 56 - 0.04
    assert mamba.max() < 16 / 56 + 0.04


def test_compression_asks_for_every_token() -> None:
    for example in rows(build_probe("compression", {"length": 6}), 20):
        assert (example.tokens[6:] == 15).all()
        assert (example.labels[6:] == example.tokens[:6]).all()
        assert (example.labels[:6] == IGNORE).all()


# --- states -----------------------------------------------------------------------------------------------------------


def test_parity_counts() -> None:
    for labels in ("last", "all"):
        probe = build_probe("parity", {"labels": labels})
        for example in rows(probe, 100):
            bits = example.tokens.tolist()
            assert 3 <= len(bits) <= 40
            expected = [sum(bits[: at + 1]) % 2 for at in range(len(bits))]
            if labels == "last":
                expected[:-1] = [IGNORE] * (len(bits) - 1)
            assert example.labels.tolist() == expected
    lengths = Counter(len(example.tokens) for example in rows(build_probe("parity"), 4000))
    assert set(lengths) == set(range(3, 41))
    assert max(lengths.values()) < 2.2 * min(lengths.values())


@pytest.mark.parametrize("name", ["modular-arithmetic", "modular-arithmetic-brackets"])
def test_arithmetic_is_pythons(name: str) -> None:
    options = {"multiply": True} if name.endswith("brackets") else {}
    probe = build_probe(name, {"min_length": 4, "max_length": 30, **options})
    seen = Counter()
    for example in rows(probe, 400):
        tokens, labels = shown(probe, example)
        assert 4 <= len(example.tokens) <= 30
        expression = tokens.replace(" ", "")
        assert expression.endswith("=")
        assert labels.split()[:-1] == ["_"] * (len(example.tokens) - 1)
        assert int(labels.split()[-1]) == eval(expression[:-1]) % 5  # noqa: S307 - digits and operators
        seen.update(expression)
    assert {"+", "-", "*"} <= set(seen)
    assert {str(n) for n in range(5)} <= set(seen)


def test_operators_are_those_that_were_asked_for() -> None:
    symbols = {s for e in rows(build_probe("modular-arithmetic", {"operators": "*-"}), 50) for s in e.tokens.tolist()}
    assert symbols == {0, 1, 2, 3, 4, 6, 7, 8}
    brackets = build_probe("modular-arithmetic-brackets")
    assert not any("*" in shown(brackets, example)[0] for example in rows(brackets, 50))


def test_groups_are_groups() -> None:
    for name, order, commutes in (
        ("S3", 6, False),
        ("A5", 60, False),
        ("Z7", 7, True),
        ("A4xZ5", 60, False),
        ("S5", 120, False),
    ):
        table = group_table(name)
        size = len(table)
        assert size == order
        assert (table[0] == np.arange(size)).all(), "0 is the identity"
        assert (table[:, 0] == np.arange(size)).all()
        assert all(len(set(row)) == size for row in (*table, *table.T))
        some = np.random.default_rng(0).integers(size, size=(3, 500))
        assert (table[table[some[0], some[1]], some[2]] == table[some[0], table[some[1], some[2]]]).all()
        assert bool((table == table.T).all()) is commutes


def test_word_problems_multiply_from_the_left() -> None:
    """S3 in lexicographic order: 1 is (0 2 1), 2 is (1 0 2). First 1, then 2: i -> 2[1[i]] = (1 2 0), which is 3."""
    assert group_table("S3")[1, 2] == 3
    assert group_table("S3")[2, 1] == 4
    probe = build_probe("word-problem", {"group": "S5", "min_length": 4, "max_length": 9})
    for example in rows(probe, 50):
        product = 0
        for element, label in zip(example.tokens, example.labels, strict=True):
            product = group_table("S5")[product, element]
            assert label == product


def test_swaps_make_the_whole_group() -> None:
    """Grazzi's S5 with swaps only: eleven elements are multiplied, all 120 are answers."""
    table = group_table("S5")
    probe = build_probe("word-problem", {"moved": 2, "min_length": 30, "max_length": 30})
    tokens = {int(t) for e in rows(probe, 50) for t in e.tokens}
    assert len(tokens) == 1 + 10
    assert all(table[token, token] == 0 for token in tokens), "a swap undoes itself"
    assert len({int(lab) for e in rows(probe, 200) for lab in e.labels}) == 120
    assert (
        len({int(t) for e in rows(build_probe("word-problem", {"group": "A5", "moved": 3}), 50) for t in e.tokens})
        == 21
    )
    for options, message in (
        ({"group": "Z7", "moved": 2}, "moved is for permutations"),
        ({"group": "A5", "moved": 2}, "no element"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_probe("word-problem", options)


def value_of(tokens: list[str]) -> int:
    """ListOps read from the inside out."""
    operators = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(statistics.median(v)), "[SM": lambda v: sum(v) % 10}
    text = list(tokens)
    while "]" in text:
        end = text.index("]")
        start = max(at for at in range(end) if text[at].startswith("["))
        text[start : end + 1] = [str(operators[text[start]]([int(word) for word in text[start + 1 : end]]))]
    assert len(text) == 1
    return int(text[0])


def test_listops_are_right() -> None:
    assert value_of(["[MAX", "4", "3", "[MIN", "2", "3", "]", "1", "0", "]"]) == 4
    assert value_of(["[SM", "9", "8", "[MED", "1", "4", "]", "]"]) == 9
    probe = build_probe("listops", {"min_length": 10, "max_length": 60, "max_depth": 5, "max_arguments": 4})
    operators = Counter()
    for example in rows(probe, 200):
        tokens, labels = (text.split() for text in shown(probe, example))
        assert 10 <= len(tokens) <= 60
        assert labels == ["_"] * (len(tokens) - 1) + [str(value_of(tokens))]
        depths = np.cumsum([word.startswith("[") - (word == "]") for word in tokens])
        assert depths.max() <= 4, "digits stand at depth 5"
        operators.update(word for word in tokens if word.startswith("["))
    assert len(operators) == 4


# --- as data ----------------------------------------------------------------------------------------------------------


def config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "data": {
            "task": "probe",
            "train": {"generated": "mqar", "size": 64, "options": SMALL["mqar"]},
            "valid": {"generated": "mqar", "size": 16, "options": SMALL["mqar"]},
            "test": {"generated": "mqar", "size": 16, "options": {**SMALL["mqar"], "length": 32}},
        },
        "tokenizer": {"kind": "task"},
        "model": {"layout": "decoder-only"},
        "training": {"batch_tokens": 256, "steps": 1},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = {**values[section], name: value}
    return parse(RunConfig, values)


def test_batches_hold_the_rows_and_score_labels_only(tmp_path: Path) -> None:
    dataset, tokenizer = prepare(config(), cache_dir=tmp_path)
    batch = dataset.micro_batch(0)
    assert batch.inputs.shape == (16, 16)
    assert batch.num_targets == 32
    assert batch.prefix is None
    assert tokenizer.vocab_size == 64 + 6
    probe = build_probe("mqar", SMALL["mqar"])
    drawn = list(probe.examples("train", 64))
    for row, example in enumerate(batch.examples):
        tokens = torch.from_numpy(drawn[example].tokens) + 6
        labels = torch.from_numpy(drawn[example].labels)
        assert torch.equal(batch.inputs[row], tokens)
        assert torch.equal(batch.labels[row], torch.where(labels == IGNORE, labels, labels + 6))
    assert [b.inputs.shape[1] for b in dataset.eval_batches("test")] == [32, 32]
    sources, labels_text = dataset.eval_texts("test")
    assert tokenizer.encode(sources[0]) == (next(probe_rows(32)).tokens + 6).tolist()
    assert len(labels_text[0].split()) == 32
    again, _ = prepare(config(), cache_dir=tmp_path)
    assert again.data_hash == dataset.data_hash


def probe_rows(length: int) -> Any:
    return build_probe("mqar", {**SMALL["mqar"], "length": length}).examples("test", 16)


def test_rows_of_unequal_length_are_padded(tmp_path: Path) -> None:
    source = {"generated": "parity", "size": 40, "options": {"min_length": 3, "max_length": 9}}
    dataset, tokenizer = prepare(config(data__train=source, data__valid=source, data__test=source), cache_dir=tmp_path)
    batch = dataset.micro_batch(0)
    for row, length in enumerate(batch.lengths.tolist()):
        assert (batch.inputs[row, length:] == tokenizer.pad).all()
        assert (batch.labels[row, length:] == IGNORE).all()
        assert batch.labels[row, length - 1] != IGNORE


def test_a_curriculum_is_a_mixture(tmp_path: Path) -> None:
    """Mamba-2's training set: several numbers of pairs, one vocabulary."""
    sources = [
        {"generated": "mqar", "size": 20, "options": {"length": 32, "pairs": p, "vocab_size": 64}} for p in (1, 2, 4, 8)
    ]
    dataset, _ = prepare(config(data__train=sources), cache_dir=tmp_path)
    pairs = {
        int((labels != IGNORE).sum())
        for k in range(dataset.batches_per_epoch)
        for labels in dataset.micro_batch(k).labels
    }
    assert pairs == {1, 2, 4, 8}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokenizer__kind": "bpe"}, ConfigError, "a probe has its own vocabulary, set kind: task"),
        ({"data__train": {"path": "x.txt"}}, ConfigError, "data.task probe is generated"),
        ({"data__test": {"generated": "parity"}}, ConfigError, "data.test: another vocabulary"),
        ({"model__layout": "encoder-decoder"}, CapabilityError, "needs model.layout decoder-only"),
        ({"data__task": "seq2seq"}, ConfigError, "only data.task probe brings a vocabulary"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        prepare(config(**changes), cache_dir=tmp_path)


def test_a_probe_takes_no_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data can be given"):
        prepare(config(), cache_dir=tmp_path, data=["a"])
    text = config(data__task="language-model", data__train={"generated": "copy", "size": 9})
    with pytest.raises(ConfigError, match=r"only data\.task probe brings a vocabulary"):
        prepare(text, cache_dir=tmp_path)
