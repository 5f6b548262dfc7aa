"""Beginning with what another run has learned: its architecture, its tokenizer and its weights.

A run of the same kind goes on with all of them (a language model on other text, a translator on other pairs). Where the
task asks for another head (a masked language model becomes a classifier, labels change), the head is new.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel

from trilemma.config import RunConfig
from trilemma.errors import ConfigError
from trilemma.models import SequenceModel
from trilemma.runs.directory import MODEL, RunDirectory
from trilemma.runs.load import LoadedRun
from trilemma.runs.tensors import model_tensors

# Of the model's section a run may choose these anew: they are no weights, or belong to the head, which is its task's.
_FREE = {"dropout", "pooling", "num_labels"}
_HEADS = ("output.", "logit_bias", "head_transform.")


def inherited(config: RunConfig, stored: RunConfig | None = None) -> RunConfig:
    """`config` with what it takes from the run that it starts from, if any.

    Args:
        stored: of the run that is resumed, which has all that already.

    Raises:
        ConfigError: see `inherit`. CheckpointError: `config.start_from` is no run.
    """
    if stored is not None:
        return config if stored.start_from is None else inherit(config, stored, stored.start_from)
    if config.start_from is None:
        return config
    return inherit(config, RunDirectory.open(config.start_from).read_config(), config.start_from)


def inherit(config: RunConfig, parent: RunConfig, where: str) -> RunConfig:
    """`config` with the architecture and tokenizer of `parent`; what it does not set itself comes from there.

    Args:
        config: as asked for. parent: of the run to begin with, resolved. where: that run, for messages.

    Raises:
        ConfigError: `config` sets something that the weights or the vocabulary do not allow; both values are named.
    """
    if (coded := parent.model.quantization) is not None:
        raise ConfigError(f"{where}: its weights are in {coded}; start from the run that it was made from")
    changes = config.model.model_dump(include=config.model.model_fields_set & _FREE)
    changes["num_labels"] = config.model.num_labels
    _check("model", config.model, parent.model, _FREE, where)
    _check("tokenizer", config.tokenizer, parent.tokenizer, set(), where)
    lowercase = config.data.lowercase if "lowercase" in config.data.model_fields_set else parent.data.lowercase
    if lowercase != parent.data.lowercase:
        raise ConfigError(f"data.lowercase is {lowercase}, but {where} was trained with {parent.data.lowercase}")
    return config.model_copy(
        update={
            "model": parent.model.model_copy(update=changes),
            "tokenizer": parent.tokenizer,
            "data": config.data.model_copy(update={"lowercase": lowercase}),
        }
    )


def _check(section: str, wanted: BaseModel, held: BaseModel, free: set[str], where: str) -> None:
    new, old = wanted.model_dump(mode="json"), held.model_dump(mode="json")
    for key in sorted(wanted.model_fields_set - free):
        if new[key] is not None and new[key] != old[key]:
            raise ConfigError(
                f"{section}.{key} is {new[key]!r}, but {where} has {old[key]!r}; "
                f"a run that starts from it keeps it: leave {section}.{key} out"
            )


@torch.no_grad()
def take_weights(model: SequenceModel, config: RunConfig, run: LoadedRun) -> str:
    """Copies a run's weights into a new model, in place, but for a head that its task makes new; says what was taken.

    Args:
        model: of `config`, which came from `inherit` and is resolved: all but the head has the same names and shapes.
        run: the run to begin with.
    """
    held, wanted = model_tensors(run.model), model_tensors(model)
    heads = _HEADS if _head(config) != _head(run.config) else ()
    taken = [name for name in wanted if not name.startswith(heads)]
    for name in taken:
        wanted[name].copy_(held[name])
    new, left = sorted(wanted.keys() - set(taken)), sorted(held.keys() - set(taken))
    digest = run.directory.verify(MODEL).files[MODEL].sha256[:12]
    parts = [f"{len(taken)} of {len(wanted)} tensors taken, and the tokenizer ({MODEL} {digest})"]
    parts += [f"new: {', '.join(new)}"] if new else []
    parts += [f"left behind: {', '.join(left)}"] if left else []
    return "; ".join(parts)


def _head(config: RunConfig) -> object:
    """What the head's rows stand for: the vocabulary, or these classes."""
    labels = config.model.num_labels
    return (labels, config.data.labels) if labels is not None else "vocabulary"
