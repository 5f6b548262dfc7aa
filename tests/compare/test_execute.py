"""Running a study: end to end, killed half way, run again; and the verb."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from trilemma.cli.main import main
from trilemma.compare.analysis import analyse
from trilemma.compare.execute import failed, run_study
from trilemma.compare.measuring import measure_run, score_run
from trilemma.compare.records import StudyDirectory
from trilemma.compare.training import train_in_process
from trilemma.config import dump, parse
from trilemma.errors import ConfigError, Interrupted, LawError, RunInUseError, TrainingError, TrilemmaError
from trilemma.runs import RunDirectory
from trilemma.runs.lock import RunLock
from trilemma.study import StudyConfig
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


def fail(out: Path, error: Exception) -> NoReturn:
    """As `trilemma train` does."""
    if isinstance(error, TrainingError):
        out.mkdir(parents=True)
        RunDirectory(out).write_failure(error)
    raise error


class Trainer:
    """The verb's function in this process (a process of its own costs seconds); `fail_at`: the k-th run fails."""

    def __init__(self, fail_at: int | None = None, error: Exception | None = None) -> None:
        self.names: list[str] = []
        self.fail_at, self.error = fail_at, error

    def __call__(self, config: Path, out: Path) -> None:
        self.names.append(out.name)
        if self.error is not None and len(self.names) == self.fail_at:
            fail(out, self.error)
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
    assert failed(directory) == []
    run_study(asked, tmp_path, say=silent, train=refuse)


DIVERGED = TrainingError("step 37: the loss is nan in batch 36 (seed 1); no weight was changed", 37)


def test_a_run_that_diverges_does_not_stop_the_others(tmp_path: Path) -> None:
    seeds = study(seeds=[1, 2], contexts=[8])
    trainer = Trainer(1, DIVERGED)
    directory = run_study(seeds, tmp_path, say=silent, train=trainer)
    assert len(trainer.names) == 4
    report = analyse(directory.read())
    assert {row.name: [seed for seed, _ in row.quality.values] for row in report.candidates} == {
        "transformer": [2],
        "gru": [1, 2],
    }
    assert report.candidates[0].inference is not None
    text = "seed 1: training failed at step 37 (the loss is nan in batch 36 (seed 1)); not counted"
    assert ("transformer", text) in [(item.candidate, item.text) for item in report.inequalities]
    assert report.missing == []
    assert failed(directory) == [f"transformer, {text}"]
    run_study(seeds, tmp_path, say=silent, train=refuse)
    # other settings are another attempt, and what is left of the first is kept
    changed = [{"name": "transformer", "overrides": {"training.clip_norm": 0.1}, "seeds": [1]}]
    again = Trainer()
    run_study(study(candidates=changed, contexts=[8]), tmp_path, say=silent, train=again)
    assert again.names == ["transformer-lr0.001-seed1"]
    assert failed(directory) == []
    assert directory.run_path("transformer-lr0.001-seed1.failed-1").is_dir()


def test_a_candidate_that_no_learning_rate_suits_is_left_out(tmp_path: Path) -> None:
    class Failing(Trainer):
        def __call__(self, config: Path, out: Path) -> None:
            if out.name.startswith("gru"):
                fail(out, DIVERGED)
            super().__call__(config, out)

    asked = study(learning_rates=[1e-3, 2e-3], widen=False, contexts=[])
    directory = run_study(asked, tmp_path, say=silent, train=Failing())
    report = analyse(directory.read())
    assert [row.name for row in report.candidates] == ["transformer"]
    text = "training failed at every learning rate of the sweep (0.001, 0.002); not counted"
    assert failed(directory) == [f"gru: {text}"]
    assert text in [item.text for item in report.inequalities]


def test_a_failure_is_told_by_the_trainers_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A real process whose loss overflows: its message and step come back; another mistake is no failure of a run."""
    base = {**STUDY["base"], "training": {**STUDY["base"]["training"], "learning_rate": 1e30, "warmup_steps": 0}}
    config = study(base=base).base
    training = config.training.model_copy(update={"steps": 50, "clip_norm": None})
    file = tmp_path / "config.yaml"
    file.write_text(dump(config.model_copy(update={"training": training})), encoding="utf-8")
    with pytest.raises(TrainingError, match=r"step \d+: the (loss|gradient norm) is (nan|inf)") as caught:
        train_in_process(file, tmp_path / "run")
    assert f"step {caught.value.step}: " in capfd.readouterr().err
    with pytest.raises(TrilemmaError, match="training failed; the reason stands above") as other:
        train_in_process(tmp_path / "nowhere.yaml", tmp_path / "other")
    assert not isinstance(other.value, TrainingError)


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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, r"needs test or validation data: set data\.test or data\.split in base"),
        (
            {"learning_rates": [1e-3, 2e-3]},
            r"learning_rates: a sweep needs validation data to choose by; set data\.valid",
        ),
    ],
)
def test_a_study_without_data_to_judge_by_stops_before_anything_is_trained(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"a{at}\tb{at}\n" for at in range(40)), encoding="utf-8")
    base = {**STUDY["base"], "data": {"train": {"path": str(file)}}}
    with pytest.raises(ConfigError, match=message):
        run_study(study(base=base, **more), tmp_path / "study", say=silent, train=refuse)


def test_a_folder_that_holds_a_run_is_no_place_for_a_study(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunDirectory.create(run, study().base, b"{}")
    before = sorted(run.rglob("*"))
    with pytest.raises(ConfigError, match="holds a run, not a study; choose another --out"):
        run_study(study(), run, say=silent, train=refuse)
    assert sorted(run.rglob("*")) == before


def test_samples_and_batch_sizes_can_be_added_to_a_finished_study(tmp_path: Path) -> None:
    one = [{"name": "transformer"}]
    first = run_study(study(candidates=one, samples=0), tmp_path, say=silent, train=Trainer()).read().runs[0]
    messages: list[str] = []
    asked = study(candidates=one, samples=3, batch_sizes=[2])
    run = run_study(asked, tmp_path, say=messages.append, train=refuse).read().runs[0]
    assert run.documents is not None
    assert first.documents is not None
    assert [len(documents.samples) for documents in (first.documents, run.documents)] == [0, 3]
    assert {(point.context, point.batch) for point in run.inference.points} == {(8, 1), (8, 2), (16, 1), (16, 2)}
    assert messages == ["measuring inference: transformer"]
    messages.clear()
    run_study(asked, tmp_path, say=messages.append, train=refuse)
    assert messages == []


def test_inference_says_where_when_and_on_which_path_it_was_measured(tmp_path: Path) -> None:
    run = run_study(study(candidates=[{"name": "a"}]), tmp_path, say=silent, train=Trainer()).read().runs[0]
    assert run.inference.path == "plain"
    assert run.inference.environment["cpu"] == run.summary["environment"]["cpu"]
    assert run.inference.environment["precision"] == "float32"
    assert datetime.fromisoformat(run.inference.measured).utcoffset() == timedelta(0)


def test_a_path_without_a_law_record_is_neither_trained_nor_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise LawError('mixer "attention" breaks the law')

    one = study(candidates=[{"name": "a"}], samples=0, contexts=[])
    with monkeypatch.context() as patch:
        patch.setattr("trilemma.compare.execute.require", broken)
        with pytest.raises(LawError, match="breaks the law"):
            run_study(one, tmp_path, say=silent, train=refuse)
    run = run_study(one, tmp_path, say=silent, train=Trainer()).run_path("a-lr0.001-seed1")
    monkeypatch.setattr("trilemma.laws.admission.require", broken)
    for measure in (lambda: measure_run(run, [8], [1], silent), lambda: score_run(run, "bleu", 0, silent)):
        with pytest.raises(LawError, match="breaks the law"):
            measure()


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
    file = tmp_path / "asked.yaml"
    automatic = {key: value for key, value in STUDY["base"]["training"].items() if key not in ("precision", "device")}
    asked = {**STUDY, "base": {**STUDY["base"], "training": automatic}}
    for amount, code, message in ((600, 0, ""), (700, 2, "holds a study with budget.amount=600.0")):
        file.write_text(yaml.safe_dump({**asked, "budget": {"lock": "tokens", "amount": amount}}), encoding="utf-8")
        assert main(["compare", str(file), "--out", str(tmp_path), "--report-only"]) == code
        assert message in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "nowhere.yaml"), "--out", str(tmp_path), "--report-only"]) == 2
    assert "nowhere.yaml: no such file" in capsys.readouterr().err


def test_the_verb_ends_with_an_error_where_a_run_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_one(config: Path, out: Path, share: int = 1) -> None:
        Trainer(1 if out.name.startswith("gru") else None, DIVERGED)(config, out)

    monkeypatch.setattr("trilemma.compare.execute.train_in_process", train_one)
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({**STUDY, "contexts": []}), encoding="utf-8")
    assert main(["compare", str(file), "--out", str(out), "--price-per-hour", "2"]) == 2
    captured = capsys.readouterr()
    assert "report: " in captured.out
    assert "the study is complete but for what could not be trained:" in captured.err
    assert "gru, seed 1: training failed at step 37" in captured.err
    assert StudyDirectory(out).read_study().price_per_hour == 2
    assert main(["compare", "--out", str(out), "--report-only"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["x.yaml", "--report-only"], "no study here"),
        (["x.yaml", "seeds=[1]", "--report-only"], '"seeds=[1]" would change nothing'),
        ([], "compare needs a study"),
        (["x.yaml", "--price-per-hour", "-1"], "a positive amount is needed, found -1"),
        (["x.yaml", "--price-per-hour", "nan"], "a positive amount is needed, found nan"),
        (["x.yaml", "--price-per-hour", "inf"], "a positive amount is needed, found inf"),
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


@pytest.mark.turns(2)
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
