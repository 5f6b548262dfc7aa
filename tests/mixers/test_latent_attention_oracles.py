"""Latent attention against transformers' DeepSeek-V3 and, without rotation, Kimi Linear; whole, cached and in steps.

Theirs rotates the same pairs of neighbours and then sorts them; scores do not see the order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DynamicCache, KimiLinearConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention

from trilemma.errors import ConfigError
from trilemma.mixers.latent_attention import LatentAttention
from trilemma.ragged import Ragged

ROWS, LENGTH, D_MODEL, HEADS = 2, 13, 24, 3
TIGHT = {"rtol": 0.0, "atol": 1e-12}
NAMES = {"deepseek": "transformers DeepseekV3Attention", "kimi": "transformers KimiLinearAttention"}
# Wide latents: both forms are met. Narrow ones: absorbed throughout.
SIZES: dict[str, dict[str, int]] = {
    "wide": {"head_dim": 6, "value_dim": 10, "kv_lora_rank": 20, "rope_head_dim": 4},
    "narrow": {"head_dim": 8, "value_dim": 8, "kv_lora_rank": 5, "rope_head_dim": 6, "q_lora_rank": 7},
}


def pair(kind: str, sizes: dict[str, int], causal: bool = True, dtype: torch.dtype = torch.float64) -> Any:
    """Our mixer and theirs with the same random weights."""
    ours = LatentAttention(D_MODEL, causal, HEADS, rotary=kind == "deepseek", **sizes).to(dtype)
    names = {"kv_lora_rank": "kv_lora_rank", "head_dim": "qk_nope_head_dim", "value_dim": "v_head_dim"}
    options = {theirs: sizes[own] for own, theirs in names.items()}
    config_class: Any = {"deepseek": DeepseekV3Config, "kimi": KimiLinearConfig}[kind]
    config = config_class(
        hidden_size=D_MODEL,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=sizes.get("q_lora_rank"),
        qk_rope_head_dim=sizes["rope_head_dim"],
        attn_implementation="eager" if dtype == torch.float32 else "sdpa",  # eager rounds its softmax to float32
        **options,
    )
    oracle: Any = (DeepseekV3Attention if kind == "deepseek" else KimiLinearAttention)(config, 0).to(dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
        queries, latents = ours.down.weight.split([ours.widths[0], sum(ours.widths[1:])])
        oracle.kv_a_proj_with_mqa.weight.copy_(latents)
        oracle.kv_a_layernorm.weight.copy_(ours.latent_norm.weight)
        oracle.kv_b_proj.weight.copy_(ours.up.weight)
        oracle.o_proj.weight.copy_(ours.out.weight)
        if ours.query_norm is not None and ours.query_up is not None:
            oracle.q_a_proj.weight.copy_(queries)
            oracle.q_a_layernorm.weight.copy_(ours.query_norm.weight)
            oracle.q_b_proj.weight.copy_(ours.query_up.weight)
        else:
            oracle.q_proj.weight.copy_(queries)
    if dtype == torch.float64:  # the same norms without their rounding to float32
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if getattr(oracle, name) is not None:
                setattr(oracle, name, unrounded(getattr(oracle, name)))
    return ours, oracle.eval()


def unrounded(norm: Any) -> nn.RMSNorm:
    result = nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon, dtype=torch.float64)
    result.weight = norm.weight
    return result


def run(oracle: Any, x: Tensor, causal: bool = True, cache: Any = None, begin: int = 0) -> Tensor:
    """Their output for tokens from `begin` on."""
    length = x.shape[1]
    mask = torch.zeros(1, 1, length, begin + length, dtype=x.dtype)
    if causal:
        mask += torch.full_like(mask, -torch.inf).triu(begin + 1)
    arguments: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache}
    if isinstance(oracle, DeepseekV3Attention):
        place = torch.arange(begin, begin + length, dtype=x.dtype)[None]
        if x.dtype == torch.float64:  # their table is made in float32
            half = oracle.qk_rope_head_dim // 2
            angles = place[..., None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
            angles = torch.cat([angles, angles], dim=-1)
            arguments["position_embeddings"] = angles.cos(), angles.sin()
        else:
            arguments["position_embeddings"] = DeepseekV3RotaryEmbedding(oracle.config)(x, place.long())
    y: Tensor = oracle(x, **arguments)[0]
    return y


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(ROWS, LENGTH, D_MODEL, dtype=dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["deepseek", "kimi"])
def test_whole_sequences_and_gradients(kind: str, sizes: str, causal: bool, agrees: Callable[..., None]) -> None:
    ours, oracle = pair(kind, SIZES[sizes], causal)
    assert ours._absorbs(LENGTH, LENGTH) == (sizes == "narrow")
    first, second = (x.requires_grad_() for x in inputs().expand(2, -1, -1, -1).clone())
    want, (got, _) = run(oracle, first, causal), ours(second)
    agrees("latent_attention", "layer", got, want, oracle=NAMES[kind])
    weights = torch.randn_like(want)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    assert first.grad is not None
    found, wanted = (second.grad, ours.up.weight.grad), (first.grad, oracle.kv_b_proj.weight.grad)
    agrees("latent_attention", "gradients of the layer", found, wanted, oracle=NAMES[kind])


@pytest.mark.parametrize("plan", [[13], [1] * 13, [5, 1, 4, 1, 1, 1], [1, 6, 6]])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["deepseek", "kimi"])
def test_cached_calls(kind: str, sizes: str, plan: list[int], agrees: Callable[..., None]) -> None:
    """Theirs expands every latent in every call; ours does not in steps."""
    ours, oracle = pair(kind, SIZES[sizes])
    x, cache, begin = inputs(), DynamicCache(), 0
    with torch.no_grad():
        state = ours.init_state(ROWS)
        for part in x.split(plan, dim=1):
            want = run(oracle, part, True, cache, begin)
            got, state = ours(part, state)
            agrees("latent_attention", "layer in cached calls", got, want, oracle=NAMES[kind])
            begin += part.shape[1]


@pytest.mark.parametrize("sizes", SIZES)
def test_as_it_comes_in_float32(sizes: str) -> None:
    ours, oracle = pair("deepseek", SIZES[sizes], dtype=torch.float32)
    x = inputs(torch.float32)
    torch.testing.assert_close(ours(x)[0], run(oracle, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_no_shared_part_at_all(sizes: str) -> None:
    ours, oracle = pair("kimi", {**SIZES[sizes], "rope_head_dim": 0})
    x = inputs()
    torch.testing.assert_close(ours(x)[0], run(oracle, x), **TIGHT)


def test_the_comparison_can_fail() -> None:
    ours, oracle = pair("deepseek", SIZES["wide"])
    x = inputs()
    ours.rotary_base = 9000.0
    assert (ours(x)[0] - run(oracle, x)).abs().max() > 1e-4


def test_both_forms_are_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced, for padded rows with a prefix and a State, at sizes where a call would choose either."""
    mixer = LatentAttention(D_MODEL, num_heads=HEADS).double()
    x, lengths = inputs(), torch.tensor([LENGTH, 6])
    ragged = Ragged(lengths=lengths, prefix=torch.tensor([4, 2]))
    results = []
    for absorbed in (True, False):
        monkeypatch.setattr(mixer, "_absorbs", lambda length, held, absorbed=absorbed: absorbed)
        whole, _ = mixer(x, None, ragged)
        first, state = mixer(x, mixer.init_state(ROWS), ragged)
        second, _ = mixer(x[:, :3], state)
        results.append((whole[1, :6], first[1, :6], whole[0], first[0], second))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


def test_a_step_holds_and_makes_latents_only() -> None:
    """The State is [capacity, C + R] a row, and no tensor as large as one head's keys for every head is made."""
    mixer = LatentAttention(D_MODEL, num_heads=HEADS)
    width, held = mixer.kv_lora_rank + mixer.rope_head_dim, 500
    with torch.no_grad():
        state = mixer.init_state(1, capacity=held + 1)
        assert state.capacity_nbytes == 4 * (held + 1) * width
        _, state = mixer(torch.randn(1, held, D_MODEL), state)
        with torch.profiler.profile(profile_memory=True) as profile:
            mixer(torch.randn(1, 1, D_MODEL), state)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 4 * held * HEADS * mixer.head_dim


def test_an_odd_rotated_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="even rope_head_dim"):
        LatentAttention(D_MODEL, num_heads=HEADS, rope_head_dim=3)
