"""Mixing matrices: times the values they are what the layer computed, for every mixer that has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trilemma.laws.registered import _factory, describe
from trilemma.laws.subject import Subject
from trilemma.mixers.base import MemoryMixer
from trilemma.models import build_model
from trilemma.ops.attention import attend
from trilemma.ops.mixing import MixingCall, mixes, watched
from trilemma.registry import available_mixers, mixer_class
from trilemma.show import Map, Reading, collect

LENGTH = 21
# What adds up no values by one weight for each pair of tokens.
WITHOUT = {"conv", "gru", "lstm", "ngram", "rnn", "slstm"}
VARIANTS = [
    pytest.param(name, variant, id=f"{name} {describe(variant)}".strip())
    for name in available_mixers()
    for variant in mixer_class(name).law_variants()
]


def calls_of(name: str, variant: dict[str, Any]) -> list[MixingCall]:
    """What a mixer with random weights calls for one row of random tokens."""
    mixer = Subject(_factory(mixer_class(name), variant), seed=4).example.double()
    x = torch.randn(1, LENGTH, mixer.d_model, dtype=torch.float64)
    state = mixer.remember(torch.randn(1, 5, mixer.memory_width).double()) if isinstance(mixer, MemoryMixer) else None
    shared = {key: torch.randn(shape, dtype=torch.float64) for key, shape in mixer.shared_inputs().items()}
    with watched() as calls, torch.no_grad():
        mixer(x, state, None, shared)
    return calls


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_matrix_times_the_values_is_the_output(name: str, variant: dict[str, Any]) -> None:
    calls = calls_of(name, variant)
    inner = variant.get("inner", name)
    inner = inner if isinstance(inner, str) else inner["name"]
    if inner in WITHOUT:
        assert not calls
        return
    assert calls, f"{name} has no mixing matrix: declare its operator linear (@mixes), or name it in WITHOUT"
    for call in calls:
        matrix = call.matrix()
        assert call.error(matrix) < 1e-11
        assert matrix.shape == (*call.mixed.shape[:3], call.values.shape[2])
    assert max(float(call.mixed.detach().abs().max()) for call in calls) > 1e-3


def test_attentions_matrix_is_its_softmax() -> None:
    queries, keys, values = (torch.randn(2, heads, 6, 4, dtype=torch.float64) for heads in (4, 2, 2))
    with watched() as calls:
        attend(queries, keys, values, is_causal=True)
    scores = queries @ keys.repeat_interleave(2, dim=1).transpose(-1, -2) / 2
    expected = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    torch.testing.assert_close(calls[0].matrix(), expected)


def test_only_the_outermost_operator_is_seen_and_only_while_somebody_watches() -> None:
    @mixes("x", axes="blh")
    def inner(x: Tensor, scale: float = 2.0) -> Tensor:
        return x.cumsum(1) * scale

    @mixes("x", axes="blhf")
    def outer(x: Tensor) -> tuple[Tensor, None]:
        return inner(x.flatten(2)).view(x.shape), None

    x = torch.randn(1, 4, 2, 3)
    with watched() as calls:
        y, _ = outer(x)
        with pytest.raises(AttributeError):
            outer(None)  # type: ignore[arg-type]
        inner(x.flatten(2), scale=3.0)
    outer(x)
    assert [call.name for call in calls] == ["outer", "inner"]
    assert calls[0].error(calls[0].matrix()) < 1e-6
    torch.testing.assert_close(calls[0].matrix(), 2 * torch.ones(4, 4).tril().expand(1, 2, 4, 4))
    torch.testing.assert_close(calls[1].matrix(), 3 * torch.ones(4, 4).tril().expand(1, 6, 4, 4))
    torch.testing.assert_close(y, calls[0].mixed.transpose(1, 2))


def test_an_operator_that_is_not_what_it_says_has_a_large_error() -> None:
    @mixes("v")
    def squared(v: Tensor) -> Tensor:
        return v.cumsum(2).square()

    with watched() as calls:
        squared(torch.randn(1, 1, 5, 2))
    assert calls[0].error(calls[0].matrix()) > 0.01


def maps_of(layout: str, mixer: Any, layers: set[int] | None = None) -> tuple[list[Map], Reading]:
    values = {"layout": layout, "vocab_size": 11, "d_model": 8, "d_ff": 8, "num_layers": 2, "num_heads": 2}
    model = build_model(values | {"mixer": mixer, "dropout": 0.5}).double().eval()
    source = [1, 2, 3, 4, 5] if layout == "encoder-decoder" else None
    reading = Reading([3, 1, 4, 1, 5, 9, 2], source, None, list("3141592"), list("12345") if source else [], None)
    return collect(model, reading, layers), reading


def test_an_encoder_decoder_shows_both_stacks_and_the_alignments() -> None:
    maps, _ = maps_of("encoder-decoder", ["attention", "lstm"])
    assert [(m.title, m.columns, None if m.matrix is None else tuple(m.matrix.shape)) for m in maps] == [
        ("encoder layer 1: attention (attend)", "inputs", (2, 5, 5)),
        ("encoder layer 2: lstm ahead", "inputs", None),
        ("encoder layer 2: lstm back", "inputs", None),
        ("decoder layer 1: attention (attend)", "inputs", (2, 7, 7)),
        ("decoder layer 1: cross_attention (attend)", "source", (2, 7, 5)),
        ("decoder layer 2: lstm", "inputs", None),
        ("decoder layer 2: cross_attention (attend)", "source", (2, 7, 5)),
    ]
    alignment = maps[4].matrix
    assert alignment is not None
    torch.testing.assert_close(alignment.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    assert len({shown.file for shown in maps}) == len(maps)


def test_the_second_direction_of_an_encoder_reads_what_comes_after() -> None:
    maps, _ = maps_of("encoder-only", "retention", {2})
    ahead, back = (shown.matrix for shown in maps)
    assert [shown.layer for shown in maps] == [2, 2]
    assert ahead is not None
    assert back is not None
    assert torch.equal(ahead, ahead.tril())
    assert torch.equal(back, back.triu())
    assert bool((ahead[:, 1, 0] != 0).all())
    assert bool((back[:, 0, 1] != 0).all())


def test_nothing_is_left_behind() -> None:
    """Hooks are removed and nobody watches, also after a failure."""
    from trilemma.ops import mixing

    maps_of("decoder-only", "retention")
    with pytest.raises(RuntimeError), watched():
        raise RuntimeError
    assert mixing._watching == []
