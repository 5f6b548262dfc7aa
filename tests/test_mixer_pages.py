"""The pages of docs/mixers/ are what docs/mixer_pages.py makes of the code and its records."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from trilemma.registry import available_mixers

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mixer_pages", ROOT / "docs" / "mixer_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", available_mixers())
def test_a_page_is_up_to_date(name: str, generator: ModuleType) -> None:
    stored = ROOT / "docs" / "mixers" / f"{name}.md"
    assert stored.exists(), "run: python docs/mixer_pages.py"
    assert stored.read_text(encoding="utf-8") == generator.page(name), "run: python docs/mixer_pages.py"


def test_the_index_is_up_to_date_and_there_are_no_other_pages(generator: ModuleType) -> None:
    names = available_mixers()
    assert (ROOT / "docs" / "mixers" / "README.md").read_text(encoding="utf-8") == generator.index(names)
    stored = {file.stem for file in (ROOT / "docs" / "mixers").iterdir()}
    assert stored == {"README", *names}


def test_what_has_no_record_reads_not_shown(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "## Speed\n\nnot shown" not in generator.page("attention")
    monkeypatch.setattr(generator, "shipped_records", dict)
    monkeypatch.setattr(generator, "shipped_oracles", dict)
    monkeypatch.setattr(generator, "RESULTS", tmp_path)
    text = generator.page("attention")
    for section in ("Oracle", "Speed", "Studies"):
        assert f"## {section}\n\nnot shown\n" in text
    assert "| all others | not shown |" in text
    assert "| `compile` | not shown |" in text


def test_laws_are_shown_of_this_very_code_alone(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    known = generator.shipped_records()["gru"]
    monkeypatch.setattr(generator, "fingerprint", lambda name, path: known[path]["fingerprint"])
    assert generator.laws_in_short("gru") == "6 of 8"
    text = generator.laws("gru")
    assert "| `split` | holds | 2 |" in text
    assert "| `compile` | says nothing: declared: torch's recurrent kernel" in text
    assert f"code {known['plain']['fingerprint'][:12]}" in text
    monkeypatch.setattr(generator, "fingerprint", lambda name, path: "of another code")
    assert generator.laws_in_short("gru") == "not shown"
    assert "holds" not in generator.laws("gru")


def test_timings_are_shown_by_task(generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = {"case": "mamba3_mimo", "speedup": 1.25, "ours_median": 80.0, "peer_median": 100.0, "field": "ms"}
    growth = {"task": "growth", "field": "us_per_token", "ours": [{"length": 1024}], "peer": [{"length": 8192}]}
    refused = {"case": "mamba3", "task": "step", "speedup": None, "reason": "sizes differ\nby far"}
    rows = [row | {"task": "train"}, row | growth, refused, row | {"case": "mamba", "task": "step"}]
    machine = {"gpu": None, "cpu": "a processor", "threads": 2, "torch": "2.13.0", "commit": "c0ffee"}
    stored = {"rows": rows, "size": {"width": 512}, "environment": machine, "date": "2026-01-02T03:04:05"}
    (tmp_path / "mixers_speed.json").write_text(json.dumps(stored))
    monkeypatch.setattr(generator, "RESULTS", tmp_path)
    text = generator.speed("mamba3")
    assert "| mamba3_mimo, train | 80 ms | 100 ms | 1.25 |" in text
    assert "| mamba3_mimo, growth | 80 us a token at 1,024, 100 at 8,192 |  | grows by 1.25 |" in text
    assert "| mamba3, step | not shown | not shown | sizes differ |" in text
    assert "width 512; a processor, 2 threads, torch 2.13.0, commit c0ffee, 2026-01-02." in text
    assert "mamba, step" not in text


def test_every_option_has_a_meaning(generator: ModuleType) -> None:
    for name in available_mixers():
        cls = generator.mixer_class(name)
        _, meanings = generator.parsed(generator.inspect.getdoc(cls))
        assert all("not shown" not in row for row in generator.options(cls, meanings)), name
