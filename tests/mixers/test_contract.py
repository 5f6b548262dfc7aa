"""The contract's refusals and errors; what it promises about answers is a law."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trilemma.errors import CapabilityError, ConfigError
from trilemma.mixers.base import Replay
from trilemma.mixers.build import build_mixer
from trilemma.mixers.gru import GRU
from trilemma.ragged import Ragged
from trilemma.state import State


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attention", {"windw": 3}, 'mixer "attention": unknown option "windw"; did you mean "window"?'),
        ("attention", {"num_heads": 5}, "d_model 16 is no multiple of num_heads 5"),
        ("attention", {"num_kv_heads": 3}, "num_heads 4 is no multiple of num_kv_heads 3"),
        ("attention", {"position": "rope"}, "option position: Input should be 'none', 'rotary'"),
        ("attention", {"position": "rotary", "head_dim": 3}, "rotary needs an even head_dim, found 3"),
        ("attention", {"window": 0}, "window must be at least 1, found 0"),
        ("retention", {"decay": "fast"}, "option decay: Input should be 'paper', 'experiments'"),
        ("retention", {"head_dim": 5}, "needs an even head_dim, found 5"),
        ("cross_attention", {"num_heads": 5}, "d_model 16 is no multiple of num_heads 5"),
        ("bidirectional", {"causal": False, "inner": {}}, 'needs the key "name"'),
        ("bidirectional", {"causal": False, "inner": "lstmm"}, 'unknown mixer "lstmm"; did you mean "lstm"?'),
        ("bidirectional", {"causal": False, "inner": "cross_attention"}, "reads a memory"),
        ("gruu", {}, 'unknown mixer "gruu"; did you mean "gru"?'),
    ],
)
def test_a_users_mistake_is_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_mixer(name, 16, **options)
    assert message in str(error.value)


def test_directions_that_a_mixer_cannot_work_in() -> None:
    with pytest.raises(CapabilityError, match='"gru" is causal only; in encoders wrap it'):
        build_mixer("gru", 16, causal=False)
    with pytest.raises(CapabilityError, match='"bidirectional" cannot be causal'):
        build_mixer("bidirectional", 16, causal=True)


def test_replay_refuses_what_it_cannot_take_back() -> None:
    mixer = GRU(8)
    state = mixer.init_state(2, rewind=3)
    assert isinstance(state, Replay)
    _, after = mixer(torch.randn(2, 2, 8), state, Ragged(lengths=torch.tensor([2, 1])))
    assert after is not None
    for counts in ([2, 2], [3, 0], [-1, 0]):
        with pytest.raises(CapabilityError, match="at most 3 tokens, and no more than were read"):
            after.rewind(torch.tensor(counts))
    _, long = mixer(torch.randn(2, 50, 8), after)
    assert long is not None
    long.rewind(torch.tensor([3, 3]))
    with pytest.raises(CapabilityError):
        long.rewind(torch.tensor([4, 0]))


def test_replay_runs_a_token_about_twice() -> None:
    """The anchor moves up only when the inputs since are full: amortised, not at each step."""
    mixer, runs = GRU(8), 0
    original = mixer.mix

    def counted(x: torch.Tensor, *rest: Any) -> Any:
        nonlocal runs
        runs += x.shape[1]
        return original(x, *rest)

    mixer.mix = counted  # type: ignore[method-assign]
    with torch.no_grad():
        state: State | None = mixer.init_state(1, rewind=8)
        for _ in range(160):
            _, state = mixer(torch.randn(1, 1, 8), state)
    assert runs <= 3.3 * 160


def test_a_call_of_no_positions_returns_its_state() -> None:
    mixer = GRU(8)
    state = mixer.init_state(2)
    y, after = mixer(torch.zeros(2, 0, 8), state)
    assert y.shape == (2, 0, 8)
    assert after is state


def test_states_are_kept_in_the_precision_they_need() -> None:
    """Recurrences sum in float32 at least; a key-value cache has the type that is asked for."""
    for name, kept in (("retention", torch.float32), ("lstm", torch.float32), ("attention", torch.bfloat16)):
        state = build_mixer(name, 16).init_state(1, dtype=torch.bfloat16)
        assert {t.dtype for t in state.tensors().values() if t.is_floating_point()} == {kept}
