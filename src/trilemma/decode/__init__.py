"""Decoding: greedy, beam search and sampling for every mixer and layout, through `prefill`, `step` and State alone."""

from trilemma.decode.batching import DecodingBatch, collate, plan_batches
from trilemma.decode.beam import decode_beam
from trilemma.decode.ensemble import AnyModel, Average, Ensemble, joined
from trilemma.decode.hypothesis import Hypothesis, Phrase, Request, StepModel, length_penalty, require_numbers
from trilemma.decode.outputs import Generated, Output, Written, nothing, output_of, write
from trilemma.decode.prompts import Line, Prompts, TooLong
from trilemma.decode.search import BatchingReport, Disagreement, check_decoding, compare_with_single, decode
from trilemma.decode.single import decode_single

__all__ = [
    "AnyModel",
    "Average",
    "BatchingReport",
    "DecodingBatch",
    "Disagreement",
    "Ensemble",
    "Generated",
    "Hypothesis",
    "Line",
    "Output",
    "Phrase",
    "Prompts",
    "Request",
    "StepModel",
    "TooLong",
    "Written",
    "check_decoding",
    "collate",
    "compare_with_single",
    "decode",
    "decode_beam",
    "decode_single",
    "joined",
    "length_penalty",
    "nothing",
    "output_of",
    "plan_batches",
    "require_numbers",
    "write",
]
