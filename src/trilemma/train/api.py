"""`trilemma.train(...)`: from a configuration to a trained run, new or resumed, in one process or under torchrun."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trilemma.config import RunConfig, load_config, parse
from trilemma.data import Dataset, Tokenizer, prepare
from trilemma.errors import CheckpointError, ConfigError, TrainingError
from trilemma.machine import keep_freed_memory
from trilemma.models import SequenceModel, build_model
from trilemma.ops import backends
from trilemma.runs import RunDirectory
from trilemma.runs.directory import SUMMARY
from trilemma.runs.load import LoadedRun, load_run
from trilemma.train.average import NOTE
from trilemma.train.choices import announce, choose, reconcile
from trilemma.train.finish import finish
from trilemma.train.loop import Callback, Trainer
from trilemma.train.processes import Processes, is_first, started
from trilemma.train.progress import Display, NoTracker, tracker
from trilemma.train.randomness import derive
from trilemma.train.signals import listening
from trilemma.train.start import inherited, take_weights

Data = Iterable[object] | Mapping[str, Iterable[object]]


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    data: Data | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
) -> LoadedRun:
    """Trains a model and leaves a run directory.

    Args:
        config: a configuration, a mapping with its keys, or the path of a YAML file.
        data: training examples instead of `config.data.train`, or a mapping from splits to examples; see `prepare`.
        out: the run directory; None: `runs/NAME`.
        resume: go on with the run in `out` after its last checkpoint; with nothing there, start.
        callbacks: called on rank 0 with an `Event` after logged steps, validations and checkpoints; one that returns
            True ends the training.
        quiet: print nothing.

    Returns:
        The finished run with the published weights, in evaluation mode, on the CPU.

    Raises:
        ConfigError, CapabilityError, DataError: the configuration or the data cannot be used.
        CheckpointError: `out` holds a run (without `resume`), or is damaged, or cannot be written.
        RunInUseError: another process trains in `out`.
        TrainingError: the loss is not a number. Interrupted: a signal came, and the state was saved.
    """
    if isinstance(config, (str, Path)):
        config = load_config(config)
    elif not isinstance(config, RunConfig):
        config = parse(RunConfig, dict(config), "config")
    directory = RunDirectory(out if out is not None else Path("runs") / config.name)
    display = Display(quiet or not is_first())
    exists = directory.exists()
    if exists and not resume:
        raise CheckpointError(f"{directory.path}: holds a run already; go on with --resume, or choose another --out")
    stored = RunDirectory.open(directory.path).read_config() if exists else None
    if stored is not None and NOTE in stored.notes and not directory.checkpoints():
        raise CheckpointError(
            f"{directory.path}: an average of checkpoints has no optimizer to go on with; "
            f"begin another run with it: --from {directory.path}"
        )
    config = inherited(config, stored)
    before = config if stored is None else stored
    config = choose(config if stored is None else reconcile(config, stored))
    if data is not None:
        config = config.model_copy(update={"notes": {**config.notes, "data": "given from Python, not by this file"}})
    with ExitStack() as stack:
        processes = stack.enter_context(started(config.training.device))
        _check_shares(config, processes)
        with processes.first_alone():
            # the others find what rank 0 decided on disk
            found = _Prepared.of(directory, config, data, new=stored is None and processes.is_first, say=display.say)
            stack.callback(backends.reset)
            if processes.is_first:
                stack.enter_context(directory.lock())
                directory.recover()
                if stored is not None and found.config != stored:
                    directory.write_config(found.config)
                announce(found.config, before, display.say)
        model = _placed(found.model, found.config, processes)
        step = directory.latest_checkpoint()
        follow = tracker(config.training.tensorboard, directory.path, step or 0) if processes.is_first else NoTracker()
        stack.callback(follow.close)
        stack.callback(display.close)
        # from here on a signal is a request to save; until now there was nothing to save
        signals = stack.enter_context(listening())
        trainer = Trainer(found.config, model, found.dataset, directory, processes, display, follow, signals, callbacks)
        _begin(trainer, step, resume)
        reason = _trained(trainer)
        if not _is_finished(directory, trainer.counters.step):
            summary = finish(trainer, reason)
            display.say(
                f"done: {summary['steps']:,} steps, {summary['tokens']:,} target tokens; "
                f"published: {summary['weights']}; data order {summary['order_hash'][:12]}"
            )
    return load_run(directory.path)


@dataclass(frozen=True)
class _Prepared:
    """What training works on, the same in every process."""

    config: RunConfig
    dataset: Dataset
    tokenizer: Tokenizer
    model: SequenceModel

    @classmethod
    def of(
        cls,
        directory: RunDirectory,
        config: RunConfig,
        data: Data | None,
        new: bool,
        say: Callable[[str], None],
    ) -> _Prepared:
        """Prepares data and model; `new`: also makes the run directory, which holds what all choices came to."""
        tokenizer = start = None
        if config.model.quantization is not None:
            raise ConfigError("model.quantization is of trained weights: train without it, then run trilemma quantize")
        if not new:
            kept = RunDirectory.open(directory.path)
            tokenizer = Tokenizer.parse(kept.read_tokenizer(), str(kept.tokenizer_path))
            config = reconcile(config, kept.read_config())
        if config.start_from is not None and directory.latest_checkpoint() is None:
            start = load_run(config.start_from)
            tokenizer = start.tokenizer
        dataset, tokenizer = prepare(config, tokenizer, data=data)
        dataset.check_positions()
        if config.training.quality is not None and not dataset.sizes.get("valid"):
            raise ConfigError("training.quality is measured on validation data, and there are none: set data.valid")
        config = dataset.resolved(config)
        torch.manual_seed(derive(config.seed, "init"))
        model = build_model(config.model)
        if config.training.precision == "float64":
            model = model.double()
        if start is not None:
            note = take_weights(model, config, start)
            config = config.model_copy(update={"notes": {**config.notes, "start_from": note}})
        config = choose(config, model, say)
        if new:
            RunDirectory.create(directory.path, config, tokenizer.serialize().encode())
        return cls(config, dataset, tokenizer, model)


def _check_shares(config: RunConfig, processes: Processes) -> None:
    if config.training.accumulate % processes.world:
        raise ConfigError(
            f"training.accumulate: {config.training.accumulate} micro-batches cannot be dealt evenly over "
            f"{processes.world} processes; set it to a multiple of {processes.world} and, for the same tokens a step, "
            "divide training.batch_tokens accordingly"
        )


def _placed(model: SequenceModel, config: RunConfig, processes: Processes) -> SequenceModel:
    """The model on its device, with rank 0's weights, compiled where that was chosen."""
    model = model.to(processes.device)
    processes.share(model.state_dict().values())
    if processes.device.type == "cpu":
        keep_freed_memory()
    if config.training.compile == "on":
        fixed = config.data.task in ("language-model", "masked-language-model")
        for stack in model.stacks():
            for block in stack.blocks:
                block.compile(dynamic=None if fixed else True)
    return model


def _begin(trainer: Trainer, step: int | None, resume: bool) -> None:
    model = trainer.config.model
    counts = trainer.model.parameter_counts()
    trainer.display.say(
        f"{model.layout}, {counts['total']:,} parameters ({counts['non_embedding']:,} without embeddings), "
        f"{trainer.config.training.precision} on {trainer.config.training.device}, "
        f"{trainer.processes.world} process(es), data {trainer.dataset.data_hash[:12]}"
    )
    if step is not None:
        trainer.restore(step)
        trainer.display.say(f"resumed after step {step:,}")
    elif resume:
        trainer.display.say("no checkpoint yet: starting from the beginning")


def _trained(trainer: Trainer) -> str:
    """Trains to the end; a loss that is not a number is also kept in the run, for whoever started this process."""
    first, directory = trainer.processes.is_first, trainer.directory
    if first:
        directory.clear_failure()
    try:
        return trainer.run()
    except TrainingError as error:
        if first:
            directory.write_failure(error)
        raise


def _is_finished(directory: RunDirectory, step: int) -> bool:
    return directory.has(SUMMARY) and directory.read_summary().get("steps") == step
