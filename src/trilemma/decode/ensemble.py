"""Several models with one vocabulary as one: their predictions are averaged at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from trilemma.config import ModelConfig
from trilemma.errors import ConfigError, nearest
from trilemma.mixers.base import Mixer
from trilemma.models import SequenceModel
from trilemma.models.model import ModelState
from trilemma.runs.load import LoadedRun
from trilemma.state import State, TupleState

Average = Literal["log-probability", "probability"]


class Ensemble(nn.Module):
    """Models as one, with the methods that decoding and scoring use.

    What `head` returns are logits of the average: with "log-probability" the mean of log-probabilities (a geometric
    mean; whoever normalises it gets a distribution), with "probability" the logarithm of the mean probability.

    Args:
        models: of one layout and one vocabulary, at least one.
        average: what is averaged.
    """

    def __init__(self, models: Sequence[SequenceModel], average: Average = "log-probability") -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.average = average
        first = models[0].config
        assert all(model.config.vocab_size == first.vocab_size for model in models), "one vocabulary"
        positions = [model.config.max_length for model in models if model.config.max_length is not None]
        self.config: ModelConfig = first.model_copy(update={"max_length": min(positions, default=None)})

    def members(self) -> list[SequenceModel]:
        """The models."""
        return [model for model in self.models if isinstance(model, SequenceModel)]

    def mixers(self) -> list[Mixer]:
        """All mixers of all models."""
        return [mixer for model in self.members() for mixer in model.mixers()]

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor | None = None,
        *,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """As `SequenceModel.forward`; the hidden vectors of all models side by side, [B, L, sum of widths]."""
        hidden = [
            model(inputs, lengths, source=source, source_lengths=source_lengths, prefix=prefix)
            for model in self.members()
        ]
        return torch.cat(hidden, dim=-1)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of what `forward` returns."""
        parts = hidden.split([model.config.d_model for model in self.members()], dim=-1)
        return self._averaged([model.head(part) for model, part in zip(self.members(), parts, strict=True)])

    def prefill(
        self,
        inputs: Tensor,
        lengths: Tensor | None = None,
        *,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        capacity: int | None = None,
        rewind: int = 0,
    ) -> tuple[Tensor, TupleState]:
        """As `SequenceModel.prefill`; the State holds those of all models."""
        results = [
            model.prefill(
                inputs,
                lengths,
                source=source,
                source_lengths=source_lengths,
                prefix=prefix,
                capacity=capacity,
                rewind=rewind,
            )
            for model in self.members()
        ]
        return self._averaged([logits for logits, _ in results]), TupleState(tuple(state for _, state in results))

    def step(self, tokens: Tensor, state: TupleState, lengths: Tensor | None = None) -> tuple[Tensor, TupleState]:
        """As `SequenceModel.step`."""
        logits: list[Tensor] = []
        states: list[State] = []
        for model, part in zip(self.members(), state.parts, strict=True):
            assert isinstance(part, ModelState)
            own, after = model.step(tokens, part, lengths)
            logits.append(own)
            states.append(after)
        return self._averaged(logits), TupleState(tuple(states))

    def _averaged(self, logits: list[Tensor]) -> Tensor:
        wide = [one if one.dtype == torch.float64 else one.float() for one in logits]
        stacked = torch.stack([torch.log_softmax(one, dim=-1) for one in wide])
        if self.average == "log-probability":
            return stacked.mean(0)
        return stacked.logsumexp(0) - math.log(len(wide))


def joined(runs: Sequence[LoadedRun], average: str) -> Ensemble:
    """The models of several runs as one.

    Raises:
        ConfigError: an unknown average; runs that differ in task, layout or vocabulary.
    """
    if average not in get_args(Average):
        raise ConfigError(f'unknown average "{average}"{nearest(average, get_args(Average))}')
    first = _facts(runs[0])
    for other in runs[1:]:
        for name, found in _facts(other).items():
            if found != first[name]:
                raise ConfigError(
                    f"{other.directory.path}: {name} is {found}, that of {runs[0].directory.path} is {first[name]}: "
                    "an ensemble's runs share task, layout and vocabulary"
                )
    return Ensemble([run.model for run in runs], cast("Average", average))


def _facts(run: LoadedRun) -> dict[str, object]:
    config = run.config
    return {
        "data.task": config.data.task,
        "model.layout": config.model.layout,
        "model.prefix": config.model.prefix,
        "data.lowercase": config.data.lowercase,
        "vocabulary": run.tokenizer.fingerprint[:12],
    }


AnyModel = SequenceModel | Ensemble


def members(model: AnyModel) -> list[SequenceModel]:
    """The models of an ensemble, or the one model."""
    return model.members() if isinstance(model, Ensemble) else [model]
