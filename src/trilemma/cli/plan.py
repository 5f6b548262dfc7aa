"""`trilemma plan`: what a recipe will cost, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilemma.cli.common import Json, Overrides, print_json, say
from trilemma.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trilemma.config import RunConfig
    from trilemma.measure.hardware import Hardware
    from trilemma.measure.plan import Plan
    from trilemma.study import StudyTask


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML config of one model, or of a study")],
    overrides: Overrides = None,
    on: Annotated[str, typer.Option("--on", help="here, or a GPU: P100, V100, A100, H100, H200")] = "here",
    devices: Annotated[int, typer.Option("--devices", min=1, help="of that kind, working together")] = 1,
    fraction: Annotated[
        float | None, typer.Option("--fraction", help="of peak that training reaches, instead of the assumed one")
    ] = None,
    seconds_per_step: Annotated[
        float | None, typer.Option("--seconds-per-step", help="known time of a step, instead of a fraction")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="here: time a few steps of this model, instead of a fraction")
    ] = False,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="tokens of a row (with a source: of its target)")
    ] = None,
    source_length: Annotated[
        int | None, typer.Option("--source-length", min=1, help="tokens of a row's source")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", help="of one device; the cost is then money as well")
    ] = None,
    json: Json = False,
) -> None:
    """Parameters, FLOPs, memory, time and cost of a recipe, from formulas; nothing is trained and no data are read.

    Model FLOPs are the arithmetic that training needs. Machine FLOPs are time x devices x peak, as papers often count.
    """
    for option, value in (
        ("fraction", fraction),
        ("seconds-per-step", seconds_per_step),
        ("price-per-hour", price_per_hour),
    ):
        if value is not None and value <= 0:
            raise ConfigError(f"--{option}: a positive number is needed, found {value:g}")
    if fraction is not None and fraction > 1:
        raise ConfigError(f"--fraction: at most 1, found {fraction:g}")
    if sum([fraction is not None, seconds_per_step is not None, measure]) > 1:
        raise ConfigError("--fraction, --seconds-per-step and --measure each say how fast it goes: give one of them")
    if measure and (on != "here" or devices > 1):
        raise ConfigError("--measure times this machine: leave out --on and --devices")
    from trilemma.measure.plan import measured_here, plan_training

    hardware, device = _hardware(on, fraction)
    given = "given" if fraction is not None else "assumed"
    plans = []
    for label, config, budget, price in _runs(recipe, overrides or []):
        used = measured_here(config, hardware, device, length, source_length) if measure else hardware
        plan = plan_training(
            config, used, devices=devices, length=length, source_length=source_length, step_seconds=seconds_per_step,
            price_per_hour=price_per_hour or price, fraction_from="measured" if measure else given, flops_budget=budget,
        )  # fmt: skip
        plans.append(_as_json(label, plan))
        (say if json else print)(f"{_as_text(label, plan)}\n")
    if json:
        print_json({"recipe": str(recipe), "plans": plans})


def _hardware(on: str, fraction: float | None) -> tuple[Hardware, str]:
    """The hardware, and the device of this machine that it is."""
    from trilemma import machine
    from trilemma.measure.hardware import HERE, named, this_machine

    device, _ = machine.choose_device("auto")
    if on.lower() != HERE:
        return named(on, fraction), device
    if not machine.ceilings_are_cached(device):
        say("measuring this machine's ceilings first (three to ten seconds)")
    return this_machine(machine.describe(), machine.ceilings(device), fraction), device


def _runs(recipe: Path, overrides: list[str]) -> Iterator[tuple[str, RunConfig, float | None, float | None]]:
    """(label, configuration, budget in FLOPs or None, price or None) of the one model, or of each of a study's."""
    from trilemma.compare.expand import expand
    from trilemma.compare.tasks import check_tasks, task_study
    from trilemma.config import apply_overrides, load_config, read_yaml
    from trilemma.study import load_study
    from trilemma.train.start import inherited

    if "candidates" not in apply_overrides(read_yaml(recipe), overrides):
        config = inherited(load_config(recipe, overrides))
        yield config.name, config, None, None
        return
    study = load_study(recipe, overrides)
    check_tasks(study)
    tasks: list[StudyTask | None] = [*study.tasks] or [None]
    for task in tasks:
        one = study if task is None else task_study(study, task)
        budget = one.budget.amount if one.budget.lock == "flops" else None
        if budget is not None:  # steps follow from the plan's own count; to expand, any other lock will do
            one = one.model_copy(update={"budget": one.budget.model_copy(update={"lock": "tokens"})})
        for variant in expand(one).variants:
            label = variant.name if task is None else f"{task.name}: {variant.name}"
            yield label, variant.config, budget, study.price_per_hour


def _as_json(label: str, plan: Plan) -> dict[str, Any]:
    values = {name: value for name, value in vars(plan).items() if name not in ("name", "hardware", "memory", "rows")}
    hardware = {name: value for name, value in vars(plan.hardware).items() if name != "on_cpu"}
    memory = {**vars(plan.memory), "total": plan.memory.total}
    return {"name": label, "hardware": hardware, **values, "rows": vars(plan.rows), "memory": memory}


def _as_text(label: str, plan: Plan) -> str:
    from trilemma.measure.cost_report import human_bytes
    from trilemma.train.progress import clock

    counts, rows, memory = plan.parameters, plan.rows, plan.memory
    peak = plan.hardware.peak(plan.precision) / 1e12
    many = f"{plan.devices} x " if plan.devices > 1 else ""
    room = plan.hardware.memory_bytes
    fits = "" if not room else f", of {human_bytes(room)}: {'fits' if memory.total <= room else 'DOES NOT FIT'}"
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in vars(memory).items() if size)
    states = ", ".join(f"{human_bytes(size)} after {tokens:,} tokens" for tokens, size in plan.state_bytes.items())
    lines = {
        "hardware": f"{many}{plan.hardware.name}, {plan.precision}, {peak:.3g} TFLOP/s ({plan.hardware.source})",
        "parameters": f"{counts['total']:,}: {counts['embedding']:,} in embeddings, {counts['non_embedding']:,} "
        f"besides ({counts['matrices']:,} in matrices)",
        "batch": f"{plan.micro_batches} x {rows.rows:,} rows, {plan.steps:,} steps, {plan.tokens:,} target tokens",
        "model FLOPs": f"{plan.flops:.3g}, the arithmetic that training needs; {plan.step_flops:.3g} a step",
        "machine FLOPs": f"{plan.machine_flops:.3g}, time x devices x peak, what many papers print; "
        f"{plan.fraction:.0%} of it is arithmetic ({plan.fraction_from})",
        "time": f"{clock(plan.seconds)} at {plan.step_seconds:.3g} s a step",
        "memory": f"{human_bytes(memory.total)} on each device{fits} ({parts})",
        "files": f"{human_bytes(plan.checkpoint_bytes)} a checkpoint, {human_bytes(plan.published_bytes)} published",
    }
    if plan.token_ms is not None:
        lines["inference"] = f"state of a sequence {states}; no token in under {plan.token_ms:.2g} ms (bandwidth)"
    if plan.price is not None:
        lines["price"] = f"{plan.price:,.2f}"
    for at, text in enumerate(plan.assumptions):
        lines["assumed" if at == 0 else " " * at] = text
    return "\n".join([label, *(f"  {name:<15}{text}" for name, text in lines.items())])
