"""Data: readers, generated tasks, tokenizers, the token cache and batches by number."""

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
from trilemma.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "Dataset",
    "Tokenizer",
    "classification_batch",
    "concatenated_batch",
    "encoder_decoder_batch",
    "generate",
    "generated_names",
    "prepare",
    "train_tokenizer",
]
