"""Running a study: end to end, killed half way, run again; and the verb."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trilemma.cli.main import main
from trilemma.compare.analysis import analyse
from trilemma.compare.execute import run_study
from trilemma.compare.records import StudyDirectory
from trilemma.config import StudyConfig, parse
from trilemma.errors import ConfigError, Interrupted, RunInUseError, TrainingError
from trilemma.runs.lock import RunLock
from trilemma.train.api import train

STUDY: dict[str, Any] = {
    "name": "tiny",
    "base": {
        "model": {"d_model": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
        "data": {
            "train": {"generated": "reverse", "size": 60, "options": {"max_length": 6}},
            "valid": {"generated": "reverse", "size": 8, "options": {"max_length": 6}},
            "test": {"generated": "reverse", "size": 8, "options": {"max_length": 6}},
        },
        "tokenizer": {"kind": "character"},
        "training": {"batch_tokens": 256, "warmup_steps": 2, "precision": "float32", "device": "cpu"},
        "decoding": {"method": "greedy"},
    },
    "candidates": [{"name": "transformer"}, {"name": "gru", "overrides": {"model.mixer": "gru"}}],
    "budget": {"lock": "tokens", "amount": 600},
    "seeds": [1],
    "contexts": [8, 16],
    "samples": 2,
}


@pytest.fixture(scope="module", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRILEMMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def study(**changes: Any) -> StudyConfig:
    return parse(StudyConfig, {**STUDY, **changes})


class Trainer:
    """The verb's function in this process (a process of its own costs seconds); `fail_at`: the k-th run fails."""

    def __init__(self, fail_at: int | None = None, error: Exception | None = None) -> None:
        self.names: list[str] = []
        self.fail_at, self.error = fail_at, error

    def __call__(self, config: Path, out: Path) -> None:
        self.names.append(out.name)
        if self.error is not None and len(self.names) == self.fail_at:
            raise self.error
        train(config, out=out, resume=True, quiet=True)


def refuse(config: Path, out: Path) -> None:
    raise AssertionError(f"{out} is trained again")


def silent(message: str) -> None:
    """No progress messages in tests."""


def test_a_study_runs_end_to_end_and_is_never_repeated(tmp_path: Path) -> None:
    trainer, messages = Trainer(), []
    asked = study(
        learning_rates=[1e-3, 4e-3],
        sweep_share=0.5,
        controls={"same_twice": True, "known_gap": {"model.positions": "none"}},
    )
    directory = run_study(asked, tmp_path, "trilemma compare x.yaml", messages.append, trainer)
    report = analyse(directory.read())
    assert [row.name for row in report.candidates] == ["transformer", "gru"]
    assert [row.role for row in report.controls] == ["same-twice", "known-gap"]
    assert report.missing == []
    for row in report.candidates:
        assert row.training.learning_rate in (2.5e-4, 1e-3, 4e-3, 1.6e-2)
        assert row.inference is not None
        assert set(row.inference.ms_per_token) == {8, 16}
        assert row.curve.at_share["quarter"] is not None
        assert row.training.tokens >= 600
        sizes = [row.parameters["non_embedding"] for row in report.candidates]
        assert max(sizes) / min(sizes) <= 1.02
    assert len(report.samples) == 2
    assert set(report.sweep_notes) == {"transformer", "gru"}
    # two candidates, each with an optimum at the edge of two rates: one rate more, then candidates and controls
    assert len(trainer.names) == len(set(trainer.names)) == 2 * 3 + 4
    assert any("left" in message for message in messages)
    assert len(set(report.order_hashes.values())) == 2  # the seeds 1 and 2 (A/A); all candidates agree on each
    run_study(asked, tmp_path, "trilemma compare x.yaml", silent, refuse)
    assert [item.text for item in analyse(directory.read()).inequalities] == [item.text for item in report.inequalities]


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    stopped = Trainer(fail_at=2, error=Interrupted("stop", 2))
    with pytest.raises(Interrupted):
        run_study(study(), tmp_path, say=silent, train=stopped)
    assert len(StudyDirectory(tmp_path).read().missing) == 1
    again = Trainer()
    run_study(study(), tmp_path, say=silent, train=again)
    assert again.names == ["gru-lr0.001-seed1"]


def test_seeds_and_candidates_can_be_added_to_a_finished_study(tmp_path: Path) -> None:
    run_study(study(), tmp_path, say=silent, train=Trainer())
    more = Trainer()
    wider = [*STUDY["candidates"], {"name": "lstm", "overrides": {"model.mixer": "lstm"}}]
    run_study(study(candidates=wider, seeds=[1, 2]), tmp_path, say=silent, train=more)
    assert sorted(more.names) == sorted(
        ["lstm-lr0.001-seed1", "transformer-lr0.001-seed2", "gru-lr0.001-seed2", "lstm-lr0.001-seed2"]
    )


def test_another_study_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run_study(study(), tmp_path, say=silent, train=Trainer())
    changed = study(budget={"lock": "tokens", "amount": 700})
    with pytest.raises(ConfigError, match=r"holds a study with budget\.amount=600\.0, this one says 700\.0"):
        run_study(changed, tmp_path, say=silent, train=refuse)
    gru = {"name": "gru", "overrides": {"model.mixer": "gru", "model.dropout": 0.5}}
    with pytest.raises(ConfigError, match=r"was run with model\.dropout=0\.0, the study now says 0\.5"):
        run_study(study(candidates=[{"name": "transformer"}, gru]), tmp_path, say=silent, train=refuse)


def test_a_learning_rate_that_diverges_only_drops_out_of_the_sweep(tmp_path: Path) -> None:
    rates = [1e-3, 2e-3, 4e-3]
    trainer = Trainer(fail_at=3, error=TrainingError("the loss is nan"))
    asked = study(candidates=[{"name": "a"}], learning_rates=rates, widen=False)
    directory = run_study(asked, tmp_path, say=silent, train=trainer)
    report = analyse(directory.read())
    assert [point.learning_rate for point in report.sweep] == [1e-3, 2e-3]
    assert report.sweep_notes["a"].endswith("; training failed at 0.004")
    with pytest.raises(TrainingError):
        run_study(study(), tmp_path / "final", say=silent, train=Trainer(1, TrainingError("the loss is nan")))


def test_two_processes_cannot_run_one_study(tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    lock = RunLock(tmp_path)
    lock.acquire()
    try:
        with pytest.raises(RunInUseError):
            run_study(study(), tmp_path, say=silent, train=refuse)
    finally:
        lock.release()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "bluue"}, 'metric: "bluue" cannot be compared on seq2seq; did you mean "bleu"'),
        ({"metric": "chrf"}, 'metric: "chrf" cannot be compared on seq2seq'),
        ({"reference": "x"}, 'no candidate is called "x"'),
    ],
)
def test_mistakes_stop_a_study_before_anything_is_trained(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_study(study(**changes), tmp_path, say=silent, train=refuse)


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_report_only_redraws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_study(study(), tmp_path, say=silent, train=Trainer())
    arguments = ["compare", "--out", str(tmp_path), "--report-only", "--price-per-hour", "2", "--json"]
    assert main(arguments) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert any(line.startswith("transformer *") for line in table)
    assert any("no verdict: 1 seed, three are needed" in line for line in table)
    assert f"report: {tmp_path / 'report.html'}" in table
    values = json.loads(last)
    assert values["price_per_hour"] == 2.0
    assert values["candidates"][0]["price"]["train"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["x.yaml", "--report-only"], "no study here"),
        (["x.yaml", "seeds=[1]", "--report-only"], '"seeds=[1]" would change nothing'),
        ([], "compare needs a study"),
        (["x.yaml", "--price-per-hour", "-1"], "a positive amount is needed, found -1"),
    ],
)
def test_mistakes_at_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["compare", *arguments, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.slow
def test_a_study_killed_half_way_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Real processes and a real kill -9, in the middle of a run; weights and results are those of a quiet study."""
    values = {**STUDY, "budget": {"lock": "tokens", "amount": 6000}}
    values["base"] = {**STUDY["base"], "training": {**STUDY["base"]["training"], "checkpoint_every": 5, "log_every": 1}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    run_study(parse(StudyConfig, values), quiet, say=silent, train=Trainer())
    command = [sys.executable, "-m", "trilemma", "compare", str(file), "--out", str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        _wait_for(killed / "runs" / "transformer-lr0.001-seed1" / "checkpoints" / "step-00000005")
        process.send_signal(signal.SIGKILL)
    assert not (killed / "report.json").exists()
    for _ in range(20):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if "in use by process" not in done.stderr:
            break
        time.sleep(0.5)  # the orphaned trainer is still saving
    assert done.returncode == 0, done.stderr
    for name in ("transformer-lr0.001-seed1", "gru-lr0.001-seed1"):
        weights = [(folder / "runs" / name / "model.safetensors").read_bytes() for folder in (quiet, killed)]
        assert weights[0] == weights[1]
    results = [json.loads((killed / "report.json").read_text(encoding="utf-8"))["candidates"]]
    expected = analyse(StudyDirectory(quiet).read()).candidates
    assert [row["quality"]["mean"] for row in results[0]] == [row.quality.interval.mean for row in expected]


def _wait_for(path: Path, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
