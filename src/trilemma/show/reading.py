"""From a text to what a model reads, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.data import Tokenizer
from trilemma.decode import Prompts, TooLong, decode
from trilemma.errors import ConfigError, LengthError
from trilemma.predictor import Predictor

MOST_TOKENS = 256  # more than that nobody can tell apart in a picture


@dataclass(frozen=True)
class Reading:
    """Tokens of one call of a model.

    Attributes:
        inputs: ids that the decoder, or the only stack, reads.
        source: ids that the encoder reads, or None.
        prefix: leading inputs that see each other, or None.
        labels, source_labels: the tokens as text.
        target: the text that follows the given one, or None.
    """

    inputs: list[int]
    source: list[int] | None
    prefix: int | None
    labels: list[str]
    source_labels: list[str]
    target: str | None

    def tensors(self, device: torch.device | str) -> dict[str, Tensor]:
        """The arguments of the model's `forward`, for one row."""
        given = {"inputs": torch.tensor([self.inputs], device=device)}
        if self.source is not None:
            given["source"] = torch.tensor([self.source], device=device)
        if self.prefix is not None:
            given["prefix"] = torch.tensor([self.prefix], device=device)
        return given


def read(predictor: Predictor, text: str, target: str | None = None) -> Reading:
    """What a run's model reads of a text.

    Args:
        text: the source, for a run that turns a source into a target.
        target: what stands on the other side; None: what the model itself writes, greedily.

    Raises:
        ConfigError: no text, or a target for a run that has none.
        LengthError: the text is too long for the model, or for a picture.
    """
    tokenizer, config = predictor.tokenizer, predictor.config
    if config.data.lowercase:
        text, target = text.lower(), None if target is None else target.lower()
    ids = tokenizer.encode(text)
    if not ids:
        raise ConfigError("there is no text to show")
    prompts = Prompts(tokenizer, config)
    if config.model.layout == "encoder-only" or prompts.is_language_model:
        if target is not None:
            raise ConfigError(f"--target: a {config.data.task} run has no other side; give one text")
        inputs = [tokenizer.bos, *ids]
        if config.model.layout == "encoder-only":
            inputs.append(tokenizer.eos)
        longest = config.model.max_length
        if longest is not None and len(inputs) > longest:
            raise LengthError(f"{len(inputs)} tokens, more than model.max_length = {longest}")
        return _reading(tokenizer, inputs, None, None, None)
    request = prompts.requests([text], predictor.decoding(method="greedy", n_best=1, mbr=None))[0]
    if isinstance(request, TooLong):
        raise LengthError(f"the text has {request}")
    if target is None:
        settings = predictor.decoding(method="greedy", n_best=1, mbr=None)
        model, device = predictor.model, predictor.device
        eos, pad, unk = tokenizer.eos, tokenizer.pad, tokenizer.unk
        (best,) = decode(model, [request], settings, eos=eos, pad=pad, unk=unk, device=device)[0]
        written, target = best.tokens, prompts.text(best)
    else:
        written = tokenizer.of_targets().encode(target)
    inputs = [*request.prompt, *written]
    longest = config.model.max_length
    if longest is not None and len(inputs) > longest:
        raise LengthError(f"--target: {len(inputs)} tokens, more than model.max_length = {longest}")
    return _reading(tokenizer, inputs, request.source, request.prefix, target)


def _reading(
    tokenizer: Tokenizer, inputs: list[int], source: list[int] | None, prefix: int | None, target: str | None
) -> Reading:
    most = max(len(inputs), len(source or ()))
    if most > MOST_TOKENS:
        raise LengthError(f"{most} tokens: maps are drawn of {MOST_TOKENS} at most; show a shorter text")
    labels = [_label(tokenizer, token) for token in inputs]
    return Reading(inputs, source, prefix, labels, [_label(tokenizer, token) for token in source or ()], target)


def _label(tokenizer: Tokenizer, token: int) -> str:
    """A token as it is written on an axis: spaces and control characters are seen, special tokens have their names."""
    for name in ("pad", "bos", "eos", "unk", "sep", "mask"):
        if token == getattr(tokenizer, name):
            return f"<{name}>"
    text = tokenizer.decode([token]).replace(" ", "\N{OPEN BOX}")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown if shown.strip("\N{REPLACEMENT CHARACTER}") else f"#{token}"  # a part of a character
