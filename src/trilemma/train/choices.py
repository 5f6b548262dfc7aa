"""Automatic choices, made once: device, precision, backend, compile. Each is written with its reason, and obeyed on
resume.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from trilemma import machine
from trilemma.config import RunConfig, TrainingConfig
from trilemma.errors import CapabilityError, ConfigError
from trilemma.laws import operators_of
from trilemma.mixers.base import Mixer
from trilemma.models import SequenceModel
from trilemma.ops import backends
from trilemma.train.quality import check_quality

# What a resumed run may change: how long, how often, how it is shown. The rest is what the run is.
_CHANGEABLE = {
    "name",
    "notes",
    "decoding",
    "training.steps",
    "training.max_tokens",
    "training.max_seconds",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.validate_every",
    "training.patience",
    "training.log_every",
    "training.tensorboard",
    "training.average_last",
}
_AUTOMATIC = ("precision", "compile", "device", "backend")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_LONG_RUN = 5000  # steps after which a minute of compiling is earned back


def choose(
    config: RunConfig, model: SequenceModel | None = None, say: Callable[[str], None] | None = None
) -> RunConfig:
    """`config` with no "auto" left in device and precision and, once the model is known, in backend and compile.

    Args:
        config: as asked for, or as stored.
        model: its operators run by the chosen backend from now on.
        say: told of a self-check, and of calls that a backend chosen by "auto" cannot serve.

    Raises:
        ConfigError: a device that is not there, or nothing that ends the training.
        BackendError: the backend asked for cannot serve this model here.
        CapabilityError: compile is "on" for a mixer that declares it cannot be compiled, or with a backend.
    """
    training = config.training
    if training.steps is None and training.max_tokens is None and training.max_seconds is None:
        raise ConfigError("training: nothing ends this run; set training.steps, max_tokens or max_seconds")
    if training.ema is not None and training.average_last > 1:
        raise ConfigError("training.ema and training.average_last both choose the final weights; set one of them")
    check_quality(config)
    if training.target_accuracy is not None and config.data.task != "probe":
        raise ConfigError(
            "training.target_accuracy is for data.task probe; elsewhere training.patience ends a run early"
        )
    _check_regularisation(config)
    changes, notes = {}, dict(config.notes)
    if training.device == "auto":
        changes["device"], notes["training.device"] = machine.choose_device("auto")
    else:
        machine.choose_device(training.device)
    device = changes.get("device", training.device)
    if training.precision == "auto":
        changes["precision"], notes["training.precision"] = machine.choose_precision(device)
    elif training.precision == "bfloat16" and machine.emulates_bfloat16(device):
        notes["training.precision"] = f"as asked, many times slower than float32: {machine.NO_BFLOAT16}"
    if model is not None:
        changes["backend"], reason = _backend(training.model_copy(update=changes), model, notes, say)
        if training.backend == "auto":
            notes["training.backend"] = reason
    if model is not None and training.compile != "off":
        decided, reason = _compile(config, model)
        if training.compile == "auto":
            changes["compile"], notes["training.compile"] = decided, reason
        elif decided == "off" and _uncompilable(model):
            raise CapabilityError(f"training.compile is on, but {reason}; set training.compile=off")
    return config.model_copy(update={"training": training.model_copy(update=changes), "notes": notes})


def _check_regularisation(config: RunConfig) -> None:
    training = config.training
    if config.data.task == "question-answering":
        for key in ("label_smoothing", "r_drop"):
            if getattr(training, key):
                raise ConfigError(f"training.{key} is not for question answering: leave it out")
    if training.r_drop is not None and not config.model.dropout:
        raise ConfigError(
            "training.r_drop compares a row under two draws of dropout, and model.dropout is 0: it would only train "
            "twice as slowly; raise model.dropout, or leave training.r_drop out"
        )


def reconcile(config: RunConfig, stored: RunConfig) -> RunConfig:
    """The configuration of a resumed run: the stored one, with those changes of `config` that a run can take.

    Raises:
        ConfigError: `config` changes something that makes it another run; the key and both values are named.
    """
    wanted, kept = config.model_dump(mode="json"), stored.model_dump(mode="json")
    for key in _AUTOMATIC:
        if wanted["training"][key] == "auto":
            wanted["training"][key] = kept["training"][key]
    if wanted["start_from"] is None:
        wanted["start_from"] = kept["start_from"]
    for section, keys in (("model", ("vocab_size", "num_labels")), ("data", ("labels",))):
        for key in keys:
            if wanted[section][key] is None:
                wanted[section][key] = kept[section][key]
    for key, new, old in _differences(wanted, kept):
        if key.split(".")[0] not in _CHANGEABLE and key not in _CHANGEABLE:
            raise ConfigError(
                f"{key} is {new!r}, but the run was started with {old!r}; a resumed run keeps it. "
                "Put the old value back, or choose another --out"
            )
    training = stored.training.model_copy(
        update={key.split(".")[1]: getattr(config.training, key.split(".")[1]) for key in _CHANGEABLE if "." in key}
    )
    return stored.model_copy(update={"training": training, "decoding": config.decoding, "name": config.name})


def announce(config: RunConfig, before: RunConfig, say: Callable[[str], None]) -> None:
    """Says what was chosen automatically, and why; reasons that were in `before` already are not repeated."""
    values: dict[str, Any] = config.model_dump(mode="json")
    for key, reason in config.notes.items():
        if before.notes.get(key) != reason:
            section, _, name = key.partition(".")
            value = values.get(section, {}).get(name) if isinstance(values.get(section), dict) else None
            say(f"{key}: {reason}" if value is None else f"{key}: {value} ({reason})")


def _backend(
    training: TrainingConfig, model: SequenceModel, notes: Mapping[str, str], say: Callable[[str], None] | None
) -> tuple[str, str]:
    """What runs the model's operators, and why. A choice that was automatic once stays lenient when resumed."""
    chosen = backends.choose(
        training.backend,
        operators_of(model.mixers()),
        device=training.device,
        dtype=_DTYPES[training.precision],
        strict="training.backend" not in notes,
        say=say,
    )
    if say is not None and training.backend != "auto":
        for choice in backends.running():  # what `auto` decides is announced with the other choices
            say(str(choice))
    if backends.running():
        return backends.path().removeprefix("plain+"), "; ".join(map(str, chosen))
    return "plain", "; ".join(sorted({choice.why for choice in chosen})) or "no operator here has another"


def _compile(config: RunConfig, model: SequenceModel) -> tuple[str, str]:
    if reason := _uncompilable(model):
        return "off", reason
    if config.training.device == "mps":
        return "off", "compiled training is not validated on mps"
    if config.training.device == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "off", "there is no C++ compiler"
    if config.data.task not in ("language-model", "masked-language-model"):
        return "off", "batches of many shapes would be compiled again and again"
    steps = config.training.steps
    if steps is None or steps < _LONG_RUN:
        return "off", f"shorter than {_LONG_RUN:,} steps: compiling would cost more than it saves"
    return "on", f"{steps:,} steps of one shape"


def _uncompilable(model: SequenceModel) -> str:
    if backends.path() != "plain":
        return f"kernels on the path {backends.path()} are not traced"
    for module in model.modules():
        if isinstance(module, Mixer) and module.capabilities.compiles is not True:
            return f'mixer "{module.name}" is not compiled: {module.capabilities.compiles}'
    return ""


def _differences(new: Mapping[str, Any], old: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in new:
        path = f"{prefix}{key}"
        if isinstance(new[key], dict) and isinstance(old.get(key), dict) and path.count(".") < 1:
            yield from _differences(new[key], old[key], f"{path}.")
        elif new[key] != old.get(key):
            yield path, new[key], old.get(key)
