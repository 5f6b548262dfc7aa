"""From requests to texts: decoding, then what is done to texts rather than tokens (risk, unknown words, alignments)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trilemma.config import DecodingConfig
from trilemma.decode.alignment import Link, source_attention, token_links, word_links, words_of_pieces, words_of_spans
from trilemma.decode.ensemble import AnyModel
from trilemma.decode.hypothesis import Hypothesis, Request, StepModel
from trilemma.decode.prompts import Prompts, one_line
from trilemma.decode.risk import expected_chrf
from trilemma.decode.search import decode
from trilemma.errors import CapabilityError


@dataclass(frozen=True)
class Written:
    """One output.

    Attributes:
        text: one line.
        hypothesis: its tokens; with minimum Bayes risk `score` is the expected chrF.
        links: its alignment, or None where none was asked for.
    """

    text: str
    hypothesis: Hypothesis
    links: list[Link] | None = None


@dataclass(frozen=True)
class Output:
    """One generated text.

    Attributes:
        text: one line.
        score: what outputs are ranked by: log-probability over the length penalty, plus the coverage penalty; with
            minimum Bayes risk the expected chrF.
        log_probability: natural, under the model. tokens: new tokens, end-of-sequence counted if it was produced.
        finished: end-of-sequence was produced; False: cut at the length limit.
        acted: keys of the rules that forbade or replaced something on the way: no_repeat_ngram, unknown, phrases.
        alignment: (source, output) numbers of words or tokens, from 0; None: not asked for.
    """

    text: str
    score: float
    log_probability: float
    tokens: int
    finished: bool
    acted: tuple[str, ...] = ()
    alignment: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class Generated:
    """What became of one input line.

    Attributes:
        index: the line's number, from 0.
        outputs: best first, at least one; a single empty text for an empty line or a skipped one.
        skipped: why the line was not read, or None. unknown: how many of its tokens the tokenizer did not know.
    """

    index: int
    outputs: list[Output]
    skipped: str | None = None
    unknown: int = 0

    @property
    def text(self) -> str:
        """The best output."""
        return self.outputs[0].text


def write(
    model: AnyModel,
    prompts: Prompts,
    requests: Sequence[Request],
    sources: Sequence[str],
    config: DecodingConfig,
    device: torch.device | str | None = None,
) -> list[list[Written]]:
    """Decodes requests to texts; result i belongs to request i, best first.

    Args:
        sources: the text of each request, in the case that the model reads.

    Raises:
        ConfigError: settings that exclude each other. CapabilityError: alignments of a run that has none.
    """
    if prompts.is_language_model and (config.alignments is not None or config.unknown == "replace"):
        raise CapabilityError("a language model has no source to align with: decoding.alignments, unknown=replace")
    tokenizer = prompts.tokenizer
    search = config if config.mbr is None else config.model_copy(update={"n_best": config.mbr, "mbr": None})
    steps: StepModel[Any] = model
    found = decode(steps, requests, search, eos=tokenizer.eos, pad=tokenizer.pad, unk=tokenizer.unk, device=device)
    written = [[Written(prompts.text(one), one) for one in outputs] for outputs in found]
    if config.mbr is not None:
        written = [_least_risk(outputs, config) for outputs in written]
    return _aligned(model, prompts, requests, sources, written, config, device)


def _least_risk(outputs: list[Written], config: DecodingConfig) -> list[Written]:
    """The best by expected chrF. Samples weigh the same; outputs of a beam weigh as much as the model believes them."""
    beliefs = np.array([one.hypothesis.log_probability for one in outputs])
    weights = np.ones(len(outputs)) if config.method == "sample" else np.exp(beliefs - beliefs.max())
    values = expected_chrf([one.text for one in outputs], (weights / weights.sum()).tolist())
    order = sorted(range(len(outputs)), key=lambda i: (-values[i], -outputs[i].hypothesis.score))
    ranked = [replace(outputs[i], hypothesis=replace(outputs[i].hypothesis, score=float(values[i]))) for i in order]
    unlike = {one.text: one for one in reversed(ranked)}  # the same text twice is no second choice
    return [one for one in ranked if unlike[one.text] is one][: config.n_best]


def _aligned(
    model: AnyModel,
    prompts: Prompts,
    requests: Sequence[Request],
    sources: Sequence[str],
    written: list[list[Written]],
    config: DecodingConfig,
    device: torch.device | str | None,
) -> list[list[Written]]:
    """With links where they are asked for, and unknown tokens replaced by what they are linked to."""
    tokenizer = prompts.tokenizer
    places = [
        (row, number)
        for row, outputs in enumerate(written)
        for number, one in enumerate(outputs)
        if config.alignments is not None or (config.unknown == "replace" and tokenizer.unk in one.hypothesis.tokens)
    ]
    maps = source_attention(
        model,
        [requests[row] for row, _ in places],
        [written[row][number].hypothesis.tokens for row, number in places],
        pad=tokenizer.pad,
        layer=config.alignment_layer,
        head=config.alignment_head,
        device=device,
        batch_tokens=config.batch_tokens,
    )
    for (row, number), weights in zip(places, maps, strict=True):
        one, source = written[row][number], sources[row]
        tokens, (_, spans) = one.hypothesis.tokens, tokenizer.encode_with_offsets(source)
        links = token_links(weights)
        if config.unknown == "replace":
            names = {to: source[slice(*spans[at])].strip() for at, to in links if tokens[to] == tokenizer.unk}
            one = _replaced(one, prompts, names) if names else one
        if config.alignments == "words":
            prefixes = [tokenizer.decode(tokens[: end + 1]) for end in range(len(tokens))]
            links = word_links(weights, words_of_spans(source, spans), words_of_pieces(prefixes))
        written[row][number] = replace(one, links=links if config.alignments is not None else None)
    return written


def _replaced(one: Written, prompts: Prompts, names: dict[int, str]) -> Written:
    """With other words in the place of some unknown tokens, which `names` gives by position."""
    tokenizer, tokens = prompts.tokenizer, one.hypothesis.tokens
    shown = tokenizer.decode([tokenizer.unk])  # SentencePiece's has spaces of its own, which are no one's
    text, read = "", 0
    for position, name in sorted(names.items()):
        before, after = (tokenizer.decode(tokens[:end]) for end in (position, position + 1))
        text += before[read:] + after[len(before) :].replace(shown, name, 1)
        read = len(after)
    acted = (*one.hypothesis.acted, "unknown")
    line = one_line(text + tokenizer.decode(tokens)[read:])
    return replace(one, text=line, hypothesis=replace(one.hypothesis, acted=acted))


def nothing(settings: DecodingConfig, finished: bool) -> Output:
    """The empty output of an empty line, or of one that was skipped."""
    return Output("", 0.0, 0.0, 0, finished, alignment=None if settings.alignments is None else [])


def output_of(written: Written) -> Output:
    """What users are given of an output."""
    one = written.hypothesis
    return Output(written.text, one.score, one.log_probability, one.length, one.finished, one.acted, written.links)
