"""Imported models give the logits and the greedy tokens of transformers: whole, padded, in chunks and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CASES, edit_weights, make, padded, rows
from torch import Tensor

from trilemma.decode import Request, decode
from trilemma.errors import CheckpointError
from trilemma.interop import import_model
from trilemma.runs.load import LoadedRun, load_run

TOLERANCE = 2e-5  # of the largest logit
LENGTHS = [9, 1, 5]
GENERATING = [name for name, case in CASES.items() if case.kind in ("decoder", "seq2seq")]


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, LoadedRun]:
    """A case's name, transformers' model, and ours."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make(CASES[request.param], folder / "hf")
    return request.param, theirs, load_run(import_model(folder / "hf", folder / "run").path)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * max(1.0, float(theirs.abs().max())))


@torch.no_grad()
def theirs_alone(name: str, model: Any, row: list[int], source: list[int] | None) -> Tensor:
    """[L, V] of one row without padding; of a classifier [labels], of a bare encoder what it computes [L, d_model]."""
    inputs = torch.tensor([row])
    if CASES[name].kind == "encoder":
        return model(input_ids=inputs).last_hidden_state[0]
    if CASES[name].cls.endswith("ForPreTraining"):
        return model(input_ids=inputs).prediction_logits[0]
    if CASES[name].kind == "bare-seq2seq":
        return model(input_ids=torch.tensor([source]), decoder_input_ids=inputs).last_hidden_state[0]
    if source is None:
        return model(input_ids=inputs).logits[0]
    return model(input_ids=torch.tensor([source]), decoder_input_ids=inputs).logits[0]


def drawn(name: str) -> tuple[list[list[int]], list[list[int]] | None]:
    """Rows, and sources for encoder-decoders."""
    return rows(1, LENGTHS), rows(2, [4, 7, 1]) if "seq2seq" in CASES[name].kind else None


def memory(sources: list[list[int]] | None) -> dict[str, Tensor]:
    if sources is None:
        return {}
    source, lengths = padded(sources)
    return {"source": source, "source_lengths": lengths}


@torch.no_grad()
def test_whole_and_padded(pair: tuple[str, Any, LoadedRun]) -> None:
    name, theirs, run = pair
    lines, sources = drawn(name)
    inputs, lengths = padded(lines)
    hidden = run.model(inputs, lengths, **memory(sources))
    for i, line in enumerate(lines):
        want = theirs_alone(name, theirs, line, sources[i] if sources else None)
        ours = hidden[i] if hidden.ndim == 2 else hidden[i, : len(line)]
        close(ours if CASES[name].kind in ("encoder", "bare-seq2seq") else run.model.head(ours), want)


@pytest.mark.parametrize("pair", GENERATING, indirect=True, scope="module")
@torch.no_grad()
def test_in_chunks_and_steps(pair: tuple[str, Any, LoadedRun]) -> None:
    name, theirs, run = pair
    lines, sources = drawn(name)
    inputs, lengths = padded(lines)
    state = run.model.begin(len(lines), **memory(sources))
    parts, position = [], 0
    for size in (1, 3, 4, 1):  # rows end within and before chunks
        chunk = inputs[:, position : position + size]
        logits, state = run.model.step(chunk, state, (lengths - position).clamp(0, size))
        parts.append(logits)
        position += size
    got = torch.cat(parts, 1)
    for i, line in enumerate(lines):
        close(got[i, : len(line)], theirs_alone(name, theirs, line, sources[i] if sources else None))


@pytest.mark.parametrize("pair", GENERATING, indirect=True, scope="module")
@torch.no_grad()
def test_same_greedy_tokens(pair: tuple[str, Any, LoadedRun]) -> None:
    name, theirs, run = pair
    lines = rows(3, [6, 2, 1])
    limit, tokenizer = 15, run.tokenizer
    if CASES[name].kind == "seq2seq":
        requests = [Request([tokenizer.bos], limit, source=line, index=i) for i, line in enumerate(lines)]
    else:
        requests = [Request(line, limit, index=i) for i, line in enumerate(lines)]
    settings = run.config.decoding.model_copy(update={"method": "greedy"})
    outputs = decode(run.model, requests, settings, eos=tokenizer.eos, pad=tokenizer.pad)
    for line, found in zip(lines, outputs, strict=True):
        inputs = torch.tensor([line])
        wanted = theirs.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, num_beams=1, max_new_tokens=limit
        )[0].tolist()
        wanted = wanted[1:] if CASES[name].kind == "seq2seq" else wanted[len(line) :]
        end = [tokenizer.eos] if found[0].finished else []
        assert found[0].tokens + end == wanted


@pytest.mark.parametrize("name", ["qwen3-yarn", "qwen3-next", "kimi-linear"])
@torch.no_grad()
def test_longer_than_a_chunk(name: str, tmp_path: Path) -> None:
    """Recurrences go on over chunks of 64, and scaled rotations far beyond the first length."""
    theirs = make(CASES[name], tmp_path / "hf", max_position_embeddings=256)
    model = load_run(import_model(tmp_path / "hf", tmp_path / "run").path).model
    line = torch.tensor(rows(5, [150]))
    want = theirs(input_ids=line).logits
    close(model.head(model(line)), want)
    _, state = model.step(line[:, :97], model.begin(1))
    close(model.step(line[:, 97:], state)[0], want[:, 97:])


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_accounted_for(name: str, tmp_path: Path) -> None:
    make(CASES[name], tmp_path / "hf")

    def attempt(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            import_model(tmp_path / "hf", tmp_path / "run")
        assert not (tmp_path / "run").exists()

    held: dict[str, Tensor] = {}
    edit_weights(tmp_path / "hf", held.update)
    other = ("embed", "shared", "pooler", "lm_head", "visual", "block_sparse_moe")  # tied, left out, or with two names
    inner = [key for key in held if not any(part in key for part in other)]
    victim = max(inner, key=lambda key: held[key].numel())
    edit_weights(tmp_path / "hf", lambda tensors: tensors.pop(victim))
    attempt(f'"{victim}" .* is missing')
    edit_weights(tmp_path / "hf", lambda tensors: tensors.update({victim: held[victim][..., :-1].contiguous()}))
    attempt(f'"{victim}" has shape .* needed')
    extra = {victim: held[victim], "extra.weight": torch.zeros(2)}
    edit_weights(tmp_path / "hf", lambda tensors: tensors.update(extra))
    attempt(r'"extra.weight" \[2\] is left over')
