"""YOCO: against torch's own attention, and what one cache for many layers means in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilemma.errors import CapabilityError, ConfigError
from trilemma.mixers.yoco import YOCO
from trilemma.models import SequenceModel, build_model
from trilemma.nn.cache import KVCache
from trilemma.state import NoState


def pair(**options: Any) -> tuple[YOCO, YOCO]:
    """A writer and a reader, in float64 with weights that matter."""
    layers = YOCO(16, **options).double(), YOCO(16, producer=False, **options).double()
    with torch.no_grad():
        for parameter in (parameter for layer in layers for parameter in layer.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layers


def oracle(layer: YOCO, writer: YOCO) -> nn.MultiheadAttention:
    """torch's multi-head attention with the layer's queries and output, and the writer's keys and values."""
    attention = nn.MultiheadAttention(16, layer.num_heads, batch_first=True, dtype=torch.float64)
    assert writer.key_value is not None
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([layer.query.weight, writer.key_value.weight]))
        assert attention.in_proj_bias is not None
        attention.in_proj_bias.copy_(torch.cat([layer.query.bias, writer.key_value.bias]))
        attention.out_proj.load_state_dict(layer.out.state_dict())
    return attention


@pytest.mark.parametrize("causal", [True, False])
def test_readers_attend_to_what_the_writer_has_written(causal: bool, agrees: Callable[..., None]) -> None:
    writer, reader = pair(position="none", bias=True, causal=causal)
    memory, x = torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(2, 7, 16, dtype=torch.float64)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    shared: dict[str, Any] = {}
    first, _ = writer(memory, None, None, shared)
    second, _ = reader(x, None, None, shared)
    for kind, layer, queries, y in (("writes", writer, memory, first), ("reads", reader, x, second)):
        expected, _ = oracle(layer, writer)(queries, memory, memory, attn_mask=hidden, need_weights=False)
        agrees("yoco", f"layer that {kind}", y, expected, oracle="torch MultiheadAttention")


def test_positions_are_relative() -> None:
    """Rotation sees distances alone: the same tokens after a longer past that is hidden give the same scores."""
    writer, reader = pair(num_kv_heads=2)
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    shared: dict[str, Any] = {}
    writer(x, None, None, shared)
    y, _ = reader(x, None, None, shared)
    view = shared["yoco_cache"]
    turn = torch.full_like(view.angles, 0.7)

    def turned(values: Tensor, by: Tensor) -> Tensor:
        even, odd = values[..., 0::2], values[..., 1::2]
        return torch.stack([even * by.cos() - odd * by.sin(), odd * by.cos() + even * by.sin()], -1).flatten(-2)

    moved = {"yoco_cache": type(view)(turned(view.keys, turn), view.values, None, True, view.angles + turn)}
    torch.testing.assert_close(reader(x, None, None, moved)[0], y, rtol=1e-12, atol=1e-12)


def model(layers: int, **changes: Any) -> SequenceModel:
    values = {"layout": "decoder-only", "vocab_size": 11, "d_model": 16, "d_ff": 16, "num_heads": 4}
    mixer: list[Any] = ["retention", *[{"name": "yoco", "num_kv_heads": 2}] * (layers - 1)]
    return build_model(values | {"positions": "none", "num_layers": layers, "mixer": mixer} | changes)


def test_more_readers_keep_no_more() -> None:
    """One cache, however many layers read it: 2 G D elements a token."""
    few, many = model(2), model(6)
    growth = {model.state_bytes(50) - model.state_bytes(10) for model in (few, many)}
    assert growth == {40 * 2 * 2 * 4 * 4}
    with torch.no_grad():
        _, state = many.prefill(torch.randint(0, 11, (3, 10)))
    assert state.nbytes == 3 * many.state_bytes(10)
    kinds = [type(layer.parts[0]) for layer in state.layers.parts]  # type: ignore[union-attr]
    assert kinds[1:] == [KVCache, NoState, NoState, NoState, NoState]


def test_readers_have_no_keys() -> None:
    writer, *readers = [mixer for mixer in model(4).mixers() if isinstance(mixer, YOCO)]
    assert writer.key_value is not None
    assert all(reader.key_value is None for reader in readers)
    assert writer.count_parameters() - readers[0].count_parameters() == 16 * 2 * 2 * 4


@pytest.mark.parametrize(
    ("mixer", "error", "message"),
    [
        (
            [{"name": "yoco", "num_kv_heads": 2}, "yoco"],
            ConfigError,
            '"yoco" reads "yoco_cache" as a cache of 4 x 4, rotated by base 10000; '
            "it is published as a cache of 2 x 4, rotated",
        ),
        ([{"name": "yoco", "position": "none"}, "yoco"], ConfigError, "a cache of 4 x 4, without positions"),
        ({"name": "yoco", "num_kv_heads": 3}, ConfigError, "num_heads 4 is no multiple of num_kv_heads 3"),
        ({"name": "yoco", "head_dim": 3}, ConfigError, "rotary needs an even head_dim, found 3"),
        ({"name": "yoco", "producer": False}, ConfigError, "producer follows from the model"),
    ],
)
def test_a_users_mistake_is_named(mixer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        model(2, mixer=mixer)
    assert message in str(raised.value)


def test_an_encoder_needs_no_wrapper_and_the_wrapper_refuses() -> None:
    encoder = model(3, layout="encoder-only")
    assert [mixer.name for mixer in encoder.mixers()] == ["bidirectional", "yoco", "yoco"]
    assert not encoder.mixers()[1].causal
    with pytest.raises(CapabilityError, match=r'"yoco_cache" is a cache .* cannot be turned round or replayed'):
        model(2, layout="encoder-only", mixer={"name": "bidirectional", "inner": "yoco"})
