"""Reliability row 2: signals at random instants, once and twice; at most one step is lost and the way on is named."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest

from trilemma.runs import RunDirectory
from trilemma.runs.load import load_run

SIGNALS = 150 if os.environ.get("TRILEMMA_NIGHTLY") else 15
Tiny = Callable[..., dict[str, Any]]
NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.mark.turns(2)
@pytest.mark.slow
def test_signals_at_random_instants(
    runner: Any, tiny_config: Tiny, session_seed: int, capsys: pytest.CaptureFixture[str], run_contents: Any
) -> None:
    draw = random.Random(session_seed)
    config = tiny_config(steps=30, checkpoint_every=10, keep_checkpoints=9)
    whole = runner.train("whole", config)
    assert whole["code"] == 0, whole["log"]
    reference = run_contents(runner.folder / "whole")["model.safetensors"]
    landed = saved = twice = 0
    for number in range(SIGNALS):
        name, blow, times = f"run{number}", int(NUMBERS[number % 3]), 1 + (number % 5 == 4)
        order: dict[str, Any] = {"signals": [[draw.uniform(0, 1) * whole["seconds"], blow]]}
        if number % 5 < 2:
            order = {"signal_batch": [draw.randrange(1, 60), blow, 1]}
        elif number % 5 > 2:
            order = {"signal_call": [draw.randrange(60, 200), blow, times]}
        answer = runner.train(name, config, **order)
        assert answer["code"] in (0, 128 + blow, -blow), f"{answer['code']}: {answer['log']}"
        run = RunDirectory(runner.folder / name)
        if answer["code"] == 128 + blow:
            landed, twice = landed + 1, twice + (times == 2)
        begun = "process(es)" in answer["log"]  # before that, Ctrl-C finds nothing to save
        if answer["code"] == 128 + blow and times == 1 and begun:
            done = [record["step"] for record in run.read_metrics()] if run.exists() else []
            assert (run.latest_checkpoint() or 0) >= max(done, default=0), "more than the step in progress was lost"
            # a signal may also come when all is done, and nothing is left to go on with
            assert "Go on with: trilemma train" in answer["log"] or "\ndone: " in answer["log"]
            assert "Traceback" not in answer["log"]
            saved += run.latest_checkpoint() is not None
        end = runner.train(name, config)
        assert end["code"] == 0, end["log"]
        assert (run.path / "model.safetensors").read_bytes() == reference, f"TRILEMMA_SEED={session_seed}: {name}"
    with capsys.disabled():
        print(f"\n{landed} of {SIGNALS} signals landed in time, {saved} of them saved a step, {twice} came twice")
    assert landed >= SIGNALS * 2 // 3
    assert saved >= SIGNALS // 3
    assert twice >= SIGNALS // 8


def test_the_first_signal_saves_the_step_and_the_second_ends_at_once(runner: Any, tiny_config: Tiny) -> None:
    """During micro-batch 39, the first of step 20: that step is abandoned, step 19 is saved."""
    config = tiny_config(steps=100_000, checkpoint_every=100_000)
    answer = runner.train("long", config, signal_batch=[39, int(signal.SIGINT), 1])
    assert answer["code"] == 130, answer["log"]
    assert RunDirectory(runner.folder / "long").checkpoints() == [19]
    assert "interrupted; step 19 is saved. Go on with: trilemma train" in answer["log"]
    twice = runner.train("long", config, signal_batch=[5, int(signal.SIGTERM), 2])
    assert twice["code"] == 143
    assert RunDirectory(runner.folder / "long").checkpoints() == [19], "the second signal waits for nothing"
    load_run(runner.folder / "long", checkpoint="last")
