"""A model's scores on a split or on lines of text: outputs, forced decoding and labels, brought to signed metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from trilemma.config import DecodingConfig, RunConfig
from trilemma.data import IGNORE, UNSCORED, Dataset, Tokenizer
from trilemma.data.languages import is_unspaced
from trilemma.data.questions import Question
from trilemma.decode import AnyModel, Prompts, Request, require_numbers
from trilemma.errors import CapabilityError, ConfigError, DataError, nearest
from trilemma.measure import answers, quality
from trilemma.measure.answers import find_answers
from trilemma.measure.calibration import BINS, at_temperature, calibration_error
from trilemma.measure.classes import class_log_probabilities
from trilemma.measure.forced import forced_nats
from trilemma.measure.quality import Score
from trilemma.measure.scores import check_positions, likelihood_scores, make_outputs, output_scores, unknown_note
from trilemma.measure.texts import questions_of
from trilemma.models import SequenceModel

# Padded tokens of one batch of forced decoding; results do not depend on it.
LIKELIHOOD_BATCH_TOKENS = 8192

OUTPUT_METRICS = ("bleu", "chrf", "exact_match")
LIKELIHOOD_METRICS = ("loss", "perplexity", "bits_per_byte")
METRICS: dict[str, tuple[str, ...]] = {
    "seq2seq": (*OUTPUT_METRICS, *LIKELIHOOD_METRICS),
    "language-model": LIKELIHOOD_METRICS,
    "classification": ("accuracy", "loss", "calibration_error", "calibration_error_raw"),
    "masked-language-model": ("loss", "perplexity"),
    "question-answering": ("exact_match", "f1"),
    "probe": ("accuracy", "exact_match", "loss"),
}


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split.

    Attributes:
        split: its name, or that of the file.
        scores: in the order of `METRICS`.
        sources, references: the raw text; references are empty for language models.
        hypotheses: outputs, or predicted labels; empty where no metric needs them.
        notes: what a reader of the scores must know: a replaced tokenizer, cut outputs.
    """

    split: str
    scores: list[Score]
    sources: list[str] = field(repr=False)
    references: list[str] = field(repr=False)
    hypotheses: list[str] = field(repr=False)
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, metric: str) -> Score:
        for score in self.scores:
            if score.metric == metric:
                return score
        raise ConfigError(f'"{metric}" was not measured{nearest(metric, [score.metric for score in self.scores])}')

    def to_json(self) -> list[dict[str, Any]]:
        """The entries of scores.json."""
        return [{"split": self.split, **score.to_json()} for score in self.scores]


def check_metrics(task: str, metrics: Sequence[str] | None) -> tuple[str, ...]:
    """The metrics to measure, in a fixed order; None: all that the task has.

    Raises:
        ConfigError: a metric that the task has not; names the nearest.
    """
    known = METRICS[task]
    for metric in metrics or ():
        if metric not in known:
            raise ConfigError(f'task {task} has no metric "{metric}"{nearest(metric, known)}')
    return tuple(metric for metric in known if metrics is None or metric in metrics)


def score_model(
    model: SequenceModel,
    dataset: Dataset,
    split: Literal["valid", "test"] = "test",
    *,
    decoding: DecodingConfig | None = None,
    metrics: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Scores a split of a run's own data.

    Scores do not depend on the batch size: outputs as `decode` promises, likelihoods up to the model's rounding.

    Args:
        model: in evaluation mode, on `device`.
        decoding: how outputs are made; None: the run's, with one output an input.
        metrics: of `METRICS[task]`; None: all.

    Raises:
        DataError: the split does not exist.
        LengthError: a text is longer than the model's positions.
    """
    config = dataset.resolved(dataset.config)
    if config.data.task == "masked-language-model":
        return _with_intervals(_score_masked(model, dataset, split, metrics, device))
    if config.data.task == "probe":
        return _with_intervals(_score_probe(model, dataset, split, metrics, device))
    if config.data.task == "question-answering":
        questions = questions_of(config, split)
        return score_questions(
            model,
            dataset.tokenizer,
            config,
            questions,
            split=split,
            decoding=decoding,
            metrics=metrics,
            device=device,
        )
    sources, targets = dataset.eval_texts(split)
    line_ends = 0
    if config.data.task == "language-model":
        line_ends = dataset.bytes_of(split) - sum(len(text.encode()) for text in sources)
    return score_texts(
        model,
        dataset.tokenizer,
        config,
        sources,
        targets,
        split=split,
        decoding=decoding,
        metrics=metrics,
        line_ends=line_ends,
        device=device,
    )


def score_texts(
    model: AnyModel,
    tokenizer: Tokenizer,
    config: RunConfig,
    sources: Sequence[str],
    targets: Sequence[str],
    *,
    split: str = "test",
    decoding: DecodingConfig | None = None,
    metrics: Sequence[str] | None = None,
    line_ends: int = 0,
    temperature: float | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Scores lines of text.

    Args:
        sources, targets: line by line; for language models documents and nothing; for classification texts and labels.
        line_ends: bytes of line ends that end-of-sequence stands for, in all (language models).
        temperature: what a classifier's logits are divided by for `calibration_error`; the loss is the model's own.

    Other arguments and errors are those of `score_model`.
    """
    task = config.data.task
    wanted = check_metrics(task, metrics)
    if not sources:
        raise DataError(f"{split}: nothing to score: no lines")
    if task == "classification":
        assert isinstance(model, SequenceModel), "ensembles generate and score texts"
        classes = _score_classes(model, tokenizer, config, sources, targets, split, wanted, temperature, device)
        return _with_intervals(classes)
    if task == "masked-language-model":
        raise CapabilityError("a masked language model is scored on its own splits: no files can be given")
    if task == "probe":
        raise CapabilityError("a probe is scored on its own splits: no files can be given")
    if config.data.lowercase:
        sources, targets = [text.lower() for text in sources], [text.lower() for text in targets]
    prompts = Prompts(tokenizer, config)
    if task == "language-model":
        found, notes = _score_documents(model, prompts, sources, line_ends, split, wanted, device)
        return _with_intervals(Evaluation(split, found, list(sources), [], [], notes))
    scores: list[Score] = []
    hypotheses: list[str] = []
    source_ids = tokenizer.encode_batch(sources)
    notes = unknown_note("sources", tokenizer, source_ids)
    if any(metric in OUTPUT_METRICS for metric in wanted):
        hypotheses, about = make_outputs(model, prompts, sources, decoding or config.decoding, split, device)
        notes += about
        scores += output_scores(hypotheses, targets, config.data, wanted, notes)
    if any(metric in LIKELIHOOD_METRICS for metric in wanted):
        target_ids = tokenizer.of_targets().encode_batch(targets)
        contexts = [prompts.context(ids) for ids in source_ids]
        check_positions(config, contexts, target_ids, split)
        ended = [[*ids, tokenizer.eos] for ids in target_ids]
        nats = forced_nats(
            model, contexts, ended, pad=tokenizer.pad, device=device, batch_tokens=LIKELIHOOD_BATCH_TOKENS
        )
        sizes = np.array([len(text.encode()) for text in targets])
        unknown = sum(map(tokenizer.count_unknown, target_ids))
        notes += unknown_note("targets", tokenizer, target_ids)
        scores += likelihood_scores(nats, np.array([len(ids) for ids in ended]), sizes, wanted, unknown)
    return _with_intervals(Evaluation(split, scores, list(sources), list(targets), hypotheses, notes))


def _with_intervals(evaluation: Evaluation) -> Evaluation:
    return replace(evaluation, scores=[quality.with_interval(score) for score in evaluation.scores])


def _score_documents(
    model: AnyModel,
    prompts: Prompts,
    documents: Sequence[str],
    line_ends: int,
    split: str,
    wanted: Sequence[str],
    device: torch.device | str,
) -> tuple[list[Score], list[str]]:
    """Each document alone, `[bos] text [eos]`, in pieces of `data.context_length`; a piece is a segment.

    A piece's share of its document's bytes is its share of the tokens, so that the totals are exact.
    """
    length, tokenizer = prompts.config.data.context_length, prompts.tokenizer
    contexts: list[Request] = []
    targets: list[list[int]] = []
    shares: list[float] = []
    rows = tokenizer.encode_batch(documents)
    for text, ids in zip(documents, rows, strict=True):
        unit = [tokenizer.bos, *ids, tokenizer.eos]
        size = len(text.encode()) + line_ends / len(documents)
        for start in range(0, len(unit) - 1, length):
            targets.append(unit[start + 1 : start + 1 + length])
            contexts.append(Request([unit[start]], 1))
            shares.append(size * len(targets[-1]) / (len(unit) - 1))
    check_positions(prompts.config, contexts, [target[:-1] for target in targets], split)
    nats = forced_nats(model, contexts, targets, pad=tokenizer.pad, device=device, batch_tokens=LIKELIHOOD_BATCH_TOKENS)
    unknown = sum(map(tokenizer.count_unknown, rows))
    sizes = np.array([len(target) for target in targets])
    scores = likelihood_scores(nats, sizes, np.array(shares), wanted, unknown)
    return scores, unknown_note("text", tokenizer, rows)


def _score_classes(
    model: SequenceModel,
    tokenizer: Tokenizer,
    config: RunConfig,
    texts: Sequence[str],
    labels: Sequence[str],
    split: str,
    wanted: Sequence[str],
    temperature: float | None,
    device: torch.device | str,
) -> Evaluation:
    names = config.data.labels
    assert names is not None, "a resolved configuration names its classes"
    if config.data.lowercase:
        texts = [text.lower() for text in texts]
    for number, label in enumerate(labels, start=1):
        if label not in names:
            raise DataError(f'{split}: line {number}: unknown label "{label}"{nearest(label, names)}')
    rows = tokenizer.encode_batch(texts)
    check_positions(config, [Request([0, 0], 1)] * len(rows), rows, split)
    log_probabilities = class_log_probabilities(model, tokenizer, rows, device=device)
    predicted = [names[index] for index in log_probabilities.argmax(1)]
    ids = np.array([names.index(label) for label in labels])
    scores = [quality.accuracy(predicted, labels)] if "accuracy" in wanted else []
    if "loss" in wanted:
        nats = -log_probabilities[np.arange(len(ids)), ids]
        scores.append(replace(quality.loss(nats, np.ones(len(ids))), signature="unit:nats-per-example"))
    for metric, chosen in (("calibration_error", temperature), ("calibration_error_raw", 1.0)):
        if metric in wanted and chosen is not None:
            error = calibration_error(at_temperature(log_probabilities, chosen), ids)
            scores.append(Score(metric, error, f"bins:{BINS}|temperature:{chosen:.4g}", len(ids)))
    return Evaluation(split, scores, list(texts), list(labels), predicted, unknown_note("texts", tokenizer, rows))


def score_questions(
    model: SequenceModel,
    tokenizer: Tokenizer,
    config: RunConfig,
    questions: Sequence[Question],
    *,
    split: str = "test",
    decoding: DecodingConfig | None = None,
    metrics: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Exact match and F1 of answers, each against the nearest right one; by character for languages without spaces.

    Other arguments and errors are those of `score_model`.
    """
    wanted = check_metrics("question-answering", metrics)
    longest = (decoding or config.decoding).max_length
    pairs = [(item.question, item.passage) for item in questions]
    found = find_answers(model, tokenizer, config, pairs, longest=longest, device=device)
    said = [answer.text for answer in found]
    characters = is_unspaced(config.data.source_language)
    unit = "characters|punctuation:unicode" if characters else "words|punctuation:ascii|articles:en"
    signature = f"unit:percent|{unit}|longest:{longest or answers.DEFAULT_LONGEST}"
    right = [item.answers for item in questions]
    scores = []
    if "exact_match" in wanted:
        hits = [answers.exact(one, these, characters) for one, these in zip(said, right, strict=True)]
        scores.append(replace(quality.accuracy(hits, [True] * len(hits)), metric="exact_match", signature=signature))
    if "f1" in wanted:
        shares = [answers.f1(one, these, characters) for one, these in zip(said, right, strict=True)]
        scores.append(replace(quality.mean_share(shares), signature=signature))
    sources = [item.question for item in questions]
    return _with_intervals(Evaluation(split, scores, sources, [these[0] for these in right], said))


@torch.no_grad()
def _score_masked(
    model: SequenceModel,
    dataset: Dataset,
    split: Literal["valid", "test"],
    metrics: Sequence[str] | None,
    device: torch.device | str,
) -> Evaluation:
    """Masked tokens, chosen the same way every time; a batch row is a segment."""
    wanted = check_metrics("masked-language-model", metrics)
    nats, tokens = [], []
    for batch in dataset.eval_batches(split):
        moved = batch.to(device)
        logits = model.head(model(moved.inputs, moved.lengths, segments=moved.segments))
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(wide.transpose(1, 2), moved.labels, ignore_index=IGNORE, reduction="none")
        nats.append(require_numbers(loss).cpu().double().sum(1).numpy())
        tokens.append((batch.labels != IGNORE).sum(1).numpy())
    training = dataset.config.training
    signature = f"unit:masked-token|fraction:{training.mask_fraction:g}|masking:{training.masking}"
    scores = likelihood_scores(np.concatenate(nats), np.concatenate(tokens), np.ones(1), wanted)
    return Evaluation(split, [replace(score, signature=signature) for score in scores], [], [], [])


@torch.no_grad()
def _score_probe(
    model: SequenceModel,
    dataset: Dataset,
    split: Literal["valid", "test"],
    metrics: Sequence[str] | None,
    device: torch.device | str,
) -> Evaluation:
    """Labelled positions only; texts are the rows' symbols, and those of their labels."""
    wanted = check_metrics("probe", metrics)
    sources, labels = dataset.eval_texts(split)
    references = [" ".join(symbol for symbol in row.split(" ") if symbol != UNSCORED) for row in labels]
    hits, counts, nats = np.zeros((3, len(sources)))
    said = [""] * len(sources)
    for batch in dataset.eval_batches(split):
        moved = batch.to(device)
        hidden = model(moved.inputs, None if bool((batch.lengths == batch.inputs.shape[1]).all()) else moved.lengths)
        for row, example in enumerate(batch.examples):
            places = (batch.labels[row] != IGNORE).nonzero().squeeze(1)
            answers = batch.labels[row, places]
            logits = require_numbers(model.head(hidden[row, places.to(device)]).cpu())
            predicted = logits.argmax(-1)
            hits[example], counts[example] = int((predicted == answers).sum()), len(answers)
            nats[example] = float(F.cross_entropy(logits.double(), answers, reduction="sum"))
            said[example] = dataset.tokenizer.decode(predicted.tolist())
    makers: dict[str, Callable[[], Score]] = {
        "accuracy": lambda: quality.label_accuracy(hits, counts),
        "exact_match": lambda: quality.all_labels(hits, counts),
        "loss": lambda: replace(quality.loss(nats, counts), signature="unit:nats-per-label"),
    }
    return Evaluation(split, [makers[metric]() for metric in wanted], sources, references, said)
