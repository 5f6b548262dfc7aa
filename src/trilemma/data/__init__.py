"""Data: readers, generated tasks, probes, tokenizers, the token cache and batches by number."""

from trilemma.data.batch import (
    IGNORE,
    Batch,
    classification_batch,
    concatenated_batch,
    encoder_decoder_batch,
)
from trilemma.data.dataset import Dataset
from trilemma.data.generated import generate, generated_names
from trilemma.data.prepare import prepare
from trilemma.data.probes import build_probe, probe_names, probe_of
from trilemma.data.probes.base import UNSCORED
from trilemma.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "IGNORE",
    "UNSCORED",
    "Batch",
    "Dataset",
    "Tokenizer",
    "build_probe",
    "classification_batch",
    "concatenated_batch",
    "encoder_decoder_batch",
    "generate",
    "generated_names",
    "prepare",
    "probe_names",
    "probe_of",
    "train_tokenizer",
]
