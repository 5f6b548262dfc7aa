"""A trained run in use: `trilemma.load(run)`.

predictor = trilemma.load("runs/demo")
predictor.translate(["twenty-one"])
predictor.generate(["twenty-one"], beam_size=8, n_best=3)
predictor.score(["twenty-one"], ["einundzwanzig"])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trilemma.config import DecodingConfig, RunConfig, parse
from trilemma.data import Tokenizer, prepare
from trilemma.decode import (
    BatchingReport,
    Prompts,
    Request,
    TooLong,
    check_decoding,
    compare_with_single,
    decode,
    length_penalty,
)
from trilemma.decode.hypothesis import NOT_A_NUMBER
from trilemma.errors import (
    CapabilityError,
    ConfigError,
    DataError,
    LengthError,
    TrilemmaError,
    nearest,
)
from trilemma.machine import choose_device
from trilemma.measure.evaluation import Evaluation, score_model, score_texts
from trilemma.measure.forced import forced_token_nats
from trilemma.measure.reading import Classified as Classified
from trilemma.measure.reading import Reader
from trilemma.measure.texts import file_texts, split_texts
from trilemma.models import SequenceModel
from trilemma.runs import RunDirectory
from trilemma.runs.load import load_run

OverLength = Literal["error", "skip"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# Lines decoded together by `stream`: enough for batches of similar length, little enough to hold.
DEFAULT_WINDOW = 1024
_WINDOW_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class Output:
    """One generated text.

    Attributes:
        text: one line.
        score: what outputs are ranked by: log-probability over the length penalty.
        log_probability: natural, under the model. tokens: new tokens, end-of-sequence counted if it was produced.
        finished: end-of-sequence was produced; False: cut at the length limit.
    """

    text: str
    score: float
    log_probability: float
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Generated:
    """What became of one input line.

    Attributes:
        index: the line's number, from 0.
        outputs: best first, at least one; a single empty text for an empty line or a skipped one.
        skipped: why the line was not read, or None.
    """

    index: int
    outputs: list[Output]
    skipped: str | None = None

    @property
    def text(self) -> str:
        """The best output."""
        return self.outputs[0].text


@dataclass(frozen=True)
class ForcedScore:
    """What a model makes of a given text.

    Attributes:
        log_probability: natural, of the text and end-of-sequence.
        tokens: how many that are, end-of-sequence counted.
        score: log-probability over the length penalty, as of a generated text.
        token_log_probabilities: of each token, in order; `pieces`: the tokens as text, "<eos>" last.
    """

    log_probability: float
    tokens: int
    score: float
    token_log_probabilities: list[float]
    pieces: list[str]


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    checkpoint: int | Literal["published", "best", "last"] = "published",
) -> Predictor:
    """Opens a run for use.

    Args:
        path: a run directory, as `trilemma train` writes it.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "float32", "bfloat16" or "float64" for the weights; None: float32, or float64 for a run trained in it.
        checkpoint: the published weights, or "best", "last" or a step.

    Raises:
        CheckpointError: not a run, not finished, or a file is missing, truncated, altered or foreign.
        ConfigError: unknown device or dtype.
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ConfigError(f'unknown dtype "{dtype}"{nearest(dtype, _DTYPES)}')
        dtype = _DTYPES[dtype]
    chosen, _ = choose_device(device)
    run = load_run(path, chosen, dtype, checkpoint)
    temperature = run.directory.read_temperature() if checkpoint == "published" else None
    return Predictor(run.model, run.tokenizer, run.config, chosen, run.directory, temperature)


class Predictor(Reader):
    """A model with its tokenizer: text in, text, labels, vectors or probabilities out.

    Args:
        model: in evaluation mode, on `device`.
        tokenizer, config: the run's; `config` resolved.
        directory, temperature: see `Reader`.
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
        super().__init__(model, tokenizer, config, device, directory, temperature)
        self._prompts = Prompts(tokenizer, config)

    # Generation

    def translate(self, lines: Sequence[str], over_length: OverLength = "error", **decoding: Any) -> list[str]:
        """The best output for each line; an empty line gives an empty text.

        Args:
            lines: any number of texts.
            over_length: a line that is longer than the model allows is an "error", or left empty with "skip".
            decoding: keys of the config's `decoding` section, such as `beam_size=8` or `method="greedy"`.

        Raises:
            ConfigError: an unknown key (the nearest is named) or an unfit value.
            LengthError: a line is too long; names the line.
            CapabilityError: the run generates no text.
        """
        return [line.text for line in self.generate(lines, over_length, **decoding)]

    def generate(self, lines: Sequence[str], over_length: OverLength = "error", **decoding: Any) -> list[Generated]:
        """All outputs (`n_best`) with their scores for each line; arguments and errors as for `translate`."""
        return list(self.stream(lines, over_length, **decoding))

    def stream(
        self,
        lines: Iterable[str],
        over_length: OverLength = "error",
        window: int = DEFAULT_WINDOW,
        **decoding: Any,
    ) -> Iterator[Generated]:
        """As `generate`, over any iterable in bounded memory; results come in the order of the lines."""
        for results in self.windows(lines, over_length, window, **decoding):
            yield from results

    def windows(
        self,
        lines: Iterable[str],
        over_length: OverLength = "error",
        window: int = DEFAULT_WINDOW,
        **decoding: Any,
    ) -> Iterator[list[Generated]]:
        """As `stream`, as many lines at a time as are decoded together: at most `window`, or a few megabytes.

        Before a `LengthError` is raised, everything before its line is yielded.
        """
        settings = self.decoding(**decoding)
        self._prompts.require_generation()
        for first, held in _windows(lines, window):
            results, failure = self._generate(held, first, settings, over_length)
            if results:
                yield results
            if failure is not None:
                raise failure

    def decoding(self, **overrides: Any) -> DecodingConfig:
        """The run's decoding settings with some keys changed.

        Raises:
            ConfigError: an unknown key (the nearest is named) or an unfit value.
        """
        settings = parse(DecodingConfig, {**self.config.decoding.model_dump(), **overrides}, "decoding")
        check_decoding(settings)
        return settings

    def batching_report(self, lines: Sequence[str], **decoding: Any) -> BatchingReport:
        """Decodes lines together and one by one: identical, near-ties with their gaps, or different."""
        settings = self.decoding(**decoding)
        requests = [self._readable(request) for request in self._prompts.requests(lines, settings)]
        return compare_with_single(
            self.model,
            requests,
            settings,
            eos=self.tokenizer.eos,
            pad=self.tokenizer.pad,
            dtype=self.dtype,
            device=self.device,
        )

    def _generate(
        self, lines: list[str], first: int, settings: DecodingConfig, over_length: OverLength
    ) -> tuple[list[Generated], LengthError | None]:
        """Results up to the first line that is too long, and the error of that line."""
        texts = [line.lower() for line in lines] if self.config.data.lowercase else lines
        requests: list[Request] = []
        results: dict[int, Generated] = {}
        failure: LengthError | None = None
        for line, request in zip(lines, self._prompts.requests(texts, settings, first), strict=True):
            if not line.strip():
                results[request.index] = Generated(request.index, [_nothing(finished=True)])
            elif isinstance(request, Request):
                requests.append(request)
            elif over_length == "skip":
                results[request.index] = Generated(request.index, [_nothing(finished=False)], _too_long(request))
            else:
                failure = LengthError(_too_long(request) + _MEND)
                break
        tokenizer = self.tokenizer
        outputs = decode(self.model, requests, settings, eos=tokenizer.eos, pad=tokenizer.pad, device=self.device)
        for request, hypotheses in zip(requests, outputs, strict=True):
            shown = [
                Output(self._prompts.text(one), one.score, one.log_probability, one.length, one.finished)
                for one in hypotheses
            ]
            results[request.index] = Generated(request.index, shown)
        return [results[index] for index in sorted(results)], failure

    def _readable(self, request: Request | TooLong) -> Request:
        if isinstance(request, TooLong):
            raise LengthError(_too_long(request) + _MEND)
        return request

    # Forced decoding

    def score(
        self, sources: Sequence[str], targets: Sequence[str] | None = None, first_line: int = 1, **decoding: Any
    ) -> list[ForcedScore]:
        """Forced decoding: the log-probability of each target given its source.

        Args:
            sources: for a language model the texts to score, with no targets.
            first_line: the number of the first one, for messages.
            decoding: keys of the config's `decoding` section; `length_penalty` is read.

        Raises:
            DataError: sides of unequal length. CapabilityError: a run that generates no text.
            LengthError: a text is longer than the model's positions; names the line.
        """
        self._prompts.require_generation()
        settings = self.decoding(**decoding)
        if (targets is None) != self._prompts.is_language_model:
            wanted = "texts alone" if self._prompts.is_language_model else "sources and targets"
            raise DataError(f"a {self.config.data.task} run scores {wanted}")
        if targets is not None and len(targets) != len(sources):
            raise DataError(f"{len(sources)} sources and {len(targets)} targets: the sides differ in length")
        given = [""] * len(sources) if targets is None else sources
        wanted_texts = sources if targets is None else targets
        if self.config.data.lowercase:
            given, wanted_texts = [t.lower() for t in given], [t.lower() for t in wanted_texts]
        tokenizer = self.tokenizer
        contexts = [self._prompts.context(ids) for ids in tokenizer.encode_batch(given)]
        ended = [[*ids, tokenizer.eos] for ids in tokenizer.encode_batch(wanted_texts)]
        positions = self.config.model.max_length
        for number, (context, target) in enumerate(zip(contexts, ended, strict=True), start=first_line):
            longest = max(len(context.prompt) + len(target) - 1, len(context.source or ()))
            if positions is not None and longest > positions:
                raise LengthError(f"line {number}: {longest} tokens, more than model.max_length = {positions}")
        scores = []
        nats = forced_token_nats(self.model, contexts, ended, pad=tokenizer.pad, device=self.device)
        for target, values in zip(ended, nats, strict=True):
            total = -float(values.sum())
            if math.isnan(total):
                raise TrilemmaError(NOT_A_NUMBER)
            normalised = total / length_penalty(len(target), settings.length_penalty)
            pieces = [*(tokenizer.decode([token]) for token in target[:-1]), "<eos>"]
            scores.append(ForcedScore(total, len(target), normalised, (-values).tolist(), pieces))
        return scores

    # Scores

    def evaluate(
        self,
        files: Sequence[str | Path] = (),
        split: Literal["valid", "test"] = "test",
        metrics: Sequence[str] | None = None,
        **decoding: Any,
    ) -> Evaluation:
        """Signed scores of the run's own split, or of files (one of examples, or a source and a target).

        Raises:
            DataError: no such split; a file is missing, empty, misaligned or malformed.
            ConfigError: an unknown metric or decoding key (the nearest is named).
        """
        settings = self.decoding(**{**decoding, "n_best": 1})
        if self.config.data.task in ("masked-language-model", "probe"):
            if files:
                what = "a probe" if self.config.data.task == "probe" else "a masked language model"
                raise CapabilityError(f"{what} is scored on its own splits: no files can be given")
            dataset, _ = prepare(self.config, self.tokenizer)
            return score_model(self.model, dataset, split, metrics=metrics, device=self.device)
        chosen = [Path(file) for file in files]
        texts = file_texts(self.config, chosen) if chosen else split_texts(self.config, split)
        return score_texts(
            self.model,
            self.tokenizer,
            self.config,
            texts.sources,
            texts.targets,
            split=texts.name,
            decoding=settings,
            metrics=metrics,
            line_ends=texts.line_ends,
            temperature=self.temperature,
            device=self.device,
        )


_MEND = '; split the line, or use --over-length skip (over_length="skip") to leave such lines empty'


def _too_long(request: TooLong) -> str:
    return f"line {request.index + 1}: {request}"


def _nothing(finished: bool) -> Output:
    return Output("", 0.0, 0.0, 0, finished)


def _windows(lines: Iterable[str], window: int) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, lines), at most `window` lines or some megabytes at a time."""
    if window < 1:
        raise ConfigError(f"a window of {window} lines: at least 1 is needed")
    held: list[str] = []
    characters = first = 0
    for line in lines:
        held.append(line)
        characters += len(line)
        if len(held) >= window or characters >= _WINDOW_CHARACTERS:
            yield first, held
            first, held, characters = first + len(held), [], 0
    if held:
        yield first, held
