"""Imported runs are ordinary runs: they are fine-tuned, get new heads, and go out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import CASES, make, rows

import trilemma
from trilemma.errors import ConfigError
from trilemma.interop import import_model
from trilemma.interop.export_hf import write
from trilemma.interop.target import ExportOptions
from trilemma.runs.load import load_run
from trilemma.runs.tensors import model_tensors

TRAINING = {"steps": 2, "batch_tokens": 64, "learning_rate": 1e-3, "warmup_steps": 0, "precision": "float32"}
LINES = [f"w{4 + i % 50} w{9 + i % 30} w7" for i in range(24)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEMMA_CACHE", str(tmp_path / "cache"))


def tuned(start: Path, out: Path, data: dict[str, Any], examples: list[Any], **model: Any) -> trilemma.Predictor:
    config = {"start_from": str(start), "data": data, "training": TRAINING, "model": model}
    trilemma.train(config, data=examples, out=out, quiet=True)
    return trilemma.load(out)


@pytest.mark.parametrize("name", ["llama", "mamba2", "qwen3-next", "kimi-linear"])
def test_a_language_model_goes_on_with_other_text(name: str, tmp_path: Path) -> None:
    make(CASES[name], tmp_path / "hf")
    start = trilemma.load(import_model(tmp_path / "hf", tmp_path / "start").path)
    done = tuned(tmp_path / "start", tmp_path / "run", {"task": "language-model", "context_length": 16}, LINES)
    before, after = model_tensors(start.model), model_tensors(done.model)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) == len(before)
    assert all(torch.allclose(before[name], after[name], atol=0.02) for name in before)
    assert done.tokenizer.fingerprint == start.tokenizer.fingerprint


def test_a_translator_goes_on_with_other_pairs(tmp_path: Path) -> None:
    make(CASES["marian"], tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "start")
    data = {"task": "seq2seq", "max_source_length": 20, "max_target_length": 20}
    done = tuned(tmp_path / "start", tmp_path / "run", data, [(line, line) for line in LINES])
    assert done.config.model == trilemma.load(tmp_path / "start").config.model
    assert len(done.translate(LINES[:2], max_length=3)) == 2


def test_bert_gets_a_classifier_s_head_and_goes_out_with_it(tmp_path: Path) -> None:
    make(CASES["bert-masked"], tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "start")
    examples = [(line, "glad" if i % 2 else "sad") for i, line in enumerate(LINES)]
    data = {"task": "classification", "max_source_length": 20}
    done = tuned(tmp_path / "start", tmp_path / "run", data, examples, pooling="first")
    (tmp_path / "out").mkdir()
    write(load_run(tmp_path / "run"), tmp_path / "out", ExportOptions())
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.id2label == {0: "glad", 1: "sad"}
    ids = torch.tensor(rows(1, [6]))
    with torch.no_grad():
        torch.testing.assert_close(done.model.head(done.model(ids)), theirs(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_another_size_is_refused_with_both_values(tmp_path: Path) -> None:
    make(CASES["llama"], tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "start")
    with pytest.raises(ConfigError, match=r"model.d_model is 64, but .*start has 32"):
        tuned(tmp_path / "start", tmp_path / "run", {"task": "language-model"}, LINES, d_model=64)


@torch.no_grad()
def test_token_types(tmp_path: Path) -> None:
    theirs = make(CASES["bert-masked"], tmp_path / "hf")
    model = trilemma.load(import_model(tmp_path / "hf", tmp_path / "run").path).model
    ids, types = torch.tensor(rows(1, [6])), torch.tensor([[0, 0, 0, 1, 1, 1]])
    wanted = theirs(input_ids=ids, token_type_ids=types).logits
    torch.testing.assert_close(model.head(model(ids, types=types)), wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_distances_beyond_t5_s_last_bucket(tmp_path: Path) -> None:
    theirs = make(CASES["t5"], tmp_path / "hf")
    model = trilemma.load(import_model(tmp_path / "hf", tmp_path / "run").path).model
    source, target = (torch.tensor(rows(seed, [length])) for seed, length in ((1, 200), (2, 170)))
    wanted = theirs(input_ids=source, decoder_input_ids=target).logits
    torch.testing.assert_close(model.head(model(target, source=source)), wanted, rtol=0, atol=1e-4)
