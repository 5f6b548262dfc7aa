"""Attention against what others wrote: torch.nn.MultiheadAttention and transformers' Llama, Qwens, T5 and Bloom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config, Qwen3NextConfig, T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotate
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from trilemma.errors import ConfigError
from trilemma.mixers.attention import Attention
from trilemma.mixers.cross_attention import CrossAttention
from trilemma.nn.positions import RotaryScaling, alibi_slopes, rotate, t5_buckets, xpos_scale
from trilemma.ragged import Ragged

ROWS, LENGTH, D_MODEL, HEADS = 3, 11, 24, 4
TIGHT = {"rtol": 0.0, "atol": 1e-12}
TORCHS = "torch MultiheadAttention"


def inputs(length: int = LENGTH) -> Tensor:
    return torch.randn(ROWS, length, D_MODEL, dtype=torch.float64)


def causal_mask(length: int = LENGTH) -> Tensor:
    """[length, length] 0 where allowed, else minus infinity."""
    return torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)


def torchs_own(mixer: Attention) -> nn.MultiheadAttention:
    oracle = nn.MultiheadAttention(D_MODEL, HEADS, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(mixer.qkv.weight)
        oracle.in_proj_bias.copy_(mixer.qkv.bias)
        oracle.out_proj.weight.copy_(mixer.out.weight)
        oracle.out_proj.bias.copy_(mixer.out.bias)
    return oracle


def randomised(mixer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))


def test_causal_attention_is_torchs(agrees: Callable[..., None]) -> None:
    mixer = Attention(D_MODEL, num_heads=HEADS).double()
    randomised(mixer)
    x = inputs()
    want, _ = torchs_own(mixer)(x, x, x, attn_mask=causal_mask())
    agrees("attention", "layer", mixer(x)[0], want, oracle=TORCHS)


@pytest.mark.parametrize("padded", [False, True])
def test_bidirectional_attention_is_torchs(padded: bool) -> None:
    mixer = Attention(D_MODEL, causal=False, num_heads=HEADS).double()
    randomised(mixer)
    x = inputs()
    lengths = torch.tensor([LENGTH, 4, 1])
    valid = torch.arange(LENGTH) < lengths[:, None]
    want, _ = torchs_own(mixer)(x, x, x, key_padding_mask=~valid if padded else None)
    got, _ = mixer(x, None, Ragged(lengths=lengths) if padded else None)
    where = valid if padded else torch.ones_like(valid)
    torch.testing.assert_close(got[where], want[where], **TIGHT)


def test_gradients_are_torchs(agrees: Callable[..., None]) -> None:
    mixer = Attention(D_MODEL, num_heads=HEADS).double()
    randomised(mixer)
    oracle, x = torchs_own(mixer), inputs()
    weights = torch.randn_like(x)
    (oracle(x, x, x, attn_mask=causal_mask())[0] * weights).sum().backward()
    (mixer(x)[0] * weights).sum().backward()
    assert oracle.in_proj_weight.grad is not None
    got, want = mixer.qkv.weight.grad, oracle.in_proj_weight.grad
    agrees("attention", "gradients of the layer", got, want, oracle=TORCHS)


@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_is_torchs(padded: bool, agrees: Callable[..., None]) -> None:
    mixer = CrossAttention(D_MODEL, num_heads=HEADS).double()
    randomised(mixer)
    oracle = nn.MultiheadAttention(D_MODEL, HEADS, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.cat([mixer.query.weight, mixer.key_value.weight]))
        oracle.in_proj_bias.copy_(torch.cat([mixer.query.bias, mixer.key_value.bias]))
        oracle.out_proj.weight.copy_(mixer.out.weight)
        oracle.out_proj.bias.copy_(mixer.out.bias)
    x, memory = inputs(5), inputs(7)
    lengths = torch.tensor([7, 2, 4]) if padded else None
    mask = None if lengths is None else torch.arange(7) >= lengths[:, None]
    want, _ = oracle(x, memory, memory, key_padding_mask=mask)
    got, _ = mixer(x, mixer.remember(memory, lengths))
    agrees("cross_attention", "layer", got, want, oracle=TORCHS)


@pytest.mark.parametrize("interval", [1, 2])
def test_grouped_heads_are_repeated_heads(interval: int) -> None:
    """Grouped-query attention is multi-head attention whose key and value weights repeat within a group."""
    grouped = Attention(D_MODEL, num_heads=HEADS, num_kv_heads=HEADS // (2 * interval), position="rotary").double()
    randomised(grouped)
    full = Attention(D_MODEL, num_heads=HEADS, position="rotary").double()
    share = HEADS // grouped.num_kv_heads
    width, kv_width = D_MODEL, grouped.kv_width
    with torch.no_grad():
        for target, source in ((full.qkv.weight, grouped.qkv.weight), (full.qkv.bias, grouped.qkv.bias)):
            query, key, value = source.split([width, kv_width, kv_width])
            heads = [part.unflatten(0, (-1, grouped.head_dim)).repeat_interleave(share, 0) for part in (key, value)]
            target.copy_(torch.cat([query, *(part.flatten(0, 1) for part in heads)]))
        full.out.load_state_dict(grouped.out.state_dict())
    x = inputs()
    torch.testing.assert_close(grouped(x)[0], full(x)[0], **TIGHT)


def test_rotary_grouped_attention_is_llamas(agrees: Callable[..., None]) -> None:
    config = LlamaConfig(
        hidden_size=D_MODEL, num_attention_heads=HEADS, num_key_value_heads=2, attn_implementation="eager"
    )
    oracle = LlamaAttention(config, layer_idx=0).double()
    randomised(oracle)
    mixer = Attention(
        D_MODEL, num_heads=HEADS, num_kv_heads=2, position="rotary", rotary_interleaved=False, bias=False
    ).double()
    projections = (oracle.q_proj.weight, oracle.k_proj.weight, oracle.v_proj.weight)
    mixer.load_state_dict({"qkv.weight": torch.cat(projections), "out.weight": oracle.o_proj.weight})
    x = inputs()
    embedding = LlamaRotaryEmbedding(config).double()
    positions = embedding(x, torch.arange(LENGTH)[None])
    want, _ = oracle(x, position_embeddings=positions, attention_mask=causal_mask()[None, None])
    # transformers computes angles in float32
    llamas = "transformers LlamaAttention"
    agrees("attention", "layer with rotation and shared keys", mixer(x)[0], want, oracle=llamas, share=1e-5)


def test_normalised_queries_and_keys_are_qwens(agrees: Callable[..., None]) -> None:
    config = Qwen3Config(
        hidden_size=D_MODEL, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=6, attn_implementation="eager"
    )
    oracle = Qwen3Attention(config, layer_idx=0).double()
    randomised(oracle)
    mixer = Attention(
        D_MODEL,
        num_heads=HEADS,
        num_kv_heads=2,
        position="rotary",
        rotary_interleaved=False,
        bias=False,
        qk_norm=True,
    ).double()
    mixer.load_state_dict(
        {
            "qkv.weight": torch.cat([oracle.q_proj.weight, oracle.k_proj.weight, oracle.v_proj.weight]),
            "out.weight": oracle.o_proj.weight,
            "query_norm.weight": oracle.q_norm.weight,
            "key_norm.weight": oracle.k_norm.weight,
        }
    )
    x = inputs()
    positions = LlamaRotaryEmbedding(config).double()(x, torch.arange(LENGTH)[None])
    want, _ = oracle(x, position_embeddings=positions, attention_mask=causal_mask()[None, None])
    qwens = "transformers Qwen3Attention"
    agrees("attention", "layer with normalised queries and keys", mixer(x)[0], want, oracle=qwens, share=1e-5)


def test_gated_half_rotated_attention_is_qwen3_nexts(agrees: Callable[..., None]) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0}
    config = Qwen3NextConfig(
        hidden_size=D_MODEL,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "yarn", "rope_theta": 100.0, "partial_rotary_factor": 0.5, **scaling},
        attn_implementation="eager",
    )
    oracle = Qwen3NextAttention(config, layer_idx=0).double()
    randomised(oracle)
    mixer = Attention(
        D_MODEL,
        num_heads=HEADS,
        num_kv_heads=2,
        head_dim=8,
        position="rotary",
        rotary_base=100.0,
        rotary_interleaved=False,
        rotary_dim=4,
        rotary_scaling=RotaryScaling("yarn", 4.0, original_length=32, high=4.0),
        qk_norm=True,
        output_gate=True,
        bias=False,
    ).double()
    queries, gate = (part.flatten(0, 1) for part in oracle.q_proj.weight.unflatten(0, (HEADS, 2, 8)).unbind(1))
    mixer.load_state_dict(
        {
            "qkv.weight": torch.cat([queries, oracle.k_proj.weight, oracle.v_proj.weight, gate]),
            "out.weight": oracle.o_proj.weight,
            "query_norm.weight": 1 + oracle.q_norm.weight,
            "key_norm.weight": 1 + oracle.k_norm.weight,
        }
    )
    x = inputs()
    positions = Qwen3NextRotaryEmbedding(config).double()(x, torch.arange(LENGTH)[None])
    want, _ = oracle(x, position_embeddings=positions, attention_mask=causal_mask()[None, None])
    what, qwens = "layer with a gate, half rotated, scaled by yarn", "transformers Qwen3NextAttention"
    agrees("attention", what, mixer(x)[0], want, oracle=qwens, share=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"rotary_dim": 3}, {"rotary_dim": 0}, {"rotary_dim": 8}, {"rotary_dim": 4, "position": "xpos"}],
    ids=str,
)
def test_a_rotated_part_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rotary_dim needs position rotary and an even number of a head's 6"):
        Attention(D_MODEL, num_heads=HEADS, **{"position": "rotary", **options})


def test_interleaved_rotation_is_gptjs() -> None:
    x = torch.randn(2, HEADS, LENGTH, 8, dtype=torch.float64)
    angles = torch.arange(LENGTH, dtype=torch.float64)[:, None] * 10000.0 ** -(torch.arange(4) / 4)
    want = gptj_rotate(x.transpose(1, 2), angles.sin()[None], angles.cos()[None]).transpose(1, 2)
    torch.testing.assert_close(rotate(x, angles[None]), want, **TIGHT)


@pytest.mark.parametrize("causal", [True, False])
def test_t5_bias_is_t5s(causal: bool, agrees: Callable[..., None]) -> None:
    config = T5Config(
        d_model=D_MODEL, d_kv=6, num_heads=HEADS, is_decoder=causal, dropout_rate=0.0, attn_implementation="eager"
    )
    oracle = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    randomised(oracle)
    mixer = Attention(D_MODEL, causal=causal, num_heads=HEADS, position="t5", scale=1.0, bias=False).double()
    mixer.load_state_dict(
        {
            "qkv.weight": torch.cat([oracle.q.weight, oracle.k.weight, oracle.v.weight]),
            "out.weight": oracle.o.weight,
            "t5_bias": oracle.relative_attention_bias.weight,
        }
    )
    x = inputs(140)[:1]  # beyond the largest distance that has a bucket of its own
    mask = causal_mask(140)[None, None] if causal else torch.zeros(1, 1, 140, 140, dtype=torch.float64)
    want = oracle(x, mask=mask)[0]
    t5s = "transformers T5Attention"
    agrees("attention", "layer with T5's biases", mixer(x)[0], want, oracle=t5s)


@pytest.mark.parametrize("causal", [True, False])
def test_t5_buckets_are_t5s(causal: bool) -> None:
    distance = torch.arange(-300, 301)
    want = T5Attention._relative_position_bucket(distance, bidirectional=not causal)
    assert torch.equal(t5_buckets(distance, causal), want)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16, 20])
def test_alibi_slopes_are_blooms(heads: int, agrees: Callable[..., None]) -> None:
    biases = build_alibi_tensor(torch.ones(1, 5), heads, torch.float32).view(heads, 5)
    want = biases[:, 4] - biases[:, 3]
    blooms = "transformers build_alibi_tensor (Bloom)"
    agrees("attention", "ALiBi's slopes", torch.tensor(alibi_slopes(heads)), want, oracle=blooms)


def test_alibi_is_a_penalty_on_distance() -> None:
    """Bloom's whole attention: scores plus slope * (j - i)."""
    mixer = Attention(D_MODEL, num_heads=HEADS, position="alibi").double()
    randomised(mixer)
    x = inputs()
    q, k, v = (t.view(ROWS, LENGTH, HEADS, -1).transpose(1, 2) for t in mixer.qkv(x).chunk(3, dim=-1))
    distance = torch.arange(LENGTH)[None, :] - torch.arange(LENGTH)[:, None]
    slopes = torch.tensor(alibi_slopes(HEADS), dtype=torch.float64)[:, None, None]
    scores = q @ k.transpose(-1, -2) / (D_MODEL // HEADS) ** 0.5 + slopes * distance + causal_mask()
    want = mixer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x)[0], want, **TIGHT)


def test_xpos_scores_decay_with_distance_alone() -> None:
    """q_n k_m depends on n - m, and a pair of features shrinks by zeta^(distance / scale base) (equation 12)."""
    dim, base = 8, 16.0
    q, k = torch.randn(dim, dtype=torch.float64), torch.randn(dim, dtype=torch.float64)
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    zeta = (torch.arange(0, dim, 2, dtype=torch.float64) / dim + 0.4) / 1.4

    def placed(vector: Tensor, position: int, sign: int) -> Tensor:
        positions = torch.tensor([[position]])
        scale = xpos_scale(positions, dim, base, sign, torch.float64)
        return rotate(vector.view(1, 1, 1, dim), positions[..., None] * frequencies, True, scale).flatten()

    for query, key in ((5, 5), (9, 2), (107, 100)):
        got = placed(q, query, 1) @ placed(k, key, -1)
        distance = query - key
        pair_q, pair_k = torch.view_as_complex(q.view(-1, 2)), torch.view_as_complex(k.view(-1, 2))
        turned = (pair_q * pair_k.conj() * torch.polar(zeta ** (distance / base), distance * frequencies)).real
        torch.testing.assert_close(got, turned.sum(), **TIGHT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 3, 50])
def test_a_window_is_a_band_of_the_mask(causal: bool, window: int) -> None:
    mixer = Attention(D_MODEL, causal=causal, num_heads=HEADS, window=window).double()
    randomised(mixer)
    x = inputs()
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    allowed = (distance.abs() < window) & ((distance >= 0) | (not causal))
    want, _ = torchs_own(mixer)(x, x, x, attn_mask=~allowed)
    torch.testing.assert_close(mixer(x)[0], want, **TIGHT)


def test_a_prefix_is_a_block_of_the_mask() -> None:
    mixer = Attention(D_MODEL, num_heads=HEADS).double()
    randomised(mixer)
    x, prefix = inputs(), torch.tensor([0, 4, LENGTH])
    got, _ = mixer(x, None, Ragged(prefix=prefix))
    for row in range(ROWS):
        allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        allowed[:, : int(prefix[row])] = True
        want, _ = torchs_own(mixer)(x[row], x[row], x[row], attn_mask=~allowed)
        torch.testing.assert_close(got[row], want, **TIGHT)
