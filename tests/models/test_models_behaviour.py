"""What layouts promise beyond the laws: prefixes, pooling, shared memory, cost, decay, and the errors users meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import MIXERS, VOCABULARY, build, close, logits, run_steps, source_of, tokens
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trilemma.errors import CapabilityError, ConfigError, LengthError
from trilemma.mixers.attention import Attention
from trilemma.mixers.cross_attention import Memory
from trilemma.mixers.yoco import YOCO
from trilemma.models import EncoderOnly, SequenceModel, build_model

ATTENTIONS = ["attention", "rotary-grouped", "window", "t5-shared"]
TINY: dict[str, Any] = {"vocab_size": 11, "d_model": 8, "d_ff": 8, "num_layers": 2, "num_heads": 2}


def changed(ids: Tensor, at: int) -> Tensor:
    other = ids.clone()
    other[:, at] = (other[:, at] + 1) % VOCABULARY
    return other


# Prefix models


@pytest.mark.parametrize("mixer", ATTENTIONS)
def test_the_prefix_is_read_in_both_directions_and_the_target_does_not_leak(mixer: str) -> None:
    model = build("decoder-only", mixer, prefix=True)
    ids, prefix = tokens(2, 8), torch.tensor([4, 4])
    hidden = model(ids, prefix=prefix)
    assert not torch.equal(model(changed(ids, 3), prefix=prefix)[:, 2], hidden[:, 2])
    for target in (4, 5, 7):
        other = model(changed(ids, target), prefix=prefix)
        assert torch.equal(other[:, :target], hidden[:, :target])


@pytest.mark.parametrize("mixer", ATTENTIONS)
def test_prefix_rows_of_unequal_length_stand_alone(mixer: str) -> None:
    model = build("decoder-only", mixer, prefix=True)
    ids, prefix, lengths = tokens(3, 8), torch.tensor([4, 1, 6]), torch.tensor([8, 3, 6])
    hidden = model(ids, lengths, prefix=prefix)
    for row in range(3):
        alone = model(ids[row : row + 1, : lengths[row]], prefix=prefix[row : row + 1])
        close(hidden[row : row + 1, : lengths[row]], alone)


@pytest.mark.parametrize("mixer", ATTENTIONS)
def test_prefixes_of_none_and_of_one_token_are_causal(mixer: str) -> None:
    model = build("decoder-only", mixer, prefix=True)
    ids = tokens(2, 6)
    causal = model(ids)
    close(model(ids, prefix=torch.tensor([0, 1])), causal)
    assert not torch.allclose(model(ids, prefix=torch.tensor([2, 2])), causal)


@pytest.mark.parametrize("layout_mixer", ["attention", "t5-shared"])
def test_a_prefix_of_the_whole_row_is_an_encoder(layout_mixer: str) -> None:
    """Same weights, both layouts. T5's buckets differ by direction, so its bias is set to one value for all."""
    both = [build("decoder-only", layout_mixer, prefix=True), build("encoder-only", layout_mixer)]
    with torch.no_grad():
        for name, parameter in both[0].named_parameters():
            if "t5_bias" in name:
                parameter.fill_(0.5)
    both[1].load_state_dict(both[0].state_dict())
    ids = tokens(2, 6)
    close(both[0](ids, prefix=torch.tensor([6, 6])), both[1](ids))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mixer", ATTENTIONS)
def test_a_prefix_model_generates_as_it_scores(mixer: str, grad: bool) -> None:
    model = build("decoder-only", mixer, prefix=True)
    ids, prefix = tokens(3, 9), torch.tensor([4, 2, 5])
    with torch.set_grad_enabled(grad):
        whole = logits(model, ids, prefix=prefix)
        y, state = model.prefill(ids[:, :5], prefix, prefix=prefix)
        close(y, whole[torch.arange(3), prefix - 1])
        for i in range(4):
            y, state = model.step(ids[torch.arange(3), prefix + i][:, None], state)
            close(y[:, 0], whole[torch.arange(3), prefix + i])


def test_a_causal_model_reads_no_prefix() -> None:
    """Batches may carry a prefix; only `model.prefix` obeys it."""
    model = build("decoder-only", "attention")
    ids = tokens(2, 6)
    assert torch.equal(model(ids, prefix=torch.tensor([3, 3])), model(ids))


# Classification


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_pooling_ignores_padding(mixer: str, pooling: str) -> None:
    model = build("encoder-only", mixer, num_labels=3, pooling=pooling)
    ids, lengths = tokens(3, 7), torch.tensor([7, 2, 4])
    pooled = model(ids, lengths)
    assert pooled.shape == (3, 8)
    assert model.head(pooled).shape == (3, 3)
    for row in range(3):
        close(pooled[row : row + 1], model(ids[row : row + 1, : lengths[row]]))


def test_mean_pooling_is_the_mean_and_an_empty_row_is_finite() -> None:
    classifier = build("encoder-only", "attention", num_labels=3)
    language = build("encoder-only", "attention")
    language.load_state_dict(classifier.state_dict(), strict=False)
    ids, lengths = tokens(2, 5), torch.tensor([3, 0])
    pooled = classifier(ids, lengths)
    close(pooled[0], language(ids, lengths)[0, :3].mean(0))
    assert torch.equal(pooled[1], torch.zeros_like(pooled[1]))


# Memory


def memories(model: SequenceModel, state: Any) -> list[Memory]:
    held = [part for layer in state.layers.parts for part in layer.parts]
    return [part for part in held if isinstance(part, Memory)]


def test_hypotheses_of_one_source_share_its_memory() -> None:
    model = build("encoder-decoder", "attention")
    given = source_of(model, 3)
    inputs = tokens(3, 1)
    with torch.no_grad():
        _, state = model.prefill(inputs, **given)
        before = memories(model, state)
        beams = state.select(torch.arange(3).repeat_interleave(4))
        mixed = beams.select(torch.tensor([5, 4, 4, 0, 11, 8, 8, 2]))
        fewer = state.select(torch.tensor([1, 1]))
    assert len(before) == 4
    for first, second, third, last in zip(
        before, memories(model, beams), memories(model, mixed), memories(model, fewer), strict=True
    ):
        assert first.cache.keys.data_ptr() == second.cache.keys.data_ptr() == third.cache.keys.data_ptr()
        assert first.cache.values.data_ptr() == third.cache.values.data_ptr()
        assert second.group == 4 and third.group == 0
        assert first.nbytes == second.nbytes
        assert last.cache.keys.shape[0] == 1  # sources that nobody reads are let go


def test_the_source_is_encoded_once() -> None:
    model = build("encoder-decoder", "lstm")
    calls: list[int] = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    _, state = model.prefill(tokens(2, 1), **source_of(model, 2))
    run_steps(model, tokens(2, 4), state)
    assert calls == [1]


def test_gradients_reach_the_encoder_and_carried_state() -> None:
    model = build("encoder-decoder", "retention")
    given = source_of(model, 2)
    ids = tokens(2, 6)
    weights = [p for p in model.parameters() if p.requires_grad]
    whole = torch.autograd.grad(logits(model, ids, **given).square().sum(), weights, allow_unused=True)
    first, state = model.step(ids[:, :2], model.begin(2, **given))
    second, _ = model.step(ids[:, 2:], state)
    split = torch.autograd.grad(torch.cat([first, second], 1).square().sum(), weights, allow_unused=True)
    for expected, actual in zip(whole, split, strict=True):
        assert expected is not None and actual is not None
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    reached = dict(zip((name for name, _ in model.named_parameters()), split, strict=True))
    assert all(bool(g.abs().sum() > 0) for name, g in reached.items() if name.startswith("encoder.") and g is not None)


# Embeddings and weights


def test_source_and_target_embeddings_may_differ() -> None:
    shared = build("encoder-decoder", "attention")
    apart = build("encoder-decoder", "attention", share_embeddings=False)
    assert shared.source_embedding is shared.embedding
    assert apart.source_embedding is not apart.embedding
    assert apart.parameter_counts()["embedding"] == 2 * shared.parameter_counts()["embedding"]


def test_counts_of_tied_untied_and_classifying_models() -> None:
    table = VOCABULARY * 8
    tied, untied = build("decoder-only", "gru"), build("decoder-only", "gru", tie_embeddings=False)
    assert tied.parameter_counts()["embedding"] == table
    assert untied.parameter_counts()["embedding"] == 2 * table
    assert tied.parameter_counts()["non_embedding"] == untied.parameter_counts()["non_embedding"]
    classifier = build("encoder-only", "gru", num_labels=3)
    assert classifier.parameter_counts()["embedding"] == table  # the labels' matrix is no table of tokens


def test_no_weight_decay_names_vectors_tables_and_biases() -> None:
    model = build("encoder-decoder", "t5-shared", token_types=2, logit_bias=True)
    exempt, names = model.no_weight_decay(), dict(model.named_parameters())
    assert exempt <= names.keys()
    assert {"logit_bias", "embedding.tokens.weight", "embedding.types.weight"} <= exempt
    assert {"stack.shared.t5_bias", "encoder.shared.t5_bias", "stack.norm.weight"} <= exempt
    decayed = names.keys() - exempt
    assert "stack.blocks.0.parts.0.part.qkv.weight" in decayed and "output.weight" in decayed
    assert all(names[name].ndim == 2 for name in decayed)
    own = build_model({**TINY, "layout": "decoder-only", "mixer": {"name": "attention", "position": "t5"}})
    assert "stack.blocks.1.parts.0.part.t5_bias" in own.no_weight_decay()


def test_token_types_are_added() -> None:
    model = build("encoder-only", "attention", token_types=2)
    ids = tokens(2, 4)
    types = torch.tensor([[0, 0, 1, 1]]).expand(2, -1)
    close(model(ids, types=torch.zeros_like(ids)), model(ids))
    assert not torch.allclose(model(ids, types=types), model(ids))


def test_a_pattern_repeats_over_the_layers_and_may_be_longer_than_them() -> None:
    pattern = ["retention", "attention", "lstm"]
    kinds = [mixer.name for mixer in build_model({**TINY, "layout": "decoder-only", "mixer": pattern}).mixers()]
    assert kinds == ["retention", "attention"]
    longer = build_model({**TINY, "layout": "decoder-only", "mixer": pattern, "num_layers": 5})
    assert [mixer.name for mixer in longer.mixers()] == ["retention", "attention", "lstm", "retention", "attention"]


def test_encoder_and_decoder_may_differ() -> None:
    model = build_model({**TINY, "mixer": "retention", "encoder_mixer": "attention", "encoder_layers": 3})
    stacks = [[mixer.name for mixer in stack.mixers()] for stack in model.stacks()]
    assert stacks == [["attention"] * 3, ["retention", "cross_attention"] * 2]
    wrapped = build_model({**TINY, "mixer": "retention"})
    assert [mixer.name for mixer in wrapped.stacks()[0].mixers()] == ["bidirectional"] * 2


def test_weights_survive_save_and_load() -> None:
    for layout in ("encoder-decoder", "decoder-only", "encoder-only"):
        first, second = (build(layout, "hybrid", share_embeddings=False) for _ in range(2))
        ids, given = tokens(2, 5), source_of(first, 2)
        assert not torch.equal(first(ids, **given), second(ids, **given))
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(ids, **given), second(ids, **given))


# Cost


def counted_flops(model: SequenceModel, run: Any) -> int:
    """What torch's own counter sees, every attention in the form that multiplies whole squares."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(model)
    return counter.get_total_flops()


def squares_over_triangles(model: SequenceModel, length: int, source_length: int) -> int:
    """FLOPs that causal or windowed attention computes as a square and needs only in part: 4 h d_h for each pair
    masked away."""
    masked = 0
    for stack in model.stacks():
        rows = source_length if model.layout == "encoder-decoder" and stack is model.stacks()[0] else length
        for mixer in stack.mixers():
            if isinstance(mixer, (Attention, YOCO)):
                window = (mixer.window if isinstance(mixer, Attention) else None) or rows
                seen = [(i, j) for i in range(rows) for j in range(rows) if abs(i - j) < window]
                pairs = sum(j <= i or not mixer.causal for i, j in seen)
                masked += 4 * mixer.num_heads * mixer.head_dim * (rows * rows - pairs)
    return masked


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only", "encoder-only"])
def test_flops_are_those_that_torch_counts(layout: str, mixer: str) -> None:
    model = build(layout, mixer)
    length, source_length = 7, 5
    given = {"source": tokens(1, source_length)} if layout == "encoder-decoder" else {}
    counted = counted_flops(model, lambda m: logits(m, tokens(1, length), **given))
    expected = counted - squares_over_triangles(model, length, source_length)
    assert model.flops(length, source_length if given else 0) == expected


@pytest.mark.parametrize("mixer", ["attention", "rotary-grouped", "t5-shared", "retention", "lstm", "gru"])
@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only"])
def test_step_flops_are_those_that_torch_counts(layout: str, mixer: str) -> None:
    model = build(layout, mixer)
    given = {"source": tokens(1, 5)} if layout == "encoder-decoder" else {}
    with torch.no_grad():
        _, state = model.prefill(tokens(1, 6), **given)
    counted = counted_flops(model, lambda m: m.step(tokens(1, 1), state))
    assert model.step_flops(6, 5 if given else 0) == counted


def test_flops_of_a_classifier() -> None:
    model = build("encoder-only", "attention", num_labels=3)
    counted = counted_flops(model, lambda m: m.head(m(tokens(1, 6))))
    assert model.flops(6) == counted


def test_a_step_of_retention_costs_the_same_at_any_context_and_attention_grows_by_its_formula() -> None:
    values = {**TINY, "d_model": 64, "num_heads": 4, "layout": "decoder-only"}
    retention, attention = build_model({**values, "mixer": "retention"}), build_model(values)
    assert retention.step_flops(128) == retention.step_flops(8192)
    assert retention.state_bytes(128) == retention.state_bytes(8192)
    assert attention.step_flops(8192) - attention.step_flops(128) == 2 * 4 * 64 * (8192 - 128)
    assert attention.state_bytes(8192) == 2 * 2 * 64 * 8192 * 4


# Errors


def built(**changes: Any) -> SequenceModel:
    return build_model({**TINY, **changes})


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"layout": "decoder-only", "prefix": True, "mixer": "retention"},
        CapabilityError,
        'model.prefix: mixer "retention" cannot read a prefix in both directions',
    ),
    (
        {"prefix": True},
        CapabilityError,
        "model.prefix is for decoder-only models; the layout is encoder-decoder",
    ),
    (
        {"layout": "decoder-only", "num_labels": 2},
        CapabilityError,
        "model.num_labels is for encoder-only models; the layout is decoder-only",
    ),
    (
        {"cross_mixer": "attention"},
        CapabilityError,
        'model.cross_mixer: mixer "attention" reads no memory',
    ),
    (
        {"layout": "decoder-only", "mixer": "cross_attention"},
        CapabilityError,
        'model.mixer: "cross_attention" reads a memory; it is for model.cross_mixer',
    ),
    (
        {"layout": "encoder-only", "mixer": "cross_attention"},
        CapabilityError,
        'model.mixer: "cross_attention" reads a memory; it is for model.cross_mixer',
    ),
    (
        {"layout": "decoder-only", "mixer": "bidirectional"},
        CapabilityError,
        'mixer "bidirectional" cannot be causal; it may serve in encoders only',
    ),
    ({"mixer": "atention"}, ConfigError, 'unknown mixer "atention"; did you mean "attention"?'),
    (
        {"mixer": {"name": "attention", "windw": 8}},
        ConfigError,
        'mixer "attention": unknown option "windw"; did you mean "window"?',
    ),
    ({"mixer": []}, ConfigError, "model: mixer: the pattern is empty; name at least one mixer"),
    (
        {"num_heads": 3},
        ConfigError,
        "attention: d_model 8 is no multiple of num_heads 3; give head_dim",
    ),
    ({"vocab_size": None}, ConfigError, "model.vocab_size is not set; it comes from the tokenizer"),
    ({"d_modle": 8}, ConfigError, 'model: unknown key "d_modle"; did you mean "d_model"?'),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS, ids=[case[2][:40] for case in ERRORS])
def test_a_model_that_cannot_be_is_one_clear_message(
    changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        built(**changes)
    assert str(caught.value) == message


def test_an_encoder_only_model_cannot_generate() -> None:
    model = built(layout="encoder-only")
    message = "an encoder-only model cannot generate; choose layout decoder-only or encoder-decoder"
    with pytest.raises(CapabilityError) as caught:
        model.prefill(torch.ones(1, 2, dtype=torch.int64))
    assert str(caught.value) == message
    with pytest.raises(CapabilityError):
        model.begin(1)


def test_a_source_is_given_where_it_is_read() -> None:
    ids = torch.ones(1, 2, dtype=torch.int64)
    for call in (lambda m: m(ids), lambda m: m.prefill(ids), lambda m: m.begin(1)):
        with pytest.raises(CapabilityError, match=r"^an encoder-decoder model needs a source$"):
            call(built())
    for call in (lambda m: m(ids, source=ids), lambda m: m.prefill(ids, source=ids)):
        with pytest.raises(CapabilityError, match="decoder-only model has no encoder: put the source"):
            call(built(layout="decoder-only"))
    with pytest.raises(CapabilityError, match=r"^an encoder-only model reads its inputs"):
        built(layout="encoder-only")(ids, source=ids)
    with pytest.raises(
        CapabilityError,
        match=r"^packed rows hold several sequences; an encoder-decoder model reads one sequence a row$",
    ):
        built()(ids, source=ids, segments=torch.zeros_like(ids))


def test_a_classifier_takes_no_packed_rows() -> None:
    """One vector a row cannot stand for several sequences."""
    model = built(layout="encoder-only", num_labels=2)
    assert isinstance(model, EncoderOnly)
    with pytest.raises(
        CapabilityError, match=r"^packed rows hold several sequences; a classifier reads one sequence a row$"
    ):
        model(torch.ones(1, 2, dtype=torch.int64), segments=torch.zeros(1, 2, dtype=torch.int64))


def test_rows_and_sources_must_agree() -> None:
    model = built()
    with pytest.raises(ValueError, match="3 rows need as many sources, found 1"):
        model.prefill(torch.ones(3, 1, dtype=torch.int64), source=torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="3 rows need as many sources, found 1"):
        model(torch.ones(3, 1, dtype=torch.int64), source=torch.ones(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only"])
def test_longer_than_the_models_positions(layout: str, positions: str) -> None:
    message = (
        "a sequence of 7 tokens is longer than the model's 6 positions; "
        "shorten it, or train with a larger model.max_length"
    )
    model = built(layout=layout, positions=positions, max_length=6).eval()
    ids = torch.ones(2, 7, dtype=torch.int64)
    given = {"source": ids[:, :4]} if layout == "encoder-decoder" else {}
    model(ids[:, :6], **given)
    with pytest.raises(LengthError) as caught:
        model(ids, **given)
    assert str(caught.value) == message
    model(ids, torch.tensor([6, 2]), **given)  # only padding lies beyond
    with torch.no_grad():
        _, state = model.prefill(ids[:, :6], torch.tensor([6, 5]), **given)
        with pytest.raises(LengthError) as caught:
            model.step(ids[:, :1], state)
        assert str(caught.value) == message
        model.step(ids[:, :1], state, torch.tensor([0, 1]))
    if given:
        with pytest.raises(LengthError):
            model(ids[:, :4], source=ids)


def test_reserved_capacity_is_a_limit() -> None:
    model = built(layout="decoder-only")
    ids = torch.ones(1, 5, dtype=torch.int64)
    with torch.no_grad():
        _, state = model.prefill(ids[:, :3], capacity=4)
        _, state = model.step(ids[:, 3:4], state)
        with pytest.raises(LengthError, match="reserved for 4 tokens, 5 are needed"):
            model.step(ids[:, 4:], state)


def test_a_state_without_room_to_rewind_says_so() -> None:
    model = built(layout="decoder-only", mixer="retention")
    _, state = model.prefill(torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(CapabilityError, match=r"cannot rewind; make it with init_state\(\.\.\., rewind=n\)$"):
        state.rewind(torch.tensor([1]))


def test_lengths_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lengths \(3,\) must be \[batch\]"):
        built(layout="decoder-only")(torch.ones(2, 4, dtype=torch.int64), torch.tensor([1, 2, 3]))
