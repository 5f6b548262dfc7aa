"""`training.quality`: the task's metric on the valid split while training."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trilemma.config import DecodingConfig, RunConfig
from trilemma.data import Dataset
from trilemma.errors import ConfigError
from trilemma.measure.evaluation import check_metrics, score_texts
from trilemma.models import SequenceModel


class Abandoned(Exception):
    """A measurement was stopped before it was complete: no error, a resumed run repeats it."""


def check_quality(config: RunConfig) -> None:
    """Raises `ConfigError` where the task has no such metric, or nothing would ever be compared with it."""
    wanted = config.training.quality
    if wanted is None:
        return
    if config.data.task not in ("seq2seq", "classification"):
        raise ConfigError(
            f"training.quality is for data.task seq2seq and classification; {config.data.task} is validated by its loss"
        )
    check_metrics(config.data.task, [wanted.metric])


def measure_quality(
    model: SequenceModel, dataset: Dataset, config: RunConfig, device: torch.device, stop: Callable[[], bool]
) -> float:
    """`config.training.quality.metric` of the model as it is, 0 to 100; no random stream is touched.

    Args:
        model: in evaluation mode, on `device`.
        config: resolved.
        stop: asked before each call of the model, so between batches and between the tokens of one.

    Raises:
        Abandoned: `stop` said so.
    """

    def ask(*_: object) -> None:
        if stop():
            raise Abandoned

    wanted = config.training.quality
    assert wanted is not None
    sources, targets = dataset.eval_texts("valid")
    count = min(wanted.examples or len(sources), len(sources))
    places = [place * len(sources) // count for place in range(count)]
    decoding = config.decoding.model_copy(update={"n_best": 1})
    if wanted.decoding == "greedy":
        kept = decoding.model_dump(include={"max_length", "max_ratio", "max_extra", "batch_tokens"})
        decoding = DecodingConfig(method="greedy", **kept)
    # However the metric is found, by any decoding or scoring, each batch begins with its embedding.
    watch = model.embedding.register_forward_pre_hook(ask)
    try:
        found = score_texts(
            model,
            dataset.tokenizer,
            config,
            [sources[place] for place in places],
            [targets[place] for place in places],
            split="valid",
            decoding=decoding,
            metrics=[wanted.metric],
            device=device,
        )
    finally:
        watch.remove()
    return found[wanted.metric].value
