"""What a checkpoint says about generation, in our terms; the rest is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trilemma.config import DecodingConfig, parse
from trilemma.errors import ConfigError
from trilemma.interop.families.base import Task
from trilemma.interop.keys import GENERATION, IDS

# Ours and theirs of what means the same.
_SAME = {"num_beams": "beam_size", "no_repeat_ngram_size": "no_repeat_ngram", "temperature": "temperature"}
_SAME |= {"top_k": "top_k", "top_p": "top_p", "max_new_tokens": "max_length"}
_TOP_K = 50  # what sampling keeps there, unless told otherwise
# What no setting at all comes to, where it is not nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "temperature": (1.0,),
    "top_p": (1.0,),
    "top_k": (_TOP_K,),
    "length_penalty": (1.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "typical_p": (1.0,),
    "max_length": (20,),
    "early_stopping": (True,),
    "use_cache": (True,),
    "_from_model_config": (True,),
}
_NOTHING: tuple[object, ...] = (None, False, 0, "", [], {})


def decoding_of(
    config: Mapping[str, Any], generation: Mapping[str, Any], task: Task, vocab_size: int, where: str
) -> tuple[DecodingConfig, list[str]]:
    """The run's decoding section, and a note on the settings that were not taken over.

    Args:
        config, generation: config.json, whose older files hold such settings too, and generation_config.json.
        task: language models are greedy unless told otherwise; other tasks keep our beam.
        vocab_size: the model's. where: the directory, for messages.

    Raises:
        ConfigError: a value that cannot be used.
    """
    settings = {name: value for name, value in config.items() if name in GENERATION} | dict(generation)
    found = {
        name: value
        for name, value in settings.items()
        if value not in (*_NOTHING, *_NEUTRAL.get(name, ())) and name not in IDS and name != "transformers_version"
    }
    greedy = task == "language-model" or settings.get("num_beams") == 1
    ours: dict[str, Any] = {"method": "greedy" if greedy else "beam"}
    if found.pop("do_sample", False):
        ours["method"] = "sample"
        if found.get("top_k") is None and settings.get("top_k") != 0:  # 0 is no limit, no setting at all is 50
            ours["top_k"] = _TOP_K
    elif "num_beams" in found:
        ours["method"] = "beam"
    else:  # they say how to sample, where nobody samples
        for name in ("temperature", "top_k", "top_p"):
            found.pop(name, None)
    if settings.get("length_penalty") == 0:  # no penalty, in either formula; others have no counterpart here
        ours["length_penalty"] = 0.0
    ours |= {_SAME[name]: found.pop(name) for name in list(found) if name in _SAME}
    banned, words = found.pop("suppress_tokens", []), found.get("bad_words_ids", [])
    for name, value in (("suppress_tokens", banned), ("bad_words_ids", words)):
        if not isinstance(value, list):
            raise ConfigError(f"{where}: {name}: a list is needed, found {value!r}")
    if all(isinstance(word, list) and len(word) == 1 for word in words):
        banned = [*banned, *(word[0] for word in words)]
        found.pop("bad_words_ids", None)
    for token in banned:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ConfigError(f"{where}: generation forbids the token {token!r}; the vocabulary has {vocab_size}")
    ours["banned"] = sorted(set(banned))
    notes = [f"settings of generation not taken over: {', '.join(sorted(found))}"] if found else []
    return parse(DecodingConfig, ours, where), notes
