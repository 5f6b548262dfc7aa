"""`trilemma verify`: the laws, on our mixers or on yours."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from trilemma.cli.common import CacheOption, Json, print_json, say
from trilemma.errors import ConfigError

if TYPE_CHECKING:
    from trilemma.laws import Report

_MARKS = {"pass": "[green]ok[/]", "fail": "[red]FAIL[/]", "n/a": "[dim]-[/]"}


def command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="mixers; see --all", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="every registered mixer")] = False,
    level: Annotated[str, typer.Option("--level", help="quick or full")] = "quick",
    law: Annotated[
        list[str] | None, typer.Option("--law", help="one law only; may be repeated", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="of all draws; default: a new one, printed")] = None,
    variant: Annotated[int | None, typer.Option("--variant", help="one variant of the mixer, by number")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda")] = "cpu",
    cache: CacheOption = None,
    record: Annotated[bool, typer.Option("--record", help="write the law records that Trilemma ships")] = False,
    json: Json = False,
) -> None:
    """The laws: splitting a sequence never changes the answer, and what follows from it.

    Without names, the mixers of the plug-ins given with --plugin FILE[:CLASS] are verified. Exit code 1 if a law fails.
    """
    from trilemma import laws, machine, registry
    from trilemma.laws import oracles, records, registered
    from trilemma.models import cache_kind

    device, _ = machine.choose_device(device)
    chosen = list(names or [])
    if every:
        chosen = registry.available_mixers()
    if not chosen:
        known = registry.available_mixers()
        chosen = [name for name in known if registered.is_plugin(registry.mixer_class(name))]
    if not chosen:
        raise ConfigError("nothing to verify: name a mixer, or give --all or --plugin FILE")
    if record and (law or variant is not None or cache is not None):
        raise ConfigError("--record writes down all laws, variants and paths; leave out --law, --variant and --cache")
    seed = secrets.randbelow(2**31) if seed is None else seed
    say(f"seed {seed}, level {level}")
    found: dict[str, list[Report]] = {}
    prints = {name: {path: laws.fingerprint(name, path, device) for path in records.PATHS} for name in chosen}
    kind = cache_kind(cache)
    for name in chosen:
        found[name] = laws.verify(
            name, laws=law, level=level, seed=seed, variant=variant, device=device, cache=kind, progress=_progress
        )
    ok = all(report.ok for reports in found.values() for report in reports)
    if record and ok:
        written = {name: records.records_of(prints[name], reports, device) for name, reports in found.items()}
        for name in chosen:
            for path in set(records.shipped_paths(name)) - set(records.PATHS):
                say(f"{name} on the path {path}")
                written[name][path] = laws.record(name, path, level=level, seed=seed, device=device, progress=_progress)
        ok = all(each["ok"] for paths in written.values() for each in paths.values())
    if record and ok:
        records.write_shipped(written)
        say(f"records written to {records.SHIPPED}")
    shipped = oracles.shipped_oracles()
    agreements = {name: shipped.get(name, []) for name in found}
    if json:
        plain = {name: [report.to_dict() for report in reports] for name, reports in found.items()}
        plain_oracles = {
            name: {"summary": oracles.summary(items), "records": [asdict(item) for item in items]}
            for name, items in agreements.items()
        }
        print_json(
            {"ok": ok, "seed": seed, "level": level, "device": device, "mixers": plain, "oracles": plain_oracles}
        )
    else:
        _print(found)
        print()
        for name, items in agreements.items():
            print(f"{name}: {oracles.summary(items)}")
    if not ok:
        raise typer.Exit(1)


def _progress(report: Report) -> None:
    say(f"{'lawful  ' if report.ok else 'UNLAWFUL'} {report.seconds:6.1f} s  {report.subject}")


def _print(found: dict[str, list[Report]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    laws = [result.law for result in next(iter(found.values()))[0].results]
    table = Table("mixer", "options", *laws, "worst", "s", box=SIMPLE, pad_edge=False)
    for name, reports in found.items():
        for number, report in enumerate(reports):
            marks = [_MARKS[result.outcome] for result in report.results]
            worst = max((result.worst or 0.0 for result in report.results), default=0.0)
            options = report.subject.removeprefix(name).strip()
            table.add_row(name if not number else "", options, *marks, f"{worst:.0%}", f"{report.seconds:.1f}")
    console = Console(width=max(Console().width, 130))
    console.print(table)
    console.print("worst: the largest error met, as a share of what is allowed; -: the law says nothing", style="dim")
    for reports in found.values():
        for law in laws:
            broken = [report for report in reports if report[law].outcome == "fail"]
            if broken:
                result, others = broken[0][law], len(broken) - 1
                also = f" (nor in {others} more of its variants)" if others else ""
                print(f"\n{broken[0].subject}: the law of {law} does not hold{also}")
                print(f"  {result.reason}\n  in case: {result.case}\n  again:   {result.reproduce}")
    for reports in found.values():
        for report in reports[:1]:
            for result in report.results:
                if result.outcome == "n/a":
                    print(f"{report.subject}: the law of {result.law} says nothing: {result.reason}")
