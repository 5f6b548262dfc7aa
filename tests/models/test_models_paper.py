""" "Attention Is All You Need", number by number: weights (section 3, Table 3) and encodings (section 3.5)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trilemma.models import SequenceModel, build_model
from trilemma.nn.positions import sinusoid

BASE: dict[str, Any] = {
    "layout": "encoder-decoder",
    "vocab_size": 37_000,
    "d_model": 512,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "norm_position": "post",
    "activation": "relu",
    "positions": "sinusoidal",
    "dropout": 0.1,
}
BIG = {**BASE, "d_model": 1024, "d_ff": 4096, "num_heads": 16, "dropout": 0.3}


def heads(num: int, head_dim: int) -> dict[str, Any]:
    """h heads of d_k = d_v, as the rows of Table 3 vary them."""
    return {
        "num_heads": num,
        "mixer": {"name": "attention", "head_dim": head_dim},
        "cross_mixer": {"name": "cross_attention", "head_dim": head_dim},
    }


# Table 3: the change, and its weight matrices in millions at a shared vocabulary of 37,000.
TABLE_3: dict[str, tuple[dict[str, Any], float]] = {
    "base": ({}, 63.0),
    "A h=1": (heads(1, 512), 63.0),
    "A h=4": (heads(4, 128), 63.0),
    "A h=16": (heads(16, 32), 63.0),
    "A h=32": (heads(32, 16), 63.0),
    "B d_k=16": ({}, 55.9),
    "B d_k=32": ({}, 58.3),
    "C N=2": ({"num_layers": 2}, 33.6),
    "C N=4": ({"num_layers": 4}, 48.3),
    "C N=8": ({"num_layers": 8}, 77.7),
    "C d=256": ({"d_model": 256, **heads(8, 32)}, 26.8),
    "C d=1024": ({"d_model": 1024, **heads(8, 128)}, 163.7),
    "C d_ff=1024": ({"d_ff": 1024}, 50.4),
    "C d_ff=4096": ({"d_ff": 4096}, 88.2),
    "big": ({"d_model": 1024, "d_ff": 4096, "num_heads": 16}, 214.0),
}


def build_on_meta(config: dict[str, Any]) -> SequenceModel:
    """The model's shapes without its memory."""
    with torch.device("meta"):
        return build_model(config)


def matrices(model: SequenceModel) -> int:
    """Weights in matrices: the paper's count has neither biases nor norms in it that matter."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim >= 2)


def test_base_has_62_984_192_weights_in_matrices() -> None:
    model = build_on_meta(BASE)
    assert matrices(model) == 62_984_192
    # Vectors: LayerNorms (2 an encoder layer, 3 a decoder layer, 1,024 weights each) and the projections' biases.
    vectors = 6 * (2 + 3) * 1024 + 6 * (4 + 8) * 512 + 12 * (2048 + 512)
    assert model.parameter_counts() == {
        "total": 62_984_192 + vectors,
        "embedding": 37_000 * 512,
        "non_embedding": 62_984_192 + vectors - 37_000 * 512,
    }


def test_big_has_214_048_768_weights_in_matrices() -> None:
    assert matrices(build_on_meta(BIG)) == 214_048_768  # 214.05 M


@pytest.mark.parametrize("row", [name for name in TABLE_3 if not name.startswith("B")])
def test_table_3_weights(row: str) -> None:
    changes, millions = TABLE_3[row]
    assert round(matrices(build_on_meta(BASE | changes)) / 1e6, 1) == pytest.approx(millions, abs=0.051)


@pytest.mark.parametrize(("head_dim", "millions"), [(16, 55.9), (32, 58.3)])
def test_table_3_rows_b_shrink_the_keys_alone(head_dim: int, millions: float) -> None:
    """Rows B reduce d_k and leave d_v at 64. Our heads have one width for both, so the row's count is rebuilt: the
    model with both reduced, plus the values' and outputs' share that the paper keeps."""
    model = build_on_meta(BASE | heads(8, head_dim))
    kept = 18 * 2 * 512 * 8 * (64 - head_dim)  # 18 attentions, W_V and W_O
    assert round((matrices(model) + kept) / 1e6, 1) == millions


def test_counts_can_differ() -> None:
    """The planted defect: an untied output projection is seen."""
    assert matrices(build_on_meta({**BASE, "tie_embeddings": False})) == 62_984_192 + 37_000 * 512


def test_learned_positions_count_as_embedding() -> None:
    """Row E: learned positions."""
    plain, learned = build_on_meta(BASE), build_on_meta({**BASE, "positions": "learned", "max_length": 1024})
    assert learned.parameter_counts()["non_embedding"] == plain.parameter_counts()["non_embedding"]
    assert learned.parameter_counts()["embedding"] == (37_000 + 1024) * 512


def test_sinusoid_as_in_the_paper() -> None:
    """PE(p, 2i) = sin(p / 10000^(2i/d)), PE(p, 2i+1) = cos of the same: d = 4 gives the divisors 1 and 100."""
    table = sinusoid(torch.arange(4), 4, "paper", torch.float64)
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(4)]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)
    known = [0.8414709848, 0.5403023059, 0.0099998333, 0.9999500004]  # sin 1, cos 1, sin 0.01, cos 0.01
    assert [round(float(value), 10) for value in table[1]] == known


def test_sinusoid_as_in_tensor2tensor() -> None:
    """Sines first, then cosines; the exponent runs to 1 inclusive: d = 6 gives the divisors 1, 100 and 10,000."""
    table = sinusoid(torch.tensor([0, 3]), 6, "tensor2tensor", torch.float64)
    angles = [3.0, 0.03, 0.0003]
    expected = [[0.0] * 3 + [1.0] * 3, [math.sin(a) for a in angles] + [math.cos(a) for a in angles]]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("positions", "layout"), [("sinusoidal", "paper"), ("sinusoidal-t2t", "tensor2tensor")])
def test_embedding_is_scaled_by_the_root_of_the_width_before_positions_are_added(positions: str, layout: str) -> None:
    model = build_model({**BASE, "vocab_size": 11, "d_model": 16, "d_ff": 8, "num_layers": 1, "positions": positions})
    tokens = torch.tensor([[3, 5, 3]])
    embedded, _ = model.eval().embedding(tokens)
    expected = model.embedding.tokens.weight[tokens] * 4.0 + sinusoid(torch.arange(3), 16, layout)
    torch.testing.assert_close(embedded, expected)


def test_one_matrix_serves_both_embeddings_and_the_output() -> None:
    model = build_model({**BASE, "vocab_size": 11, "d_model": 16, "d_ff": 8, "num_layers": 1})
    tables = [p for p in model.parameters() if p.shape[0] == 11]
    assert len(tables) == 1
    hidden = torch.randn(2, 16)
    torch.testing.assert_close(model.head(hidden), hidden @ tables[0].T)
