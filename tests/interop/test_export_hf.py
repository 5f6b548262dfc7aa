"""What `export --to hf` writes is loaded by transformers and gives the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import CASES, make, rows, tokenizer

from trilemma.config import DataConfig, ModelConfig, RunConfig, TokenizerConfig
from trilemma.data import Tokenizer
from trilemma.decode import Prompts
from trilemma.errors import CapabilityError
from trilemma.interop import export_hf, import_model
from trilemma.interop.export_hf import write
from trilemma.interop.families.llama import LLAMA
from trilemma.interop.target import ExportOptions
from trilemma.models import build_model
from trilemma.runs import RunDirectory
from trilemma.runs.load import LoadedRun, load_run
from trilemma.runs.tensors import model_tensors

ROTARY = {"name": "attention", "position": "rotary", "bias": False, "num_kv_heads": 2}
SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 4, "dropout": 0.0}
T5_PART = {"scale": 1.0, "bias": False, "head_dim": 6}
# Models as a user may train them here, and the architecture that they are exported as.
OWN: dict[str, tuple[dict[str, Any], str]] = {
    "LlamaForCausalLM": (
        {"mixer": ROTARY, "norm": "rmsnorm", "activation": "swiglu", "bias": False, "positions": "none"},
        "language-model",
    ),
    "Qwen3ForCausalLM": (
        {
            "mixer": {"name": "attention", "position": "rotary", "qk_norm": True, "bias": False},
            "norm": "rmsnorm",
            "norm_epsilon": 1e-6,
            "activation": "swiglu",
            "bias": False,
            "positions": "none",
        },
        "language-model",
    ),
    "MistralForCausalLM": (
        {
            "mixer": {**ROTARY, "window": 4},
            "norm": "rmsnorm",
            "activation": "swiglu",
            "bias": False,
            "positions": "none",
            "tie_embeddings": False,
        },
        "language-model",
    ),
    "Qwen3NextForCausalLM": (
        {
            "mixer": [
                {"name": "gated_deltanet", "head_dim": 8, "epsilon": 1e-6},
                {
                    "name": "attention",
                    "position": "rotary",
                    "rotary_interleaved": False,
                    "rotary_dim": 2,
                    "qk_norm": True,
                    "output_gate": True,
                    "bias": False,
                    "rotary_scaling": {"kind": "linear", "factor": 2.0},
                },
            ],
            "norm": "rmsnorm",
            "norm_epsilon": 1e-6,
            "activation": "swiglu",
            "bias": False,
            "positions": "none",
        },
        "language-model",
    ),
    "GPT2LMHeadModel": ({"positions": "learned", "max_length": 24, "activation": "gelu-tanh"}, "language-model"),
    "Mamba2ForCausalLM": (
        {"mixer": "mamba2", "norm": "rmsnorm", "feed_forward": False, "positions": "none"},
        "language-model",
    ),
    "BertForMaskedLM": (
        {
            "layout": "encoder-only",
            "norm_position": "post",
            "positions": "learned",
            "max_length": 24,
            "embedding_norm": True,
            "token_types": 2,
            "head_transform": True,
            "logit_bias": True,
        },
        "masked-language-model",
    ),
    "MarianMTModel": (
        {"layout": "encoder-decoder", "norm_position": "post", "positions": "sinusoidal-halves", "logit_bias": True},
        "seq2seq",
    ),
    "T5ForConditionalGeneration": (
        {
            "layout": "encoder-decoder",
            "norm": "rmsnorm",
            "bias": False,
            "positions": "none",
            "mixer": {"name": "attention", "position": "t5-shared", **T5_PART},
            "activation": "geglu-tanh",
            "cross_mixer": {"name": "cross_attention", **T5_PART},
            "embedding_scale": False,
        },
        "seq2seq",
    ),
}


def own_run(folder: Path, settings: dict[str, Any], task: Any) -> LoadedRun:
    """A published run with random weights of a model of ours."""
    words = Tokenizer.parse(tokenizer(40).to_str().encode(), "words")
    scale = settings.get("layout") == "encoder-decoder"
    model = ModelConfig(**{"layout": "decoder-only", "embedding_scale": scale, **SMALL, **settings}).model_copy(
        update={"vocab_size": words.vocab_size}
    )
    config = RunConfig(model=model, data=DataConfig(task=task), tokenizer=TokenizerConfig(kind="file"))
    made = build_model(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    run = RunDirectory.create(folder, config, words.serialize().encode())
    run.publish_model(model_tensors(made))
    return load_run(folder)


@torch.no_grad()
def agree(run: LoadedRun, folder: Path, architecture: str) -> None:
    theirs, report = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    # a bare BERT is written without the pooler, which ours has not
    assert not [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    assert not report["unexpected_keys"]
    theirs.eval()
    inputs = torch.tensor(rows(4, [9])) % 36
    given = {"source": inputs[:, :5]} if run.model.layout == "encoder-decoder" else {}
    ours = run.model.head(run.model(inputs, **given))
    if architecture == "BartModel":
        ours = run.model(inputs, **given)
        wanted = theirs(input_ids=given["source"], decoder_input_ids=inputs).last_hidden_state
    elif given:
        wanted = theirs(input_ids=given["source"], decoder_input_ids=inputs).logits
    elif architecture.endswith("Model") and "LMHead" not in architecture:
        ours, wanted = run.model(inputs), theirs(input_ids=inputs).last_hidden_state
    else:
        wanted = theirs(input_ids=inputs).logits
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("architecture", OWN)
def test_own_models(architecture: str, tmp_path: Path) -> None:
    run = own_run(tmp_path / "run", *OWN[architecture])
    (tmp_path / "hf").mkdir()
    written = write(run, tmp_path / "hf", ExportOptions())
    assert written["architecture"] == architecture
    agree(run, tmp_path / "hf", architecture)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text, own = "w5 w9 w7", run.tokenizer
    ids = own.encode(text)
    wanted = {"encoder-decoder": [*ids, own.eos], "encoder-only": [own.bos, *ids, own.eos]}
    assert words(text)["input_ids"] == wanted.get(run.model.layout, [own.bos, *ids])
    assert (words.pad_token_id, words.eos_token_id) == (own.pad, own.eos)


def test_a_decoder_s_prompt_ends_with_the_separator(tmp_path: Path) -> None:
    settings, _ = OWN["LlamaForCausalLM"]
    run = own_run(tmp_path / "run", settings, "seq2seq")
    (tmp_path / "hf").mkdir()
    write(run, tmp_path / "hf", ExportOptions())
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (
        words("w5 w9")["input_ids"] == Prompts(run.tokenizer, run.config).context(run.tokenizer.encode("w5 w9")).prompt
    )


@pytest.mark.parametrize("name", CASES)
def test_imported_models_go_out_again(name: str, tmp_path: Path) -> None:
    make(CASES[name], tmp_path / "hf")
    run = load_run(import_model(tmp_path / "hf", tmp_path / "run").path)
    (tmp_path / "again").mkdir()
    written = write(run, tmp_path / "again", ExportOptions())
    agree(run, tmp_path / "again", written["architecture"])
    assert (tmp_path / "again" / "tokenizer.json").exists()
    back = load_run(import_model(tmp_path / "again", tmp_path / "back").path)
    held = model_tensors(back.model)
    for key, tensor in model_tensors(run.model).items():
        torch.testing.assert_close(held[key], tensor, rtol=1e-6, atol=0)
    assert back.tokenizer.special_ids == run.tokenizer.special_ids


def test_what_has_no_counterpart_is_refused(tmp_path: Path) -> None:
    run = own_run(tmp_path / "run", {"mixer": "retention", "positions": "none"}, "language-model")
    with pytest.raises(CapabilityError, match=r"no architecture of transformers.*llama: model.norm is 'layernorm'"):
        write(run, tmp_path, ExportOptions())
    settings, task = OWN["MarianMTModel"]
    bart = {"positions": "learned", "max_length": 24, "share_embeddings": "tokens", "embedding_norm": True}
    for name, more in (("marian", {}), ("bart", bart)):
        untied = own_run(tmp_path / name, {**settings, **more, "tie_embeddings": False}, task)
        with pytest.raises(CapabilityError, match=rf"{name}: model\.tie_embeddings is False"):
            write(untied, tmp_path, ExportOptions())


def test_windows_of_two_sizes_are_refused(tmp_path: Path) -> None:
    settings, task = OWN["Qwen3ForCausalLM"]
    mixers = [{**settings["mixer"], "window": window} for window in (4, 12)]
    run = own_run(tmp_path / "run", {**settings, "mixer": mixers}, task)
    with pytest.raises(CapabilityError, match=r"llama: all windows must have one size, found \[4, 12\]"):
        write(run, tmp_path, ExportOptions())


def test_a_gate_and_parts_of_heads_have_no_place_elsewhere(tmp_path: Path) -> None:
    """The families with plain attention refuse them by name; without deltanet, Qwen3-Next's is no place either."""
    settings, task = OWN["Qwen3ForCausalLM"]
    gated = {**settings["mixer"], "output_gate": True, "rotary_interleaved": False}
    messages = {
        "llama: attention needs position rotary for whole heads, no output_gate": {"mixer": gated},
        "llama: attention needs position": {"mixer": {**settings["mixer"], "rotary_dim": 4}},
        "qwen3_next: mixers must be gated_deltanet and attention": {"mixer": gated},
        "qwen3_next: all attention layers must be alike": {
            "mixer": [{**gated, "rotary_base": 50.0}, gated, {"name": "gated_deltanet", "epsilon": 1e-6}],
            "num_layers": 3,
        },
        "qwen3_next: attention needs output_gate": {"mixer": [settings["mixer"], "gated_deltanet"]},
        "qwen3_next: gated_deltanet needs epsilon 1e-06": {"mixer": [gated, "gated_deltanet"]},
    }
    for number, (message, changes) in enumerate(messages.items()):
        run = own_run(tmp_path / str(number), {**settings, **changes}, task)
        with pytest.raises(CapabilityError, match=message):
            write(run, tmp_path, ExportOptions())
    _, task = OWN["GPT2LMHeadModel"]
    settings = {**OWN["GPT2LMHeadModel"][0], "mixer": {"name": "attention", "output_gate": True}}
    with pytest.raises(CapabilityError, match="gpt2: every mixer must be attention"):
        write(own_run(tmp_path / "gpt2", settings, task), tmp_path, ExportOptions())


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (["kda", "kda"], "kimi_linear: mixers must be kda and latent_attention, at least one of each"),
        (["kda", "latent_attention"], "kimi_linear: latent_attention needs rotary false"),
        (["kda", {"name": "latent_attention", "rotary": False}], "gate.bias is not zero, and this architecture has no"),
        (
            [{"name": "kda", "negative_eigenvalues": True}, {"name": "latent_attention", "rotary": False}],
            r"kimi_linear: kda needs epsilon 1e-05 .*, and no negative_eigenvalues",
        ),
        (
            ["kda", {"name": "kda", "head_dim": 4}, {"name": "latent_attention", "rotary": False}],
            "kimi_linear: all layers of kda must be alike",
        ),
    ],
)
def test_what_kimi_linear_has_not(mixer: list[Any], message: str, tmp_path: Path) -> None:
    settings, task = OWN["LlamaForCausalLM"]
    changes = {"mixer": mixer, "num_layers": len(mixer), "tie_embeddings": False}
    run = own_run(tmp_path / "run", {**settings, **changes}, task)
    with pytest.raises(CapabilityError, match=message):
        write(run, tmp_path, ExportOptions())


def test_layers_rotated_differently_are_refused(tmp_path: Path) -> None:
    """Eight tokens would hardly show it."""
    settings, task = OWN["LlamaForCausalLM"]
    scaled = {**ROTARY, "rotary_scaling": {"kind": "llama3", "factor": 8.0, "original_length": 8192}}
    run = own_run(tmp_path / "run", {**settings, "mixer": [ROTARY, scaled]}, task)
    with pytest.raises(CapabilityError, match="llama: all layers must have the same rotations"):
        write(run, tmp_path, ExportOptions())


def test_the_check_reads_beyond_the_largest_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mistake: a window of 20 is written as 16, which eight tokens would not show."""
    settings, task = OWN["MistralForCausalLM"]
    run = own_run(tmp_path / "run", {**settings, "mixer": {**settings["mixer"], "window": 20}}, task)
    values = LLAMA.write(run.model, run.config)
    monkeypatch.setattr(export_hf, "_described", lambda run: {**values, "sliding_window": 16})
    with pytest.raises(CapabilityError, match="what was written does not compute what this run does"):
        write(run, tmp_path, ExportOptions())
