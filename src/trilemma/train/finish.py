"""The end of a run: which weights are published, the summary, the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trilemma import machine
from trilemma.config import RunConfig
from trilemma.measure.calibration import Calibration, fit_temperature
from trilemma.runs import RunDirectory
from trilemma.runs.directory import CALIBRATION, CARD, SUMMARY, to_json
from trilemma.runs.tensors import model_tensors
from trilemma.train.loop import Trainer, run_model
from trilemma.train.optimizer import assign


def finish(trainer: Trainer, reason: str) -> dict[str, Any]:
    """Puts the chosen weights into the model and publishes them with the summary and the card; returns the summary.

    Chosen are, in this order: the average of the last `average_last` checkpoints; else those of the lowest validation
    loss, for probes of the highest accuracy, with `quality` of its highest value (with `ema`, their moving average);
    without validation data the last ones.
    """
    chosen, loss = _choose(trainer)
    summary = _summary(trainer, reason, chosen, loss)
    if trainer.processes.is_first:
        calibration = _calibration(trainer)
        card = model_card(trainer.config, summary)
        # the summary comes last: where it stands, the run is complete
        others = {CARD: card.encode(), SUMMARY: to_json(summary)}
        if calibration is not None:
            trainer.display.say(f"calibration: {calibration}")
            others = {CALIBRATION: to_json(calibration.to_json()), **others}
        trainer.directory.publish_model(model_tensors(trainer.model), others)
    trainer.processes.wait()
    return summary


def _choose(trainer: Trainer) -> tuple[str, float | None]:
    """Loads the weights to publish into the model; says which they are, and their validation loss where known."""
    counters, training, model = trainer.counters, trainer.config.training, model_tensors(trainer.model)
    if training.average_last > 1:
        steps = trainer.directory.checkpoints()[-training.average_last :]
        assign(model, average_checkpoints([(trainer.directory, step) for step in steps], model))
        found = trainer.validation() if trainer.dataset.sizes.get("valid") else None
        return f"average of checkpoints {', '.join(map(str, steps))}", found.loss if found else None
    if counters.best_step is not None and counters.best_step != counters.step:
        trainer.directory.load_checkpoint(counters.best_step, model, trainer.optimizer.tensors())
    trainer.optimizer.use_average()
    step = counters.step if counters.best_step is None else counters.best_step
    wanted = training.quality.metric if training.quality is not None else "validation accuracy"
    best = "lowest validation loss" if counters.best_score is None else f"highest {wanted}"
    what = "last" if counters.best_step is None else best
    average = f", moving average {training.ema}" if training.ema is not None else ""
    return f"step {step} ({what}{average})", counters.best_loss


@torch.no_grad()
def _calibration(trainer: Trainer) -> Calibration | None:
    """A classifier's temperature, fitted on the validation data with the weights that are published."""
    if trainer.config.data.task != "classification" or not trainer.dataset.sizes.get("valid"):
        return None
    trainer.model.eval()
    found, labels = [], []
    for batch in trainer.dataset.eval_batches("valid"):
        hidden = run_model(trainer.model, batch.to(trainer.processes.device))
        found.append(torch.log_softmax(trainer.model.head(hidden).double(), dim=-1).cpu())
        labels.append(batch.labels)
    calibration = fit_temperature(torch.cat(found).numpy(), torch.cat(labels).numpy())
    if calibration.at_bound:
        trainer.display.say(f"not calibrated: {calibration.examples:,} validation examples bound no temperature")
        return None
    return calibration


def average_checkpoints(
    checkpoints: Sequence[tuple[RunDirectory, int]], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The mean of each tensor over checkpoints, summed in float64 (Vaswani et al. 2017, section 6.1).

    Args:
        checkpoints: runs and steps; each is checked against its manifest.
        like: tensors of the right names, shapes and types.
    """
    sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in like.items()}
    loaded = {name: torch.empty_like(tensor, device="cpu") for name, tensor in like.items()}
    for directory, step in checkpoints:
        directory.load_checkpoint(step, loaded)
        for name, tensor in loaded.items():
            sums[name] += tensor.detach()
    return {name: (total / len(checkpoints)).to(like[name].dtype) for name, total in sums.items()}


def _summary(trainer: Trainer, reason: str, chosen: str, loss: float | None) -> dict[str, Any]:
    config, counters, dataset = trainer.config, trainer.counters, trainer.dataset
    wanted = config.training.quality
    compiled = config.training.compile == "on"
    return {
        "steps": counters.step,
        "tokens": counters.tokens,
        "input_tokens": counters.input_tokens,
        "flops": counters.flops,
        "seconds": counters.seconds,
        "tokens_per_second": counters.tokens / counters.seconds if counters.seconds else None,
        "peak_memory_bytes": counters.peak_memory_bytes,
        "parameters": trainer.model.parameter_counts(),
        "ended_by": reason,
        "weights": chosen,
        "valid_loss": loss,
        "best_step": counters.best_step,
        "best_valid_loss": counters.best_loss,
        "best_valid_accuracy": counters.best_score if config.data.task == "probe" else None,
        "best_quality": None if wanted is None else {"metric": wanted.metric, "value": counters.best_score},
        "resumes": counters.resumes,
        "processes": trainer.processes.world,
        "data_hash": dataset.data_hash,
        "order_hash": dataset.order_hash(counters.step * config.training.accumulate),
        "environment": machine.environment(config.training.device, config.training.precision, compiled),
    }


def model_card(config: RunConfig, summary: Mapping[str, Any]) -> str:
    """A model card in the form that Hugging Face reads: YAML metadata, then Markdown.

    (Mitchell et al. 2019, "Model Cards for Model Reporting".)
    """
    languages = [name for name in (config.data.source_language, config.data.target_language) if name]
    task = {
        "seq2seq": "translation",
        "language-model": "text-generation",
        "classification": "text-classification",
        "question-answering": "question-answering",
    }
    lines = ["---", "library_name: trilemma", f"pipeline_tag: {task.get(config.data.task, 'fill-mask')}"]
    lines += ["language:", *(f"- {_plain(name)}" for name in dict.fromkeys(languages))] if languages else []
    lines += ["tags:", "- trilemma", f"- {config.model.layout}", "---", "", f"# {_plain(config.name)}", ""]
    parameters, environment = summary["parameters"], summary["environment"]
    loss = "not validated" if summary["valid_loss"] is None else f"{summary['valid_loss']:.4f} nats per token"
    rows = {
        "Layout": config.model.layout,
        "Mixer": _plain(str(config.model.mixer)),
        "Width, layers": f"{config.model.d_model}, {config.model.num_layers}",
        "Parameters": f"{parameters['total']:,} ({parameters['embedding']:,} of them embeddings)",
        "Vocabulary": f"{config.model.vocab_size:,}",
        "Trained on": f"{summary['tokens']:,} target tokens in {summary['steps']:,} steps",
        "Training cost": f"{summary['flops']:.3g} FLOPs counted, {summary['seconds']:,.0f} s",
        "Weights": summary["weights"],
        "Validation loss": loss,
        "Precision": config.training.precision,
        "Hardware": _plain(f"{environment.get('cpu')}, device {environment.get('device')}"),
        "Data hash": summary["data_hash"],
    }
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    lines += [
        "## Use",
        "",
        "```python",
        "import trilemma",
        "",
        'predictor = trilemma.load("THIS_FOLDER")',
        "```",
    ]
    lines += ["", "## Automatic choices", "", *(f"- `{key}`: {_plain(note)}" for key, note in config.notes.items())]
    lines += [
        "",
        "## Limits",
        "",
        "It knows what was in its training data and no more. Its scores, where `scores.json` is",
    ]
    lines += ["is present, hold for the data they name. Nobody has examined it for bias or safety.", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text without what Markdown, HTML or a table would read as its own."""
    return "".join(character if character.isprintable() and character not in "|<>`[]" else " " for character in text)
