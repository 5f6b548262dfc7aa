"""Values that a layer makes for later layers: lawful alone on both sides, checked by the stack, kept for rewinding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilemma import registry
from trilemma.errors import CapabilityError, ConfigError
from trilemma.laws import check
from trilemma.mixers import base
from trilemma.mixers.base import Capabilities, Mixer, Shared
from trilemma.mixers.bidirectional import Bidirectional
from trilemma.models import SequenceModel, build_model
from trilemma.ragged import Ragged
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class Mean(State):
    mean: Tensor  # [rows, d_model]


class Carried(Mixer):
    """A moving average of values; later layers mix the first layer's values into their own."""

    capabilities = Capabilities(constant_state=True)

    def __init__(self, d_model: int, causal: bool = True, producer: bool = True, shape: int = 2) -> None:
        super().__init__(d_model, causal)
        self.producer = producer
        self.shape = (shape, d_model // shape)
        self.value = nn.Linear(d_model, d_model)
        self.mixing = None if producer else nn.Parameter(torch.full((d_model,), 0.3))

    def publishes(self) -> Mapping[str, tuple[int, ...]]:
        return {"first_value": self.shape} if self.producer else {}

    def reads(self) -> Mapping[str, tuple[int, ...]]:
        return {} if self.producer else {"first_value": self.shape}

    def new_state(self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device) -> Mean:
        dtype = torch.promote_types(dtype, torch.float32)
        return Mean(torch.zeros(rows, self.d_model, dtype=dtype, device=device))

    def first(self, value: Tensor, shared: Shared | None) -> Tensor:
        assert shared is not None
        if self.mixing is None:
            shared["first_value"] = value.unflatten(2, self.shape)
            return value
        return value + self.mixing * (shared["first_value"].flatten(2) - value)

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, State | None]:
        value = self.first(self.value(x), shared)
        mean = x.new_zeros(len(x), self.d_model)
        if isinstance(state, Mean):
            mean = state.mean
        valid = ragged.valid(x.shape[1]) if ragged is not None else None
        starts = ragged.starts if ragged is not None else None
        means = []
        for t in range(x.shape[1]):
            if starts is not None:
                mean = torch.where(starts[:, t, None], torch.zeros_like(mean), mean)
            new = 0.7 * mean + value[:, t]
            mean = new if valid is None else torch.where(valid[:, t, None], new, mean)
            means.append(mean)
        y = torch.stack(means, 1).to(x.dtype)
        return y, Mean(updated(state.mean, mean)) if isinstance(state, Mean) else None

    def flops(self, length: int, context: int = 0) -> int:
        return 2 * length * self.d_model**2

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        return self.d_model * torch.promote_types(dtype, torch.float32).itemsize


class Later(Carried):
    """Unlawful reader: it takes the values of the token before, within the call."""

    def first(self, value: Tensor, shared: Shared | None) -> Tensor:
        assert shared is not None
        return super().first(value, {"first_value": shared["first_value"].roll(1, 1)})


class Careless(Carried):
    """Unlawful reader: padding's values count."""

    def first(self, value: Tensor, shared: Shared | None) -> Tensor:
        assert shared is not None
        values = shared["first_value"]
        return super().first(value, {"first_value": values + values.flip(1)[:, :1]})


class Forgetful(Carried):
    """Unlawful producer: what it publishes depends on the tokens of this call only."""

    def first(self, value: Tensor, shared: Shared | None) -> Tensor:
        assert shared is not None
        shared["first_value"] = value.cumsum(1).unflatten(2, self.shape)
        return value


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.available_mixers()
    monkeypatch.setattr(registry, "_MIXERS", dict(registry._MIXERS))
    register_mixer("carried")(Carried)


def build(layout: str, mixer: Any = "carried", layers: int = 3) -> SequenceModel:
    values = {"layout": layout, "vocab_size": 11, "d_model": 8, "d_ff": 12, "num_layers": layers, "num_heads": 2}
    model = build_model(values | {"mixer": mixer, "positions": "none"}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.laws
@pytest.mark.parametrize("producer", [True, False], ids=["producer", "reader"])
def test_both_sides_are_lawful_alone(producer: bool) -> None:
    check(lambda: Carried(16, producer=producer), seed=3).require()


@pytest.mark.laws
@pytest.mark.parametrize("producer", [True, False], ids=["producer", "reader"])
def test_in_two_directions_both_sides_are_lawful(producer: bool) -> None:
    check(lambda: Bidirectional(16, causal=False, inner="carried", producer=producer), seed=3).require()


@pytest.mark.parametrize(
    ("mutant", "law"), [(Later, "split"), (Careless, "causality"), (Careless, "raggedness"), (Forgetful, "split")]
)
def test_an_unlawful_use_of_shared_values_is_found(mutant: type[Carried], law: str) -> None:
    report = check(lambda: mutant(16, producer=mutant is Forgetful), laws=[law], seed=3)
    assert [result.law for result in report.failures] == [law]
    assert report.subject == mutant.__name__


def test_a_replay_that_forgets_what_was_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = base._run

    def forgetful(mixer: Mixer, inputs: Tensor, *rest: Any) -> Any:
        blank = torch.cat([inputs[..., : mixer.d_model], torch.zeros_like(inputs[..., mixer.d_model :])], dim=-1)
        return right(mixer, blank, *rest)

    monkeypatch.setattr(base, "_run", forgetful)
    report = check(lambda: Carried(16, producer=False), laws=["state"], seed=3)
    assert "after rewind" in report["state"].reason


def test_the_first_layer_that_can_produces_and_the_others_read() -> None:
    model = build("decoder-only", ["lstm", "carried"], layers=6)
    carried = [mixer for mixer in model.mixers() if isinstance(mixer, Carried)]
    assert [mixer.producer for mixer in carried] == [True, False, False]
    encoder = build("encoder-only")
    assert [next(iter(mixer.publishes()), None) for mixer in encoder.mixers()] == ["ahead.first_value", None, None]


@pytest.mark.parametrize("layout", ["decoder-only", "encoder-decoder"])
def test_a_model_gives_the_same_whole_and_step_by_step(layout: str) -> None:
    model = build(layout)
    inputs, lengths = torch.randint(0, 11, (3, 9)), torch.tensor([4, 2, 3])
    source = {"source": torch.randint(0, 11, (3, 5))} if layout == "encoder-decoder" else {}
    whole = model.head(model(inputs, **source))
    with torch.no_grad():
        y, state = model.prefill(inputs[:, :4], lengths, rewind=2, **source)
        torch.testing.assert_close(y, whole[torch.arange(3), lengths - 1])
        _, state = model.step(torch.randint(0, 11, (3, 2)), state)
        state = state.rewind(torch.tensor([2, 2, 2]))
        for step in range(3):
            y, state = model.step(inputs.gather(1, (lengths + step)[:, None]), state)
            torch.testing.assert_close(y[:, 0], whole[torch.arange(3), lengths + step])


@pytest.mark.parametrize("layout", ["decoder-only", "encoder-only"])
def test_packed_and_padded_rows_of_a_model_are_what_they_are_alone(layout: str) -> None:
    model = build(layout)
    first, second = torch.randint(0, 11, (1, 4)), torch.randint(0, 11, (1, 3))
    alone = torch.cat([model(first), model(second)], dim=1)
    row = torch.cat([first, second, first[:, :1]], dim=1)
    packed = model(row, segments=torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]]))
    torch.testing.assert_close(packed[:, :7], alone)
    padded = model(torch.cat([second, first[:, :2]], dim=1), torch.tensor([3]))
    torch.testing.assert_close(padded[:, :3], alone[:, 4:])


def test_a_stack_refuses_values_that_nobody_or_everybody_makes() -> None:
    class Reader(Carried):
        def __init__(self, d_model: int, causal: bool = True) -> None:
            super().__init__(d_model, causal, producer=False)

    class Producer(Carried):
        def __init__(self, d_model: int, causal: bool = True) -> None:
            super().__init__(d_model, causal)

    register_mixer("reader")(Reader)
    register_mixer("maker")(Producer)
    build("decoder-only", ["maker", "reader", "carried"])
    with pytest.raises(ConfigError, match='mixer "reader" reads "first_value", which no layer before it publishes'):
        build("decoder-only", ["reader", "maker"])
    with pytest.raises(ConfigError, match='mixer "maker" publishes "first_value", which the stack has already'):
        build("decoder-only", ["maker", "maker"])
    with pytest.raises(ConfigError, match=r'reads "first_value" as \(4, 2\); it is published as \(2, 4\)'):
        build("decoder-only", ["carried", {"name": "carried", "shape": 4}])
    with pytest.raises(ConfigError, match="producer follows from the model, it is no option"):
        build("decoder-only", {"name": "carried", "producer": True})


def test_a_reader_alone_says_what_it_misses() -> None:
    with pytest.raises(CapabilityError, match='reads "first_value", which a layer before it must publish'):
        Carried(8, producer=False)(torch.randn(1, 2, 8))
    Carried(8)(torch.randn(1, 2, 8))  # a producer needs nobody
