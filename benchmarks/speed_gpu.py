"""The section of docs/speed.md about GPUs. See speed_page.py."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_models import of_bandwidth, utilisation
from speed_parts import NOT_MEASURED, Promise, Result, Section, megabytes, origin, promise, reason, table

from trilemma.registry import available_mixers

DENSE = {"124m": 0.45, "350m": 0.48, "1.3b": 0.50}  # size -> goal
LENGTHS = (2048, 8192)
LINEAR = ("retention", "mamba2", "gated_deltanet")
DECODED = ("1.3b", "6.7b")
CONTEXTS = (2048, 8192, 32768)
READERS = ("attention", "attention-gqa8", "retention")


def gpu(laws: Result | None, training: Result | None, decode: Result | None) -> Section:
    """gpu_laws.json, gpu_training.json and gpu_decode.json."""
    about = (
        "Models of 124 M to 6.7 B weights, in shares of what the card can do. FLOPs are those that the model asks for: "
        "matrix parameters, the output's included and look-ups not, and mixing over the past alone, without "
        "recomputation. The peak is the data sheet's for dense bfloat16, the ceiling a matrix product's in the same "
        "run. In decoding, the bandwidth is measured in the same run; a step reads weights and State, and a recurrence "
        "writes its State back. A graph is one CUDA graph for all positions; graph-here is attention's at one position "
        "alone, with torch's unmasked kernel, which no decoder could use for the next token. No peers: shares of the "
        "card are what published systems quote."
    )
    promises = [law_promise(laws), *training_promises(training), decode_promise(decode)]
    section = Section("GPU", about, promises)
    parts = [(laws, law_table), (training, training_table), (decode, decode_table)]
    section.table = "\n\n".join(shown(result["rows"], result) for result, shown in parts if result is not None)
    section.origin = "\n\n".join(origins(result) for result, _ in parts if result is not None)
    return section


def origins(result: Result) -> str:
    """Of each process that measured a row."""
    used = sorted({row["run"] for row in result["rows"]})
    return "\n\n".join(dict.fromkeys(origin(result["runs"][number]) for number in used))


def measured(result: Result | None) -> list[Result]:
    """Rows that have numbers."""
    return [] if result is None else [row for row in result["rows"] if not row["reason"]]


# --- laws


def law_promise(result: Result | None) -> Promise:
    """Of all mixers; those that were not verified are not measured."""
    found: list[float | None] = [float(row["ok"]) for row in measured(result)]
    missing = len(available_mixers()) - len(found)
    return promise("gate", "the laws hold on a GPU, for every mixer", found + [None] * missing, 1)


def law_table(rows: Sequence[Result], _: Result) -> str:
    """Mixers that share an outcome stand together."""
    outcomes: dict[str, list[str]] = {}
    for row in rows:
        outcome = reason(row) if row["reason"] else "lawful"
        if not row["reason"] and not row["ok"]:
            outcome = "; ".join(f"{one['law']}: {one['found']}".replace("|", "\\|") for one in row["failures"])
        outcomes.setdefault(outcome, []).append(row["case"]["mixer"])
    return table(("laws, quick level", "mixers"), ((outcome, ", ".join(names)) for outcome, names in outcomes.items()))


# --- training


def training_promises(result: Result | None) -> list[Promise]:
    """Best of the modes and backends, at each length."""
    dense = [
        promise(
            "goal",
            f"a dense model of {words(size)} weights trains at {goal:.2f} of the card's FLOP/s",
            [best_share(result, size, "attention", length) for length in LENGTHS],
            goal,
        )
        for size, goal in DENSE.items()
    ]
    linear = [best_share(result, size, mixer, length) for size in DENSE for mixer in LINEAR for length in LENGTHS]
    return [*dense, promise("goal", "linear mixers train at 0.40 of it", linear, 0.4)]


def best_share(result: Result | None, size: str, mixer: str, length: int) -> float | None:
    """Of the data sheet's peak."""
    wanted = {"size": size, "mixer": mixer, "length": length}
    found = [share(result, row)["peak"] for row in measured(result) if wanted.items() <= row["case"].items()]
    return max((value for value in found if value is not None), default=None)


def share(result: Result | None, row: Result) -> dict[str, float | None]:
    """See `utilisation`."""
    assert result is not None
    return utilisation(row, result["runs"][row["run"]])


def training_table(rows: Sequence[Result], result: Result) -> str:
    """One line a case."""
    lines = []
    for row in rows:
        case = row["case"]
        mode = case["mode"] if case["backend"] == "plain" else f"{case['mode']}, {case['backend']}"
        head = (words(case["size"]), case["mixer"], f"{case['length']:,}", mode)
        if row["reason"]:
            lines.append((*head, reason(row), *[""] * 4))
            continue
        shares = (NOT_MEASURED if value is None else f"{value:.0%}" for value in share(result, row).values())
        numbers = (f"{row['tokens_per_second']:,.0f}", *shares, f"{row['peak_memory_bytes'] / 1e9:.1f}")
        lines.append((*head, *numbers, f"{row['rows']} x {case['length']:,}"))
    heads = (
        "training", "mixer", "length", "mode", "tokens/s", "of the peak", "of the ceiling", "peak memory, GB", "step",
    )  # fmt: skip
    return table(heads, lines)


# --- decoding


def decode_promise(result: Result | None) -> Promise:
    """Best of the paths that a decoder could use, at batch 1."""
    found = [best_fraction(result, size, mixer, at) for size in DECODED for mixer in READERS for at in CONTEXTS]
    return promise("goal", "decoding at batch 1 reaches 0.80 of the memory bandwidth", found, 0.8)


def best_fraction(result: Result | None, size: str, mixer: str, context: int) -> float | None:
    """Of the bandwidth, with what is read alone."""
    wanted = {"size": size, "mixer": mixer, "context": context, "batch": 1}
    found = [row for row in measured(result) if wanted.items() <= row["case"].items()]
    return max((fractions(result, row)[0] for row in found if row["case"]["path"] != "graph-here"), default=None)


def fractions(result: Result | None, row: Result) -> tuple[float, float]:
    """Of the bandwidth: with what is read, and with what is read or written."""
    assert result is not None
    ceilings = result["runs"][row["run"]]["ceilings"]
    read = row["weight_bytes"] + row["state_bytes"]
    moved = read + row["written_bytes"]
    return of_bandwidth(read, row["ms"], ceilings), of_bandwidth(moved, row["ms"], ceilings)


def decode_table(rows: Sequence[Result], result: Result) -> str:
    """One line a case."""
    lines = []
    for row in rows:
        case = row["case"]
        head = (words(case["size"]), case["mixer"], f"{case['context']:,}", str(case["batch"]), case["path"])
        if row["reason"]:
            lines.append((*head, reason(row), *[""] * 5))
            continue
        shares = (f"{value:.0%}" for value in fractions(result, row))
        numbers = (f"{row['ms']:.3f}", f"{row['tokens_per_second']:,.0f}", *shares, megabytes(row["state_bytes"]))
        lines.append((*head, *numbers, f"{row['peak_memory_bytes'] / 1e9:.1f}"))
    heads = (
        "decoding", "mixer", "context", "batch", "path", "ms a token", "tokens/s", "of the bandwidth", "with writes",
        "State, MB", "peak memory, GB",
    )  # fmt: skip
    return table(heads, lines)


def words(size: str) -> str:
    """124m -> 124 M."""
    return f"{size[:-1]} {size[-1].upper()}"
