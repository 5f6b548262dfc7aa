"""Oracle records: every mixer has one or says why not, tests that made them exist, and what they say is printed."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from trilemma.laws import oracles
from trilemma.laws.oracles import Agreement, shipped_oracles, summary, write_shipped
from trilemma.registry import available_mixers

ROOT = Path(__file__).parents[2]
ONE = Agreement("mamba2", "their 1.0 layer", "", "layer", "float32", 2e-7, "tests/a.py::test_a", "2026-01-01", "c0ffee")

# Kernels of torch itself, and two layers that no installed package has: their equations are written out in the tests.
WITHOUT = {"rnn", "lstm", "gru", "conv", "ngram"}


def changed(**values: object) -> Agreement:
    return dataclasses.replace(ONE, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", available_mixers())
def test_every_mixer_has_an_oracle_or_says_why_not(name: str) -> None:
    items = shipped_oracles().get(name, [])
    assert items, "no record: see the fixture agrees in tests/conftest.py"
    assert all(bool(item.oracle) != bool(item.no_oracle) for item in items)
    assert any(item.oracle for item in items) == (name not in WITHOUT)
    known = re.compile(r"[\w-]+ \d+\.\d[\w.]* .+|numbers stored from [\w./-]+@[0-9a-f]{7,}, .+")
    assert all(known.fullmatch(item.oracle) for item in items if item.oracle), "PACKAGE VERSION PART, or stored numbers"


@pytest.mark.parametrize("name", sorted(shipped_oracles()))
def test_a_record_is_of_a_test_that_exists(name: str) -> None:
    assert name in available_mixers()
    for item in shipped_oracles()[name]:
        file, _, function = item.test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), f"record anew: {item.test}"
        assert item.mixer == name
        assert math.isfinite(item.error)
        assert item.date
        assert not item.commit.endswith("changes"), "records are made at a commit"


def test_a_summary_names_the_oracle_and_the_worst_case() -> None:
    items = [ONE, changed(what="gradients", error=3e-6), changed(oracle="other 2.0", error=0.0)]
    assert summary(items) == "agrees with their 1.0 layer to 3.0e-06 (layer, gradients); with other 2.0 exactly (layer)"
    assert summary([changed(oracle="", no_oracle="why")]) == "no outside oracle: why (it agrees to 2.0e-07)"
    assert summary([]) == "no outside oracle: none is recorded"


def test_the_worst_case_of_a_test_replaces_what_it_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracles, "SHIPPED", tmp_path / "oracles.json")
    other = changed(mixer="gla", test="tests/b.py::test_b")
    write_shipped([ONE, changed(what="gone"), other])
    write_shipped([changed(error=5e-7), changed(error=4e-7)])
    assert shipped_oracles() == {"gla": [other], "mamba2": [changed(error=5e-7)]}
