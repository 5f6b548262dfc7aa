"""Reliability row 2: signals at random instants, once and twice; at most one step is lost and the way on is named."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from typing import Any

import pytest

from trilemma.runs import RunDirectory
from trilemma.runs.load import load_run

SIGNALS = 15
Tiny = Callable[..., dict[str, Any]]
NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.mark.slow
def test_signals_at_random_instants(
    runner: Any, tiny_config: Tiny, session_seed: int, capsys: pytest.CaptureFixture[str], run_contents: Any
) -> None:
    draw = random.Random(session_seed)
    config = tiny_config(steps=60, checkpoint_every=20, keep_checkpoints=9)
    whole = runner.train("whole", config)
    assert whole["code"] == 0, whole["log"]
    reference = run_contents(runner.folder / "whole")["model.safetensors"]
    landed = saved = 0
    for number in range(SIGNALS):
        name, blow = f"run{number}", NUMBERS[number % 3]
        signals = [[draw.uniform(0.3, 0.9) * whole["seconds"], int(blow)]]
        if number % 5 == 4:
            signals.append([signals[0][0] + draw.uniform(0, 0.05), int(blow)])
        answer = runner.train(name, config, signals=signals)
        assert answer["code"] in (0, 128 + blow, -blow), f"{answer['code']}: {answer['log']}"
        landed += answer["code"] == 128 + blow
        assert answer["seconds"] - signals[0][0] < 10
        run = RunDirectory(runner.folder / name)
        if answer["code"] == 128 + blow and len(signals) == 1:
            done = [record["step"] for record in run.read_metrics()] if run.exists() else []
            assert (run.latest_checkpoint() or 0) >= max(done, default=0), "more than the step in progress was lost"
            assert "Go on with: trilemma train" in answer["log"]
            assert "Traceback" not in answer["log"]
            saved += run.latest_checkpoint() is not None
        end = runner.train(name, config)
        assert end["code"] == 0, end["log"]
        assert (run.path / "model.safetensors").read_bytes() == reference, f"TRILEMMA_SEED={session_seed}: {name}"
    with capsys.disabled():
        print(f"\n{landed} of {SIGNALS} signals landed in time, {saved} of them saved a step")
    assert landed >= SIGNALS // 2
    assert saved >= SIGNALS // 3


def test_the_first_signal_saves_the_step_and_the_second_ends_at_once(runner: Any, tiny_config: Tiny) -> None:
    config = tiny_config(steps=100_000, checkpoint_every=100_000)
    answer = runner.train("long", config, signals=[[4.0, int(signal.SIGINT)]])
    assert answer["code"] == 130, answer["log"]
    step = RunDirectory(runner.folder / "long").latest_checkpoint()
    assert step is not None
    assert f"interrupted; step {step:,} is saved. Go on with: trilemma train" in answer["log"]
    load_run(runner.folder / "long", checkpoint="last")
    twice = runner.train("long", config, signals=[[4.0, int(signal.SIGTERM)], [4.0, int(signal.SIGTERM)]])
    assert twice["code"] in (143, -15)
    load_run(runner.folder / "long", checkpoint="last")
