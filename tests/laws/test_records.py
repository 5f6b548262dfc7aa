"""Law records: shipped ones are up to date, a changed source has none, plug-ins are verified on first use."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trilemma import registry
from trilemma.errors import ConfigError, LawError
from trilemma.laws import fingerprint, records, require, verify
from trilemma.laws.records import PATHS, cache_file, shipped_paths, shipped_records
from trilemma.mixers.build import build_mixer
from trilemma.nn import coded_cache
from trilemma.registry import available_mixers, load_plugin, mixer_class

SOUND = "from trilemma.mixers.gru import GRU\nclass {name}(GRU):\n    pass\n"
BROKEN = (
    "from trilemma.mixers.gru import GRU\n"
    "class {name}(GRU):\n"
    "    def mix(self, x, state, ragged, shared):\n"
    "        y, after = super().mix(x, state, ragged, shared)\n"
    "        return (y if state is None else y * 1.01), after\n"
)


@pytest.fixture(autouse=True)
def _same_registry_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten."""
    registry.available_mixers()
    monkeypatch.setattr(registry, "_MIXERS", dict(registry._MIXERS))
    monkeypatch.setattr(registry, "_PLUGINS", dict(registry._PLUGINS))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plugin(folder: Path, text: str, name: str) -> str:
    file = folder / f"{name.lower()}.py"
    file.write_text(text.format(name=name))
    (registered,) = load_plugin(f"{file}:{name}")
    return registered


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in available_mixers() for path in shipped_paths(name)]
)
def test_the_shipped_record_is_up_to_date(name: str, path: str) -> None:
    known = shipped_records()[name][path]
    assert known["fingerprint"] == fingerprint(name, path), "run: trilemma verify --all --record"
    assert known["ok"]
    assert known["variants"] == len(registry.mixer_class(name).law_variants())


def test_our_mixers_need_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "verify", None)  # would fail if called
    found = require([build_mixer("attention", 16), "gru"])
    assert set(found) == {"attention", "gru"}
    assert found["gru"]["laws"]["split"]["outcome"] == "pass"


def test_fingerprints_tell_mixers_paths_devices_and_sources_apart(tmp_path: Path) -> None:
    prints = {fingerprint(name, path) for name in ("attention", "gru") for path in PATHS}
    assert len(prints) == 4
    assert fingerprint("gru", device="cuda") != fingerprint("gru")
    name = plugin(tmp_path, SOUND, "Fingered")
    before = fingerprint(name)
    assert fingerprint(name) == before
    file = tmp_path / "fingered.py"
    file.write_text(file.read_text() + "# changed\n")
    assert fingerprint(name) != before


def test_an_unknown_path_is_named() -> None:
    with pytest.raises(ConfigError, match='unknown path "complied"; did you mean "compiled"'):
        fingerprint("gru", "complied")


@pytest.mark.laws
def test_a_plugin_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, said = plugin(tmp_path, SOUND, "SoundPlugin"), []
    require([name], say=said.append)
    assert len(said) == 1
    assert f'no law record for "{name}" on the path plain (cpu)' in said[0]
    (known,) = json.loads(cache_file().read_text())["records"].values()
    assert known["level"] == "quick"
    monkeypatch.setattr(records, "verify", None)
    require([name], say=said.append)
    assert len(said) == 1


@pytest.mark.laws
def test_an_unlawful_plugin_does_not_run(tmp_path: Path) -> None:
    name = plugin(tmp_path, BROKEN, "BrokenPlugin")
    for _ in range(2):  # a failure is not remembered as a pass, nor at all
        with pytest.raises(LawError, match=r"breaks the law on the path plain:\n  split: .*again: trilemma verify"):
            require([name])
    assert not cache_file().exists()


def test_a_damaged_cache_counts_as_empty() -> None:
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text("{")
    assert require(["gru"])


def test_a_record_for_a_compiled_path_says_why_there_is_none() -> None:
    law = shipped_records()["lstm"]["compiled"]["laws"]["compile"]
    assert law["outcome"] == "n/a"
    assert "torch's recurrent kernel" in law["reason"]


def test_a_fingerprint_covers_what_a_mixer_imports_and_nothing_else() -> None:
    sources = {
        name: {file.name for file in records._closure({Path(inspect.getsourcefile(mixer_class(name)) or "")})}
        for name in ("gru", "retention")
    }
    assert {"gru.py", "base.py", "recurrent.py", "state.py", "ragged.py", "truth.py"} <= sources["gru"]
    assert {"retention.py", "decayed_scan.py", "positions.py"} <= sources["retention"]
    assert "decayed_scan.py" not in sources["gru"]


def test_a_cache_in_eight_bits_is_a_path_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    known = {"ok": True}
    monkeypatch.setattr(records, "_lookup", lambda name, path, print_of: asked.append(f"{name} {path}") or known)
    mixers = [build_mixer(name, 16) for name in ("attention", "gru")]
    require(mixers)
    mixers[0].cache = "int8"
    require(mixers)
    assert asked == ["attention plain", "gru plain", "attention plain+cache-int8", "gru plain"]
    assert fingerprint("attention", "plain+cache-int8") != fingerprint("attention")


def test_the_laws_find_a_cache_whose_codes_depend_on_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale for each call instead of each token: splitting would change the answer."""

    def by_call(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = (x.abs().amax((-1, -2), keepdim=True) / 127).clamp(min=1e-30)
        return (x / scale).round().to(torch.int8), scale.expand(*x.shape[:-1], 1)

    assert verify("attention", laws=["split"], seed=1, variant=1, cache="int8")[0].ok
    monkeypatch.setattr(coded_cache, "quantize_rows", by_call)
    report = verify("attention", laws=["split"], seed=1, variant=1, cache="int8")[0]
    assert not report.ok
    assert "--cache int8 --law split" in str(report["split"].reproduce)


def test_what_the_laws_cannot_ask_of_a_cache_in_eight_bits() -> None:
    with pytest.raises(ConfigError, match='mixer "gru" keeps no keys and values'):
        verify("gru", cache="int8")
    with pytest.raises(ConfigError, match="the law of training says nothing about a cache in 8 bits"):
        verify("attention", laws=["training"], cache="int8")
