"""docs/speed.md is what benchmarks/speed_page.py makes of the stored results."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ORIGIN = {
    "environment": {"gpu": None, "cpu": "a processor", "cores": 2, "threads": 1, "torch": "2.13.0", "commit": "c0ffee"},
    "ceilings": {
        "bfloat16_gflops": 400.0, "float32_gflops": 150.0, "bandwidth": [[1, 90.0], [2, 29.0]], "overhead_us": 1.3,
    },
    "date": "2026-01-02T03:04:05",
    "command": "python benchmarks/x.py",
}  # fmt: skip

Plant = Callable[[str, dict[str, Any]], str]


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("speed_page")


@pytest.fixture
def plant(generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plant:
    """Stores a result, nothing else, and gives the page."""
    monkeypatch.setattr(generator, "RESULTS", tmp_path)

    def planted(name: str, result: dict[str, Any]) -> str:
        (tmp_path / f"{name}.json").write_text(json.dumps(result | ORIGIN))
        return str(generator.page(generator.sections()))

    return planted


def test_the_page_is_up_to_date_and_its_pictures_are_there(generator: ModuleType) -> None:
    text = generator.PAGE.read_text(encoding="utf-8")
    assert text == generator.page(generator.sections()), "run: python benchmarks/speed_page.py"
    pictures = set(re.findall(r"\(images/(speed-[\w-]+\.png)\)", text))
    assert pictures == {file.name for file in generator.IMAGES.glob("speed-*.png")}
    assert pictures


def test_without_results_everything_reads_not_measured(plant: Plant) -> None:
    text = plant("unknown", {})
    rows = [line for line in text.splitlines() if line.startswith(("| gate", "| goal"))]
    assert len(rows) > 20
    assert all(row.endswith("| not measured | not measured |") for row in rows)
    assert "![" not in text


def duel(own: str, peer: str, mode: str, speedup: float) -> dict[str, Any]:
    mine = {"tokens_per_second": 2000.0, "flops": 2.8e11, "memory_growth_bytes": 1e8}
    theirs = {"tokens_per_second": 1000.0, "memory_growth_bytes": 2e8}
    return {
        "ours": own, "peer": peer, "mode": mode, "speedup": speedup,
        "speedups": [speedup - 0.1, speedup, speedup + 0.2], "ours_median": 1000.0,
        "peer_median": 1000.0 * speedup, "ours_runs": [mine], "peer_runs": [theirs], "cold_first_step_s": [12.0, 40.0],
    }  # fmt: skip


def test_a_promise_is_met_missed_or_met_as_far_as_measured(plant: Plant) -> None:
    duels = [
        duel(f"ours-{own}", peer, mode, 1.2)
        for own, peer in (("attention", "llama"), ("attention", "litgpt"), ("retention", "torchscale"))
        for mode in ("eager", "compiled")
    ]
    failed = {"ours": "ours-mamba2", "peer": "mamba2", "mode": "compiled", "speedup": None, "reason": "at\nit | broke"}
    text = plant("train_step_lm", {"duels": [*duels, duel("ours-mamba2", "mamba2", "eager", 2.5), failed]})
    assert "| gate | attention and retention faster than every peer, in the same mode | 1.20 | yes |" in text
    assert "| goal | attention and retention 1.25x as fast | 1.20 | no |" in text
    assert "| gate | Mamba-2 2x as fast as transformers' | 2.50 | yes, as far as measured |" in text
    assert "| goal | Mamba-2 3x as fast | 2.50 | no |" in text
    # 280 GFLOP in a second of 400 GFLOP/s
    assert "at 0.70 of the bfloat16 ceiling | 0.70 | yes |" in text
    assert "| the first compiled step within 15 s | 12.00 | yes, as far as measured |" in text
    assert "| eager | attention | llama | 2,000 | 1,000 | 70% | 58% | 100 | 200 | 1.20 (1.10 to 1.40) |" in text
    assert "not measured: it \\| broke |" in text
    assert "Measured on a processor, 2 cores, 1 thread, torch 2.13.0, commit c0ffee, 2026-01-02; ceilings: 400" in text
    assert "    python benchmarks/x.py\n" in text


def test_translation_is_judged_by_the_fastest_modes(plant: Plant) -> None:
    speeds = {"ours-float32": 9.0, "ours-int8": 1.0, "transformers-bfloat16": 2.5, "ctranslate2-int8": 1.1}
    rows = [
        {
            "case": case, "system": system, "ms_per_sentence": seconds, "memory_growth_bytes": 1e9 * seconds,
            "same_outputs": None, "processes": [{"seconds": seconds}] * 5,
            **({"floor_ms": 0.22} if case == "1x1" else {}),
        }
        for case in ("1x1", "1x4", "32x1", "32x4") for system, seconds in speeds.items()
    ]  # fmt: skip
    text = plant("translation_speed", {"rows": rows})
    assert "| gate | 2x transformers in bfloat16 at beam 4 | 2.50 | yes |" in text
    assert "in two of the four cases | 1.10 | yes |" in text
    assert "| goal | 1.2x CTranslate2's best mode in all four | 1.10 | no |" in text
    assert "CTranslate2's beyond Python's, theirs over ours | 1.10 | yes |" in text
    assert "| 1x4 | ctranslate2-int8 | 1.1 | 909.1 |  | 1,100 |  | 1.10 (1.10 to 1.10) |" in text
    assert "| 1x1 | ctranslate2-int8 | 1.1 | 909.1 | 20% | 1,100 |  | 1.10 (1.10 to 1.10) |" in text


def test_a_recurrent_step_must_be_flat_and_near_its_floor(plant: Plant) -> None:
    rows = [
        {
            "pair": ["ours-retention", "torchscale"], "batch": 1, "context": context, "speedup": 1.6, "speedups": [1.6],
            "ours_median": ms, "peer_median": 1.6 * ms, "floor_ms": 4.0,
        }
        for context, ms in ((128, 5.0), (8192, 6.5))
    ]  # fmt: skip
    text = plant("decode_lm", {"rows": rows})
    assert "longest context at most 1.1x the shortest | 1.30 | no |" in text
    assert "| goal | batch 1 within 1.5x of the floor | 1.25 to 1.62 | no |" in text
    assert "| gate | retention 1.5x as fast as torchscale's | 1.60 | yes, as far as measured |" in text
    assert "| retention | torchscale | 1 | 8,192 | 6.50 | 62% | 10.40 | 1.60 (1.60 to 1.60) |" in text


def test_start_up_counts_beyond_torch(plant: Plant) -> None:
    times = {"trilemma --help": 0.2, "import trilemma": 0.6, "import torch": 1.0, "first translation": 1.9}
    text = plant("startup", {"median_seconds": times})
    assert "| gate | `trilemma --help` within 0.3 s | 0.20 | yes |" in text
    assert "| gate | `import trilemma` within 0.5 s | 0.60 | no |" in text
    assert "beyond `import torch` | 0.90 | yes |" in text


def test_growth_is_shown_and_drawn(plant: Plant, generator: ModuleType, tmp_path: Path) -> None:
    points = [{"length": n, "us_per_token": n / 256, "memory_growth_bytes": 3e6} for n in (256, 512, 1024)]
    slopes = {
        "us_per_token": {"all": 1.0, "longer half": 1.0},
        "memory_growth_bytes": {"all": 0.0, "longer half": 0.01},
    }
    rows = [
        {"mixer": "attention", "points": points, "exponents": slopes},
        {"mixer": "lstm", "points": [], "reason": "longer than 1800 s"},
    ]
    text = plant("growth", {"rows": rows})
    assert "| attention | 1 to 4 | 1.00 (1.00) | 3 to 3 | 0.00 (0.01) |" in text
    assert "| lstm | not measured: longer than 1800 s |" in text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "PAGE", tmp_path / "speed.md")
        patch.setattr(generator, "IMAGES", tmp_path)
        (tmp_path / "speed-layers.png").touch()  # of a result that is gone
        generator.main()
    assert (tmp_path / "speed.md").read_text() == text
    assert (tmp_path / "speed-growth.png").stat().st_size > 1000
    assert not (tmp_path / "speed-layers.png").exists()


def test_data_is_shown_with_its_shares(plant: Plant) -> None:
    sizes = ((32e6, 1.5, 100e6), (128e6, 1.4, 120e6))
    prepared = [
        {
            "task": "seq2seq", "bytes": size, "gb_per_hour_core": rate, "memory_growth_bytes": held,
            "tokens_gb_per_hour_core": 9.0, "tokens_memory_growth_bytes": 2e6,
        }
        for size, rate, held in sizes
    ]  # fmt: skip
    stored = {"prepare": prepared, "loading": {"share": 0.012}, "padding": {"1024": 0.04, "4096": 0.06}}
    text = plant("data_speed", stored)
    assert "| gate | text prepared at 1 GB an hour a core | 1.40 to 1.50 | yes |" in text
    assert "at most 1.1x the shortest's | 1.00 to 1.20 | no |" in text
    assert "| gate | waiting for batches at most 0.03 of a training step | 0.01 | yes |" in text
    assert "| goal | padding at most 0.05 of the tokens | 0.04 to 0.06 | no |" in text
    assert "| prepared for seq2seq, 128 MB | 1.40 (9.00) GB an hour a core, 120 (2) MB held |" in text
    assert "| padding, budget 4,096 | 6.0% of the tokens |" in text


GPU_RUN = ORIGIN | {
    "environment": ORIGIN["environment"] | {"gpu": "NVIDIA H200"},
    "ceilings": ORIGIN["ceilings"] | {
        "device": "cuda", "bfloat16_gflops": 8e5, "bandwidth": [[1, 9000.0], [2**20, 4000.0]], "autocast_gain": 2.0,
    },
    "board": {"name": "H200", "flops": {"bfloat16": 1e15}},
}  # fmt: skip


def gpu_rows(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"runs": [GPU_RUN], "rows": [{"run": 0, "reason": ""} | row for row in rows]}


def test_training_on_a_gpu_is_judged_by_the_best_mode(plant: Plant) -> None:
    def trained(size: str, mixer: str, mode: str, share: float, length: int = 2048) -> dict[str, Any]:
        return {
            "case": {"size": size, "mixer": mixer, "length": length, "mode": mode, "backend": "plain"}, "rows": 8,
            "tokens_per_second": share * 1e6, "flops_per_token": 1e9, "peak_memory_bytes": 42e9,
        }  # fmt: skip

    full = {"case": trained("1.3b", "mamba2", "eager", 0)["case"], "reason": "out of memory: too large"}
    rows = [
        trained("1.3b", "attention", mode, share, length)
        for mode, share, length in (("eager", 0.3, 2048), ("compiled", 0.52, 2048), ("compiled", 0.51, 8192))
    ]
    text = plant("gpu_training", gpu_rows(*rows, trained("124m", "retention", "eager", 0.2), full))
    assert "| goal | a dense model of 1.3 B weights trains at 0.50 of the card's FLOP/s | 0.51 to 0.52 | yes |" in text
    assert "| goal | linear mixers train at 0.40 of it | 0.20 | no |" in text
    assert "| 1.3 B | attention | 2,048 | compiled | 520,000 | 52% | 65% | 42.0 | 8 x 2,048 |" in text
    assert "| 1.3 B | mamba2 | 2,048 | eager | not measured: out of memory: too large |" in text
    assert "Measured on NVIDIA H200" in text


def test_decoding_on_a_gpu_is_judged_by_paths_that_a_decoder_could_use(plant: Plant) -> None:
    def decoded(path: str, ms: float, batch: int = 1) -> dict[str, Any]:
        return {
            "case": {"size": "6.7b", "mixer": "attention", "context": 2048, "batch": batch, "path": path}, "ms": ms,
            "tokens_per_second": batch / ms * 1e3, "weight_bytes": 13 * 10**9, "state_bytes": 3 * 10**9,
            "written_bytes": 10**9, "peak_memory_bytes": 20e9,
        }  # fmt: skip

    text = plant("gpu_decode", gpu_rows(decoded("plain", 16.0), decoded("graph", 8.0), decoded("graph-here", 4.5)))
    assert "decoding at batch 1 reaches 0.80 of the memory bandwidth | 0.50 | no |" in text
    assert "| 6.7 B | attention | 2,048 | 1 | graph | 8.000 | 125 | 50% | 53% | 3,000 | 20.0 |" in text
    assert "| 6.7 B | attention | 2,048 | 1 | graph-here | 4.500 | 222 | 89% | 94% |" in text


def test_laws_on_a_gpu_must_hold_for_every_mixer(plant: Plant) -> None:
    lawful = {"case": {"mixer": "gru"}, "ok": True}
    text = plant("gpu_laws", gpu_rows(lawful))
    assert "| gate | the laws hold on a GPU, for every mixer | 1.00 | yes, as far as measured |" in text
    failure = {"subject": "lstm", "law": "split", "found": "error 1 | 2"}
    broken = {"case": {"mixer": "lstm"}, "ok": False, "failures": [failure]}
    text = plant("gpu_laws", gpu_rows(lawful, broken, {"case": {"mixer": "rnn"}, "reason": "longer than 400 s"}))
    assert "| gate | the laws hold on a GPU, for every mixer | 0.00 to 1.00 | no |" in text
    assert "| lawful | gru |" in text
    assert "| split: error 1 \\| 2 | lstm |" in text
    assert "| not measured: longer than 400 s | rnn |" in text
