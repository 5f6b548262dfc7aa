"""ctranslate2: the same tokens as ours, by the script of docs/export.md; what it cannot run is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import LIMIT, SYMBOLS, documented, make_run, outputs
from hf_models import CASES as HF_CASES
from hf_models import make

from trilemma.errors import BackendError, CapabilityError, ConfigError, LawError
from trilemma.interop import export_ctranslate2, import_model
from trilemma.interop.target import ExportOptions, new_folder
from trilemma.nn.kernels import codes_pack
from trilemma.runs.load import LoadedRun, load_run

LINES = [" ".join(f"s{(7 * i + j * j + j) % len(SYMBOLS)}" for j in range(1 + i % 8)) for i in range(10)]

ROTARY = {"name": "attention", "position": "rotary"}
LLAMA = {"positions": "none", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
# layout, mixer, and what else the model has; every shape that is taken stands in one of them
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "paper": ("encoder-decoder", "attention", {"norm_position": "post", "tie_embeddings": True}),
    "unlike layers": ("encoder-decoder", "attention", {"encoder_layers": 1, "activation": "gelu"}),
    "t2t, two tables": (
        "encoder-decoder",
        {"name": "attention", "scale": 0.5},
        {
            "positions": "sinusoidal-t2t",
            "activation": "silu",
            "bias": False,
            "embedding_norm": True,
            "share_embeddings": False,
        },
    ),
    "marian": (
        "encoder-decoder",
        "attention",
        {"positions": "sinusoidal-halves", "activation": "silu", "norm_epsilon": 1e-3},
    ),
    "learned": (
        "encoder-decoder",
        "attention",
        {"positions": "learned", "max_length": 40, "activation": "gelu-tanh", "embedding_scale": False},
    ),
    "rotary, wide heads": (
        "encoder-decoder",
        {**ROTARY, "head_dim": 6},
        {**LLAMA, "cross_mixer": {"name": "cross_attention", "head_dim": 6, "scale": 0.3}},
    ),
    "no positions": ("encoder-decoder", "attention", {"positions": "none"}),
    "gpt": ("decoder-only", "attention", {"positions": "learned", "max_length": 64, "activation": "gelu"}),
    "llama": (
        "decoder-only",
        {**ROTARY, "num_kv_heads": 1, "rotary_interleaved": False, "bias": False},
        {**LLAMA, "embedding_scale": False},
    ),
    "geglu": ("decoder-only", {**ROTARY, "rotary_base": 500.0}, {"positions": "none", "activation": "geglu"}),
    "post": ("decoder-only", "attention", {"norm_position": "post"}),
}


def model_run(layout: str, mixer: Any, ending: float = -1.0, **changes: Any) -> LoadedRun:
    """As `make_run`, with keys of the section model, and two layers."""
    return make_run(
        layout, mixer, ending, **{f"model__{key}": value for key, value in {"num_layers": 2, **changes}.items()}
    )


def export(run: LoadedRun, path: Path, quantization: str | None = None) -> dict[str, Any]:
    with new_folder(path) as folder:
        return export_ctranslate2.write(run, folder, ExportOptions(quantization=quantization))


def elsewhere(script: Path, folder: Path, beam_size: int) -> list[str]:
    """What the documented script prints for LINES."""
    command = [sys.executable, "-I", str(script), str(folder), str(beam_size), str(LIMIT)]
    done = subprocess.run(command, input="\n".join(LINES), capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[: len(LINES)]


@pytest.mark.parametrize("case", CASES)
def test_greedy_and_beam_give_our_tokens(case: str, tmp_path: Path) -> None:
    layout, mixer, changes = CASES[case]
    # decoder-only: never an empty output, see docs/export.md
    run = model_run(layout, mixer, ending=1.0 if layout == "encoder-decoder" else -1.0, **changes)
    page = export(run, tmp_path / "out")
    assert page["difference"] < 1e-4
    script = documented(tmp_path / "decode.py", "ctranslate2.Translator")
    seen = set()
    for beam_size, method in ((1, "greedy"), (4, "beam")):
        ours = outputs(run, LINES, method=method, beam_size=beam_size)
        assert elsewhere(script, tmp_path / "out", beam_size) == ours
        seen |= set(ours)
    assert len(seen) > 2, "the outputs depend on the input"


def test_int8_is_smaller_and_says_how_far_it_is_off(tmp_path: Path) -> None:
    run = model_run("encoder-decoder", "attention", d_model=64, d_ff=256, num_heads=2)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    full, small = export(run, tmp_path / "full"), export(run, tmp_path / "small", "int8")
    for name, tensor in run.model.state_dict().items():  # its quantization writes into what it is given
        assert torch.equal(tensor, before[name]), name
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("full", "small")]
    assert sizes[1] < 0.6 * sizes[0]
    assert full["difference"] < 1e-4 < small["difference"]
    if codes_pack():  # without exact 8-bit products its sums saturate, and the difference says so
        assert small["difference"] < 1.0
    assert json.loads((tmp_path / "small" / "trilemma.json").read_text())["quantization"] == "int8"


REFUSED: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "mixer": ("decoder-only", "retention", {}, 'decoder: mixer "retention"; it knows attention alone'),
    "hybrid": ("decoder-only", ["attention", "gru"], {}, 'decoder: mixer "gru"'),
    "encoder": ("encoder-decoder", "attention", {"encoder_mixer": "gru"}, 'encoder: mixer "bidirectional"'),
    "window": ("decoder-only", {"name": "attention", "window": 3}, {}, "decoder: attention with window"),
    "qk_norm": ("decoder-only", {"name": "attention", "qk_norm": True}, {}, "decoder: attention with qk_norm"),
    "part": ("decoder-only", {**ROTARY, "rotary_dim": 4}, {"positions": "none"}, "decoder: attention with rotary_dim"),
    "gate": ("decoder-only", {"name": "attention", "output_gate": True}, {}, "decoder: attention with output_gate"),
    "scaling": (
        "decoder-only",
        {**ROTARY, "rotary_scaling": {"kind": "linear", "factor": 2.0}},
        {"positions": "none"},
        "decoder: attention with rotary_scaling",
    ),
    "alibi": ("decoder-only", {"name": "attention", "position": "alibi"}, {}, 'attention with position "alibi"'),
    "layers": ("decoder-only", ["attention", ROTARY], {}, "decoder: layers whose attention differs"),
    "both": ("decoder-only", ROTARY, {}, "model.positions: sinusoidal beside rotary attention"),
    "prefix": ("decoder-only", "attention", {"prefix": True}, "model.prefix"),
    "bare": ("decoder-only", "attention", {"feed_forward": False}, "model.feed_forward: false"),
    "types": ("decoder-only", "attention", {"token_types": 2}, "model.token_types"),
    "norms": ("decoder-only", "attention", {"embedding_norm": True, "norm": "rmsnorm"}, "model.embedding_norm"),
    "grouped": (
        "encoder-decoder",
        {"name": "attention", "num_kv_heads": 1},
        {"encoder_mixer": "attention"},
        "decoder: attention with num_kv_heads 1 beside cross-attention",
    ),
    "grouped encoder": (
        "encoder-decoder",
        {"name": "attention", "num_kv_heads": 1},
        {},
        "attention with num_kv_heads 1",
    ),
    "grouped memory": (
        "encoder-decoder",
        "attention",
        {"cross_mixer": {"name": "cross_attention", "num_kv_heads": 1}},
        "decoder: cross-attention with num_kv_heads 1",
    ),
    "other memory": (
        "encoder-decoder",
        "attention",
        {"cross_mixer": {"name": "cross_attention", "num_heads": 4}},
        "decoder: cross-attention of 4 heads beside attention of 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_run_is_named(case: str, tmp_path: Path) -> None:
    layout, mixer, changes, message = REFUSED[case]
    with pytest.raises(CapabilityError) as caught:
        export(model_run(layout, mixer, **changes), tmp_path / "out")
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is left of what failed"


def test_two_positions_are_enough(tmp_path: Path) -> None:
    run = model_run("encoder-decoder", "attention", positions="learned", max_length=2)
    assert export(run, tmp_path / "out")["difference"] < 1e-4


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = model_run("decoder-only", "attention")
    with pytest.raises(ConfigError, match='unknown type "int9"; did you mean "int8"'):
        export(run, tmp_path / "out", "int9")
    encoder = make_run("encoder-only", "attention", data__task="masked-language-model")
    with pytest.raises(CapabilityError, match="layout encoder-only"):
        export(encoder, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(BackendError, match=r"needs the package ctranslate2.*pip install ctranslate2"):
        export(run, tmp_path / "out")


def test_other_weights_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = export_ctranslate2._fill_norm

    def without_bias(spec: Any, norm: Any) -> None:
        fill(spec, norm)
        spec.beta = torch.zeros_like(spec.gamma)

    monkeypatch.setattr(export_ctranslate2, "_fill_norm", without_bias)
    with pytest.raises(LawError, match="CTranslate2 computes other log-probabilities than the model: they differ by"):
        export(model_run("encoder-decoder", "attention"), tmp_path / "out")


def test_bart_s_sources_begin_as_ours(tmp_path: Path) -> None:
    make(HF_CASES["bart"], tmp_path / "hf")
    run = load_run(import_model(tmp_path / "hf", tmp_path / "run").path)
    page = export(run, tmp_path / "out")  # compares the log-probabilities
    assert page["source_begin"] == ["<s>"]
    lines = ["w5 w6", "w9 w40 w7 w77", "w30"]
    script = documented(tmp_path / "decode.py", "ctranslate2.Translator")
    command = [sys.executable, "-I", str(script), str(tmp_path / "out"), "1", str(LIMIT)]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True)
    ours = outputs(run, lines, method="greedy")
    assert done.stdout.splitlines() == ours
    assert len(set(ours)) > 1, "the outputs depend on the input"
