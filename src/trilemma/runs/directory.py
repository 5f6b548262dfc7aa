"""The run directory: what one training run leaves on disk, and the only way to it.

    RUN/config.yaml tokenizer.json                written once, at the start
        model.safetensors card.md summary.json    published at the end
        calibration.json                          a classifier's temperature, with them
        scores.json outputs.SPLIT.txt             written by `trilemma evaluate`
        manifest.json                             SHA-256 of each file above
        metrics.jsonl                             one JSON object a line, appended
        failure.json                              the step that ended training, and why; gone once it goes on
        checkpoints/step-00000500/                model.safetensors optimizer.safetensors trainer.json manifest.json

A checkpoint is written as a hidden folder, synced file by file, manifest last, and then renamed into place: under its
final name it is whole, or somebody damaged it, and then it is named and never loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import yaml
from torch import Tensor

from trilemma import config as configs
from trilemma.config import RunConfig
from trilemma.errors import CheckpointError, ConfigError, TrainingError
from trilemma.runs import files, manifest, tensors
from trilemma.runs.files import PARTIAL, Digest, Payload
from trilemma.runs.lock import RunLock
from trilemma.runs.manifest import Manifest

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"
METRICS = "metrics.jsonl"
FAILURE = "failure.json"
SUMMARY = "summary.json"
SCORES = "scores.json"
CALIBRATION = "calibration.json"
CARD = "card.md"
CHECKPOINTS = "checkpoints"

_STEP = re.compile(r"step-(\d{8,})")
_TEXT_LIMIT = 1 << 30
# Weights of unknown origin beside ours are refused by name; what else a folder holds (notes, plots) is never read.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")


class RunDirectory:
    """One run on disk. Reading needs no lock; what writes takes it, or finds it held by `lock()`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = RunLock(self.path)

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, tokenizer: bytes) -> Self:
        """Makes a new run of a resolved configuration and the text of its tokenizer.json.

        Raises:
            CheckpointError: the folder holds a run, or something else.
        """
        run = cls(path)
        if run.exists():
            raise CheckpointError(f"{run.path}: holds a run already; go on with --resume, or choose another --out")
        kept = {CONFIG, TOKENIZER, METRICS, CHECKPOINTS}  # a start that was cut short leaves at most these
        if others := [name for name in files.names(run.path) if name not in kept and not name.startswith(".")]:
            raise CheckpointError(f'{run.path}: not empty ("{others[0]}") and not a run; choose another --out')
        files.make_folder(run.path)
        with run.lock():
            run._remove_partial()
            payload = {CONFIG: configs.dump(config).encode(), TOKENIZER: tokenizer}
            digests = {name: files.replace_file(run.path / name, data) for name, data in payload.items()}
            files.replace_file(run.path / manifest.NAME, Manifest("run", identity(config), digests).encode())
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """An existing run, its configuration and tokenizer checked against the manifest.

        Raises:
            CheckpointError: no run is there, or a file is missing, altered or foreign.
        """
        run = cls(path)
        if not run.exists():
            shown = "no such folder" if not files.is_folder(run.path) else f"no run here ({manifest.NAME} is missing)"
            raise CheckpointError(f"{run.path}: {shown}")
        run.verify(CONFIG, TOKENIZER)
        return run

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return files.file_size(self.path / manifest.NAME) is not None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run against other writers; nested use is fine.

        Raises:
            RunInUseError: another process holds it; its pid and host are named.
        """
        if self._lock.held:
            yield
            return
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    # --- the published files ---

    def verify(self, *names: str) -> Manifest:
        """Checks published files against the manifest, all of them when no name is given, and returns it.

        Raises:
            CheckpointError: names the file that is missing, truncated, altered or not listed.
        """
        found = manifest.read(self.path, "run")
        while True:
            try:
                found.check(self.path, names or None)
            except CheckpointError:
                again = manifest.read(self.path, "run")
                if again == found:
                    raise
                found = again  # a trainer published in between: judge by what it wrote
            else:
                break
        known = found.files.keys() | found.pending.keys() | {manifest.NAME}
        for name in files.names(self.path):
            if name not in known and name.endswith(_WEIGHTS) and not name.startswith("."):
                raise CheckpointError(f"{self.path / name}: not listed in {manifest.NAME}; a foreign file. Remove it")
        return found

    def publish(self, contents: Mapping[str, Payload]) -> None:
        """Replaces files of the run; after a crash each is the old one or the new one, and the manifest knows both."""
        with self.lock():
            self.recover()
            current = manifest.read(self.path, "run")
            digests = {name: files.write_file(files.partial(self.path / name), data) for name, data in contents.items()}
            self._write_manifest(current, pending=digests)
            for name in contents:
                files.rename(files.partial(self.path / name), self.path / name)
            files.sync_folder(self.path)
            self._write_manifest(current, changed=digests)

    def has(self, name: str) -> bool:
        """Whether a file of that name was published."""
        return files.file_size(self.path / name) is not None

    def publish_model(self, model: Mapping[str, Tensor], others: Mapping[str, Payload] | None = None) -> None:
        """Publishes model.safetensors, and `others` (the summary, the card) with it."""
        self.publish({MODEL: tensors.encode(model), **(others or {})})

    def load_model(self, into: Mapping[str, Tensor], cast: bool = False) -> None:
        """Copies the published weights into tensors of the same names and shapes, as `tensors.read` does.

        Raises:
            CheckpointError: not published yet, or missing, altered, foreign.
        """
        if not self.has(MODEL) and MODEL not in manifest.read(self.path, "run").files:
            raise CheckpointError(f"{self.path}: no {MODEL} yet: training has not ended. Go on with --resume")
        self.verify(MODEL)
        tensors.read(self.path / MODEL, into, cast)

    def read_config(self) -> RunConfig:
        """The resolved configuration."""
        text = self._read(CONFIG).decode("utf-8", errors="replace")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise CheckpointError(f"{self.path / CONFIG}: not valid YAML: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.path / CONFIG}: a mapping of sections is needed")
        return configs.parse(RunConfig, values, str(self.path / CONFIG))

    def write_config(self, config: RunConfig) -> None:
        """Replaces config.yaml; what identifies the run (model, data, tokenizer, seed) must be the same."""
        if identity(config) != identity(self.read_config()):
            raise ConfigError(f"{self.path}: the model, data, tokenizer and seed of a run cannot change")
        self.publish({CONFIG: configs.dump(config).encode()})

    @property
    def tokenizer_path(self) -> Path:
        """Where tokenizer.json lies."""
        return self.path / TOKENIZER

    def read_tokenizer(self) -> bytes:
        """The text of tokenizer.json, checked."""
        return self._read(TOKENIZER)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Publishes summary.json."""
        self.publish({SUMMARY: to_json(summary)})

    def read_summary(self) -> dict[str, Any]:
        """The content of summary.json; `CheckpointError` while there is none."""
        summary = json.loads(self._read(SUMMARY))
        assert isinstance(summary, dict)
        return summary

    def write_scores(self, scores: list[dict[str, Any]], outputs: Mapping[str, list[str]] | None = None) -> None:
        """Publishes scores.json, and the hypotheses of each split as outputs.SPLIT.txt, one a line."""
        texts = {f"outputs.{split}.txt": _lines(lines) for split, lines in (outputs or {}).items()}
        self.publish({SCORES: to_json(scores), **texts})

    def read_scores(self) -> list[dict[str, Any]]:
        """The content of scores.json; empty while there is none."""
        if not self.has(SCORES) and SCORES not in manifest.read(self.path, "run").files:
            return []
        scores = json.loads(self._read(SCORES))
        assert isinstance(scores, list)
        return scores

    def read_temperature(self) -> float | None:
        """What a classifier's logits are divided by; None where calibration.json was not published."""
        if not self.has(CALIBRATION) and CALIBRATION not in manifest.read(self.path, "run").files:
            return None
        return float(json.loads(self._read(CALIBRATION))["temperature"])

    def read_text(self, name: str) -> str:
        """The text of a published file (a card, outputs), checked."""
        return self._read(name).decode("utf-8")

    # --- metrics ---

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl; it becomes durable with the next checkpoint."""
        files.append(self.path / METRICS, json.dumps(record, allow_nan=False).encode() + b"\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a last line that a kill cut short is left out."""
        path = self.path / METRICS
        if files.file_size(path) is None:
            return []
        *lines, _ = files.read_file(path, _TEXT_LIMIT).split(b"\n")
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise CheckpointError(f"{path}:{number}: not valid JSON") from None
            if not isinstance(record, dict):
                raise CheckpointError(f"{path}:{number}: not a JSON object")
            records.append(record)
        return records

    def cut_metrics(self, step: int, validated: int) -> None:
        """Drops training records after `step` and validations after `validated`: a resumed run makes them again."""
        records = [
            record
            for record in self.read_metrics()
            if record.get("step", 0) <= (validated if "valid_loss" in record else step)
        ]
        text = b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
        files.replace_file(self.path / METRICS, text)

    # --- a failure ---

    def write_failure(self, error: TrainingError) -> None:
        """Keeps why training ended before its time."""
        files.replace_file(self.path / FAILURE, to_json({"step": error.step, "message": str(error)}))

    def read_failure(self) -> TrainingError | None:
        """Why training ended before its time; None where it did not, or went on."""
        if files.file_size(self.path / FAILURE) is None:
            return None
        try:
            values = json.loads(files.read_file(self.path / FAILURE, _TEXT_LIMIT))
            return TrainingError(str(values["message"]), values["step"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{self.path / FAILURE}: not a failure's record; remove it") from None

    def clear_failure(self) -> None:
        """Forgets a failure: training goes on."""
        if files.file_size(self.path / FAILURE) is not None:
            files.remove_tree(self.path / FAILURE)

    # --- checkpoints ---

    def checkpoint_path(self, step: int) -> Path:
        """The folder of the checkpoint after `step` optimizer steps."""
        return self.path / CHECKPOINTS / f"step-{step:08d}"

    def checkpoints(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        found = (_STEP.fullmatch(name) for name in files.names(self.path / CHECKPOINTS))
        return sorted(int(match[1]) for match in found if match)

    def latest_checkpoint(self) -> int | None:
        """Step of the newest checkpoint, None before the first."""
        return max(self.checkpoints(), default=None)

    def best_checkpoint(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss so far, None before the first validation."""
        latest = self.latest_checkpoint()
        if latest is None:
            return None
        step = self.load_trainer(latest).get("best_step")
        return step if isinstance(step, int) else None

    def save_checkpoint(
        self, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], trainer: Mapping[str, Any]
    ) -> Path:
        """Publishes a checkpoint; an intact one of the same step is kept as it is.

        Raises:
            CheckpointError: the disk is full or fails. Earlier checkpoints are untouched.
        """
        target = self.checkpoint_path(step)
        with self.lock():
            if files.is_folder(target):
                self.verify_checkpoint(step)
                return target
            run = manifest.read(self.path, "run").run
            files.append(self.path / METRICS, b"", sync=True)
            files.make_folder(target.parent)
            folder = files.partial(target)
            if files.is_folder(folder):
                files.remove_tree(folder)
            files.make_folder(folder)
            contents: dict[str, Payload]
            contents = {MODEL: tensors.encode(model), OPTIMIZER: tensors.encode(optimizer), TRAINER: to_json(trainer)}
            digests = {name: files.write_file(folder / name, payload) for name, payload in contents.items()}
            files.write_file(folder / manifest.NAME, Manifest("checkpoint", run, digests).encode())
            files.sync_folder(folder)
            files.rename(folder, target)
            files.sync_folder(target.parent)
        return target

    def verify_checkpoint(self, step: int) -> None:
        """Checks every file of a checkpoint.

        Raises:
            CheckpointError: names the file that is missing, truncated, altered, foreign or not listed.
        """
        folder = self.checkpoint_path(step)
        if not files.is_folder(folder):
            shown = ", ".join(map(str, self.checkpoints())) or "none"
            raise CheckpointError(f"{folder}: no such checkpoint; there are: {shown}")
        found = manifest.read(folder, "checkpoint")
        found.check(folder)
        found.check_no_others(folder)
        if missing := [name for name in (MODEL, OPTIMIZER, TRAINER) if name not in found.files]:
            raise CheckpointError(f"{folder / missing[0]}: not listed in {manifest.NAME}; a foreign checkpoint")
        if found.run != manifest.read(self.path, "run").run:
            raise CheckpointError(f"{folder}: foreign: a checkpoint of another run (model, data, tokenizer or seed)")

    def load_checkpoint(
        self, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None = None, cast: bool = False
    ) -> dict[str, Any]:
        """Copies a checkpoint, checked whole, into tensors of the same names and shapes; the trainer's record."""
        self.verify_checkpoint(step)
        folder = self.checkpoint_path(step)
        tensors.read(folder / MODEL, model, cast)
        if optimizer is not None:
            tensors.read(folder / OPTIMIZER, optimizer, cast)
        return self._trainer(step)

    def load_trainer(self, step: int) -> dict[str, Any]:
        """The trainer's record in a checkpoint, checked."""
        manifest.read(self.checkpoint_path(step), "checkpoint").check(self.checkpoint_path(step), [TRAINER])
        return self._trainer(step)

    def remove_checkpoint(self, step: int) -> None:
        """Removes a checkpoint; a crash on the way leaves it whole or gone, never half."""
        target = self.checkpoint_path(step)
        with self.lock():
            files.rename(target, files.partial(target))
            files.sync_folder(target.parent)
            files.remove_tree(files.partial(target))

    def recover(self) -> None:
        """Clears what a crash left unfinished; call it with the lock held, before writing."""
        with self.lock():
            self._remove_partial()
            current = manifest.read(self.path, "run")
            if not current.pending:
                return
            current.check(self.path)
            arrived = {name: files.digest_of(self.path / name) for name in current.pending if self.has(name)}
            self._write_manifest(current, changed=arrived)

    def _trainer(self, step: int) -> dict[str, Any]:
        record = json.loads(files.read_file(self.checkpoint_path(step) / TRAINER, _TEXT_LIMIT))
        assert isinstance(record, dict)
        return record

    def _read(self, name: str) -> bytes:
        self.verify(name)
        return files.read_file(self.path / name, _TEXT_LIMIT)

    def _write_manifest(
        self,
        current: Manifest,
        changed: Mapping[str, Digest] | None = None,
        pending: Mapping[str, Digest] | None = None,
    ) -> None:
        new = Manifest("run", current.run, {**current.files, **(changed or {})}, dict(pending or {}))
        files.replace_file(self.path / manifest.NAME, new.encode())

    def _remove_partial(self) -> None:
        for folder in (self.path, self.path / CHECKPOINTS):
            for name in files.names(folder):
                if name.startswith(".") and name.endswith(PARTIAL):
                    files.remove_tree(folder / name)


def identity(config: RunConfig) -> str:
    """What makes checkpoints interchangeable: a hash of model, data, tokenizer and seed of a resolved config."""
    parts = config.model_dump(mode="json", include={"model", "data", "tokenizer", "seed"})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def to_json(value: Any) -> bytes:
    """Strict, readable JSON: a NaN or infinity is a bug of the caller."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _lines(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
