"""Batches: bounded, complete, in order; and batch-mates that do not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_decoding_model import BOS, EOS, PAD, HiddenState, TinyModel, random_requests

from trilemma.config import DecodingConfig
from trilemma.decode import Request, collate, compare_with_single, decode, plan_batches


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 100), st.integers(1, 4))
def test_plans_are_complete_and_bounded(lengths: list[int], batch_tokens: int, hypotheses: int) -> None:
    requests = [Request([BOS], 5, source=[3] * length) for length in lengths]
    plan = list(plan_batches(requests, batch_tokens, hypotheses))
    assert sorted(position for batch in plan for position in batch) == list(range(len(lengths)))
    for batch in plan:
        padded = max(requests[position].num_tokens for position in batch) * len(batch) * hypotheses
        assert padded <= batch_tokens or len(batch) == 1


def test_padding_is_on_the_right_and_described() -> None:
    batch = collate([Request([BOS], 5, source=[3, 4, EOS]), Request([BOS], 6, source=[EOS])], PAD)
    assert batch.inputs.tolist() == [[BOS], [BOS]]
    assert batch.lengths is None
    assert batch.source is not None
    assert batch.source.tolist() == [[3, 4, EOS], [EOS, PAD, PAD]]
    assert batch.source_lengths is not None
    assert batch.source_lengths.tolist() == [3, 1]
    prompts = collate([Request([BOS, 3, 4], 5, prefix=3), Request([BOS, 4], 5, prefix=2)], PAD)
    assert prompts.inputs.tolist() == [[BOS, 3, 4], [BOS, 4, PAD]]
    assert prompts.lengths is not None
    assert prompts.lengths.tolist() == [3, 2]
    assert prompts.prefix is not None
    assert prompts.prefix.tolist() == [3, 2]


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_batch_mates_do_not_matter_in_float64(method: str, encoder: bool) -> None:
    model = TinyModel(scale=1.5)
    requests = random_requests(40, encoder=encoder)
    config = DecodingConfig.model_validate({"method": method, "batch_tokens": 200})
    report = compare_with_single(model, requests, config, eos=EOS, pad=PAD, dtype=torch.float64)
    assert report.disagreements == [], str(report)
    assert "40 of 40 outputs identical" in str(report)


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_a_leak_between_rows_is_reported_as_different(method: str) -> None:
    """Planted: rows see the mean of their batch."""
    model = TinyModel(scale=1.5, leak=0.1)
    config = DecodingConfig.model_validate({"method": method})
    report = compare_with_single(model, random_requests(40), config, eos=EOS, pad=PAD, dtype=torch.float64)
    assert not report.holds
    assert "DIFFERENT" in str(report)


class Rounding(TinyModel):
    """Tokens 5 and 6 are twins but for a difference of 1e-7, whose sign depends on the number of rows."""

    def __init__(self) -> None:
        super().__init__(scale=1.5, eos_bias=-6.0)
        self.embedding[6] = self.embedding[5]
        self.output[:, 6] = self.output[:, 5]

    def prefill(self, *arguments: Any, **named: Any) -> tuple[torch.Tensor, HiddenState]:
        logits, state = super().prefill(*arguments, **named)
        return self._rounded(logits), state

    def step(self, *arguments: Any, **named: Any) -> tuple[torch.Tensor, HiddenState]:
        logits, state = super().step(*arguments, **named)
        return self._rounded(logits), state

    def _rounded(self, logits: torch.Tensor) -> torch.Tensor:
        logits[..., 6] += 1e-7 if logits.shape[0] > 4 else -1e-7
        return logits


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_a_near_tie_is_reported_with_its_gap(method: str) -> None:
    config = DecodingConfig.model_validate({"method": method, "batch_tokens": 10_000})
    report = compare_with_single(
        Rounding(), random_requests(60), config, eos=EOS, pad=PAD, dtype=torch.float64, tolerance=1e-6
    )
    assert report.disagreements, "the model made no near-tie"
    assert report.holds, str(report)
    assert f"{len(report.disagreements)} near-ties" in str(report)
    assert all(0 <= disagreement.gap <= 1e-6 for disagreement in report.disagreements)


def test_order_is_kept_and_batch_size_changes_nothing() -> None:
    model = TinyModel(scale=1.5)
    requests = random_requests(50)
    outputs = {}
    for batch_tokens in (1, 50, 100_000):
        for method in ("greedy", "beam"):
            config = DecodingConfig.model_validate({"method": method, "batch_tokens": batch_tokens})
            outputs[method, batch_tokens] = [o[0].tokens for o in decode(model, requests, config, eos=EOS, pad=PAD)]
    for method in ("greedy", "beam"):
        assert outputs[method, 1] == outputs[method, 50] == outputs[method, 100_000]
        alone = [
            decode(model, [request], DecodingConfig.model_validate({"method": method}), eos=EOS, pad=PAD)
            for request in requests[:5]
        ]
        assert [outputs[0][0].tokens for outputs in alone] == outputs[method, 1][:5]


def test_finished_rows_leave_the_batch() -> None:
    """One input runs to a far limit; the others must not be stepped along with it."""
    model = TinyModel(scale=1.5)
    requests = [*random_requests(63, limit=3), Request([BOS], 200, source=[3, EOS])]
    model.bias[EOS] = -1e9
    for method in ("greedy", "beam"):
        model.rows_stepped = 0
        config = DecodingConfig.model_validate({"method": method, "beam_size": 2, "batch_tokens": 100_000})
        decode(model, requests, config, eos=EOS, pad=PAD)
        assert model.rows_stepped <= 2 * (64 * 2 + 200)
