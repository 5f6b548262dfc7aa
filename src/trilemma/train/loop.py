"""The training loop: one optimizer step after another, each a pure function of the weights before it and of its number.

Step n reads micro-batches (n - 1) * accumulate to n * accumulate - 1, dealt over the processes; dropout is seeded by
(seed, step, micro-batch); the learning rate follows from the step. A run that is killed and resumed therefore repeats
the same arithmetic on the same numbers, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch

from trilemma.config import RunConfig
from trilemma.data import Batch, Dataset
from trilemma.errors import CheckpointError, DataError, Interrupted, TrainingError
from trilemma.models import SequenceModel
from trilemma.runs import RunDirectory
from trilemma.runs.tensors import model_tensors
from trilemma.train import objective
from trilemma.train.counters import Counters, flops_of, peak_memory
from trilemma.train.optimizer import Optimizer
from trilemma.train.processes import Processes
from trilemma.train.progress import Display, Tracker
from trilemma.train.quality import Abandoned, measure_quality
from trilemma.train.randomness import reseed
from trilemma.train.schedules import learning_rate
from trilemma.train.signals import Signals

_LONG_VALIDATION = 5.0  # seconds


@dataclass(frozen=True)
class Event:
    """What a callback is told, on rank 0, with no gradients held.

    Attributes:
        kind: "step", "validation" or "checkpoint".
        step: optimizer steps done.
        record: for "step" and "validation" the numbers, as in metrics.jsonl.
        model: as it is being trained.
    """

    kind: str
    step: int
    record: Mapping[str, Any]
    model: SequenceModel


class Validation(NamedTuple):
    """Cross-entropy per scored token in nats, how many tokens were scored, and how many labels were the likeliest."""

    loss: float
    targets: int
    hits: int


Callback = Callable[[Event], bool | None]  # True ends the training after this step


class Trainer:
    """Trains one model. Everything that a resumed run needs is in the weights, `optimizer` and `counters`."""

    def __init__(
        self,
        config: RunConfig,
        model: SequenceModel,
        dataset: Dataset,
        directory: RunDirectory,
        processes: Processes,
        display: Display,
        tracker: Tracker,
        signals: Signals,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config, self.model, self.dataset, self.directory = config, model, dataset, directory
        self.processes, self.display, self.tracker = processes, display, tracker
        self.signals, self.callbacks = signals, callbacks
        self.optimizer = Optimizer(model, config.training)
        self.counters = Counters()
        self._stopped: str | None = None  # by a callback
        self._flops: dict[tuple[int, int], int] = {}
        self._trained = 0.0  # seconds, at the last validation
        self._weighed = False  # whether it was said that validations take long

    def restore(self, step: int) -> None:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: it is damaged or foreign. DataError: the data are not those that it was trained on.
        """
        try:
            record = self.directory.load_checkpoint(step, model_tensors(self.model), self.optimizer.tensors())
        except CheckpointError as error:
            damaged = self.directory.checkpoint_path(step)
            earlier = [known for known in self.directory.checkpoints() if known < step]
            way = (
                f"to go on from step {earlier[-1]} instead, remove {damaged}" if earlier else "there is no earlier one"
            )
            raise CheckpointError(f"{error}; {way}") from error
        if record.get("data_hash") != self.dataset.data_hash:
            raise DataError(
                f"{self.directory.path}: the data have changed since the run was started (data_hash "
                f"{self.dataset.data_hash[:12]}, was {str(record.get('data_hash'))[:12]}); "
                "put the old data back, or choose another --out"
            )
        self.counters = Counters.from_record(record, self.directory.checkpoint_path(step))
        self.counters.resumes += 1
        self.optimizer.set_step(step)

    def run(self) -> str:
        """Trains to the end and saves the last checkpoint; says what ended it.

        Raises:
            TrainingError: a loss or gradient is not a number; the batch is named, the last good checkpoint kept.
            Interrupted: a signal came; the state is saved.
            CheckpointError: saving failed; earlier checkpoints are intact.
        """
        if self.processes.is_first:
            self.directory.cut_metrics(self.counters.step, self.counters.validated)
        if self.counters.step:
            self._validate_and_save()  # a signal may have cut this short
        while (reason := self._ended()) is None:
            started = time.perf_counter()
            rates = self._step()
            elapsed = time.perf_counter() - started
            # rank 0's clock counts for all, so that all decide alike
            elapsed, asked = self.processes.sum([elapsed * self.processes.is_first, float(self.signals.received > 0)])
            if rates is not None:
                self.counters.seconds += elapsed
                self._after_step(rates)
            if asked:
                self._interrupted()
            if rates is not None:
                self._validate_and_save()
        if self.counters.step not in self.directory.checkpoints():
            self.save()
        return reason

    # --- one step ---

    def _step(self) -> dict[str, float] | None:
        """One optimizer step; None if a signal asked to stop before it was complete (the weights are as before)."""
        counters, training, processes = self.counters, self.config.training, self.processes
        number, count = counters.step + 1, training.accumulate
        batches = {
            item: self.dataset.micro_batch((number - 1) * count + item) for item in range(count) if processes.mine(item)
        }
        targets, tokens, flops = processes.sum(
            [
                sum(batch.num_targets for batch in batches.values()),
                sum(batch.num_tokens for batch in batches.values()),
                sum(flops_of(self.model, batch, self._flops) for batch in batches.values()),
            ]
        )
        losses = [0.0] * count
        for item, batch in batches.items():
            if self._abandons():
                self.optimizer.clear()
                return None
            reseed(self.config.seed, number, item)
            losses[item] = self._accumulate(batch, 1 / max(targets, 1.0))
        processes.sum_gradients(self.optimizer.parameters.values())
        losses = processes.sum(losses)
        norm = self._clipped(number, losses)
        rate = learning_rate(training, self.config.model.d_model, number, self._total_steps(number))
        self.optimizer.step(number, rate)
        flops *= 3 * training.forward_passes
        counters.count(number, tokens=int(targets), input_tokens=int(tokens), flops=int(flops), loss=math.fsum(losses))
        return {"learning_rate": rate, "gradient_norm": norm}

    def _accumulate(self, batch: Batch, scale: float) -> float:
        """Adds the gradients of one micro-batch; returns its loss sum."""
        self.model.train()
        batch = batch.to(self.processes.device)
        head, smoothing, alpha = self.model.head, self.config.training.label_smoothing, self.config.training.r_drop
        with self._autocast():
            hidden = run_model(self.model, batch if alpha is None else batch.twice())
            if self.config.data.task == "question-answering":
                return float(objective.backward_spans(head, hidden, batch, scale))
            if alpha is None:
                return float(objective.backward(head, hidden, batch.labels, smoothing, scale, self._classes()))
            loss = objective.backward_twice(head, hidden, batch.labels, smoothing, alpha, scale, self._classes())
            return float(loss)

    def _clipped(self, number: int, losses: list[float]) -> float:
        """The gradients' norm before clipping; `TrainingError` if it or a loss is not finite."""
        bad = [item for item, loss in enumerate(losses) if not math.isfinite(loss)]
        limit = self.config.training.clip_norm
        parameters = [parameter for parameter in self.optimizer.parameters.values() if parameter.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        norm = float(total)
        if bad or not math.isfinite(norm):
            first = (number - 1) * len(losses)
            where = f"batch {first + bad[0]}" if bad else f"batches {first} to {first + len(losses) - 1}"
            what = f"the loss is {losses[bad[0]]}" if bad else f"the gradient norm is {norm}"
            raise TrainingError(
                f"step {number}: {what} in {where} (seed {self.config.seed}); no weight was changed, {self._kept()}. "
                "Lower training.learning_rate, lengthen training.warmup_steps or set training.precision=float32",
                number,
            )
        if limit is not None and norm > limit:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, total, foreach=True)
        return norm

    # --- around the steps ---

    def _ended(self) -> str | None:
        training, counters = self.config.training, self.counters
        if training.steps is not None and counters.step >= training.steps:
            return "steps"
        if training.max_tokens is not None and counters.tokens >= training.max_tokens:
            return "max_tokens"
        if training.max_seconds is not None and counters.seconds >= training.max_seconds:
            return "max_seconds"
        if training.patience is not None and counters.bad_validations >= training.patience:
            return "patience"
        if training.target_accuracy is not None and (counters.score or 0.0) >= training.target_accuracy:
            return "target_accuracy"
        return self._stopped

    def _total_steps(self, number: int) -> float:
        """Length of the run in steps as seen before step `number`: its limit, or the estimate from the pace so far."""
        training, counters = self.config.training, self.counters
        totals = [math.inf if training.steps is None else float(training.steps)]
        if training.max_tokens is not None and counters.tokens:
            totals.append(training.max_tokens * (number - 1) / counters.tokens)
        if training.max_seconds is not None and counters.seconds:
            totals.append(training.max_seconds * (number - 1) / counters.seconds)
        return min(totals)

    def _after_step(self, rates: dict[str, float]) -> None:
        counters = self.counters
        if counters.step % self.config.training.log_every == 0 or counters.step == 1 or self._ended() is not None:
            record = counters.record(rates)
            self._record(record)
            total = self._total_steps(counters.step + 1)
            left = counters.seconds / counters.step * (total - counters.step) if math.isfinite(total) else None
            wanted, score = self.config.training.quality, counters.score
            quality = f"{wanted.metric} {score:.2f}" if wanted is not None and score is not None else ""
            self.display.step(record, total, left, quality)
            self._call("step", record)

    def _validate_and_save(self) -> None:
        """What is due after a step; nothing twice."""
        counters, training = self.counters, self.config.training
        every = training.validate_every or training.checkpoint_every
        improved = False
        due = counters.step % every == 0 or self._quality_due() or self._ended() is not None
        if due and counters.validated != counters.step and self.dataset.sizes.get("valid"):
            started = time.perf_counter()
            found = self.validation()
            if found is None:
                self._interrupted()
            self._weigh(time.perf_counter() - started)
            try:
                improved = self._judge(found)
            except Abandoned:
                self._interrupted()
        saved = counters.step in self.directory.checkpoints()
        if (counters.step % training.checkpoint_every == 0 or improved or self._ended() is not None) and not saved:
            self.save()

    def _weigh(self, seconds: float) -> None:
        """Says so, once, when validating takes longer than the training between two validations."""
        trained, self._trained = self.counters.seconds - self._trained, self.counters.seconds
        if not self._weighed and seconds > max(trained, _LONG_VALIDATION):
            self._weighed = True
            self.display.say(
                f"validating took {seconds:.0f} s and the training before it {trained:.0f} s: "
                "training.validate_tokens takes a sample, training.validate_every validates less often"
            )

    def _judge(self, found: Validation) -> bool:
        """Records a validation; whether it is the best so far."""
        counters, loss, wanted = self.counters, found.loss, self.config.training.quality
        accuracy = found.hits / max(found.targets, 1) if self.config.data.task == "probe" else None
        quality = self._quality() if self._quality_due() or self._ended() is not None else None
        score = accuracy if wanted is None else quality
        improved = counters.judge(loss, score, counts=wanted is None or quality is not None)
        record = counters.validation_record(loss)
        if self.config.data.task == "language-model":
            scored = found.targets / self.dataset.targets_of("valid")  # 1, or the share that validate_tokens leaves
            nats = loss * found.targets
            record["valid_bits_per_byte"] = nats / math.log(2) / (self.dataset.bytes_of("valid") * scored)
        if accuracy is not None:
            record["valid_accuracy"] = accuracy
        more = "" if accuracy is None else f"  accuracy {accuracy:.2%}"
        if wanted is not None and quality is not None:
            record[f"valid_{wanted.metric}"] = quality
            more = f"  {wanted.metric} {quality:.2f}"
        self._record(record)
        best = "  (best so far)" if improved else ""
        self.display.say(f"step {counters.step:,}  validation loss {loss:.4f}{more}{best}")
        self._call("validation", record)
        return improved

    def _quality_due(self) -> bool:
        """Whether `training.quality` is measured after this step; it is at the end as well."""
        wanted, training = self.config.training.quality, self.config.training
        if wanted is None:
            return False
        return self.counters.step % (wanted.every or training.validate_every or training.checkpoint_every) == 0

    def _quality(self) -> float | None:
        """The metric of `training.quality`, as rank 0 finds it; None without one. `Abandoned` if a signal came
        meanwhile."""
        if self.config.training.quality is None:
            return None
        found = 0.0
        if self.processes.is_first:
            self.model.eval()
            with self.optimizer.averaged():
                found = measure_quality(self.model, self.dataset, self.config, self.processes.device, self._abandons)
        return self.processes.sum([found])[0]

    def validation(self) -> Validation | None:
        """Scores the validation data: with the moving average of the weights where there is one. None if a signal came
        meanwhile."""
        total, targets, hits = 0.0, 0, 0
        self.model.eval()
        with self.optimizer.averaged(), torch.no_grad(), self._autocast():
            for index, batch in enumerate(self.dataset.eval_batches("valid", self.config.training.validate_tokens)):
                if self._abandons():
                    return None
                if not self.processes.mine(index):
                    continue
                batch = batch.to(self.processes.device)
                hidden, head = run_model(self.model, batch), self.model.head
                if self.config.data.task == "question-answering":
                    loss, right = objective.evaluate_spans(head, hidden, batch)
                else:
                    loss, right = objective.evaluate(head, hidden, batch.labels, self._classes())
                total, hits = total + float(loss), hits + int(right)
                targets += batch.num_targets
        total, counted, found = self.processes.sum([total, float(targets), float(hits)])
        return Validation(total / max(counted, 1.0), int(counted), int(found))

    def save(self) -> None:
        """Publishes a checkpoint and removes those that are no longer kept; all processes meet here."""
        counters, training = self.counters, self.config.training
        counters.peak_memory_bytes = max(counters.peak_memory_bytes, peak_memory(self.processes.device))
        if self.processes.is_first:
            record = counters.to_record(self.dataset.data_hash)
            try:
                self.directory.save_checkpoint(
                    counters.step, model_tensors(self.model), self.optimizer.tensors(), record
                )
                steps = self.directory.checkpoints()
                for step in steps[: -max(training.keep_checkpoints, training.average_last)]:
                    if step != counters.best_step:
                        self.directory.remove_checkpoint(step)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; {self._kept()}") from error
        self.processes.wait()
        self._call("checkpoint", {})

    def _kept(self) -> str:
        latest = self.directory.latest_checkpoint()
        return "no checkpoint exists yet" if latest is None else f"the last good checkpoint is step {latest}"

    def _abandons(self) -> bool:
        """Whether to leave what is half done: a signal came, and no other process waits for this one."""
        return self.signals.received > 0 and self.processes.world == 1

    def _interrupted(self) -> NoReturn:
        self.display.close()
        if self.counters.step and self.counters.step not in self.directory.checkpoints():
            self.save()
        number = self.signals.received or 15  # another process got it
        saved = f"step {self.counters.step:,} is saved" if self.counters.step else "nothing was trained yet"
        raise Interrupted(f"interrupted; {saved}. Go on with: trilemma train {self.directory.path} --resume", number)

    def _record(self, record: Mapping[str, Any]) -> None:
        if self.processes.is_first:
            self.directory.append_metrics(record)
            self.tracker.add(record)

    def _call(self, kind: str, record: Mapping[str, Any]) -> None:
        asked = 0.0
        if self.processes.is_first:
            for callback in self.callbacks:
                if callback(Event(kind, self.counters.step, record, self.model)):
                    asked = 1.0
        if self.callbacks and self.processes.sum([asked])[0]:
            self._stopped = "a callback"

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.training.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)

    def _classes(self) -> int:
        model = self.config.model
        return model.num_labels or model.vocab_size or 1


def run_model(model: SequenceModel, batch: Batch) -> torch.Tensor:
    """Hidden vectors [batch, length, d_model] (a classifier of texts: [batch, d_model]) of a micro-batch."""
    hidden: torch.Tensor = model(
        batch.inputs,
        _lengths(batch.inputs, batch.lengths),
        source=batch.source,
        source_lengths=_lengths(batch.source, batch.source_lengths),
        prefix=batch.prefix if model.config.prefix else None,
        segments=batch.segments,
        types=batch.types if model.config.token_types > 1 else None,
    )
    return hidden


def _lengths(tokens: torch.Tensor | None, lengths: torch.Tensor | None) -> torch.Tensor | None:
    """The lengths, or None where no row is padded: mixers then skip their masks."""
    if tokens is None or lengths is None or bool((lengths == tokens.shape[1]).all()):
        return None
    return lengths
