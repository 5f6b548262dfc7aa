"""Writes docs/speed.md and its pictures from benchmarks/results/ alone.

    python benchmarks/speed_page.py

What has no stored result reads "not measured". The same files give the same page; tests/test_speed_page.py compares.
"""

from __future__ import annotations

import csv
import json
import statistics
import textwrap
from pathlib import Path

from speed_gpu import gpu
from speed_parts import (
    NOT_MEASURED,
    Result,
    Section,
    bars,
    curves,
    megabytes,
    origin,
    promise,
    reason,
    spread,
    table,
)
from speed_training import train_lm, train_seq2seq

from trilemma.compare.plots import image, style

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "speed.md"
IMAGES = ROOT / "docs" / "images"
MARK = "<!-- Made by benchmarks/speed_page.py from benchmarks/results: run the benchmarks instead of editing. -->"
CASES = ("32x1", "32x4", "1x1", "1x4")  # rows x beam

INTRO = """\
How fast Trilemma is beside the libraries that a user would otherwise choose, on the same machine. Whole processes run
in turns (ours, theirs, ours, theirs, ...), each pair gives a ratio, and the median of the pairs is shown with their
range: above 1, ours is faster. A *gate* must be shown before we call ourselves fast, a *goal* is pursued and reported.
`python -m benchmarks` reruns everything; [benchmarks](../benchmarks/README.md) has the rules and how the others are
installed."""
FIRST = ("", "promised", "reached", "met")


DECODE_CELLS = 8  # four contexts, one row and sixteen


def sections() -> dict[str, Section]:
    """Stem of the picture -> section."""
    return {
        "speed-train-lm": train_lm(stored("train_step_lm")),
        "speed-train-seq2seq": train_seq2seq(stored("train_step_seq2seq")),
        "speed-translation": translation(stored("translation_speed")),
        "speed-decode": decoding(stored("decode_lm")),
        "speed-quality": quality(stored("multi30k_marian")),
        "speed-small": smaller(),
        "speed-startup": startup(stored("startup")),
        "speed-growth": growth(stored("growth")),
        "speed-data": data(stored("data_speed")),
        "speed-layers": layers(stored("mixers_speed")),
        "speed-gpu": gpu(stored("gpu_laws"), stored("gpu_training"), stored("gpu_decode")),
    }


def page(found: dict[str, Section]) -> str:
    """docs/speed.md."""
    parts = [f"# Speed\n\n{MARK}\n\n{INTRO}"]
    for name, section in found.items():
        promises = table(FIRST, section.promises) if section.promises else ""
        picture = f"![{section.title}](images/{name}.png)" if section.bars or section.curves else ""
        body = [f"## {section.title}", textwrap.fill(section.about, 120), promises, picture, section.table]
        parts += [part for part in [*body, section.origin] if part]
    return "\n\n".join(parts) + "\n"


# --- translation


def translation(result: Result | None) -> Section:
    """translation_speed.json."""
    rows = [] if result is None else result["rows"]
    best = [middle(rows, case, "ctranslate2") for case in CASES]
    bfloat16 = [middle(rows, case, "transformers-bfloat16") for case in CASES if case.endswith("x4")]
    held = [room(rows, case) for case in CASES]
    promises = [
        promise("gate", "2x transformers in bfloat16 at beam 4", bfloat16, 2),
        promise("gate", "faster than CTranslate2's best mode in two of the four cases", sorted(best, key=key)[-2:], 1),
        promise("goal", "1.2x CTranslate2's best mode in all four", best, 1.2),
        promise("goal", "in reduced precision within 0.2 BLEU on a trained model"),
        promise("goal", "memory beyond torch's no more than CTranslate2's beyond Python's, theirs over ours", held, 1),
    ]
    about = (
        "Encoder-decoder, 6+6 layers, 512 wide, the same random weights in all formats, 20 tokens into 20. Beside each "
        "system: how much faster ours is in its fastest mode. The floor, of a sentence alone, is the time in which the "
        "weights can be read from memory: the encoder's once, the decoder's for each token."
    )
    section = Section("Translation", about, promises)
    if result is None:
        return section
    lines = []
    for row in rows:
        case, system, ms = row["case"], row["system"], row["ms_per_sentence"]
        values = [] if system.startswith("ours") else ratios(rows, case, system)
        if values:
            section.bars[f"{system}, {case}"] = values
        floor = f"{row['floor_ms'] / ms:.0%}" if "floor_ms" in row else ""
        same = "" if row["same_outputs"] is None else f"{row['same_outputs']:.1%}"
        times = (f"{ms:.1f}", f"{1e3 / ms:.1f}", floor)
        lines.append((case, system, *times, megabytes(row["memory_growth_bytes"]), same, spread(values)))
    heads = (
        "rows x beam", "system", "ms a sentence", "sentences/s", "floor / time", "memory, MB", "same tokens",
        "ratio (range)",
    )  # fmt: skip
    section.table, section.origin = table(heads, lines), origin(result)
    return section


def fastest(rows: list[Result], case: str, system: str) -> Result | None:
    """Of a system's modes."""
    found = [row for row in rows if row["case"] == case and row["system"].startswith(system)]
    return min(found, key=lambda row: row["ms_per_sentence"], default=None)


def ratios(rows: list[Result], case: str, system: str) -> list[float]:
    """A system's time over ours, round by round, both in their fastest mode."""
    own, peer = fastest(rows, case, "ours"), fastest(rows, case, system)
    if own is None or peer is None:
        return []
    pairs = zip(own["processes"], peer["processes"], strict=True)
    return [theirs["seconds"] / mine["seconds"] for mine, theirs in pairs]


def middle(rows: list[Result], case: str, system: str) -> float | None:
    """Their median."""
    return statistics.median(values) if (values := ratios(rows, case, system)) else None


def room(rows: list[Result], case: str) -> float | None:
    """Memory of CTranslate2 over ours, both in their fastest mode."""
    own, peer = fastest(rows, case, "ours"), fastest(rows, case, "ctranslate2")
    return None if own is None or peer is None else peer["memory_growth_bytes"] / own["memory_growth_bytes"]


def key(value: float | None) -> float:
    """Orders what was not measured first."""
    return -1.0 if value is None else value


# --- decoding


def decoding(result: Result | None) -> Section:
    """decode_lm.json."""
    rows = [] if result is None else [row for row in result["rows"] if row["speedup"] is not None]

    def of(own: str, peer: str) -> list[Result]:
        return [row for row in rows if row["pair"] == [f"ours-{own}", peer]]

    def speedups(own: str, peer: str) -> list[float | None]:
        found = [row["speedup"] for row in of(own, peer)]
        return found + [None] * (DECODE_CELLS - len(found))

    recurrent = [
        [row for row in of(*pair) if row["batch"] == batch]
        for pair in (("retention", "torchscale"), ("mamba2", "mamba2"))
        for batch in sorted({row["batch"] for row in rows})
    ]
    flat = [some[-1]["ours_median"] / some[0]["ours_median"] for some in recurrent if len(some) > 1]
    floors = [row["ours_median"] / row["floor_ms"] for row in rows if row["batch"] == 1]
    promises = [
        promise("gate", "attention no slower than a plain loop over a ready cache", speedups("attention", "loop"), 1),
        promise("gate", "retention 1.5x as fast as torchscale's", speedups("retention", "torchscale"), 1.5),
        promise("gate", "Mamba-2 2x as fast as transformers'", speedups("mamba2", "mamba2"), 2),
        promise("gate", "recurrent mixers flat: longest context at most 1.1x the shortest", flat, most=1.1),
        promise("goal", "batch 1 within 1.5x of the floor", floors, most=1.5),
        promise("goal", "retention 2x as fast as torchscale's", speedups("retention", "torchscale"), 2),
        promise("goal", "Mamba-2 3x as fast as transformers'", speedups("mamba2", "mamba2"), 3),
    ]  # fmt: skip
    about = (
        "One token of the language models above, after a context. The floor is what a step must read, weights and "
        "State, over the measured memory bandwidth."
    )
    section = Section("Decoding a language model", about, promises)
    if result is None:
        return section
    lines = []
    for row in result["rows"]:
        own, peer = (name.removeprefix("ours-") for name in row["pair"])
        head = (own, peer, str(row["batch"]), f"{row['context']:,}")
        if row["speedup"] is None:
            lines.append((*head, "", "", "", reason(row)))
            continue
        section.bars[f"{own} against {peer}, batch {row['batch']}, context {row['context']:,}"] = row["speedups"]
        of_floor = f"{row['floor_ms'] / row['ours_median']:.0%}"
        times = (f"{row['ours_median']:.2f}", of_floor, f"{row['peer_median']:.2f}")
        lines.append((*head, *times, spread(row["speedups"])))
    heads = ("ours", "peer", "batch", "context", "ms, ours", "floor / ours", "ms, peer's", "ratio (range)")
    section.table, section.origin = table(heads, lines), origin(result)
    return section


# --- quality, size, start-up, growth, layers


def quality(peer: Result | None) -> Section:
    """The stored studies of Multi30k, and multi30k_marian.json."""
    rows: list[tuple[str, float, float, str]] = []
    origins = []
    for study in (RESULTS / "multi30k", RESULTS / "multi30k-small"):
        if not (study / "results.csv").exists():
            continue
        report = json.loads((study / "report.json").read_text(encoding="utf-8"))
        origins.append(origin(report))
        threads, precision = (str(report["environment"][key]) for key in ("threads", "precision"))
        with (study / "results.csv").open(encoding="utf-8", newline="") as file:
            rows += [
                (
                    f"ours, {row['candidate']} ({study.name}, {precision})",
                    float(row["bleu"]),
                    float(row["training_seconds"]),
                    threads,
                )
                for row in csv.DictReader(file)
            ]
    best = {
        minutes: max((bleu for _, bleu, s, _ in rows if s <= 60 * minutes), default=None) for minutes in (10, 20, 30)
    }
    if peer is not None:
        score, seconds = peer["scores"]["bleu"]["score"], peer["training"]["seconds"]
        rows.append(("transformers' Marian, plain loop", score, seconds, str(peer["environment"]["threads"])))
        origins.append(origin(peer))
    promises = [
        promise("gate", "30 BLEU at 30 minutes", [best[30]], 30),
        promise("goal", "20 BLEU at 10 minutes", [best[10]], 20),
        promise("goal", "30 BLEU at 20 minutes", [best[20]], 30),
        promise("goal", "35 BLEU at 30 minutes", [best[30]], 35),
    ]
    about = (
        "Multi30k, English to German, raw text, sacreBLEU 13a on test_2016_flickr, beam 5. Reached is the best of our "
        "stored runs that trained no longer; seconds of the study multi30k are doubtful (README). The command of "
        "multi30k-small is now `trilemma compare benchmarks/results/multi30k-small/study.yaml`."
    )
    values = [(name, f"{bleu:.2f}", f"{seconds:,.0f}", threads) for name, bleu, seconds, threads in rows]
    heads = ("system", "BLEU", "training, s", "threads")
    lines = table(heads, values) if values else ""
    return Section("Time to quality", about, promises, lines, origin="\n\n".join(origins))


def smaller() -> Section:
    """Quantised models have no benchmark yet."""
    promises = [promise("goal", "int8 and int4 weights, int8 compute and cache, with the quality lost stated")]
    return Section("Smaller models", "Quantised weights, compute and caches.", promises)


def startup(result: Result | None) -> Section:
    """startup.json."""
    times = {} if result is None else result["median_seconds"]
    first, torch = times.get("first translation"), times.get("import torch")
    beyond = None if first is None or torch is None else first - torch
    promises = [
        promise("gate", "`trilemma --help` within 0.3 s", [times.get("trilemma --help")], most=0.3),
        promise("gate", "`import trilemma` within 0.5 s", [times.get("import trilemma")], most=0.5),
        promise("gate", "first translation of a cold command within 1 s beyond `import torch`", [beyond], most=1.0),
    ]
    rows = [(f"`{name}`", f"{seconds:.2f}") for name, seconds in times.items()]
    lines = table(("whole process", "seconds"), rows) if rows else ""
    about = "Whole processes in turns; the model that translates has 4+4 layers, 128 wide."
    return Section("Start-up", about, promises, lines, origin=origin(result) if result else "")


def growth(result: Result | None) -> Section:
    """growth.json."""
    rows = [] if result is None else [row for row in result["rows"] if row["points"]]
    about = (
        "One layer, 512 wide, trained on the same number of tokens in rows of 256 to 16,384. An exponent is the slope "
        "of the logarithms over all lengths, in brackets over the longer half: 0 says that a token costs the same at "
        "every length."
    )
    section = Section("Growth with the length", about, [])
    for row in rows:
        section.curves[row["mixer"]] = [
            (point["length"], point["us_per_token"], point["memory_growth_bytes"]) for point in row["points"]
        ]
    if result is None:
        section.table = NOT_MEASURED
    else:
        heads = ("mixer", "us a token", "exponent of time", "memory, MB", "exponent of memory")
        section.table, section.origin = table(heads, (growing(row) for row in result["rows"])), origin(result)
    return section


def growing(row: Result) -> tuple[str, ...]:
    """Shortest and longest length, and exponents."""
    if not row["points"]:
        return row["mixer"], reason(row), "", "", ""
    cells = [row["mixer"]]
    for name, shown in (("us_per_token", "{:.3g}".format), ("memory_growth_bytes", megabytes)):
        ends = [shown(row["points"][at][name]) for at in (0, -1)]
        slopes = row["exponents"][name]
        cells += [" to ".join(ends), f"{slopes['all']:.2f} ({slopes['longer half']:.2f})"]
    return tuple(cells)


def data(result: Result | None) -> Section:
    """data_speed.json."""
    found = {"prepare": [], "padding": {}} if result is None else result
    prepared: list[Result] = found["prepare"]
    growths: dict[tuple[str, str], list[float]] = {}
    for row in prepared:
        for kind in ("memory_growth_bytes", "tokens_memory_growth_bytes"):
            growths.setdefault((row["task"], kind), []).append(row[kind])
    constant = [held[-1] / held[0] for held in growths.values()]
    waited = found["loading"]["share"] if "loading" in found else None
    promises = [
        promise("gate", "text prepared at 1 GB an hour a core", [row["gb_per_hour_core"] for row in prepared], 1),
        promise("gate", "in constant memory: the longest text at most 1.1x the shortest's", constant, most=1.1),
        promise("gate", "waiting for batches at most 0.03 of a training step", [waited], most=0.03),
        promise("goal", "padding at most 0.05 of the tokens", list(found["padding"].values()), most=0.05),
    ]
    about = (
        "Text is prepared from raw files to a dataset, with the training of a tokenizer and, in brackets, with one at "
        "hand; a step waits for its batches in the trainer."
    )
    section = Section("Data", about, promises)
    if result is None:
        return section
    rows = []
    for row in prepared:
        what = f"prepared for {row['task']}, {row['bytes'] / 1e6:,.0f} MB"
        speed = f"{row['gb_per_hour_core']:.2f} ({row['tokens_gb_per_hour_core']:.2f}) GB an hour a core"
        held = f"{megabytes(row['memory_growth_bytes'])} ({megabytes(row['tokens_memory_growth_bytes'])}) MB held"
        rows.append((what, f"{speed}, {held}"))
    rows += [("waiting for batches", f"{waited:.1%} of a step")]
    rows += [
        (f"padding, budget {int(budget):,}", f"{part:.1%} of the tokens") for budget, part in found["padding"].items()
    ]
    section.table, section.origin = table(("what", "measured"), rows), origin(result)
    return section


def layers(result: Result | None) -> Section:
    """mixers_speed.json; its growth is shown by the section before."""
    about = (
        "One mixer layer alone: `train` is forward and backward in bfloat16, `step` one token with a State in float32."
    )
    section = Section("One layer", about, [])
    if result is None:
        section.table = NOT_MEASURED
        return section
    rows = []
    for row in (row for row in result["rows"] if row["task"] != "growth"):
        head = (row["case"], row["task"])
        if row["speedup"] is None:
            rows.append((*head, "", "", reason(row)))
            continue
        section.bars[", ".join(head)] = row["speedups"]
        rows.append((*head, f"{row['ours_median']:.3g}", f"{row['peer_median']:.3g}", spread(row["speedups"])))
    heads = ("layer", "task", "ms, ours", "ms, peer's", "ratio (range)")
    section.table, section.origin = table(heads, rows), origin(result)
    return section


# --- files


def stored(name: str) -> Result | None:
    """The result of this name."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def main() -> None:
    """Writes the page and its pictures, and removes pictures that it no longer shows."""
    found = sections()
    PAGE.write_text(page(found), encoding="utf-8")
    for name, section in found.items():
        file = IMAGES / f"{name}.png"
        if not section.bars and not section.curves:
            file.unlink(missing_ok=True)
            continue
        with style():
            file.write_bytes(image(bars(section) if section.bars else curves(section), "png"))


if __name__ == "__main__":
    main()
