"""Reading another library's config.json: every key is understood, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from trilemma.errors import CheckpointError, ConfigError
from trilemma.runs import files

T = TypeVar("T")

# Keys that say nothing about what the model computes.
_METADATA = """
    architectures model_type transformers_version torch_dtype dtype use_cache output_hidden_states output_attentions
    return_dict _name_or_path id2label label2id problem_type initializer_range initializer_factor init_std
    task_specific_params gradient_checkpointing pretraining_tp chunk_size_feed_forward is_encoder_decoder
    finetuning_task _num_labels num_labels tokenizer_class output_past torchscript use_bfloat16 summary_type
    summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
"""
# Where dropout is applied that our layers have not; the families' main rate is model.dropout.
_DROPOUT = """
    attn_pdrop embd_pdrop attention_dropout attention_probs_dropout_prob activation_dropout encoder_layerdrop
    decoder_layerdrop classifier_dropout classif_dropout
"""
# Ids are read with the tokenizer, settings of `generate` in generation.py.
_IDS = """
    bos_token_id eos_token_id pad_token_id decoder_start_token_id sep_token_id cls_token_id mask_token_id unk_token_id
"""
_GENERATION = """
    num_beams length_penalty early_stopping max_length max_new_tokens min_length no_repeat_ngram_size bad_words_ids
    prefix forced_bos_token_id forced_eos_token_id num_return_sequences do_sample temperature top_k top_p
    repetition_penalty encoder_no_repeat_ngram_size diversity_penalty num_beam_groups remove_invalid_values
    suppress_tokens begin_suppress_tokens typical_p return_dict_in_generate output_scores
    exponential_decay_length_penalty
"""
IDS, GENERATION = frozenset(_IDS.split()), frozenset(_GENERATION.split())
_LARGEST = 1 << 30  # bytes of a JSON file


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file.

    Raises:
        CheckpointError: not a JSON object.
    """
    if files.file_size(path) is None:
        return {}
    try:
        values = json.loads(files.read_file(path, _LARGEST))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: a JSON object is needed")
    return values


class Keys:
    """A config.json whose keys are crossed off as they are read.

    Args:
        values: its content. where: the file, for messages. ignored: keys that the user declares to be harmless.
        inner: of an object within it, whose keys `--ignore` does not reach.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str, ignored: Collection[str] = (), inner: bool = False
    ) -> None:
        self.values, self.where, self._inner = values, where, inner
        self._seen = {*_METADATA.split(), *_DROPOUT.split(), *IDS, *GENERATION, *ignored}

    def take(self, name: str, default: T) -> T:
        """The value, of the type of `default` (an integer also serves as a number); absent or null: the default."""
        found = self.maybe(name, type(default))
        return default if found is None else found

    def size(self, name: str, default: int) -> int:
        """The integer, 1 or more; absent or null: the default."""
        found = self.take(name, default)
        if found < 1:
            raise ConfigError(f"{self.where}: {name}: 1 or more is needed, found {found}")
        return found

    def need(self, name: str, kind: type[T]) -> T:
        """The value of a key that must be there."""
        found = self.maybe(name, kind)
        if found is None:
            raise ConfigError(f'{self.where}: the key "{name}" is missing')
        return found

    def maybe(self, name: str, kind: type[T]) -> T | None:
        """The value, or None where it is absent or null."""
        self._seen.add(name)
        value = self.values.get(name)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.where}: {name}: {kind.__name__} is needed, found {value!r}")
        return value

    def only(self, name: str, *allowed: object) -> None:
        """Refuses any value but `allowed`; an absent key counts as the first of them."""
        self._seen.add(name)
        value = self.values.get(name, allowed[0])
        if value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise ConfigError(f"{self.where}: {name} is {value!r}; only {wanted} can be honoured")

    def choose(self, name: str, choices: Mapping[str, T], default: str) -> T:
        """What a named choice means here.

        Raises:
            ConfigError: a choice that cannot be honoured.
        """
        value = self.take(name, default)
        if value not in choices:
            raise ConfigError(f'{self.where}: {name} is "{value}"; only {", ".join(choices)} can be honoured')
        return choices[value]

    def skip(self, *names: str) -> None:
        """Crosses off keys that change nothing in this family."""
        self._seen.update(names)

    def within(self, name: str) -> Keys:
        """The object under a key, empty where it is absent."""
        return Keys(self.take(name, {}), f"{self.where}: {name}", inner=True)

    def finish(self) -> None:
        """Refuses a key that nobody has read: what it changes is unknown."""
        for name, value in self.values.items():
            if name not in self._seen:
                mend = "remove it from the file" if self._inner else f"import with --ignore {name}"
                raise ConfigError(
                    f'{self.where}: the key "{name}" ({value!r}) is not known for this family of models, so what it '
                    f"changes cannot be honoured; if it changes nothing, {mend}"
                )

    def untaken(self) -> list[str]:
        """A note on the dropout that is not taken over, if there is any."""
        left = [name for name in _DROPOUT.split() if self.values.get(name)]
        return [f"dropout not taken over: {', '.join(left)}; model.dropout is the only one"] if left else []

    def labels(self) -> list[str]:
        """Class names in the order of their ids."""
        found = self.values.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        if not isinstance(found, Mapping) or sorted(map(str, found)) != sorted(map(str, range(len(found)))):
            raise ConfigError(f"{self.where}: id2label: names for the ids 0, 1, ... are needed, found {found!r}")
        return [str(found[key]) for key in sorted(found, key=int)]

    @property
    def architecture(self) -> str:
        """The first of `architectures`, or ""."""
        found = self.values.get("architectures")
        return str(found[0]) if isinstance(found, list) and found else ""
