"""Small models with random weights in the Hugging Face layout, made by transformers, and what they answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers
from torch import Tensor

VOCABULARY = 96
PAD, BOS, EOS, UNK = 0, 1, 2, 3


@dataclass(frozen=True)
class Case:
    """One architecture: the class, its config, and how it is called."""

    cls: str
    config: type[Any]
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "decoder"  # or seq2seq, bare-seq2seq, masked, classifier, encoder
    banned: tuple[int, ...] = ()  # tokens that generation must not produce


_IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_LLAMA = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_GPT2 = {**_IDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}
_BERT = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
_ROBERTA = {**_BERT, "pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_MARIAN = {
    "vocab_size": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "forced_eos_token_id": None,
    "d_model": 32,
    "max_position_embeddings": 40,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "scale_embedding": True,
    "activation_function": "swish",
}
_BART = {
    **{key: value for key, value in _MARIAN.items() if key not in ("decoder_vocab_size", "activation_function")},
    "decoder_start_token_id": EOS,
    "bos_token_id": BOS,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
}
_MAMBA = {**_IDS, "hidden_size": 32, "num_hidden_layers": 3}
_MAMBA2 = {**_MAMBA, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16}


_KIMI = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 3,
    "v_head_dim": 6,
    "linear_head_dim": 8,
    "linear_num_heads": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense"] * 3,
}
del _KIMI["head_dim"]


def _rope(theta: float, kind: str = "default", **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


# With a base of 100, some pairs keep their speed, some are slowed down, some are in between.
_SCALED = {"factor": 8.0, "original_max_position_embeddings": 64}
_LLAMA3 = {**_SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {**_SCALED, "original_max_position_embeddings": 32, "beta_fast": 4.0, "truncate": False}


_NEXT = {
    **_LLAMA,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "num_experts": 0,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


_QWEN35 = {
    **{key: value for key, value in _NEXT.items() if key != "num_experts"},
    **_rope(50.0, mrope_section=[1, 1, 0], mrope_interleaved=True, partial_rotary_factor=0.5),
}


CASES = {
    "llama": Case("LlamaForCausalLM", transformers.LlamaConfig, {**_LLAMA, **_rope(5000.0), "rms_norm_eps": 1e-5}),
    "llama-tied-biased": Case(
        "LlamaForCausalLM",
        transformers.LlamaConfig,
        {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-3.1": Case("LlamaForCausalLM", transformers.LlamaConfig, {**_LLAMA, **_rope(100.0, "llama3", **_LLAMA3)}),
    "llama-linear": Case(
        "LlamaForCausalLM", transformers.LlamaConfig, {**_LLAMA, **_rope(100.0, "linear", factor=4.0)}
    ),
    "mistral": Case("MistralForCausalLM", transformers.MistralConfig, {**_LLAMA, "sliding_window": 5}),
    "qwen2": Case(
        "Qwen2ForCausalLM",
        transformers.Qwen2Config,
        {
            **{key: value for key, value in _LLAMA.items() if key != "head_dim"},
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    "gpt2": Case("GPT2LMHeadModel", transformers.GPT2Config, _GPT2),
    "gpt2-untied": Case(
        "GPT2LMHeadModel",
        transformers.GPT2Config,
        {**_GPT2, "tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu", "eos_token_id": PAD},
    ),
    "bert-masked": Case("BertForMaskedLM", transformers.BertConfig, _BERT, "masked"),
    "bert-pretraining": Case("BertForPreTraining", transformers.BertConfig, _BERT, "masked"),
    "bert-classifier": Case(
        "BertForSequenceClassification",
        transformers.BertConfig,
        {**_BERT, "id2label": {0: "sad", 1: "so-so", 2: "glad"}, "label2id": {"sad": 0, "so-so": 1, "glad": 2}},
        "classifier",
    ),
    "bert-bare": Case("BertModel", transformers.BertConfig, _BERT, "encoder"),
    "roberta-masked": Case("RobertaForMaskedLM", transformers.RobertaConfig, _ROBERTA, "masked"),
    "roberta-classifier": Case("RobertaForSequenceClassification", transformers.RobertaConfig, _ROBERTA, "classifier"),
    "marian": Case("MarianMTModel", transformers.MarianConfig, _MARIAN, "seq2seq", (PAD, 33, 47, 68, 71, 90)),
    "bart": Case("BartForConditionalGeneration", transformers.BartConfig, _BART, "seq2seq"),
    "bart-bare": Case("BartModel", transformers.BartConfig, _BART, "bare-seq2seq"),
    "t5": Case("T5ForConditionalGeneration", transformers.T5Config, _T5, "seq2seq"),
    "flan-t5": Case(
        "T5ForConditionalGeneration",
        transformers.T5Config,
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "scale_decoder_outputs": False},
        "seq2seq",
    ),
    # tied by its file, as today's transformers writes it, and yet its outputs are not scaled
    "mt5": Case("MT5ForConditionalGeneration", transformers.MT5Config, _T5, "seq2seq"),
    "mamba": Case("MambaForCausalLM", transformers.MambaConfig, {**_MAMBA, "state_size": 4, "use_bias": True}),
    "mamba2": Case("Mamba2ForCausalLM", transformers.Mamba2Config, _MAMBA2),
    "mamba2-tied": Case(
        "Mamba2ForCausalLM", transformers.Mamba2Config, {**_MAMBA2, "n_groups": 1, "tie_word_embeddings": True}
    ),
    "qwen3-next": Case("Qwen3NextForCausalLM", transformers.Qwen3NextConfig, {**_NEXT, **_rope(50.0)}),
    "qwen3-next-biased": Case(
        "Qwen3NextForCausalLM",
        transformers.Qwen3NextConfig,
        {
            **_NEXT,
            **_rope(100.0, "llama3", **_LLAMA3, partial_rotary_factor=0.5),
            "attention_bias": True,
            "tie_word_embeddings": True,
            "linear_conv_kernel_dim": 2,
            "layer_types": ["full_attention", "linear_attention"] * 2,
            "num_experts": 4,
            "mlp_only_layers": [0, 1, 2, 3],
        },
    ),
    "qwen3.5": Case("Qwen3_5ForCausalLM", transformers.Qwen3_5TextConfig, _QWEN35),
    "qwen3.5-with-pictures": Case(
        "Qwen3_5ForConditionalGeneration",
        transformers.Qwen3_5Config,
        {
            "text_config": {**_QWEN35, "tie_word_embeddings": True},
            "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-yarn": Case("Qwen3ForCausalLM", transformers.Qwen3Config, {**_LLAMA, **_rope(100.0, "yarn", **_YARN)}),
    "kimi-linear": Case("KimiLinearForCausalLM", transformers.KimiLinearConfig, _KIMI),
    "kimi-linear-latent-queries": Case(
        "KimiLinearForCausalLM",
        transformers.KimiLinearConfig,
        {**_KIMI, "q_lora_rank": 10, "linear_num_heads": 1, "linear_conv_kernel_dim": 2},
    ),
    "qwen3": Case("Qwen3ForCausalLM", transformers.Qwen3Config, {**_LLAMA, "head_dim": 16, **_rope(1e6)}),
}


def make(case: Case, folder: Path, seed: int = 0, **changes: Any) -> Any:
    """Saves a model with a tokenizer to `folder`; returns transformers' model in evaluation mode.

    Every weight is moved away from zero and one, so that none can be mixed up unseen.
    """
    torch.manual_seed(seed)
    config = case.config(**{**case.options, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, case.cls)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name and "embed_positions" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    model.eval()
    if case.banned:
        model.generation_config.bad_words_ids = [[token] for token in case.banned]
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    return model


def tokenizer(size: int = VOCABULARY) -> tokenizers.Tokenizer:
    """Words w4, w5, ... after the special ones."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(4, size))]
    made = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def rows(seed: int, lengths: list[int]) -> list[list[int]]:
    """Random tokens, none special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def padded(lines: list[list[int]], fill: int = 7) -> tuple[Tensor, Tensor]:
    """Right-padded with an ordinary token, and the lengths."""
    longest = max(map(len, lines))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in lines]), torch.tensor(list(map(len, lines)))


def edit_weights(folder: Path, change: Any) -> None:
    """Rewrites model.safetensors by `change(tensors)`."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_json(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file."""
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**held, **values}))
