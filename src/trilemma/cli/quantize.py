"""`trilemma quantize`: a run with weights in 8 or 4 bits, and what that costs in quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from trilemma.cli.common import Json, change, print_json, say
from trilemma.errors import ConfigError, nearest

if TYPE_CHECKING:
    from trilemma.measure.evaluation import Evaluation


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILES]...",
            help="what quality is measured on: a file of examples, or a source and a target; default: the run's "
            "validation data",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="the new run's folder; default: RUN-int8, RUN-int4")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="of the weights: int8 or int4")] = "int8",
    check: Annotated[bool, typer.Option("--check/--no-check", help="measure the quality of both runs")] = True,
    json: Json = False,
) -> None:
    """Weights in 8 bits: a fourth of the bytes, and the CPU's 8-bit kernels. In 4 bits: a sixth, at float32's speed.

    Linear layers and embeddings are coded; everything else, States included, stays float32. The new run can be used
    like any other, but not trained further.
    """
    from trilemma.config import Quantization
    from trilemma.train.quantized import quantize_run

    kinds = {kind: kind for kind in get_args(Quantization)}
    if dtype not in kinds:
        raise ConfigError(f'--dtype: weights are in {" or ".join(kinds)}, found "{dtype}"{nearest(dtype, kinds)}')
    if files and not check:
        raise ConfigError("files are what quality is measured on; --no-check measures none")
    first = run.resolve()  # "." has no name
    folder = out or first.with_name(f"{first.name}-{dtype}")
    size = quantize_run(run, folder, kinds[dtype])["quantized"]["weight_bytes"]
    result: dict[str, Any] = {"run": str(folder), "weight_bytes": size, "scores": []}
    (say if json else print)(f"{folder}: {size['before'] / 1e6:,.1f} MB of weights are {size['after'] / 1e6:,.1f} MB")
    if check:
        before, after = (_evaluated(path, files or []) for path in (run, folder))
        for old in before.scores:
            new = after[old.metric]
            result["scores"].append({"before": old.to_json(), "after": new.to_json()})
            (say if json else print)(f"{before.split}\t{old.metric}\t{change(old.value, new.value)}")
    if json:
        print_json(result)


def _evaluated(run: Path, files: list[Path]) -> Evaluation:
    from trilemma.predictor import load

    say(f"measuring {run}")
    return load(run, device="cpu").evaluate(files, "valid")
