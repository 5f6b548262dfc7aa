"""What a run says about texts that it reads: labels with probabilities, answers, vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trilemma.config import RunConfig
from trilemma.data import Tokenizer
from trilemma.errors import CapabilityError, CheckpointError, DataError, LengthError
from trilemma.measure.answers import Answer, find_answers
from trilemma.measure.calibration import at_temperature
from trilemma.measure.classes import class_log_probabilities
from trilemma.measure.vectors import Pooling, text_vectors
from trilemma.models import SequenceModel, path_of
from trilemma.runs import RunDirectory


@dataclass(frozen=True)
class Classified:
    """A label with the probabilities of all classes, in the order of their ids.

    `unknown`: tokens of the text that stand for what the vocabulary does not have.
    """

    label: str
    probabilities: dict[str, float]
    unknown: int = 0


def require_list(lines: object) -> None:
    """Refuses one text where a list of texts belongs: its characters would be taken for texts.

    Raises:
        DataError: it is a string.
    """
    if isinstance(lines, str):
        raise DataError("a list of texts is needed, found one text; put it in brackets: [text]")


class Reader:
    """A model with its tokenizer, for texts that it reads whole.

    Args:
        model: in evaluation mode, on `device`.
        tokenizer, config: the run's; `config` resolved.
        directory: the run directory, where there is one.
        temperature: what a classifier's logits are divided by, fitted on the run's validation data; None: not fitted.
    """

    def __init__(
        self,
        model: SequenceModel,
        tokenizer: Tokenizer,
        config: RunConfig,
        device: str = "cpu",
        directory: RunDirectory | None = None,
        temperature: float | None = None,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.device, self.directory, self.temperature = device, directory, temperature

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of activations, and of the weights if those are no integers."""
        return self.model.dtype

    @property
    def path(self) -> str:
        """How the model is executed: form, device, weights and cache, such as "plain/cpu/packed-float32"."""
        return path_of(self.model)

    def classify(self, lines: Sequence[str], first_line: int = 1, raw: bool = False) -> list[Classified]:
        """The likeliest label and all probabilities for each line.

        Args:
            lines: any number of texts.
            first_line: the number of the first one, for messages.
            raw: the model's own probabilities, not those at the run's temperature.

        Raises:
            CapabilityError: the run is no classifier.
            LengthError: a line is longer than the model allows; names the line.
        """
        require_list(lines)
        names = self.config.data.labels
        if self.config.data.task != "classification" or names is None:
            raise CapabilityError(f"this run's task is {self.config.data.task}, not classification")
        texts = [line.lower() for line in lines] if self.config.data.lowercase else list(lines)
        rows = self.tokenizer.encode_batch(texts)
        limit, key = self.config.data.max_source_length, "data.max_source_length"
        if self.config.model.max_length is not None and self.config.model.max_length - 2 < limit:
            limit, key = self.config.model.max_length - 2, "model.max_length less two"
        for index, row in enumerate(rows):
            if len(row) > limit:
                raise LengthError(f"line {first_line + index}: {len(row)} tokens, more than {key} = {limit}")
        found = class_log_probabilities(self.model, self.tokenizer, rows, device=self.device)
        if not raw and self.temperature is not None:
            found = at_temperature(found, self.temperature)
        return [
            Classified(
                names[int(row.argmax())], dict(zip(names, row.tolist(), strict=True)), self.tokenizer.count_unknown(ids)
            )
            for row, ids in zip(np.exp(found), rows, strict=True)
        ]

    def embed(
        self, lines: Sequence[str], pooling: Pooling = "mean", normalise: bool = False, first_line: int = 1
    ) -> NDArray[np.float64]:
        """A vector for each line, [lines, d_model]; an empty line's is that of the special tokens alone.

        Args:
            lines: any number of texts.
            pooling: "mean" over all tokens, special ones included; "cls", the first one (encoder-only); "last"
                (decoder-only).
            normalise: to length 1, so that a product is a cosine.
            first_line: the number of the first one, for messages.

        Raises:
            ConfigError, CapabilityError: a pooling that does not exist, or that the layout has not.
            LengthError: a line is longer than the model's positions; names the line.
        """
        require_list(lines)
        return text_vectors(
            self.model,
            self.tokenizer,
            self.config,
            lines,
            pooling=pooling,
            normalise=normalise,
            device=self.device,
            first_line=first_line,
        )

    def answer(self, pairs: Sequence[tuple[str, str]], longest: int | None = None, first_line: int = 1) -> list[Answer]:
        """The likeliest answer to each (question, passage): a part of the passage.

        Args:
            pairs: any number of them; a passage may be longer than the model reads at once.
            longest: tokens of an answer; None: the run's `decoding.max_length`, else 30.
            first_line: the number of the first one, for messages.

        Raises:
            CapabilityError: the run answers no questions.
            LengthError: a question leaves no room for its passage; names the line.
        """
        return find_answers(
            self.model,
            self.tokenizer,
            self.config,
            pairs,
            longest=longest or self.config.decoding.max_length,
            device=self.device,
            first_line=first_line,
        )

    def require_directory(self) -> RunDirectory:
        """The run directory, for what is written to it."""
        if self.directory is None:
            raise CheckpointError("this predictor was made from a model, not from a run directory")
        return self.directory
