"""The kit itself: what a report says, that its command replays, what a user's mistake looks like."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trilemma
from trilemma import registry
from trilemma.errors import ConfigError, LawError
from trilemma.laws import LAWS, Report, check, split, verify
from trilemma.laws.case import GRADIENT_TOLERANCE
from trilemma.laws.cost import count_flops
from trilemma.laws.trial import _placed
from trilemma.mixers.attention import Attention
from trilemma.mixers.gated_retention import GatedRetention
from trilemma.mixers.gru import GRU
from trilemma.registry import load_plugin


@pytest.fixture(autouse=True)
def _same_registry_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten."""
    registry.available_mixers()
    monkeypatch.setattr(registry, "_MIXERS", dict(registry._MIXERS))
    monkeypatch.setattr(registry, "_PLUGINS", dict(registry._PLUGINS))


class LateBug(GRU):
    """Right up to token 5 of a call; then off by one per cent."""

    def mix(self, x: Tensor, state: Any, ragged: Any, shared: Any) -> Any:
        y, after = super().mix(x, state, ragged, shared)
        scale = torch.ones(x.shape[1], dtype=x.dtype)
        scale[5:] = 1.01
        return y * scale[:, None], after


def test_the_kit_is_public() -> None:
    assert trilemma.laws.check is check
    assert list(LAWS) == ["split", "causality", "raggedness", "state", "cost", "training", "compile", "truth"]


def test_a_failure_names_token_tensor_size_and_how_to_see_it_again() -> None:
    report = check(lambda: LateBug(16), laws=["split"], seed=11)
    (result,) = report.failures
    assert result.law == "split"
    assert result.tensor == "y"
    assert result.token is not None
    assert result.token >= 5
    assert result.error is not None
    assert 1e-4 < result.error < 0.02
    assert "calls=" in result.case
    assert result.reproduce == 'trilemma.laws.check(factory, laws=["split"], seed=11, level="quick")'
    assert str(report).startswith("LateBug (seed 11, quick): UNLAWFUL")
    with pytest.raises(LawError, match="UNLAWFUL"):
        report.require()


def test_the_seed_replays_a_failure_exactly() -> None:
    first, second, other = (check(lambda: LateBug(16), laws=["split"], seed=seed) for seed in (11, 11, 12))
    assert vars(first["split"]) | {"seconds": 0} == vars(second["split"]) | {"seconds": 0}
    assert first["split"].case != other["split"].case


def test_one_law_replays_as_it_ran_among_all() -> None:
    """Draws do not depend on which laws ran before."""
    laws = ["causality", "raggedness", "split"]
    assert (
        check(lambda: LateBug(16), laws=laws, seed=4)["split"].case
        == check(lambda: LateBug(16), laws=["split"], seed=4)["split"].case
    )


def test_the_printed_command_replays(tmp_path: Path) -> None:
    plugin = tmp_path / "late_bug.py"
    plugin.write_text(
        "import torch\n"
        "from trilemma.mixers.gru import GRU\n"
        "class LateBug(GRU):\n"
        "    name = 'late-bug'\n"
        "    @classmethod\n"
        "    def law_variants(cls):\n"
        "        return [{}, {'hidden': 8}]\n"
        "    def mix(self, x, state, ragged, shared):\n"
        "        y, after = super().mix(x, state, ragged, shared)\n"
        "        return (y if x.shape[1] < 5 else y * 1.01), after\n"
    )
    assert load_plugin(f"{plugin}:LateBug") == ["late-bug"]
    reports = verify("late-bug", laws=["split"], seed=21)
    assert [report.ok for report in reports] == [False, False]
    from trilemma.cli.main import main

    words = reports[1]["split"].reproduce.split()
    assert words[:2] == ["trilemma", "verify"]
    assert "--variant 1" in reports[1]["split"].reproduce
    assert main([*words[1:], "--json"]) == 1


def test_a_report_is_plain_json() -> None:
    report = check(lambda: LateBug(16), laws=["split", "truth"], seed=11)
    text = json.dumps(report.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert back["ok"] is False
    assert [law["outcome"] for law in back["laws"]] == ["fail", "n/a"]
    assert back["laws"][1]["reason"] == "stands on no operator of ours"


def test_an_exception_is_a_finding() -> None:
    class Crashes(GRU):
        def mix(self, x: Tensor, state: Any, ragged: Any, shared: Any) -> Any:
            if state is not None and x.shape[1] == 1:
                raise IndexError("list index out of range")
            return super().mix(x, state, ragged, shared)

    result = check(lambda: Crashes(16), laws=["split"], seed=1)["split"]
    assert result.outcome == "fail"
    assert "raised IndexError: list index out of range" in result.reason
    assert "test_kit.py" in result.reason


def test_shape_type_and_state_are_part_of_the_contract() -> None:
    class Wider(GRU):
        def mix(self, x: Tensor, state: Any, ragged: Any, shared: Any) -> Any:
            return torch.cat([x, x], dim=-1), state

    class Coarser(GRU):
        def mix(self, x: Tensor, state: Any, ragged: Any, shared: Any) -> Any:
            return x.float(), state

    class Stateful(GRU):
        def mix(self, x: Tensor, state: Any, ragged: Any, shared: Any) -> Any:
            return super().mix(x, self.init_state(len(x)) if state is None else state, ragged, shared)

    for cls, words in ((Wider, "x's shape"), (Coarser, "x's type"), (Stateful, "a State comes back exactly when")):
        assert words in check(lambda cls=cls: cls(16), laws=["split"], seed=1)["split"].reason  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"laws": ["splitt"]}, 'unknown law "splitt"; did you mean "split"'),
        ({"level": "deep"}, 'unknown level "deep" of the laws; valid: quick, full'),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(lambda: GRU(16), **arguments)


def test_the_factory_must_build_a_mixer() -> None:
    with pytest.raises(ConfigError, match="gave a Linear"):
        check(lambda: nn.Linear(2, 2), laws=["split"])  # type: ignore[arg-type, return-value]


def test_variants_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match="has the variants 0 to 1; 7 is none of them"):
        verify("gru", variant=7)


def test_the_kit_leaves_global_settings_alone() -> None:
    before = torch.random.get_rng_state(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    check(lambda: GRU(16), laws=["training", "state"], seed=2)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()) == before[1:]


def test_flops_are_counted_by_the_pairs_that_a_mask_allows() -> None:
    q = torch.randn(1, 2, 6, 4)
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    pair = 2 * 2 * (4 + 4)  # heads * multiply-add * (scores and values)
    assert count_flops(lambda: attend(q, q, q)) == 36 * pair
    assert count_flops(lambda: attend(q, q, q, is_causal=True)) == 21 * pair
    assert count_flops(lambda: attend(q, q, q, attn_mask=mask)) == 21 * pair
    bias = torch.zeros(6, 6).masked_fill(~mask, -math.inf)
    assert count_flops(lambda: attend(q, q, q, attn_mask=bias)) == 21 * pair
    assert count_flops(lambda: q @ q.transpose(2, 3)) == 36 * 2 * 2 * 4


class DoubledGradient(GatedRetention):
    """In bfloat16 a call that carries a State gives twice the gradient."""

    def mix(self, x: Tensor, state: Any, ragged: Any, shared: Any) -> Any:
        if state is not None and x.dtype == torch.bfloat16:
            x = 2 * x - x.detach()
        return super().mix(x, state, ragged, shared)


def test_where_bfloat16_says_nothing_float64_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a case that a rotating seed found: the query of a row's first token nearly cancels its key."""
    asked: list[dict[str, float]] = []
    measure = split._sensitivity

    def noted(*given: Any) -> dict[str, float]:
        asked.append(measure(*given))
        return asked[-1]

    monkeypatch.setattr(split, "_sensitivity", noted)
    assert check(lambda: GatedRetention(32), laws=["split"], seed=766043037, level="full").ok
    assert asked
    assert asked[0]["x"] > GRADIENT_TOLERANCE[torch.bfloat16]
    (result,) = check(lambda: DoubledGradient(32), laws=["split"], seed=1).failures
    assert result.tensor == "gradient of x"


def test_an_empty_report_is_lawful_and_named() -> None:
    report = Report("nothing", 0, "quick")
    assert report.ok
    with pytest.raises(KeyError):
        report["split"]


def test_attention_passes_as_the_public_example_says() -> None:
    report = check(lambda: Attention(16), laws=["split", "causality"], seed=3)
    assert report.ok, report
    assert report["split"].worst is not None
    assert 0 < report["split"].worst < 1


def test_on_a_device_float32_is_float32_and_its_own_kernels_run() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with _placed("meta"):
            assert torch.zeros(1).device.type == "meta"
            assert torch.get_float32_matmul_precision() == "highest"
            assert (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32) == (True, False)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
