"""The parts of an evaluation: outputs and their metrics, likelihoods as metrics, what is refused and what is noted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from trilemma.config import DataConfig, DecodingConfig, RunConfig
from trilemma.data import Tokenizer
from trilemma.decode import AnyModel, Prompts, Request, TooLong, write
from trilemma.errors import LengthError
from trilemma.measure import quality
from trilemma.measure.quality import Array, Score


def make_outputs(
    model: AnyModel,
    prompts: Prompts,
    sources: Sequence[str],
    decoding: DecodingConfig,
    split: str,
    device: torch.device | str,
) -> tuple[list[str], list[str]]:
    """The best output of each source, empty for empty ones, and notes."""
    decoding = decoding.model_copy(update={"n_best": 1, "alignments": None})
    requests = []
    for request in prompts.requests(sources, decoding, beyond_training=True):
        if isinstance(request, TooLong):
            raise LengthError(f"{split}: line {request.index + 1}: {request}")
        if sources[request.index].strip():
            requests.append(request)
    texts = [sources[request.index] for request in requests]
    results = write(model, prompts, requests, texts, decoding, device)
    outputs = [""] * len(sources)
    cut, acted = 0, Counter[str]()
    for request, written in zip(requests, results, strict=True):
        outputs[request.index] = written[0].text
        cut += not written[0].hypothesis.finished
        acted.update(written[0].hypothesis.acted)
    notes = [f"{cut} of {len(sources)} outputs were cut at the length limit"] if cut else []
    notes += [f"decoding.{key} acted on {count} of {len(sources)} outputs" for key, count in acted.items()]
    return outputs, notes


def output_scores(
    hypotheses: list[str], references: Sequence[str], data: DataConfig, wanted: Sequence[str], notes: list[str]
) -> list[Score]:
    scores, lowercase = [], data.lowercase
    if "bleu" in wanted:
        scores.append(quality.bleu(hypotheses, references, data.target_language, data.bleu_tokenizer, lowercase))
        reason = quality.bleu_tokenizer(data.target_language).reason
        if data.bleu_tokenizer == "auto" and reason:
            notes.append(f"BLEU is counted over {reason}")
    if "chrf" in wanted:
        scores.append(quality.chrf(hypotheses, references, lowercase))
    if "exact_match" in wanted:
        scores.append(quality.exact_match(hypotheses, references, lowercase))
    return scores


def unknown_note(what: str, tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    """The note on text that the tokenizer does not know, if there is any."""
    tokens, lines = (
        sum(counts) for counts in zip(*((n, n > 0) for n in map(tokenizer.count_unknown, rows)), strict=True)
    )
    if not tokens:
        return []
    return [f"{what}: {tokens:,} token(s) on {lines:,} line(s) stand for text that the tokenizer does not know"]


def likelihood_scores(nats: Array, tokens: Array, sizes: Array, wanted: Sequence[str], unknown: int = 0) -> list[Score]:
    """Loss, perplexity and bits per byte. Where the scored text holds `unknown` tokens the signature says so: what they
    stand for is not scored, and no tokenizer's score can be compared with these."""
    makers: dict[str, Callable[[], Score]] = {
        "loss": lambda: quality.loss(nats, tokens),
        "perplexity": lambda: quality.perplexity(nats, tokens),
        "bits_per_byte": lambda: quality.bits_per_byte(nats, sizes),
    }
    scores = [make() for metric, make in makers.items() if metric in wanted]
    if not unknown:
        return scores
    return [replace(score, signature=f"{score.signature}|unknown:{unknown}") for score in scores]


def check_positions(
    config: RunConfig, contexts: Sequence[Request], targets: Sequence[Sequence[int]], split: str
) -> None:
    """Every text must fit the model's positions."""
    positions = config.model.max_length
    if positions is None:
        return
    for number, (context, target) in enumerate(zip(contexts, targets, strict=True), start=1):
        longest = max(len(context.prompt) + len(target), len(context.source or ()))
        if longest > positions:
            raise LengthError(f"{split}: line {number}: {longest} tokens, more than model.max_length = {positions}")
