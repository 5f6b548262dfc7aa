"""What `trilemma import` refuses, and what it says; tokenizers, shards, settings of generation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_models import CASES, EOS, PAD, VOCABULARY, edit_json, edit_weights, make, tokenizer

from trilemma import load
from trilemma.cli.main import main
from trilemma.errors import CheckpointError, ConfigError, DataError, TrilemmaError
from trilemma.interop import import_model, importing
from trilemma.interop.families import FAMILIES
from trilemma.runs.load import load_run


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    names = ("llama", "gpt2", "bert-classifier", "marian", "t5", "mamba2", "qwen3-next", "kimi-linear")
    for name in (*names, "qwen3.5-with-pictures"):
        make(CASES[name], folder / name)
    return folder


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A fresh copy of a model's directory."""

    def of(name: str) -> Path:
        shutil.copytree(originals / name, tmp_path / name)
        return tmp_path / name

    return of


BAD_KEYS = [
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 8.0}}, 'rope_parameters: rope_type "dynamic"'),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0 or None can be honoured"),
    ("llama", {"hidden_act": "relu6"}, 'hidden_act is "relu6"; only silu, swish'),
    ("llama", {"auto_map": {"AutoModel": "code.py"}}, 'the key "auto_map" .* is not known for this family'),
    ("llama", {"hidden_size": "wide"}, "hidden_size: int is needed, found 'wide'"),
    ("llama", {"layer_types": ["chunked_attention"] * 3}, 'layer_types: "chunked_attention" cannot be honoured'),
    ("llama", {"quantization_config": {"bits": 4}}, 'the key "quantization_config" .* --ignore quantization_config'),
    ("llama", {"model_type": "lama"}, 'model_type "lama" cannot be imported; did you mean "llama"'),
    ("llama", {"model_type": "qwen3", "rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05; with query and key norms only"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; only False"),
    ("bert-classifier", {"problem_type": "regression"}, "problem_type is 'regression'"),
    ("bert-classifier", {"id2label": {"0": "one"}}, "id2label: 1 class; a regression cannot be imported"),
    ("bert-classifier", {"id2label": {"0": "a", "5": "b"}}, "id2label: names for the ids 0, 1"),
    ("bert-classifier", {"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering cannot be imported"),
    ("bert-classifier", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ("marian", {"decoder_ffn_dim": 64}, "decoder_ffn_dim is 64, encoder_ffn_dim 48; they must be equal"),
    ("marian", {"normalize_before": True}, "normalize_before is True; only False can be honoured"),
    ("t5", {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets is 16; only 32"),
    ("t5", {"feed_forward_proj": "gated-relu"}, 'feed_forward_proj is "gated-relu"'),
    ("t5", {"architectures": ["T5EncoderModel"]}, "T5EncoderModel cannot be imported"),
    ("qwen3-next", {"num_experts": 8}, "num_experts: layer 0 is a mixture of 8 experts .4 layers in all.*mlp_only"),
    ("qwen3-next", {"num_experts": 8, "decoder_sparse_step": 3}, "layer 2 is a mixture of 8 experts .1 layers"),
    ("qwen3-next", {"layer_types": ["sliding_attention"] * 4}, 'layer_types: "sliding_attention" cannot be honoured'),
    ("qwen3-next", {"linear_value_head_dim": 12}, "linear_value_head_dim is 12; only multiples of the keys' 8 can"),
    ("qwen3-next", {"linear_num_value_heads": 3}, "linear_num_value_heads is 3; only multiples of the keys' 2 can"),
    ("qwen3-next", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05; with query and key norms only 1e-06"),
    ("qwen3-next", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "partial_rotary_factor is 0.2; an even number"),
    ("qwen3.5-with-pictures", {"text_config": {"use_mamba": 1}}, 'text_config: the key "use_mamba" .* remove it from'),
    ("qwen3.5-with-pictures", {"audio_config": {}}, 'the key "audio_config" .* --ignore audio_config'),
    ("kimi-linear", {"mlp_layer_types": ["dense", "sparse", "sparse"]}, 'layer 1 is "sparse" .2 layers in all.*dense'),
    ("kimi-linear", {"mlp_layer_types": None}, 'mlp_layer_types: layer 1 is "sparse" .* or first_k_dense_replace 3'),
    ("kimi-linear", {"mlp_layer_types": ["dense"]}, "mlp_layer_types: 1 entries for 3 layers"),
    ("kimi-linear", {"layer_types": ["linear_attention", "chunked", "chunked"]}, 'layer_types: "chunked" cannot be'),
    ("kimi-linear", {"mla_use_nope": False}, "mla_use_nope is False; only True can be honoured"),
    ("kimi-linear", {"num_key_value_heads": 2}, "num_key_value_heads is 2; only 4 or None can be honoured"),
    (
        "kimi-linear",
        {"layer_types": None, "linear_attn_config": {"kda_layers": [1, 2], "full_attn_layers": [2]}},
        "linear_attn_config: full_attn_layers and kda_layers must name each of the layers 1 to 3 once",
    ),
    ("kimi-linear", {"linear_attn_config": {"gate_lower_bound": 1}}, 'linear_attn_config: the key "gate_lower_bound"'),
    ("mamba2", {"time_step_limit": [0.0, 0.1]}, r"time_step_limit is \[0.0, 0.1\]"),
    ("mamba2", {"num_heads": 4}, "num_heads \\* head_dim is 32, expand \\* hidden_size 64"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD_KEYS, ids=[next(iter(row[1])) for row in BAD_KEYS])
def test_values_that_cannot_be_honoured_are_named(
    name: str, changes: dict[str, Any], message: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    edit_json(copy(name) / "config.json", **changes)
    with pytest.raises(ConfigError, match=message):
        import_model(tmp_path / name, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_may_be_declared_harmless(copy: Callable[[str], Path], tmp_path: Path) -> None:
    edit_json(copy("llama") / "config.json", quantization_config={})
    with pytest.raises(ConfigError, match=r'--ignore quantisation_config: .* has no such key; did you mean "quant'):
        import_model(tmp_path / "llama", tmp_path / "run", ignore=["quantisation_config"])
    assert import_model(tmp_path / "llama", tmp_path / "run", ignore=["quantization_config"]).exists()


def test_published_names_of_kimi_s_layers(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """A dense layer's weights stand under `mlp`; transformers writes them under the name of the experts."""
    folder = copy("kimi-linear")
    import_model(folder, tmp_path / "one")
    old, new = ".block_sparse_moe.", ".mlp."

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    edit_weights(folder, rename)
    import_model(folder, tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    extra = f"model.layers.0{old}up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({extra: torch.zeros(48, 32)}))
    with pytest.raises(CheckpointError, match=r'"model.layers.0..*up_proj.weight" are one tensor\'s names'):
        import_model(folder, tmp_path / "three")


def test_layers_counted_from_one() -> None:
    kimi = {"model_type": "kimi_linear", "num_hidden_layers": 3, "first_k_dense_replace": 3}
    lists = {"full_attn_layers": [2], "kda_layers": [3, 1], "head_dim": 16, "num_heads": 2}
    model = importing.understand({**kimi, "linear_attn_config": lists}, "config.json")[1].model
    assert isinstance(model.mixer, list)
    assert [spec["name"] for spec in model.mixer if isinstance(spec, dict)] == ["kda", "latent_attention", "kda"]
    assert model.mixer[0]["head_dim"] == 16  # type: ignore[index]


def test_half_precision_files(tmp_path: Path) -> None:
    theirs = make(CASES["t5"], tmp_path / "hf").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf")
    run = load_run(import_model(tmp_path / "hf", tmp_path / "run").path)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        wanted = theirs.float()(input_ids=ids, decoder_input_ids=ids).logits
        torch.testing.assert_close(run.model.head(run.model(ids, source=ids)), wanted, rtol=0, atol=1e-4)


# Keys that published files hold beside those that transformers writes today; each changes nothing as it stands here.
PUBLISHED = {
    "gpt2": {
        "n_ctx": 1024,
        "task_specific_params": {"text-generation": {"do_sample": True}},
        "summary_type": "cls_index",
    },
    "bert": {"gradient_checkpointing": False, "pooler_fc_size": 768, "pooler_type": "first", "directionality": "bidi"},
    "t5": {"n_positions": 512, "output_past": True, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "marian": {"add_bias_logits": False, "extra_pos_embeddings": 58101, "static_position_embeddings": True},
    "bart": {"normalize_embedding": True, "force_bos_token_to_be_generated": True, "_num_labels": 3, "prefix": " "},
    "llama": {"rope_theta": 100000, "rope_scaling": None, "rope_interleaved": False, "pretraining_tp": 1},
    "qwen2": {"use_mrope": False, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 24},
    "qwen3_next": {
        "rope_theta": 10000000,
        "rope_scaling": None,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(48)),
        "num_experts": 512,
        "norm_topk_prob": True,
    },
    "qwen3_5": {"text_config": {"model_type": "qwen3_5_text"}, "vision_config": {}, "image_token_id": 248056},
    "qwen3_5_text": {
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "full_attention_interval": 4,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    },
    "kimi_linear": {
        "first_k_dense_replace": 27,
        "head_dim": 72,
        "linear_attn_config": {
            "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
            "kda_layers": [i for i in range(1, 27) if i % 4],
            "head_dim": 128,
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
        "mla_use_nope": True,
        "model_max_length": 1048576,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "num_nextn_predict_layers": 0,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "use_grouped_topk": True,
    },
    "mamba": {"d_inner": 1536, "ssm_cfg": {}, "rms_norm": True, "fused_add_norm": True, "time_step_rank": 48},
    "mamba2": {"norm_before_gate": True, "time_step_limit": [0.0, float("inf")], "time_step_scale": 1.0},
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_files_are_understood(kind: str) -> None:
    family, blueprint = importing.understand({"model_type": kind, **PUBLISHED[kind]}, "config.json")
    assert kind in family.model_types
    assert importing.needed_shapes(blueprint)


# Without them, a file of these types describes mixtures of experts, which are refused.
DENSE = {"qwen3_next": {"num_experts": 0}, "kimi_linear": {"first_k_dense_replace": 27}}


def test_every_family_refuses_an_unknown_key() -> None:
    for kind in (kind for family in FAMILIES for kind in family.model_types):
        with pytest.raises(ConfigError, match='"surprise"'):
            importing.understand({"model_type": kind, "surprise": 1, **DENSE.get(kind, {})}, "config.json")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def integers(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))


BAD_FOLDERS: list[tuple[str, Callable[[Path], None], type[TrilemmaError], str]] = [
    ("no config", remove("config.json"), CheckpointError, "no config.json: a folder in the Hugging Face layout"),
    ("no JSON", put("config.json", "{"), CheckpointError, "config.json: not valid JSON"),
    ("a list", put("config.json", "[1]"), CheckpointError, "config.json: a JSON object is needed"),
    ("no weights", remove("model.safetensors"), CheckpointError, "no weights: model.safetensors or"),
    ("damaged weights", put("model.safetensors", "xx"), CheckpointError, "not a valid safetensors file"),
    ("pickle", pickled, CheckpointError, r"pytorch_model.bin: a pickle file can run code .* safe_serialization=True"),
    ("quantised", integers, CheckpointError, '"model.layers.0.mlp.down_proj.weight" has the type I8; quantised'),
    ("no tokenizer", remove("tokenizer.json"), CheckpointError, "no tokenizer: tokenizer.json, SentencePiece's"),
    ("bad tokenizer", put("tokenizer.json", "{}"), DataError, "tokenizer.json: not a tokenizer.json"),
    (
        "larger tokenizer",
        put("tokenizer.json", tokenizer(VOCABULARY + 4).to_str()),
        DataError,
        "the tokenizer does not match the vocabulary: it has 100 entries, the model 96",
    ),
    (
        "id beyond the vocabulary",
        put("generation_config.json", '{"eos_token_id": 96}'),
        DataError,
        "does not match the vocabulary: its eos id 96 is outside the model's 96",
    ),
    (
        "forbidden token",
        put("generation_config.json", '{"bad_words_ids": [[500]]}'),
        ConfigError,
        "generation forbids the token 500; the vocabulary has 96",
    ),
    (
        "forbidden tokens that are no list",
        put("generation_config.json", '{"suppress_tokens": 5}'),
        ConfigError,
        "suppress_tokens: a list is needed, found 5",
    ),
    (
        "beams that are none",
        put("generation_config.json", '{"num_beams": "many"}'),
        ConfigError,
        "llama: beam_size: .* found 'many'",
    ),
    ("bad index", put("model.safetensors.index.json", "{}"), CheckpointError, 'the mapping "weight_map" is needed'),
    (
        "index leads out",
        put("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}'),
        CheckpointError,
        r'"../x.safetensors" is no safetensors file of this folder',
    ),
    (
        "missing shard",
        put("model.safetensors.index.json", '{"weight_map": {"a": "x.safetensors"}}'),
        CheckpointError,
        "x.safetensors: missing; model.safetensors.index.json lists it",
    ),
    (
        "shard without the tensor",
        put("model.safetensors.index.json", '{"weight_map": {"a": "model.safetensors"}}'),
        CheckpointError,
        'model.safetensors: the tensor "a" is missing; model.safetensors.index.json lists it',
    ),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), [row[1:] for row in BAD_FOLDERS], ids=[r[0] for r in BAD_FOLDERS]
)
def test_partial_and_foreign_folders(
    change: Callable[[Path], None],
    kind: type[TrilemmaError],
    message: str,
    copy: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    change(copy("llama"))
    with pytest.raises(kind, match=message):
        import_model(tmp_path / "llama", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tied_weights_that_differ_are_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    edit_weights(copy("gpt2"), lambda tensors: tensors.update({"lm_head.weight": torch.zeros(VOCABULARY, 32)}))
    with pytest.raises(CheckpointError, match=r'"lm_head.weight" and "transformer.wte.weight" are tied, but differ'):
        import_model(tmp_path / "gpt2", tmp_path / "run")


def test_stored_positions_must_be_the_computed_ones(copy: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.encoder.embed_positions.weight"
    edit_weights(copy("marian"), lambda tensors: tensors.update({name: torch.zeros(40, 32)}))
    with pytest.raises(CheckpointError, match=f'"{name}" is not what it must be: computed positions'):
        import_model(tmp_path / "marian", tmp_path / "run")


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, originals: Path) -> None:
    """Nothing is fetched unless asked, nor when the hub is to be left alone; no pickle or code is asked for."""
    asked: list[Any] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(originals / "llama")

    hub = SimpleNamespace(snapshot_download=snapshot_download, errors=SimpleNamespace(HfHubHTTPError=OSError))
    monkeypatch.setattr(importing.importlib, "import_module", lambda name: hub)
    with pytest.raises(CheckpointError, match=r"org/name: no such folder. To fetch .* add --download"):
        import_model("org/name", tmp_path / "run")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set, so nothing is downloaded"):
        import_model("org/name", tmp_path / "run", download=True)
    assert not asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert import_model("org/name", tmp_path / "run", download=True).exists()
    assert asked == [("org/name", ["*.json", "*.safetensors", "*.model", "*.spm"])]
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        import_model("nowhere", tmp_path / "other", download=True)


def test_old_names_and_stored_constants(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """Files of the bare model lack its prefix; BERT's first ones call a norm's weights gamma and beta."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(name: str) -> str:
        for new, former in old.items():
            name = name.replace(new, former)
        return name.removeprefix("transformer.")

    constants = {"gpt2": "h.0.attn.bias", "bert-classifier": "bert.embeddings.position_ids"}
    for name, constant in constants.items():
        import_model(copy(name), tmp_path / f"{name}-run")

        def former(tensors: dict[str, torch.Tensor], constant: str = constant) -> None:
            renamed = {rename(key): tensor for key, tensor in tensors.items()}
            tensors.clear()
            tensors.update(renamed, **{constant: torch.ones(1, 4, dtype=torch.int64)})

        edit_weights(tmp_path / name, former)
        said: list[str] = []
        import_model(tmp_path / name, tmp_path / f"{name}-again", say=said.append)
        stored = [(tmp_path / f"{name}-{run}" / "model.safetensors").read_bytes() for run in ("run", "again")]
        assert stored[0] == stored[1]
        assert any("left out: " in note for note in said)


def test_shards(tmp_path: Path) -> None:
    theirs = make(CASES["llama"], tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    run = load_run(import_model(tmp_path / "hf", tmp_path / "run").path)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(run.model.head(run.model(ids)), theirs(input_ids=ids).logits, rtol=0, atol=1e-4)


def test_special_ids_and_settings_of_generation(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama")
    edit_json(folder / "generation_config.json", eos_token_id=[EOS, 5], pad_token_id=EOS, num_beams=3, max_length=99)
    edit_json(folder / "tokenizer_config.json", eos_token="w5", mask_token={"content": "w9"})
    said: list[str] = []
    run = load_run(import_model(folder, tmp_path / "run", say=said.append).path)
    held = run.tokenizer
    assert (held.pad, held.bos, held.eos, held.unk, held.mask) == (EOS, 1, 5, 3, 9)
    assert (run.config.decoding.method, run.config.decoding.beam_size) == ("beam", 3)
    assert "outputs end with id 5 alone; the checkpoint also ends them with [2]" in said
    assert "settings of generation not taken over: max_length" in said
    assert run.config.notes["import.1"] in said


def test_dropout_that_is_not_taken_over_is_named(copy: Callable[[str], Path], tmp_path: Path) -> None:
    said: list[str] = []
    run = import_model(copy("gpt2"), tmp_path / "run", say=said.append)
    assert run.read_config().model.dropout == 0.1
    assert "dropout not taken over: attn_pdrop, embd_pdrop; model.dropout is the only one" in said


def test_padding_may_be_the_end(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """One id for all, a vocabulary with rows that no text has: texts survive, lines are generated."""
    folder = copy("gpt2")
    edit_json(folder / "config.json", pad_token_id=None, bos_token_id=EOS)
    (folder / "tokenizer.json").write_text(tokenizer(90).to_str())
    edit_json(folder / "generation_config.json", pad_token_id=None, bos_token_id=EOS)
    held = json.loads(tokenizer(90).to_str())
    held["model"]["vocab"] = {("word" if name == "<pad>" else name): i for name, i in held["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(held))
    predictor = load(import_model(folder, tmp_path / "run").path)
    words = predictor.tokenizer
    assert words.pad == words.bos == words.eos == EOS
    assert words.vocab_size == VOCABULARY
    assert words.decode([7, EOS, 95, 8]) == "w7 w8"
    assert len(predictor.generate(["w7 w8", "", "w9"], max_length=3)) == 3
    assert words.encode("word")[0] == PAD


def test_command_line(copy: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = copy("bert-classifier"), tmp_path / "run"
    assert main(["import", str(folder), "--out", str(run), "--json"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["run"] == str(run)
    assert load(run).classify(["w5 w6"])[0].label in ("sad", "so-so", "glad")
    assert main(["import", str(folder), "--out", str(run)]) == 2
    assert "holds a run already; choose another --out" in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 2
    assert "there is no test data" in capsys.readouterr().err
