"""Writes docs/mixers/: a page for every mixer and an index, from its source and from stored records alone.

    python docs/mixer_pages.py

Docstrings and signatures say what a mixer is, its formulas what it costs, `laws/records.json` which laws this very code
has passed, `laws/oracles.json` with whom it agrees, and benchmarks/results/ how fast it was. What has no record reads
"not shown". The same files give the same pages; tests/test_mixer_pages.py compares.
"""

from __future__ import annotations

import ast
import csv
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from trilemma.laws.oracles import Agreement, closeness, shipped_oracles
from trilemma.laws.records import PATHS, fingerprint, kind_of, shipped_paths, shipped_records
from trilemma.mixers.base import MemoryMixer, Mixer
from trilemma.mixers.build import build_mixer
from trilemma.registry import available_mixers, mixer_class

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "mixers"
RESULTS = ROOT / "benchmarks" / "results"
MARK = "<!-- Made by docs/mixer_pages.py from the code and its records: edit those. -->"
NOT_SHOWN = "not shown"
WIDTH, HEADS, LENGTH = 512, 8, 2048  # what costs are stated for
CONTEXTS = (128, 2048, 8192)


def pages() -> dict[str, str]:
    """File name -> text."""
    names = available_mixers()
    return {"README.md": index(names), **{f"{name}.md": page(name) for name in names}}


def page(name: str) -> str:
    """One mixer's page."""
    cls = mixer_class(name)
    equation, (what, arguments) = as_markdown(module_docstring(cls)), parsed(inspect.getdoc(cls) or "")
    source = Path(inspect.getfile(cls)).relative_to(ROOT)
    sections = {
        "Options": table(("option", "type", "default", "meaning"), options(cls, arguments)),
        "What it can do": "\n".join(f"- {line}" for line in abilities(cls)),
        "Cost": costs(built(cls)),
        "Laws": laws(name),
        "Oracle": oracle(shipped_oracles().get(name, [])),
        "Speed": speed(name),
        "Studies": studies(name),
        "Recipes": recipes(name),
    }
    head = f"# {name}\n\n{MARK}\n\n{equation}\n\n{as_markdown(what)}\n\nSource: [{source}](../../{source})"
    return "\n\n".join([head, *(f"## {title}\n\n{text}" for title, text in sections.items())]) + "\n"


def index(names: Sequence[str]) -> str:
    """The table of all mixers."""
    oracles = shipped_oracles()
    rows = []
    for name in names:
        mixer = built(mixer_class(name))
        rows.append(
            (
                f"[{name}]({name}.md)",
                title(module_docstring(type(mixer))),
                f"{mixer.count_parameters():,}",
                f"{flops_per_token(mixer):,.0f}",
                f"{mixer.state_bytes(CONTEXTS[-1]):,}" if has_state(mixer) else "none",
                laws_in_short(name),
                oracle_in_short(oracles.get(name, [])),
            )
        )
    heads = ("mixer", "what", "weights", "FLOPs a token", f"State at {CONTEXTS[-1]:,}, bytes", "laws", "oracle")
    intro = textwrap.fill(
        "Every registered mixer with its equation, source, cost, laws and oracle. Weights, forward FLOPs per token of "
        f"a sequence of {LENGTH:,} and the bytes of one row's State are those of one layer with d_model {WIDTH}, "
        f"{HEADS} heads and otherwise its defaults, in float32; laws are counted over both paths (see "
        "[verify](../verify.md)); an oracle's number is the largest difference, as a share of its largest value. What "
        f'has no record for this very code reads "{NOT_SHOWN}".',
        width=120,
    )
    return f"# Mixers\n\n{MARK}\n\n{intro}\n\n{table(heads, rows)}\n\nTo add one: [add a mixer](../add-a-mixer.md).\n"


# --- docstrings and signatures


def module_docstring(cls: type[Mixer]) -> str:
    """Of the file that a mixer is written in."""
    return ast.get_docstring(ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))) or NOT_SHOWN


def title(docstring: str) -> str:
    """The first sentence without what is in brackets behind it."""
    sentence = re.sub(r"\s+", " ", docstring.partition("\n\n")[0])
    return escaped(re.split(r" \((?=[^)]*\d{4})|: |\.$|\. |, torch's", sentence)[0].rstrip("."))


def as_markdown(text: str) -> str:
    """Indented blocks become fenced ones."""
    paragraphs = text.strip().split("\n\n")
    indented = re.compile(r"(    .*\n?)+")
    fenced = [f"```text\n{inspect.cleandoc(part)}\n```" if indented.fullmatch(part) else part for part in paragraphs]
    return "\n\n".join(fenced).replace("\n```\n\n```text\n", "\n\n")


def parsed(docstring: str) -> tuple[str, dict[str, str]]:
    """What a class's docstring says before its arguments, and argument -> meaning."""
    text, _, rest = docstring.partition("\nArgs:\n")
    block = re.split(r"\n(?=\S)", rest)[0]
    meanings: dict[str, str] = {}
    for names, meaning in re.findall(r"^    (\w+(?:, \w+)*): ((?:.*\n?)(?:^        .*\n?)*)", block, re.MULTILINE):
        meanings |= dict.fromkeys(names.split(", "), re.sub(r"\s+", " ", meaning).strip())
    return text, meanings


def options(cls: type[Mixer], meanings: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """A row for each argument but the width."""
    for name, parameter in list(inspect.signature(cls).parameters.items())[1:]:
        kind = str(parameter.annotation).replace("Literal", "one of ")
        yield f"`{name}`", f"`{escaped(kind)}`", f"`{parameter.default!r}`", escaped(meanings.get(name, NOT_SHOWN))


def abilities(cls: type[Mixer]) -> Iterator[str]:
    """The class's declared capabilities, each held to the laws, in sentences."""
    able = cls.capabilities
    if able.reads_memory:
        yield "reads a memory that another part of the model produced"
    elif able.causal:
        both = "causal, and in both directions" if able.bidirectional else "causal; encoders wrap it in `bidirectional`"
        yield both + ("; a prefix may be read in both directions" if able.prefix else "")
    else:
        yield "in both directions only: for encoders"
    if has_state(built(cls)) and not able.reads_memory:
        yield "State of constant size" if able.constant_state else "State that grows with the tokens read"
        yield "takes tokens back by itself" if able.rewinds else "takes tokens back by replaying them"
    if able.keeps_keys:
        yield "its keys and values can be held in 8 bits"
    yield "compiles" if able.compiles is True else f"is not compiled: {able.compiles}"
    for verb, values in (("publishes", built(cls).publishes()), ("reads", built(cls).reads())):
        for value, kind in values.items():
            yield f"{verb} `{value}`, {kind if isinstance(kind, str) else f'of shape {list(kind)} a token'}"


# --- cost


def built(cls: type[Mixer]) -> Mixer:
    """One layer at the stated size."""
    causal = cls.capabilities.causal or cls.capabilities.reads_memory
    return build_mixer(cls.name, WIDTH, causal=causal, num_heads=HEADS)


def has_state(mixer: Mixer) -> bool:
    return mixer.causal or mixer.capabilities.reads_memory


def flops_per_token(mixer: Mixer) -> float:
    """Of a whole sequence; with a memory of the same length where one is read."""
    if isinstance(mixer, MemoryMixer):
        return (mixer.flops(LENGTH, LENGTH) + mixer.memory_flops(LENGTH)) / LENGTH
    return mixer.flops(LENGTH) / LENGTH


def costs(mixer: Mixer) -> str:
    """From the formulas that the law of cost compares with what is counted."""
    memory = f" that read a memory of {LENGTH:,}, its projection included" if isinstance(mixer, MemoryMixer) else ""
    text = textwrap.fill(
        f"One layer with d_model {WIDTH}, {HEADS} heads and otherwise its defaults: {mixer.count_parameters():,} "
        f"weights, {flops_per_token(mixer):,.0f} forward FLOPs a token over {LENGTH:,} tokens{memory}.",
        width=120,
    )
    if not has_state(mixer):
        return f"{text}\nIt has no State."
    heads = (
        "positions in the memory" if memory else "tokens read",
        "State of a row in float32, bytes",
        "FLOPs of the next token",
    )
    rows = [(f"{n:,}", f"{mixer.state_bytes(n):,}", f"{mixer.flops(1, n):,}") for n in CONTEXTS]
    return f"{text}\n\n{table(heads, rows)}"


# --- laws and oracles


def current_record(name: str, path: str) -> dict[str, Any] | None:
    """The law record of this very code; one of an earlier code shows nothing."""
    known = shipped_records().get(name, {}).get(path)
    return known if known is not None and known["fingerprint"] == fingerprint(name, path) else None


def laws(name: str) -> str:
    """Each path's laws."""
    rows, origins = [], []
    for path in shipped_paths(name):
        held = "" if kind_of(path) is None else ", keys and values in 8 bits"
        known = current_record(name, path)
        if known is None:
            rows.append(("`compile`" if path == "compiled" else f"all others{held}", NOT_SHOWN, "", ""))
            continue
        origins.append(
            f"{path}: level {known['level']}, seed {known['seed']}, torch {known['torch']}, {known['device']}, "
            f"{known['variants']} variants, code {known['fingerprint'][:12]}"
        )
        for law, result in known["laws"].items():
            worst = f"{result['worst']:.2g}" if "worst" in result else ""
            says = {"pass": "holds", "fail": "does not hold", "n/a": "says nothing"}[result["outcome"]]
            reason = f": {escaped(result['reason'])}" if "reason" in result else ""
            rows.append((f"`{law}`{held}", says + reason, str(result.get("variants", "")), worst))
    heads = ("law", "outcome", "variants", "largest error, of what is allowed")
    return "\n\n".join([table(heads, rows), *(f"Path {origin}." for origin in origins)])


def laws_in_short(name: str) -> str:
    known = [current_record(name, path) for path in PATHS]
    results = [result["outcome"] for record in known if record is not None for result in record["laws"].values()]
    return NOT_SHOWN if None in known else f"{results.count('pass')} of {len(results)}"


def oracle(items: Sequence[Agreement]) -> str:
    """What a mixer was compared with."""
    if not items:
        return NOT_SHOWN
    heads = ("oracle", "compared", "type", "largest difference", "test", "commit")
    rows = []
    for item in items:
        file, _, function = item.test.partition("::")
        test = f"[{function}](../../{file})"
        name = item.oracle or "its equations, written out"
        rows.append((escaped(name), item.what, item.dtype, f"{item.error:.1e}", test, f"{item.commit}, {item.date}"))
    none = "" if any(item.oracle for item in items) else f"No outside oracle: {items[0].no_oracle}.\n\n"
    return f"{none}{table(heads, rows)}\n\nDifferences are shares of the oracle's largest value."


def oracle_in_short(items: Sequence[Agreement]) -> str:
    """Packages or stored numbers, and the largest difference."""
    if not items:
        return NOT_SHOWN
    outside = [item for item in items if item.oracle]
    if not outside:
        return f"none; its equations: {closeness(items)}"
    names = ["stored numbers" if item.oracle.startswith("numbers") else item.oracle.split()[0] for item in outside]
    return f"{', '.join(dict.fromkeys(names))}: {closeness(outside)}"


# --- benchmarks, studies, recipes


def speed(name: str) -> str:
    """Stored timings of the layer alone, and of whole models made of it."""
    rows: list[tuple[str, ...]] = []
    origins = []
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        link = f"[{file.stem}](../../benchmarks/results/{file.name})"
        alone = [row for row in result.get("rows", []) if "case" in row and owner(row["case"]) == name]
        whole = [row for row in result.get("duels", []) if row["ours"] == f"ours-{name}"]
        found = [(link, f"{row['case']}, {row['task']}", *timed(row)) for row in alone]
        found += [(link, f"a model against {row['peer']}, {row['mode']}", *timed(row)) for row in whole]
        if found:
            rows += found
            size = ", ".join(f"{key} {value:,}" for key, value in result["size"].items())
            machine = result["environment"]
            origins.append(
                f"{link}: {size}; {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, "
                f"torch {machine['torch']}, commit {machine['commit']}, {result['date'][:10]}."
            )
    heads = ("benchmark", "what", "ours", "theirs", "theirs / ours")
    return "\n\n".join([table(heads, rows), *origins]) if rows else NOT_SHOWN


def owner(case: str) -> str:
    """The mixer that a case is of: mamba3 of mamba3_mimo."""
    return max((name for name in available_mixers() if f"{case}_".startswith(f"{name}_")), key=len, default="")


def timed(row: dict[str, Any]) -> tuple[str, str, str]:
    """Both medians and their ratio; of a layer's growth with the length, our own two."""
    if row["speedup"] is None:
        return NOT_SHOWN, NOT_SHOWN, escaped(row["reason"].splitlines()[0])
    unit = "us a token" if row["field"] == "us_per_token" else "ms"
    mine, other = (
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (row["ours_median"], row["peer_median"])
    )
    if row.get("task") == "growth":
        short, long = (f"{row[side][0]['length']:,}" for side in ("ours", "peer"))
        return f"{mine} {unit} at {short}, {other} at {long}", "", f"grows by {row['speedup']:.2f}"
    return f"{mine} {unit}", f"{other} {unit}", f"{row['speedup']:.2f}"


def studies(name: str) -> str:
    """Candidates of stored studies that are made of this mixer."""
    rows = []
    for file in sorted(RESULTS.glob("*/results.csv")):
        link = f"[{file.parent.name}](../../benchmarks/results/{file.parent.name}/results.csv)"
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                if name not in re.findall(r"\w+", row["mixer"]):
                    continue
                metric = list(row)[list(row).index("low") - 1]
                quality = f"{float(row[metric]):.2f} ({float(row['low']):.1f} to {float(row['high']):.1f})"
                rows.append(
                    (
                        link,
                        f"{row['candidate']}, {row['layout']}",
                        f"{metric} {quality}",
                        row["seeds"],
                        f"{float(row['training_seconds']):.0f} s",
                        f"{float(row['ms_per_token']):.2f} at {int(row['context']):,}",
                    )
                )
    heads = ("study", "candidate", "quality (95 % interval)", "seeds", "training", "ms per token")
    return table(heads, rows) if rows else NOT_SHOWN


def recipes(name: str) -> str:
    """Recipes that name the mixer."""
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    using = [file for file in files if name in named(yaml.safe_load(file.read_text(encoding="utf-8")))]
    return ", ".join(f"[{file.name}](../../recipes/{file.name})" for file in using) or "None names it."


def named(value: Any, of_mixer: bool = False) -> Iterator[str]:
    """The mixers that a configuration names: under `mixer`, `encoder_mixer`, `cross_mixer` and `inner`."""
    if isinstance(value, str) and of_mixer:
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from named(item, of_mixer)
    elif isinstance(value, dict):
        for key, item in value.items():
            place = key.rpartition(".")[2]
            yield from named(item, place.endswith("mixer") or place == "inner" or (of_mixer and place == "name"))


# --- Markdown


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """For a cell of a table."""
    return text.replace("|", "\\|")


def main() -> None:
    """Writes the pages and removes those of mixers that are gone."""
    TARGET.mkdir(exist_ok=True)
    made = pages()
    for file in TARGET.glob("*.md"):
        if file.name not in made:
            file.unlink()
    for name, text in made.items():
        (TARGET / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
