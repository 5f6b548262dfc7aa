"""An imported encoder gives the vectors that transformers gives, and is gone on with: a classifier, a span head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import CASES, make

import trilemma
from trilemma.interop import import_model
from trilemma.runs.tensors import model_tensors
from trilemma.train import train

LINES = ["w4 w9 w5 w5 w30", "", "w7", "w40 w41 w42"]
TRAINING = {"steps": 1, "learning_rate": 1e-12, "batch_tokens": 256, "precision": "float32", "device": "cpu"}

Pair = tuple[Any, Path]


@pytest.fixture
def imported(tmp_path: Path) -> Callable[[str], Pair]:
    def of(name: str) -> Pair:
        theirs = make(CASES[name], tmp_path / "hf")
        return theirs, import_model(tmp_path / "hf", tmp_path / "run").path

    return of


@pytest.mark.parametrize("name", ["bert-bare", "bert-masked", "roberta-masked"])
def test_vectors_are_those_of_transformers(imported: Callable[[str], Pair], name: str) -> None:
    theirs, path = imported(name)
    body = theirs if name == "bert-bare" else theirs.base_model
    reader = trilemma.load(path)
    tokenizer = reader.tokenizer
    rows = [[tokenizer.bos, *ids, tokenizer.eos] for ids in tokenizer.encode_batch(LINES)]
    longest = max(map(len, rows))
    pad = theirs.config.pad_token_id
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    # RoBERTa numbers positions by which ids are its padding's, which here the tokenizer gives to another
    places = torch.arange(longest)[None] + (pad + 1 if "roberta" in name else 0)
    with torch.no_grad():
        hidden = body(ids, attention_mask=mask, position_ids=places).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    np.testing.assert_allclose(reader.embed(LINES), mean.numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(reader.embed(LINES, "cls"), hidden[:, 0].numpy(), rtol=0, atol=2e-5)
    unit = torch.nn.functional.normalize(mean)
    np.testing.assert_allclose(reader.embed(LINES, normalise=True), unit.numpy(), rtol=0, atol=2e-5)


def test_it_becomes_a_classifier(imported: Callable[[str], Pair], tmp_path: Path) -> None:
    _, path = imported("bert-masked")
    config = {"data": {"task": "classification"}, "training": TRAINING, "start_from": str(path)}
    examples = [(line, str(number % 2)) for number, line in enumerate(LINES * 3)]
    run = train(config, data={"train": examples, "valid": examples}, out=tmp_path / "labels", quiet=True)
    held, new = model_tensors(trilemma.load(path).model), model_tensors(run.model)
    for name in new.keys() & held.keys() - {"head_transform.dense.weight", "head_transform.dense.bias"}:
        torch.testing.assert_close(new[name], held[name], rtol=0, atol=1e-8)
    assert (
        "new: head_transform.dense.bias, head_transform.dense.weight, output.bias, output.weight"
        in (run.config.notes["start_from"])
    )
    assert sum(trilemma.load(run.directory.path).classify(LINES)[0].probabilities.values()) == pytest.approx(1)


def test_it_answers_questions(imported: Callable[[str], Pair], tmp_path: Path) -> None:
    """The span head is a plain layer, and the two token types are question and passage."""
    _, path = imported("bert-masked")
    passage = "w8 w9 w10 w11 w12"
    qas = [{"question": "w4 w5", "answers": [{"text": "w10 w11", "answer_start": passage.index("w10")}]}]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": passage, "qas": qas}]}]}))
    config = {
        "data": {
            "task": "question-answering", "train": {"path": str(file)}, "context_length": 30, "window_overlap": 5,
        },
        "model": {"layout": "encoder-only", "pooling": "none"},
        "training": {**TRAINING, "steps": 60, "learning_rate": 0.01, "warmup_steps": 5},
        "start_from": str(path),
    }  # fmt: skip
    run = train(config, out=tmp_path / "qa", quiet=True)
    assert run.config.model.token_types == 2
    assert not any(name.startswith("head_transform") for name in model_tensors(run.model))
    (found,) = trilemma.load(run.directory.path).answer([("w4 w5", passage)])
    assert found.text == "w10 w11"
