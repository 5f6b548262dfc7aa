"""Models whose keys and values are in 8 bits: whole sequences and steps are one function, near the one without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trilemma.errors import CapabilityError, ConfigError
from trilemma.models import SequenceModel, build_model, cache_kind, cache_notes, hold_cache, path_of
from trilemma.registry import available_mixers, mixer_class

VOCABULARY = 101
KEEPERS = [name for name in available_mixers() if mixer_class(name).capabilities.keeps_keys]
CAUSAL = [name for name in KEEPERS if mixer_class(name).capabilities.causal]


def model_of(mixer: Any, layout: str = "decoder-only", **changes: Any) -> SequenceModel:
    torch.manual_seed(3)
    values = {"layout": layout, "vocab_size": VOCABULARY, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 2}
    return build_model({**values, "dropout": 0.0, "mixer": mixer, **changes}).eval().double()


@torch.no_grad()
def read(model: SequenceModel, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits [3, 6, V] of whole sequences, and of the same in steps."""
    ids = torch.randint(0, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))
    given = {"source": ids, "source_lengths": lengths} if model.layout == "encoder-decoder" else {}
    whole = model.head(model(ids, **given))
    last, state = model.prefill(ids[:, :3], **given)
    steps = [last]
    for position in range(3, 8):
        logits, state = model.step(ids[:, position : position + 1], state)
        steps.append(logits[:, -1])
    return whole[:, 2:], torch.stack(steps, dim=1)


def test_who_keeps_keys() -> None:
    assert set(KEEPERS) == {"attention", "block_sparse_attention", "cross_attention", "latent_attention", "yoco"}


WINDOWED = {"name": "attention", "window": 3}


@pytest.mark.parametrize("mixer", [*CAUSAL, WINDOWED], ids=str)
def test_steps_are_the_whole_and_near_what_they_were(mixer: Any) -> None:
    model = model_of(mixer)
    exact, _ = read(model)
    hold_cache(model, "int8")
    whole, steps = read(model)
    assert torch.allclose(steps, whole, rtol=0, atol=1e-10)
    difference = float((whole - exact).norm() / exact.norm())
    assert 1e-6 < difference < 0.03
    assert path_of(model) == "plain/cpu/float64+cache-int8"
    hold_cache(model, None)
    assert torch.equal(read(model)[0], exact)
    assert path_of(model) == "plain/cpu/float64"


def test_an_encoder_s_memory_is_in_eight_bits_and_the_encoder_is_not() -> None:
    model = model_of("attention", "encoder-decoder")
    lengths = torch.tensor([8, 1, 5])
    exact, _ = read(model, lengths)
    encoded = model.encode(torch.ones(1, 4, dtype=torch.long))
    hold_cache(model, "int8")
    assert torch.equal(model.encode(torch.ones(1, 4, dtype=torch.long)), encoded)
    whole, steps = read(model, lengths)
    assert torch.allclose(steps, whole, rtol=0, atol=1e-10)
    assert 1e-6 < float((whole - exact).norm() / exact.norm()) < 0.03


def test_packed_rows_read_the_same_codes() -> None:
    model = model_of("attention")
    hold_cache(model, "int8")
    ids = torch.randint(0, VOCABULARY, (1, 7))
    with torch.no_grad():
        packed = model(ids, segments=torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
        alone = torch.cat([model(ids[:, :3]), model(ids[:, 3:])], dim=1)
    assert torch.allclose(packed, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixer", CAUSAL)
def test_a_state_is_smaller_and_declared_is_counted(mixer: str) -> None:
    ids = torch.zeros(2, 20, dtype=torch.long)
    found = []
    for kind in (None, "int8"):
        model = model_of(mixer, num_heads=1).float()
        hold_cache(model, cache_kind(kind))
        with torch.no_grad():
            _, state = model.prefill(ids)
        assert state.nbytes == 2 * (
            model.state_bytes(20) + sum(t.nbytes for t in state.positions.tensors().values() if t.is_floating_point())
        )
        assert state.capacity_nbytes >= state.nbytes
        found.append(state.nbytes)
    assert found[1] < (0.7 if mixer == "block_sparse_attention" else 0.3) * found[0]


def test_what_stays_as_it_was_is_said() -> None:
    hybrid = model_of(["retention", "attention", "gru"], num_layers=3)
    hold_cache(hybrid, "int8")
    assert cache_notes(hybrid.mixers()) == ["without keys and values, and as before: gru, retention"]
    assert path_of(hybrid).endswith("+cache-int8")
    plain = model_of("retention")
    hold_cache(plain, "int8")
    assert cache_notes(plain.mixers()) == [
        "no layer of this model keeps keys and values: a cache in 8 bits changes nothing"
    ]
    assert path_of(plain) == "plain/cpu/float64"
    full = model_of("attention")
    hold_cache(full, "int8")
    assert cache_notes(full.mixers()) == []


def test_refusals() -> None:
    with pytest.raises(ConfigError, match='unknown cache "int9"; did you mean "int8"'):
        cache_kind("int9")
    model = model_of("attention")
    hold_cache(model, "int8")
    with pytest.raises(CapabilityError, match="a cache in 8 bits is for inference"):
        model(torch.zeros(1, 3, dtype=torch.long))
