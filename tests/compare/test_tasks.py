"""Studies with tasks: their order, resuming, several workers, and a matrix that judges cells as it says."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import Fake, replace_plan, write_study

from trilemma.cli.main import main
from trilemma.compare.execute import run_study
from trilemma.compare.expand import choose_rate
from trilemma.compare.heatmap import write_matrix
from trilemma.compare.matrix import Verdict, read_matrix, verdict
from trilemma.compare.records import StudyDirectory
from trilemma.compare.report import write_report
from trilemma.compare.tasks import run_tasks, task_study
from trilemma.compare.training import in_parallel
from trilemma.config import parse
from trilemma.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from trilemma.runs import RunDirectory
from trilemma.study import StudyConfig
from trilemma.train.api import train

PARITY = {"generated": "parity", "size": 60, "options": {"min_length": 5, "max_length": 9}}
INDUCTION = {"generated": "induction", "size": 60, "options": {"length": 8, "vocab_size": 4}}
STUDY: dict[str, Any] = {
    "name": "tiny probes",
    "base": {
        "model": {"layout": "decoder-only", "d_model": 8, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
        "data": {"task": "probe"},
        "tokenizer": {"kind": "task"},
        "training": {"batch_tokens": 64, "warmup_steps": 2, "precision": "float32", "device": "cpu", "log_every": 1},
    },
    "candidates": [{"name": "transformer"}, {"name": "gru", "overrides": {"model.mixer": "gru"}}],
    "tasks": [
        {
            "name": "parity",
            "overrides": {"data": {"train": PARITY, "valid": {**PARITY, "size": 20}, "test": {**PARITY, "size": 20}}},
            "control": "gru",
            "expected": {"gru": "solves", "transformer": "fails"},
            "source": "a paper",
        },
        {
            "name": "induction",
            "overrides": {
                "data": {"train": INDUCTION, "valid": {**INDUCTION, "size": 9}, "test": {**INDUCTION, "size": 9}}
            },
            "amount": 30,
        },
    ],
    "budget": {"lock": "tokens", "amount": 40},
    "learning_rates": [1e-3, 1e-2],
    "widen": False,
    "sweep_seeds": 2,
    "seeds": [1, 2],
    "contexts": [64],
    "samples": 0,
}


@pytest.fixture(scope="module", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRILEMMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def study(**changes: Any) -> StudyConfig:
    return parse(StudyConfig, {**STUDY, **changes})


class Trainer:
    """The verb's function in this process; `fail_at`: the k-th run is interrupted."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.names: list[str] = []
        self.fail_at = fail_at

    def __call__(self, config: Path, out: Path) -> None:
        self.names.append(f"{out.parent.parent.name}/{out.name}")
        if len(self.names) == self.fail_at:
            raise Interrupted("stop", 2)
        train(config, out=out, resume=True, quiet=True)


def refuse(config: Path, out: Path) -> None:
    raise AssertionError(f"{out} is trained again")


def silent(message: str) -> None:
    """No progress messages in tests."""


# --- running --------------------------------------------------------------------------------------------------------


def test_a_matrix_is_made_controls_first_and_never_repeated(tmp_path: Path) -> None:
    trainer, messages = Trainer(), []
    run_tasks(study(), tmp_path, "trilemma compare x.yaml", messages.append, trainer)
    assert len(trainer.names) == len(set(trainer.names)) == 2 * 2 * 2 * 2  # tasks, candidates, rates, seeds
    assert all(name.startswith("parity/gru") for name in trainer.names[:4])
    assert not any(name.startswith("parity/gru") for name in trainer.names[4:])
    assert any("positive control of parity: gru has" in message for message in messages)
    assert any("run 16 of 16: induction (2 of 2), gru" in message and "left" in message for message in messages)
    matrix = write_matrix(tmp_path)
    assert [column.name for column in matrix.columns] == ["parity", "induction"]
    for column in matrix.columns:
        for cell in column.cells:
            assert [seed for seed, _ in cell.values] == [1, 2]
            assert set(cell.rates) == {1e-3, 1e-2}
            assert cell.learning_rate in cell.rates
            assert cell.rates[cell.learning_rate] == max(cell.rates.values())
            assert cell.mean == pytest.approx(sum(value for _, value in cell.values) / 2)
            assert cell.state_bytes is not None
    state = {cell.candidate: cell.state_bytes for cell in matrix.columns[0].cells}
    assert state["transformer"] == 64 * 2 * 8 * 4
    assert state["gru"] == 8 * 4
    assert matrix.missing == 0
    assert matrix.columns[0].chance == 50
    assert matrix.columns[1].control_passed is None
    run_tasks(study(), tmp_path, "trilemma compare x.yaml", silent, refuse)
    assert (tmp_path / "tasks" / "parity" / "report.html").is_file()
    arguments = ["compare", "--out", str(tmp_path), "--report-only", "--price-per-hour", "3"]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "tasks" / "parity" / "report.json").read_text(encoding="utf-8"))
    assert report["price_per_hour"] == 3


def test_a_matrix_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_tasks(study(), tmp_path, say=silent, train=Trainer(fail_at=7))
    matrix = write_matrix(tmp_path)
    assert matrix.cell("parity", "gru").mean is not None
    assert matrix.cell("induction", "gru").outcome == "missing"
    again = Trainer()
    run_tasks(study(), tmp_path, say=silent, train=again)
    assert len(again.names) == 16 - 6


def test_mistakes_stop_a_matrix_before_anything_is_trained(tmp_path: Path) -> None:
    first = STUDY["tasks"][0]
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"a text {at}\n" for at in range(40)), encoding="utf-8")
    data = {"task": "language-model", "train": {"generated": None, "path": str(file)}, "context_length": 32}
    texts = {"data": data, "tokenizer": {"kind": "byte"}}
    for tasks, message in (
        ([first, first], 'tasks: two are called "parity"'),
        ([{**first, "control": "grus"}], 'task "parity": no candidate is called "grus"; did you mean "gru"'),
        ([{**first, "expected": {"lstm": "fails"}}], 'no candidate is called "lstm"'),
        ([first, {"name": "b", "overrides": texts}], 'task "b": learning_rates: a sweep needs validation data'),
        ([{**first, "overrides": {"model.d_modell": 3}}], 'task "parity": unknown key "model.d_modell"'),
    ):
        with pytest.raises(ConfigError, match=message):
            run_tasks(study(tasks=tasks), tmp_path / "x", say=silent, train=refuse)
    with pytest.raises(ConfigError, match="runs that share the machine cannot be given a budget of seconds"):
        run_tasks(study(workers=2, budget={"lock": "seconds", "amount": 3}), tmp_path / "y", say=silent, train=refuse)
    RunDirectory.create(tmp_path / "z", study().base, b"{}")
    with pytest.raises(ConfigError, match="holds a run, not a study"):
        run_tasks(study(), tmp_path / "z", say=silent, train=refuse)


def test_a_task_changes_the_base_and_the_budget() -> None:
    asked = study()
    parity, induction = (task_study(asked, task) for task in asked.tasks)
    assert (parity.budget.amount, induction.budget.amount) == (40, 30)
    assert parity.tasks == []
    assert parity.base.data.task == "probe"
    assert induction.base.data.train.options["length"] == 8  # type: ignore[union-attr]


def test_the_sweep_counts_every_seed(tmp_path: Path) -> None:
    """A rate that is best on the mean of two seeds, and one whose training failed with one of them."""
    asked = study(
        tasks=[], candidates=[{"name": "gru", "overrides": {"model.mixer": "gru"}}], learning_rates=[1e-3, 3e-3, 1e-2]
    )
    asked = task_study(asked, study().tasks[0])

    class Failing(Trainer):
        def __call__(self, config: Path, out: Path) -> None:
            super().__call__(config, out)
            if out.name == "gru-lr0.01-seed2":
                raise TrainingError("the loss is nan")

    trainer = Failing()
    directory = run_study(asked, tmp_path, say=silent, train=trainer)
    assert len(trainer.names) == 6
    note = directory.read_plan().sweep_notes["gru"]
    assert note.endswith("training failed at 0.01")


def test_equal_errors_take_the_lowest_rate() -> None:
    assert choose_rate({1e-3: 0.2, 3e-3: 0.1, 1e-2: 0.1}, widen=False).learning_rate == 3e-3


# --- workers --------------------------------------------------------------------------------------------------------


def test_calls_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=20)
    ends = list(in_parallel([meeting.wait, meeting.wait], 2))
    assert sorted(at for at, _ in ends) == [0, 1]
    assert [error for _, error in ends] == [None, None]


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_back_and_an_interrupt_begins_nothing_more(workers: int) -> None:
    made: list[int] = []

    def call(at: int, error: Exception | None) -> None:
        made.append(at)
        if error is not None:
            raise error

    failing = TrainingError("x")
    ends = dict(in_parallel([lambda: call(0, failing), lambda: call(1, None)], workers))
    assert ends == {0: failing, 1: None}
    made.clear()
    stop = Interrupted("stop", 2)
    ends = dict(in_parallel([lambda: call(0, stop), *(lambda at=at: call(at, None) for at in range(1, 50))], workers))
    assert ends[0] is stop
    assert len(made) < 10
    assert isinstance(ends[49], Interrupted)


def test_closing_waits_and_begins_nothing_more() -> None:
    begun, go = [], threading.Event()

    def call() -> None:
        begun.append(1)
        assert go.wait(20)

    ends = in_parallel([lambda: None, *[call] * 40], 2)
    assert next(ends)[0] == 0
    go.set()
    ends.close()
    assert len(begun) < 41 or go.is_set()


@pytest.mark.turns(2)
@pytest.mark.slow
def test_two_workers_train_what_one_does(tmp_path: Path) -> None:
    """Real processes; their progress is in files, and the weights are those of a study with one worker."""
    values = {**STUDY, "tasks": [], "learning_rates": [], "workers": 2, "seeds": [1]}
    values["base"] = {**STUDY["base"], "data": {"task": "probe", **STUDY["tasks"][0]["overrides"]["data"]}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    together, alone = tmp_path / "together", tmp_path / "alone"
    run_study(parse(StudyConfig, {**values, "workers": 1}), alone, say=silent, train=Trainer())
    command = [sys.executable, "-m", "trilemma", "compare", str(file), "--out", str(together)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("transformer-lr0.001-seed1", "gru-lr0.001-seed1"):
        weights = [(folder / "runs" / name / "model.safetensors").read_bytes() for folder in (alone, together)]
        assert weights[0] == weights[1]
        assert "step" in (together / "logs" / f"{name}.log").read_text(encoding="utf-8")
    assert "2 runs at a time shared the machine" in (together / "report.md").read_text(encoding="utf-8")


# --- the matrix -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "expected", "control", "wanted"),
    [
        ("solved", "solves", True, "agrees"),
        ("solved", "fails", True, "disagrees"),
        ("solved", "fails", None, "disagrees"),
        ("unsolved", "fails", True, "agrees"),
        ("unsolved", "fails", False, "not judged"),
        ("unsolved", "fails", None, "not judged"),
        ("unsolved", "solves", True, "disagrees"),
        ("unsolved", "solves", False, "not judged"),
        ("mixed", "solves", True, "mixed"),
        ("mixed", "fails", True, "mixed"),
        ("solved", "depends", True, "not stated"),
        ("unsolved", None, True, "not stated"),
        ("missing", "solves", True, "missing"),
    ],
)
def test_verdicts(outcome: Any, expected: str | None, control: bool | None, wanted: Verdict) -> None:
    assert verdict(outcome, expected, control) == wanted


def made_up(path: Path, first: float, second: float, **task: Any) -> Path:
    """A matrix of one task in which two candidates have these accuracies."""
    model = {"layout": "decoder-only"}
    base = {"model": model, "data": {"task": "probe", "train": PARITY}, "tokenizer": {"kind": "task"}}
    fakes = {"A|B": Fake(first, seeds=(1, 2)), "=C": Fake(second, seeds=(1, 2), model={"mixer": "gru"})}
    values = {"base": base, "seeds": [1, 2], "contexts": [100]}
    directory = write_study(path / "tasks" / "one", fakes, study=values, documents=400)
    shown = directory.read_study()
    column = {
        "name": "one",
        "control": "A|B",
        "expected": {"A|B": "solves", "=C": "fails"},
        "source": "a_paper",
        **task,
    }
    whole = parse(StudyConfig, {**shown.model_dump(mode="json"), "name": "made up", "tasks": [column]})
    StudyDirectory(path).write_study(whole)
    return path


def test_cells_are_judged_by_the_control(tmp_path: Path) -> None:
    good = read_matrix(made_up(tmp_path / "good", 1.0, 0.5))
    assert [cell.verdict for cell in good.columns[0].cells] == ["agrees", "agrees"]
    assert good.columns[0].control_passed is True
    bad = read_matrix(made_up(tmp_path / "bad", 0.6, 0.5))
    assert [cell.verdict for cell in bad.columns[0].cells] == ["not judged", "not judged"]
    lenient = read_matrix(made_up(tmp_path / "lenient", 1.0, 0.7, solved=0.6))
    assert [cell.verdict for cell in lenient.columns[0].cells] == ["agrees", "disagrees"]
    alone = read_matrix(made_up(tmp_path / "alone", 1.0, 0.5, control=None))
    assert [cell.verdict for cell in alone.columns[0].cells] == ["agrees", "not judged"]


def test_the_files_say_what_was_found(tmp_path: Path) -> None:
    path = made_up(tmp_path, 1.0, 0.5, expected={"A|B": "fails"})
    write_matrix(path)
    rows = list(csv.DictReader((path / "matrix.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["candidate"] for row in rows] == ["A|B", "'=C"]
    assert [row["verdict"] for row in rows] == ["disagrees", "not stated"]
    assert float(rows[0]["accuracy"]) == 100
    assert float(rows[0]["low"]) < 100
    assert rows[0]["guessing"] == "50.0"
    values = json.loads((path / "matrix.json").read_text(encoding="utf-8"))
    assert values["columns"][0]["cells"][1]["values"].keys() == {"1", "2"}
    assert values["environment"]["threads"] == 2
    text = (path / "matrix.md").read_text(encoding="utf-8")
    assert "one, A\\|B: disagrees" in text
    assert "a\\_paper" in text
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (path / f"matrix.{kind}").read_bytes().startswith(start)
    first = (path / "matrix.svg").read_bytes()
    write_matrix(path)
    assert (path / "matrix.svg").read_bytes() == first


def test_unfinished_studies_have_a_matrix_too(tmp_path: Path) -> None:
    path = made_up(tmp_path, 1.0, 0.5)
    replace_plan(StudyDirectory(path / "tasks" / "one"), runs=[])
    matrix = write_matrix(path)
    assert [cell.verdict for cell in matrix.columns[0].cells] == ["missing", "missing"]
    assert "not run" in (path / "matrix.md").read_text(encoding="utf-8")
    plain = write_study(tmp_path / "plain", {"A": Fake()})
    with pytest.raises(CheckpointError, match="this study has no tasks"):
        read_matrix(plain.path)


def test_the_verb_draws_a_matrix_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made_up(tmp_path, 1.0, 0.5)
    assert main(["compare", "--out", str(path), "--report-only", "--json"]) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert any(line.startswith("A|B") and "100.0 agrees" in line for line in table)
    assert any(line.startswith("guessing") for line in table)
    assert json.loads(last)["columns"][0]["control_passed"] is True
    assert (path / "matrix.png").is_file()


def test_a_probes_report_says_error_and_early_ends(tmp_path: Path) -> None:
    asked = task_study(study(), study().tasks[0])
    base = asked.base.model_copy(
        update={"training": asked.base.training.model_copy(update={"target_accuracy": 0.01, "validate_every": 1})}
    )
    directory = run_study(
        asked.model_copy(update={"base": base}), tmp_path, say=silent, train=Trainer(), inference=False
    )
    report = write_report(directory)
    assert report.criterion == "validation error"
    assert all(0 <= point.loss < 1 for point in report.sweep)
    assert any("reached the target accuracy" in item.text for item in report.inequalities)
    assert not any("off the locked tokens" in item.text for item in report.inequalities)
    assert "valid_error" in json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["learning_rates"][0]
