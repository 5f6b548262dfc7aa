"""A trained run in use: `trilemma.load(run)`.

predictor = trilemma.load("runs/demo")
predictor.translate(["twenty-one"])
predictor.generate(["twenty-one"], beam_size=8, n_best=3)
predictor.score(["twenty-one"], ["einundzwanzig"])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from trilemma.config import DecodingConfig, Quantization, RunConfig, parse
from trilemma.data import Tokenizer, prepare
from trilemma.decode import (
    AnyModel,
    BatchingReport,
    Ensemble,
    Generated,
    Line,
    Prompts,
    Request,
    StepModel,
    TooLong,
    check_decoding,
    compare_with_single,
    joined,
    length_penalty,
    nothing,
    output_of,
    write,
)
from trilemma.errors import CapabilityError, ConfigError, DataError, LengthError, nearest
from trilemma.machine import choose_device, keep_freed_memory
from trilemma.measure.evaluation import Evaluation, score_model, score_questions, score_texts
from trilemma.measure.forced import ForcedScore, forced_token_nats
from trilemma.measure.reading import Classified as Classified
from trilemma.measure.reading import Reader, require_list
from trilemma.measure.texts import file_texts, questions_of, split_texts
from trilemma.models import SequenceModel, cache_kind, hold_cache, pack, quantize
from trilemma.runs import RunDirectory
from trilemma.runs.load import LoadedRun, load_run
from trilemma.state import CacheKind

OverLength = Literal["error", "skip"]

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float64")}
_CODED: dict[str, Quantization] = {"int8": "int8", "int4": "int4"}
_DTYPES |= dict.fromkeys(_CODED, torch.float32)  # of what is not coded
# Lines decoded together by `stream`: enough for batches of similar length, little enough to hold.
DEFAULT_WINDOW = 1024
_WINDOW_CHARACTERS = 1 << 22


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    checkpoint: int | Literal["published", "best", "last"] = "published",
    ensemble: Sequence[str | Path] = (),
    average: str | None = None,
    cache: str | None = None,
) -> Predictor:
    """Opens a run for use.

    Args:
        path: a run directory, as `trilemma train` writes it.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "float32", "bfloat16" or "float64" for the weights; "int8" or "int4" for such weights beside float32;
            None: float32, or float64 for a run trained in it, or as `trilemma quantize` has left it.
        checkpoint: the published weights, or "best", "last" or a step.
        ensemble: runs whose predictions are averaged with this one's; of the same task, layout and vocabulary.
        average: "log-probability" or "probability": what the ensemble averages; None: log-probabilities.
        cache: "int8": keys and values in 8 bits (`trilemma.models.hold_cache`); None: as activations are.

    Raises:
        CheckpointError: not a run, not finished, or a file is missing, truncated, altered or foreign.
        ConfigError: unknown device, dtype, cache or average; a run of the ensemble that does not fit the first.
    """
    coded = None
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ConfigError(f'unknown dtype "{dtype}"{nearest(dtype, _DTYPES)}')
        coded, dtype = _CODED.get(dtype), _DTYPES[dtype]
    kind = cache_kind(cache)
    chosen, _ = choose_device(device)
    run = _opened(path, chosen, dtype, checkpoint, coded, kind)
    temperature = run.directory.read_temperature() if checkpoint == "published" else None
    whole = None
    if ensemble:
        Prompts(run.tokenizer, run.config).require_generation()
        own = run.model.dtype
        others = [_opened(other, chosen, own, checkpoint, coded, kind) for other in ensemble]
        whole = joined([run, *others], average or "log-probability")
    elif average is not None:
        raise ConfigError(f'average "{average}": there is no ensemble; name its other runs (--with RUN)')
    return Predictor(run.model, run.tokenizer, run.config, chosen, run.directory, temperature, whole)


def _opened(
    path: str | Path,
    device: str,
    dtype: torch.dtype | None,
    checkpoint: int | Literal["published", "best", "last"],
    coded: Quantization | None,
    cache: CacheKind,
) -> LoadedRun:
    """A run ready for use: its weights coded where asked for, and packed where this machine's kernels take them."""
    run = load_run(path, device, dtype, checkpoint)
    kept = run.config.model.quantization
    if coded is not None and kept is None:
        quantize(run.model, coded)
    elif coded not in (None, kept):
        raise ConfigError(f"{path}: its weights are in {kept} already; leave dtype to the run")
    pack(run.model)
    hold_cache(run.model, cache)
    if run.model.device.type == "cpu":
        keep_freed_memory()
    return run


class Predictor(Reader):
    """A model with its tokenizer: text in, text, labels, vectors or probabilities out.

    Args:
        model: in evaluation mode, on `device`.
        tokenizer, config: the run's; `config` resolved.
        directory, temperature: see `Reader`.
        ensemble: what generates and scores in place of the model alone, of which it is the first.
    """

    def __init__(
        self,
        model: SequenceModel,
        tokenizer: Tokenizer,
        config: RunConfig,
        device: str = "cpu",
        directory: RunDirectory | None = None,
        temperature: float | None = None,
        ensemble: Ensemble | None = None,
    ) -> None:
        self.whole: AnyModel = model if ensemble is None else ensemble
        super().__init__(model, tokenizer, config, device, directory, temperature)
        positions = self.whole.config.max_length  # of an ensemble the fewest
        self._joint = config.model_copy(update={"model": config.model.model_copy(update={"max_length": positions})})
        self._prompts = Prompts(tokenizer, self._joint)

    # Generation

    def translate(self, lines: Sequence[str | Line], over_length: OverLength = "error", **decoding: Any) -> list[str]:
        """The best output for each line; an empty line gives an empty text.

        Args:
            lines: any number of texts, or `Line`s: texts with what their outputs must hold.
            over_length: a line that is longer than the model allows is an "error", or left empty with "skip".
            decoding: keys of the config's `decoding` section, such as `beam_size=8` or `method="greedy"`.

        Raises:
            ConfigError: an unknown key (the nearest is named) or an unfit value.
            LengthError: a line is too long; names the line.
            DataError: a prefix or phrase that cannot be written.
            CapabilityError: the run generates no text, or a setting needs what the model has not.
        """
        return [line.text for line in self.generate(lines, over_length, **decoding)]

    def generate(
        self, lines: Sequence[str | Line], over_length: OverLength = "error", **decoding: Any
    ) -> list[Generated]:
        """All outputs (`n_best`) with their scores for each line; arguments and errors as for `translate`."""
        return list(self.stream(lines, over_length, **decoding))

    def stream(
        self,
        lines: Iterable[str | Line],
        over_length: OverLength = "error",
        window: int = DEFAULT_WINDOW,
        **decoding: Any,
    ) -> Iterator[Generated]:
        """As `generate`, over any iterable in bounded memory; results come in the order of the lines."""
        for results in self.windows(lines, over_length, window, **decoding):
            yield from results

    def windows(
        self,
        lines: Iterable[str | Line],
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
        check_decoding(settings, overrides)
        return settings

    def batching_report(self, lines: Sequence[str], **decoding: Any) -> BatchingReport:
        """Decodes lines together and one by one: identical, near-ties with their gaps, or different."""
        settings = self.decoding(**decoding)
        requests = [self._readable(request) for request in self._prompts.requests(lines, settings)]
        model: StepModel[Any] = self.whole
        return compare_with_single(
            model,
            requests,
            settings,
            eos=self.tokenizer.eos,
            pad=self.tokenizer.pad,
            unk=self.tokenizer.unk,
            dtype=self.dtype,
            device=self.device,
        )

    def _generate(
        self, lines: list[Line], first: int, settings: DecodingConfig, over_length: OverLength
    ) -> tuple[list[Generated], LengthError | None]:
        """Results up to the first line that is too long, and the error of that line."""
        if self.config.data.lowercase:
            lines = [replace(line, text=line.text.lower()) for line in lines]
        requests: list[Request] = []
        results: dict[int, Generated] = {}
        failure: LengthError | None = None
        for line, request in zip(lines, self._prompts.requests(lines, settings, first), strict=True):
            if not line.text.strip():
                results[request.index] = Generated(request.index, [nothing(settings, finished=True)])
            elif isinstance(request, Request):
                requests.append(request)
            elif over_length == "skip":
                results[request.index] = Generated(
                    request.index, [nothing(settings, finished=False)], _too_long(request)
                )
            else:
                failure = LengthError(_too_long(request) + _MEND)
                break
        sources = [lines[request.index - first].text for request in requests]
        outputs = write(self.whole, self._prompts, requests, sources, settings, self.device)
        for request, written in zip(requests, outputs, strict=True):
            unknown = self.tokenizer.count_unknown(request.source or request.prompt)
            results[request.index] = Generated(request.index, [output_of(one) for one in written], unknown=unknown)
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
        require_list(sources)
        require_list(targets)
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
        ended = [[*ids, tokenizer.eos] for ids in tokenizer.of_targets().encode_batch(wanted_texts)]
        positions = self.whole.config.max_length
        for number, (context, target) in enumerate(zip(contexts, ended, strict=True), start=first_line):
            longest = max(len(context.prompt) + len(target) - 1, len(context.source or ()))
            if positions is not None and longest > positions:
                raise LengthError(f"line {number}: {longest} tokens, more than model.max_length = {positions}")
        scores = []
        nats = forced_token_nats(self.whole, contexts, ended, pad=tokenizer.pad, device=self.device)
        for target, values in zip(ended, nats, strict=True):
            total = -float(values.sum())
            normalised = total / length_penalty(len(target), settings.length_penalty)
            pieces = [*(tokenizer.decode([token]) for token in target[:-1]), "<eos>"]
            unknown = tokenizer.count_unknown(target)
            scores.append(ForcedScore(total, len(target), normalised, (-values).tolist(), pieces, unknown))
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
        if self.config.data.task == "question-answering":
            if len(chosen) > 1:
                raise ConfigError(f"a question-answering run is scored on one .json file; {len(chosen)} were given")
            questions = questions_of(self.config, split, *chosen)
            name = chosen[0].name if chosen else split
            given: dict[str, Any] = {"split": name, "decoding": settings, "metrics": metrics, "device": self.device}
            return score_questions(self.model, self.tokenizer, self.config, questions, **given)
        texts = file_texts(self.config, chosen) if chosen else split_texts(self.config, split)
        return score_texts(
            self.whole,
            self.tokenizer,
            self._joint,
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


def _windows(lines: Iterable[str | Line], window: int) -> Iterator[tuple[int, list[Line]]]:
    """(number of the first line, lines), at most `window` lines or some megabytes at a time."""
    require_list(lines)
    if window < 1:
        raise ConfigError(f"a window of {window} lines: at least 1 is needed")
    held: list[Line] = []
    characters = first = 0
    for line in lines:
        held.append(line if isinstance(line, Line) else Line(line))
        characters += len(held[-1].text)
        if len(held) >= window or characters >= _WINDOW_CHARACTERS:
            yield first, held
            first, held, characters = first + len(held), [], 0
    if held:
        yield first, held
