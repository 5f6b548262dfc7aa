"""`trilemma quantize`: a run whose weights are in 8 or 4 bits, as every verb opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trilemma.config import Quantization
from trilemma.errors import CapabilityError
from trilemma.models import quantize
from trilemma.runs import RunDirectory
from trilemma.runs.directory import CALIBRATION, CARD, MODEL, SUMMARY, to_json
from trilemma.runs.load import load_run
from trilemma.runs.tensors import model_tensors

NOTE = "quantization"  # of a run's notes: whose weights these are


def quantize_run(path: str | Path, out: str | Path, kind: Quantization = "int8") -> dict[str, Any]:
    """Writes a run with the nearest coded weights of another one; returns its summary.

    The summary is that of the training, with `quantized`: of which run, and the bytes of both files of weights.

    Args:
        path: a finished run. out: a new run directory. kind: of weights, as `trilemma.models.quantize` takes it.

    Raises:
        CheckpointError: not a finished run, a damaged one, or `out` holds something.
        CapabilityError: the run is quantized already, or too narrow.
    """
    run = load_run(path)
    if run.config.model.quantization is not None:
        raise CapabilityError(f"{path}: its weights are in {run.config.model.quantization} already")
    old, config = run.directory, run.config
    tensors = model_tensors(quantize(run.model, kind))
    source = old.verify(MODEL).files[MODEL]
    note = f"{kind}, of {Path(path).name} ({MODEL} {source.sha256[:12]})"
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"quantization": kind}),
            "notes": {**config.notes, NOTE: note},
        }
    )
    size = {"before": source.size, "after": sum(tensor.nbytes for tensor in tensors.values())}
    summary = old.read_summary() if old.has(SUMMARY) else {}
    summary |= {"quantized": {"weights": note, "weight_bytes": size}}
    others = {name: old.read_text(name).encode() for name in (CARD, CALIBRATION) if old.has(name)}
    if CARD in others:
        others[CARD] += f"\n## Quantized\n\nWeights: {note}.\n".encode()
    others[SUMMARY] = to_json(summary)
    made = RunDirectory.create(out, config, old.read_tokenizer())
    made.publish_model(tensors, others)
    return summary
