"""Cost by counts, not by clocks: formulas against executed operations, flat recurrent steps, bytes held, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from trilemma.errors import ConfigError
from trilemma.machine import Ceilings
from trilemma.measure import cost, cost_report
from trilemma.models import SequenceModel, build_model

# round numbers, so that fractions can be checked by hand
LIMITS = Ceilings("cpu", 100.0, 400.0, ((1, 50.0),), 1.0, 2.0)
CONTEXTS = (16, 64, 256)
QUICK: dict[str, Any] = {"new_tokens": 2, "repeats": 2, "limits": LIMITS, "max_seconds": 2.0}


def model(mixer: Any = "attention", layout: str = "decoder-only", **changes: Any) -> SequenceModel:
    torch.manual_seed(0)
    values = {"layout": layout, "mixer": mixer, "vocab_size": 50, "d_model": 32, "num_heads": 2, "num_layers": 2}
    return build_model({**values, "max_length": None, **changes}).eval()


def fused_attention_flops(query: Any, key: Any, value: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
    """torch's counter does not know its own CPU kernel; it computes the full rectangle of scores."""
    return sdpa_flop_count(query.shape, key.shape, value.shape)


fused_attention_flops._get_raw = True  # type: ignore[attr-defined]
CPU_KERNEL = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused_attention_flops}


def executed_flops(run: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_KERNEL) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def step_after(subject: SequenceModel, context: int) -> Any:
    with torch.no_grad():
        _, state = subject.prefill(torch.randint(6, 50, (1, context)), capacity=context + 1)
    return lambda: subject.step(torch.randint(6, 50, (1, 1)), state.clone())


def test_attention_s_step_executes_what_its_formula_says() -> None:
    """Projections and head: 2 FLOPs a weight. Scores and values: 2 * 2 * (context + 1) * d_model a layer."""
    subject = model("attention", d_ff=64)
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 50
    for context in CONTEXTS:
        by_hand = 2 * weights + 2 * (4 * (context + 1) * 32)
        assert subject.step_flops(context) == by_hand


def test_attention_s_state_holds_keys_and_values_of_every_token_and_no_more() -> None:
    subject = model("attention")
    rows = cost.measure_decode(subject, CONTEXTS, (1, 3), **QUICK)
    for row in rows:
        by_hand = 2 * 2 * row["context"] * 32 * 4 * row["batch"]  # layers, keys and values, tokens, d_model, float32
        assert row["state_bytes"] == by_hand
        assert row["state_bytes"] == row["batch"] * subject.state_bytes(row["context"])
        assert row["capacity_bytes"] >= row["state_bytes"]


def test_a_retention_step_costs_the_same_at_every_context() -> None:
    subject = model("retention", positions="none")
    executed = {executed_flops(step_after(subject, context)) for context in CONTEXTS}
    assert len(executed) == 1
    assert len({subject.step_flops(context) for context in CONTEXTS}) == 1
    rows = cost.measure_decode(subject, CONTEXTS, **QUICK)
    assert len({row["state_bytes"] for row in rows}) == 1
    assert len({row["step_bytes"] for row in rows}) == 1


def test_the_flatness_check_can_fail() -> None:
    """The same counts on attention do grow."""
    rows = cost.measure_decode(model("attention"), CONTEXTS, **QUICK)
    assert [row["step_bytes"] for row in rows] == sorted({row["step_bytes"] for row in rows})
    assert len({row["step_flops"] for row in rows}) == len(CONTEXTS)


@pytest.mark.parametrize("mixer", ["attention", "retention"])
@pytest.mark.parametrize("layout", ["decoder-only", "encoder-decoder"])
def test_a_step_executes_the_flops_that_are_declared(mixer: str, layout: str) -> None:
    subject = model(mixer, layout, encoder_mixer="attention", positions="none")
    source = torch.randint(6, 50, (1, 12)) if layout == "encoder-decoder" else None
    for context in CONTEXTS:
        with torch.no_grad():
            prompt = torch.randint(6, 50, (1, context))
            _, state = subject.prefill(prompt, source=source, capacity=context + 1)
        executed = executed_flops(lambda: subject.step(torch.tensor([[7]]), state))  # noqa: B023 - called at once
        assert executed == subject.step_flops(context, 12 if source is not None else 0)


@pytest.mark.parametrize("length", [32, 96])
def test_reading_a_sequence_executes_the_flops_that_are_declared(length: int) -> None:
    """The kernel computes the full square of scores; the formula counts the pairs that a causal model needs."""
    tokens = torch.randint(6, 50, (1, length))
    attention = model("attention")
    masked = length * length - length * (length + 1) // 2
    executed = executed_flops(lambda: attention.head(attention(tokens)))
    assert executed == attention.flops(length) + 2 * (2 * 2 * 32 * masked)
    retention = model("retention")
    assert executed_flops(lambda: retention.head(retention(tokens))) == retention.flops(length)


def test_weights_read_by_a_step_leave_out_look_ups_and_the_encoder() -> None:
    tied = model("attention", bias=False, norm="rmsnorm")
    counts = tied.parameter_counts()
    read = cost.parameter_bytes_read(tied, step_after(tied, 8))
    assert read == 4 * counts["total"]  # the table is the output projection
    untied = model("attention", bias=False, norm="rmsnorm", tie_embeddings=False)
    read = cost.parameter_bytes_read(untied, step_after(untied, 8))
    assert read == 4 * (untied.parameter_counts()["total"] - 50 * 32)  # the input table is only looked up
    translator = model("attention", layout="encoder-decoder")
    with torch.no_grad():
        _, state = translator.prefill(torch.tensor([[1]]), source=torch.randint(6, 50, (1, 9)), capacity=4)
    read = cost.parameter_bytes_read(translator, lambda: translator.step(torch.tensor([[7]]), state))
    encoder = sum(parameter.nbytes for name, parameter in translator.named_parameters() if name.startswith("encoder."))
    assert 0 < read <= 4 * translator.parameter_counts()["total"] - encoder


def test_fractions_follow_from_bytes_flops_and_time() -> None:
    (row,) = cost.measure_decode(model("retention", positions="none"), [16], **QUICK)
    seconds = row["ms_per_token"] / 1e3
    assert row["bandwidth_fraction"] == pytest.approx(row["step_bytes"] / seconds / 50e9)
    assert row["compute_fraction"] == pytest.approx(row["step_flops"] / seconds / 100e9)
    assert row["tokens_per_second"] == pytest.approx(1 / seconds)
    assert row["path"] == "plain/cpu/float32"
    assert row["bound"] in ("memory", "compute", "overhead")


def test_a_context_beyond_the_positions_is_reported_and_the_others_are_measured() -> None:
    rows = cost.measure_decode(model("attention", positions="learned", max_length=40), (16, 64), **QUICK)
    assert rows[0]["reason"] == ""
    assert rows[0]["ms_per_token"] > 0
    assert "40" in rows[1]["reason"]
    assert rows[1]["ms_per_token"] is None
    assert "not measured" in cost_report.table(rows)


def test_an_encoder_decoder_reads_half_of_the_context_as_source() -> None:
    subject = model("attention", layout="encoder-decoder")
    rows = cost.measure_decode(subject, (2, 20), **QUICK)
    assert [row["source_length"] for row in rows] == [1, 10]
    assert rows[1]["state_bytes"] == subject.state_bytes(10, 10)
    (row,) = cost.measure_decode(subject, (20,), source_length=15, **QUICK)
    assert row["source_length"] == 15
    (row,) = cost.measure_decode(subject, (1,), **QUICK)
    assert "2 or more" in row["reason"]


def test_an_encoder_has_a_reading_and_no_steps() -> None:
    (row,) = cost.measure_decode(model("attention", layout="encoder-only", num_labels=3), (16,), **QUICK)
    assert row["ms_per_token"] is None
    assert row["prefill_ms"] > 0
    assert row["state_bytes"] == 0
    assert row["reason"] == ""


def test_another_type_is_measured_on_a_copy() -> None:
    subject = model("attention")
    (row,) = cost.measure_decode(subject, (16,), dtype=torch.bfloat16, **QUICK)
    assert row["path"] == "plain/cpu/bfloat16"
    assert row["state_bytes"] == subject.state_bytes(16, dtype=torch.bfloat16)
    assert next(subject.parameters()).dtype == torch.float32


def test_measuring_leaves_the_model_as_it_was() -> None:
    subject = model("attention").train()
    before = {name: tensor.clone() for name, tensor in subject.state_dict().items()}
    cost.measure_decode(subject, (8,), **QUICK)
    cost.measure_training(subject, batch=2, length=8, repeats=1, limits=LIMITS)
    assert subject.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.parameters())


@pytest.mark.parametrize("layout", ["decoder-only", "encoder-decoder", "encoder-only"])
def test_a_training_step_of_every_layout(layout: str) -> None:
    row = cost.measure_training(model("attention", layout=layout), batch=2, length=8, repeats=1, limits=LIMITS)
    assert row["flops"] == 3 * 2 * model("attention", layout=layout).flops(8, 8 if layout == "encoder-decoder" else 0)
    assert row["tokens_per_second"] == pytest.approx(16 / row["step_ms"] * 1e3)


@pytest.mark.parametrize(("contexts", "batches"), [([0], [1]), ([8], [0])])
def test_sizes_below_one_are_refused(contexts: list[int], batches: list[int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        cost.measure_decode(model(), contexts, batches, **QUICK)


def test_rows_are_told_as_they_come() -> None:
    told: list[dict[str, Any]] = []
    rows = cost.measure_decode(model(), (8, 16), (1, 2), on_row=told.append, **QUICK)
    assert told == rows
    assert [(row["context"], row["batch"]) for row in rows] == [(8, 1), (8, 2), (16, 1), (16, 2)]
