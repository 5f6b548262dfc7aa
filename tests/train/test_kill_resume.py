"""Reliability rows 1 and 7: kill -9 at any instant, once or three times; the resumed run ends in the same bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KILLS = 200 if os.environ.get("TRILEMMA_NIGHTLY") else 20  # over the layouts
Contents = Callable[[Path], dict[str, Any]]
Tiny = Callable[..., dict[str, Any]]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder-decoder": ("encoder-decoder", {"validate_every": 2, "r_drop": 2.0}),
    "decoder-only": ("decoder-only", {"ema": 0.9, "schedule": "cosine"}),
    "encoder-only": ("encoder-only", {"average_last": 2, "patience": 9, "clip_norm": 0.5}),
}


def same(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Names of what differs."""
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


@pytest.mark.turns(2)
@pytest.mark.slow
def test_kill_at_random_instants(
    runner: Any, tiny_config: Tiny, run_contents: Contents, session_seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(session_seed)
    landed = {"inside a save": 0, "at another call": 0, "by the clock": 0}
    for variant, (layout, options) in VARIANTS.items():
        config = tiny_config(layout, **options)
        whole = runner.train(f"{variant}-whole", config)
        assert whole["code"] == 0, whole["log"]
        reference = run_contents(runner.folder / f"{variant}-whole")
        assert {"model.safetensors", "metrics.jsonl", "summary.json"} <= reference.keys()
        kills, number = 0, 0
        while kills < KILLS / len(VARIANTS) or not all(landed.values()):
            number += 1
            assert number < 4 * KILLS, f"the kills do not land: {landed}"
            name = f"{variant}-{number}"
            times = 1 if number % 3 == 0 else 3
            for _ in range(times):
                order = draw.choice(
                    [
                        {"kill_call": draw.randrange(1, 250)},
                        {"kill_call_outside": draw.randrange(1, 60)},
                        {"kill_after": draw.uniform(0.0, whole["seconds"])},
                    ]
                )
                answer = runner.train(name, config, **order)
                assert answer["code"] in (-9, 0), f"{order}: {answer['log']}"
                if answer["code"] == -9:
                    kills += 1
                    note = answer["killed_in"]
                    kind = "by the clock" if note is None else "inside a save" if note["saving"] else "at another call"
                    landed[kind] += 1
            end = runner.train(name, config)
            assert end["code"] == 0, f"seed {session_seed}, {name}: {end['log']}"
            differs = same(reference, run_contents(runner.folder / name))
            assert not differs, f"TRILEMMA_SEED={session_seed}: {name} differs in {differs}"
    with capsys.disabled():
        print(f"\nkills that landed: {landed}")


def test_three_resumes_give_the_same_weights_and_order(runner: Any, tiny_config: Tiny, run_contents: Contents) -> None:
    """Row 7, with clean stops: the run is cut at three steps, one of them between checkpoints."""
    config = tiny_config("decoder-only")
    assert runner.train("seven-whole", config)["code"] == 0
    for steps in (2, 7, 9, 12):
        part = tiny_config("decoder-only", steps=steps)
        answer = runner.train("seven-parts", part)
        assert answer["code"] == 0, answer["log"]
    whole, parts = (run_contents(runner.folder / name) for name in ("seven-whole", "seven-parts"))
    for name in ("model.safetensors", "checkpoints/step-00000012/optimizer.safetensors", "config.yaml"):
        assert whole[name] == parts[name], name
    assert whole["summary.json"]["order_hash"] == parts["summary.json"]["order_hash"]


def test_a_regularised_run_resumes_to_the_same_bytes(runner: Any, tiny_config: Tiny, run_contents: Contents) -> None:
    """R-Drop and subword dropout, killed in the second epoch, which reads another copy than the first."""
    config = tiny_config(r_drop=3.0, subword_dropout=0.2, subword_copies=3)
    config["data"]["train"]["size"] = 60
    config["tokenizer"] = {"kind": "bpe", "vocab_size": 300}
    assert runner.train("regularised-whole", config)["code"] == 0
    assert runner.train("regularised", config, kill_after_saves=2)["code"] == -9
    assert runner.train("regularised", config)["code"] == 0
    assert not same(*(run_contents(runner.folder / run) for run in ("regularised-whole", "regularised")))


@pytest.mark.parametrize("defect", ["dropout depends on history", "optimizer forgets its step"])
def test_planted_defects_are_found(defect: str, runner: Any, tiny_config: Tiny, run_contents: Contents) -> None:
    config = tiny_config("encoder-decoder")
    name = defect.replace(" ", "-")
    assert runner.train(f"{name}-whole", config, defect=defect)["code"] == 0
    assert runner.train(name, config, kill_after_saves=1, defect=defect)["code"] == -9
    assert runner.train(name, config, defect=defect)["code"] == 0
    assert "model.safetensors" in same(*(run_contents(runner.folder / run) for run in (f"{name}-whole", name)))
