"""`trilemma import`: from a Hugging Face directory to a run directory."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from trilemma import machine
from trilemma.config import DataConfig, DecodingConfig, RunConfig, TokenizerConfig, TrainingConfig
from trilemma.errors import CheckpointError, ConfigError, nearest
from trilemma.interop import weights
from trilemma.interop.families import FAMILIES, Family
from trilemma.interop.families.base import Blueprint
from trilemma.interop.generation import decoding_of
from trilemma.interop.keys import Keys, read_json
from trilemma.interop.specials import read_tokenizer
from trilemma.models import SequenceModel, build_model
from trilemma.runs import RunDirectory
from trilemma.runs.directory import CARD, SUMMARY, to_json
from trilemma.runs.tensors import model_tensors

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What is downloaded: no pickle, no code.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.spm"]
_CONTEXT = 1024  # tokens of a training row or a source where the architecture sets no limit, or a longer one


def import_model(
    path: str | Path,
    out: str | Path,
    ignore: Collection[str] = (),
    download: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> RunDirectory:
    """Makes a run of a model in the Hugging Face layout: config.json, safetensors, a tokenizer.

    Args:
        path: a local directory; with `download`, also a hub name such as org/name.
        out: the new run directory.
        ignore: keys of config.json that the user declares to change nothing.
        download: the network may be used for a hub name.
        say: told of everything that was not taken over, and of choices.

    Raises:
        ConfigError: an architecture, or a value in config.json, that cannot be honoured; it is named.
        CheckpointError: a file is missing, damaged or a pickle; a weight is missing, left over or of wrong shape.
        DataError: the tokenizer does not match the vocabulary.
    """
    if RunDirectory(out).exists():
        raise CheckpointError(f"{out}: holds a run already; choose another --out")
    directory = _located(path, download)
    values = read_json(directory / "config.json")
    if not values:
        raise CheckpointError(f"{directory}: no config.json: a folder in the Hugging Face layout is needed")
    family, blueprint = understand(values, str(directory / "config.json"), ignore)
    tokenizer, notes = read_tokenizer(directory, values, blueprint.model, blueprint.begins)
    source = weights.Renamed(weights.TensorFiles(directory), blueprint.prefix, blueprint.endings)
    tensors, left = weights.read(source, blueprint.rules, needed_shapes(blueprint))
    generation = read_json(directory / "generation_config.json")
    decoding, untaken = decoding_of(values, generation, blueprint.task, tokenizer.vocab_size, str(directory))
    notes = [*blueprint.notes, *left, *untaken, *notes]
    for note in notes:
        say(note)
    name = re.sub(r"[^\w./-]", " ", str(values.get("_name_or_path") or directory.resolve().name))
    config = _run_config(name, family, values, blueprint, decoding, notes)
    run = RunDirectory.create(out, config, tokenizer.serialize().encode())
    summary = _summary(family, values, blank(blueprint).parameter_counts())
    others = {CARD: _card(config, summary).encode(), SUMMARY: to_json(summary)}
    run.publish_model(tensors, others)
    return run


def understand(values: Mapping[str, Any], where: str, ignore: Collection[str] = ()) -> tuple[Family, Blueprint]:
    """The family of a config.json, and what it comes to.

    Raises:
        ConfigError: an unknown architecture, or a key or value that cannot be honoured.
    """
    kind = values.get("model_type")
    by_type = {name: family for family in FAMILIES for name in family.model_types}
    if not isinstance(kind, str) or kind not in by_type:
        raise ConfigError(f'{where}: model_type "{kind}" cannot be imported{nearest(str(kind), by_type)}')
    for name in ignore:
        if name not in values:
            raise ConfigError(f"--ignore {name}: {where} has no such key{nearest(name, values)}")
    keys = Keys(values, where, ignore)
    try:
        blueprint = by_type[kind].read(keys)
    except ValidationError as error:
        found = [
            f"{where}: model.{'.'.join(map(str, item['loc']))}: {item['msg']}, found {item['input']!r}"
            for item in error.errors()
        ]
        raise ConfigError("\n".join(found)) from None
    keys.finish()
    blueprint.notes.extend(keys.untaken())
    return by_type[kind], blueprint


def blank(blueprint: Blueprint) -> SequenceModel:
    """Our model without memory for its tensors."""
    with torch.device("meta"):
        return build_model(blueprint.model)


def needed_shapes(blueprint: Blueprint) -> dict[str, weights.Shape]:
    """Names and shapes of our model's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model_tensors(blank(blueprint)).items()}


def _located(path: str | Path, download: bool) -> Path:
    if Path(path).is_dir():
        return Path(path)
    if not _HUB_NAME.fullmatch(str(path)):
        raise CheckpointError(f"{path}: no such folder")
    if not download:
        raise CheckpointError(
            f"{path}: no such folder. To fetch the model of that name from the Hugging Face hub, add --download"
        )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError(f"{path}: HF_HUB_OFFLINE is set, so nothing is downloaded; unset it, or name a local folder")
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ConfigError(
            f"{path}: downloading needs huggingface_hub: pip install 'trilemma[hub]'; or name a local folder"
        ) from None
    try:
        return Path(hub.snapshot_download(str(path), allow_patterns=_PATTERNS))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: cannot be downloaded: {reason}") from None


def _run_config(
    name: str,
    family: Family,
    values: Mapping[str, Any],
    blueprint: Blueprint,
    decoding: DecodingConfig,
    notes: list[str],
) -> RunConfig:
    """A run's configuration, with no data of its own."""
    model = blueprint.model
    longest = model.max_length or _CONTEXT
    data = DataConfig(
        task=blueprint.task,
        train=[],
        max_source_length=max(1, longest - 2),
        max_target_length=max(1, longest - 2),
        context_length=min(longest, _CONTEXT),
        labels=blueprint.labels,
    )
    kept = {f"import.{number}": note for number, note in enumerate(notes, start=1)}
    architecture = ", ".join(map(str, values.get("architectures") or [values["model_type"]]))
    return RunConfig(
        name=name,
        model=model,
        data=data,
        tokenizer=TokenizerConfig(kind="file"),
        training=TrainingConfig(precision="float32"),
        decoding=decoding,
        notes={"import": f"{architecture} (family {family.name}) in the Hugging Face layout", **kept},
    )


def _summary(family: Family, values: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "steps": 0,
        "tokens": 0,
        "ended_by": "import",
        "weights": f"imported: {values['model_type']} (family {family.name})",
        "parameters": dict(counts),
        "environment": machine.environment("cpu", "float32", False),
    }


def _card(config: RunConfig, summary: Mapping[str, Any]) -> str:
    """What the run is and where it comes from; the author's own card is not copied."""
    lines = [
        *("---", "library_name: trilemma", "tags:", "- trilemma", f"- {config.model.layout}", "---", ""),
        *(f"# {config.name}", "", f"Imported: {config.notes['import']}.", ""),
        f"{summary['parameters']['total']:,} parameters. The licence and the limits are those of the original.",
        *("", "## Notes", ""),
        *(f"- {note}" for key, note in config.notes.items() if key != "import"),
    ]
    return "\n".join([*lines, ""])
