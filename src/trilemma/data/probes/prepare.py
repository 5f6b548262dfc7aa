"""From the sources of a probe to a dataset: rows are drawn once and kept in the token cache, like text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trilemma.config import RunConfig, Source
from trilemma.data.batch import IGNORE
from trilemma.data.cache import Progress, StoreBuilder, TokenStore, hash_values_of, open_or_build
from trilemma.data.dataset import Dataset
from trilemma.data.generated import DEFAULT_SIZES
from trilemma.data.probes import Probe, probe_of
from trilemma.data.probes.base import UNSCORED
from trilemma.data.readers import FIELDS
from trilemma.data.tokenizer import SPECIALS, Tokenizer, symbol_tokenizer
from trilemma.errors import ConfigError

_PROBES_VERSION = 1  # of the rows: a change of a generator makes the cache draw again


def prepare_probe(
    config: RunConfig, sources: dict[str, list[Source]], tokenizer: Tokenizer | None, root: Path
) -> tuple[Dataset, Tokenizer]:
    """The dataset of a probe, and the tokenizer that names its symbols.

    Args:
        config: of the run. sources: of each split. tokenizer: the run's, where it has one. root: of the cache.

    Raises:
        ConfigError: another tokenizer is asked for, the sources do not share one vocabulary, or options do not fit.
    """
    probes = probes_of(config, sources)
    own = symbol_tokenizer(probes["train"][0].symbols())
    if tokenizer is not None and tokenizer.fingerprint != own.fingerprint:
        raise ConfigError(
            f"data.train: the probe has another vocabulary ({own.vocab_size} symbols, special ones counted) than the "
            f"run's tokenizer ({tokenizer.vocab_size})"
        )
    tokenizer = own
    stores = {
        split: [
            _store(probe, split, source.size or DEFAULT_SIZES[split], root)
            for probe, source in zip(probes[split], found, strict=True)
        ]
        for split, found in sources.items()
    }
    weights = [source.weight for source in sources["train"]]
    return Dataset(config, tokenizer, stores, weights), tokenizer


def probes_of(config: RunConfig, sources: dict[str, list[Source]]) -> dict[str, list[Probe]]:
    """The probes of each split's sources; all share the vocabulary of the first one of train.

    Raises:
        ConfigError: as `prepare_probe`.
    """
    if config.tokenizer.kind != "task":
        raise ConfigError(f"tokenizer.kind is {config.tokenizer.kind}: a probe has its own vocabulary, set kind: task")
    probes = {split: [probe_of(source) for source in found] for split, found in sources.items()}
    symbols = probes["train"][0].symbols()
    for split, found in probes.items():
        for probe in found:
            if probe.symbols() != symbols:
                raise ConfigError(f"data.{split}: another vocabulary than the first source of data.train has")
    return probes


def _store(probe: Probe, split: str, size: int, root: Path) -> TokenStore:
    """The rows of one source, from the cache or drawn now; ids come after the special ones. Evaluation rows keep their
    symbols as text."""
    keep_text = split != "train"
    key = hash_values_of("probe", _PROBES_VERSION, probe.name, probe.model_dump(mode="json"), split, size)
    folder = root / "tokens"

    def build() -> TokenStore:
        progress = Progress(f"drawing {probe.name}, {split}")
        symbols = probe.symbols()
        with StoreBuilder(folder, key, FIELDS["probe"], keep_text) as builder:
            for example in probe.examples(split, size):
                rows = {"tokens": example.tokens, "labels": example.labels}
                for field, row in rows.items():
                    ids = np.where(row == IGNORE, IGNORE, row + len(SPECIALS)).tolist()
                    shown = (UNSCORED if token == IGNORE else symbols[token] for token in row.tolist())
                    builder.append(field, ids, " ".join(shown) if keep_text else "")
                builder.finish_example()
                progress.add(1)
            return builder.publish({"name": f"probe {probe.name}"})

    return open_or_build(folder, key, build)
