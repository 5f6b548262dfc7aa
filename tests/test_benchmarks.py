"""What the benchmarks decide without a clock: which are run, what may be compared, and how a growth is fitted."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.syspath_prepend(str(ROOT))
        yield


@pytest.fixture
def runner() -> ModuleType:
    return importlib.import_module("benchmarks.__main__")


def test_the_set_names_scripts_that_are_there(runner: ModuleType) -> None:
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in runner.SET)
    assert all(page.is_file() for page in runner.PAGES)


@pytest.mark.parametrize("arguments", [["--only", "startup,grwth"], ["--only", ""]])
def test_an_unknown_benchmark_is_refused(
    arguments: list[str], runner: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runner.main()
    assert "there are startup, train_step_lm" in capsys.readouterr().err


def test_after_a_failure_the_others_run_and_it_is_named(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "good.py").write_text(
        f"import sys, pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).write_text(sys.argv[1])"
    )
    monkeypatch.setattr(runner, "HERE", tmp_path)
    (tmp_path / "absent.py").write_text(f"raise SystemExit({importlib.import_module('common').SKIPPED})")
    monkeypatch.setattr(runner, "SET", {name: ("", [], ["--tiny"]) for name in ("bad", "absent", "good")})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "bad,absent,good", "--tiny"])
    assert runner.main() == 1
    output = capsys.readouterr().out
    assert "== bad: exit code 3 after" in output
    assert "== absent: skipped after" in output
    assert "1 of 3 ran; skipped: absent; failed: bad" in output
    assert (tmp_path / "ran").read_text() == "--tiny"


def test_systems_of_unlike_size_are_not_compared() -> None:
    common = importlib.import_module("common")
    common.same_size({"parameters": 1000}, {"parameters": 1009})
    with pytest.raises(common.WorkerError, match="sizes differ: ours 1,000, peer 1,020 weights"):
        common.same_size({"parameters": 1000}, {"parameters": 1020})


def test_pairs_are_neighbours_and_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    common = importlib.import_module("common")
    log = tmp_path / "log"
    commands = [
        [sys.executable, "-c", f"open({str(log)!r}, 'a').write('{name}'); print('noise'); print('{{\"ms\": {ms}}}')"]
        for name, ms in (("o", 2), ("p", 3))
    ]
    result = common.duel(*commands, "ms", rounds=2)
    assert log.read_text() == "opop"
    assert (result["speedup"], result["speedups"]) == (1.5, [1.5, 1.5])
    failing = f"raise ValueError({str(common.ROOT / 'x.py')!r})"
    with pytest.raises(common.WorkerError, match=r"exit code 1\n(?s:.*)ValueError: x\.py") as failure:
        common.run_worker([sys.executable, "-c", failing])
    assert str(common.ROOT) not in str(failure.value)
    with pytest.raises(common.WorkerError, match="the last line is no JSON: done"):
        common.run_worker([sys.executable, "-c", "print('done')"])


def test_growth_is_of_every_mixer_with_a_constant_state_and_its_exponent_is_the_slope() -> None:
    growth = importlib.import_module("growth")
    assert {"retention", "mamba2", "gated_deltanet", "lstm"} <= set(growth.linear_mixers())
    assert not {"attention", "cross_attention", "bidirectional"} & set(growth.linear_mixers())
    lengths = [256, 512, 1024, 4096]
    assert growth.exponent(lengths, [3.0 * length**1.5 for length in lengths]) == pytest.approx(1.5)
    assert growth.exponent(lengths, [7.0] * 4) == pytest.approx(0.0)


def test_an_option_takes_known_names_only() -> None:
    common = importlib.import_module("common")
    names = common.among(["eager", "compiled"])
    assert names("compiled,eager") == ["compiled", "eager"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"^not among eager, compiled: eagre$"):
        names("eager,eagre")
