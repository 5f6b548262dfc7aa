"""Laws of whole models, over layouts and mixers: splitting, padding, batch-mates and packing change no answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_cases import GENERATORS, MIXERS, STYLES, VOCABULARY, build, close, logits, run_steps, source_of, tokens
from torch import Tensor

from trilemma.models import SequenceModel
from trilemma.state import load_state, save_state

pytestmark = pytest.mark.laws
LENGTH = 9
generators = pytest.mark.parametrize("layout", GENERATORS)
layouts = pytest.mark.parametrize("layout", [*GENERATORS, "encoder-only"])
mixers = pytest.mark.parametrize("mixer", MIXERS)
autograd = pytest.mark.parametrize("grad", [False, True], ids=["in-place", "autograd"])


def selected(given: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in given.items()}


@autograd
@mixers
@generators
def test_prefill_and_steps_are_the_whole_sequence(layout: str, mixer: str, grad: bool) -> None:
    """Ragged prompts, then steps of one token and of several, ragged too."""
    model = build(layout, mixer)
    inputs, given = tokens(3, 10), source_of(model, 3)
    prompt = torch.tensor([4, 1, 3])
    places = prompt[:, None] + torch.arange(6)
    with torch.set_grad_enabled(grad):
        whole = logits(model, inputs, **given)
        y, state = model.prefill(inputs[:, :4], prompt, **given)
        close(y, whole[torch.arange(3), prompt - 1])
        rest = inputs.gather(1, places)
        expected = whole.gather(1, places[:, :, None].expand(-1, -1, VOCABULARY))
        stepped, state = run_steps(model, rest[:, :2], state)
        close(stepped, expected[:, :2])
        count = torch.tensor([3, 0, 2])  # a row of length 0 is legal
        chunk, state = model.step(rest[:, 2:5], state, count)
        valid = torch.arange(3) < count[:, None]
        close(chunk[valid], expected[:, 2:5][valid])
        last = rest.gather(1, (2 + count)[:, None])
        y, state = model.step(last, state)
        close(y[:, 0], expected[torch.arange(3), 2 + count])


@mixers
@generators
def test_reserved_capacity_changes_nothing(layout: str, mixer: str) -> None:
    model = build(layout, mixer)
    inputs, given = tokens(2, LENGTH), source_of(model, 2)
    with torch.no_grad():
        whole = logits(model, inputs, **given)
        _, state = model.prefill(inputs[:, :4], capacity=LENGTH, **given)
        addresses = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
        stepped, state = run_steps(model, inputs[:, 4:], state)
    close(stepped, whole[:, 4:])
    assert {name: tensor.data_ptr() for name, tensor in state.tensors().items()} == addresses


@autograd
@mixers
@generators
def test_select_commutes_with_running(layout: str, mixer: str, grad: bool) -> None:
    """Beam search's reordering: rows repeat, leave and change places; one select after another."""
    model = build(layout, mixer)
    inputs, given = tokens(3, LENGTH), source_of(model, 3)
    with torch.set_grad_enabled(grad):
        whole = logits(model, inputs, **given)
        _, state = model.prefill(inputs[:, :4], torch.tensor([4, 2, 3]), **given)
        _, state = model.step(inputs[:, 3:4], state, torch.tensor([0, 0, 1]))
        _, state = model.step(inputs[:, 2:4], state, torch.tensor([0, 2, 0]))
        rows = torch.tensor([2, 0, 2, 1])
        y, state = model.step(inputs[rows, 4:5], state.select(rows))
        close(y[:, 0], whole[rows, 4])
        again = torch.tensor([3, 0, 0])
        rows = rows[again]
        y, state = model.step(inputs[rows, 5:7], state.select(again))
        close(y, whole[rows, 5:7])


@autograd
@mixers
@generators
def test_rewind_is_exact(layout: str, mixer: str, grad: bool) -> None:
    model = build(layout, mixer)
    inputs, wrong, given = tokens(3, LENGTH), tokens(3, LENGTH), source_of(model, 3)
    with torch.set_grad_enabled(grad):
        whole = logits(model, inputs, **given)
        mixed = torch.cat([inputs[:, :4], wrong[:, 4:7]], dim=1)
        _, state = model.prefill(mixed[:, :5], rewind=3, **given)
        _, state = run_steps(model, mixed[:, 5:7], state)
        counts = torch.tensor([3, 0, 2])
        back = 7 - counts
        mixed_whole = logits(model, torch.cat([mixed, inputs[:, 7:]], dim=1), **given)
        state = state.rewind(counts)
        y, state = model.step(inputs[torch.arange(3), back][:, None], state)
        close(y[0, 0], whole[0, 4])
        close(y[1, 0], mixed_whole[1, 7])
        expected = logits(model, torch.cat([mixed[:, :5], inputs[:, 5:6]], dim=1), **given)
        close(y[2, 0], expected[2, 5])


@mixers
@generators
def test_a_clone_is_independent_and_a_repeated_step_gives_the_same_bits(layout: str, mixer: str) -> None:
    model = build(layout, mixer)
    inputs, given = tokens(2, LENGTH), source_of(model, 2)
    with torch.no_grad():
        _, state = model.prefill(inputs[:, :5], **given)
        kept = state.clone()
        first, _ = run_steps(model, inputs[:, 5:], state)
        second, _ = run_steps(model, inputs[:, 5:], kept.clone())
        assert torch.equal(first, second)
        run_steps(model, tokens(2, 3), kept.clone())
        third, _ = run_steps(model, inputs[:, 5:], kept)
        assert torch.equal(first, third)


@mixers
@generators
def test_saved_in_mid_sequence_and_loaded_goes_on_with_the_same_bits(layout: str, mixer: str, tmp_path: Path) -> None:
    model = build(layout, mixer)
    inputs, given = tokens(2, LENGTH), source_of(model, 2)
    with torch.no_grad():
        _, state = model.prefill(inputs[:, :5], torch.tensor([5, 3]), **given)
        save_state(state, tmp_path / "state.safetensors")
        loaded = load_state(model.begin(2, **given), tmp_path / "state.safetensors")
        assert loaded.nbytes == state.nbytes
        expected, _ = run_steps(model, inputs[:, 5:], state)
        actual, _ = run_steps(model, inputs[:, 5:], loaded)
    assert torch.equal(actual, expected)


@mixers
@layouts
def test_padding_changes_nothing(layout: str, mixer: str) -> None:
    """Other tokens in the padding, and more of it, on both sides of the model."""
    model = build(layout, mixer)
    inputs, given = tokens(3, LENGTH), source_of(model, 3)
    lengths = torch.tensor([LENGTH, 2, 6])
    valid = torch.arange(LENGTH) < lengths[:, None]
    expected = model(inputs, lengths, **given)[valid]
    noisy = torch.where(valid, inputs, tokens(3, LENGTH))
    wider = torch.cat([noisy, tokens(3, 4)], dim=1)
    if given:
        real = torch.arange(5) < given["source_lengths"][:, None]
        given["source"] = torch.cat([torch.where(real, given["source"], tokens(3, 5)), tokens(3, 3)], dim=1)
    close(model(noisy, lengths, **given)[valid], expected)
    close(model(wider, lengths, **given)[:, :LENGTH][valid], expected)


@mixers
@layouts
def test_batch_mates_change_nothing(layout: str, mixer: str) -> None:
    model = build(layout, mixer)
    inputs, given = tokens(4, LENGTH), source_of(model, 4)
    lengths = torch.tensor([LENGTH, 2, 6, 1])
    together = model(inputs, lengths, **given)
    for row, length in enumerate(lengths.tolist()):
        mine = {}
        if given:
            held = int(given["source_lengths"][row])
            mine = {"source": given["source"][row : row + 1, :held]}
        close(together[row : row + 1, :length], model(inputs[row : row + 1, :length], **mine))


@mixers
@pytest.mark.parametrize("layout", ["decoder-only", "encoder-only"])
def test_packed_rows_equal_separate_rows(layout: str, mixer: str) -> None:
    model = build(layout, mixer)
    pieces = [tokens(1, n) for n in (4, 1, 3, 5, 2)]
    rows = torch.cat([torch.cat(pieces[:3], dim=1), torch.cat([*pieces[3:], tokens(1, 1)], dim=1)])
    segments = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, -1]])
    packed = model(rows, segments=segments)
    separate = torch.cat([model(piece) for piece in pieces], dim=1)[0]
    close(packed[segments >= 0], separate)


@mixers
@layouts
def test_nan_in_padding_stays_there(layout: str, mixer: str) -> None:
    """The embedding of the padding token is NaN, on both sides of the model."""
    model = build(layout, mixer)
    inputs, given = 1 + tokens(3, LENGTH) % (VOCABULARY - 1), source_of(model, 3)
    lengths = torch.tensor([LENGTH, 2, 6])
    valid = torch.arange(LENGTH) < lengths[:, None]
    if given:
        real = torch.arange(5) < given["source_lengths"][:, None]
        given["source"] = torch.where(real, 1 + given["source"] % (VOCABULARY - 1), 0)
    padded = torch.where(valid, inputs, 0)
    expected = model(padded, lengths, **given)[valid]
    with torch.no_grad():
        model.embedding.tokens.weight[0] = torch.nan
    close(model(padded, lengths, **given)[valid], expected)
    assert expected.isfinite().all()


@mixers
@layouts
def test_an_all_padding_row_harms_nobody(layout: str, mixer: str) -> None:
    model = build(layout, mixer)
    inputs, given = tokens(3, LENGTH), source_of(model, 3)
    if given:
        given["source_lengths"] = torch.tensor([5, 0, 3])
    lengths = torch.tensor([LENGTH, 0, 4])
    hidden = model(inputs, lengths, **given)
    assert hidden.isfinite().all()
    rows = torch.tensor([0, 2])
    alone = model(inputs[rows], lengths[rows], **selected(given, rows))
    close(hidden[0], alone[0])
    close(hidden[2, :4], alone[1, :4])
    gradients = torch.autograd.grad(hidden[0].sum(), list(model.parameters()), allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in gradients if g is not None)


@mixers
@generators
def test_no_output_depends_on_a_later_token(layout: str, mixer: str) -> None:
    model = build(layout, mixer)
    inputs, given = tokens(2, LENGTH), source_of(model, 2)
    other = torch.cat([inputs[:, :5], (inputs[:, 5:] + 1) % VOCABULARY], dim=1)
    first, second = model(inputs, **given), model(other, **given)
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.equal(first[:, 5:], second[:, 5:])


@mixers
def test_an_encoder_reads_both_directions(mixer: str) -> None:
    model = build("encoder-only", mixer)
    inputs = tokens(2, 6)
    for changed, seen in ((0, 1), (5, 4)):
        other = inputs.clone()
        other[:, changed] = (other[:, changed] + 1) % VOCABULARY
        assert not torch.equal(model(inputs)[:, seen], model(other)[:, seen])


@mixers
@pytest.mark.parametrize("layout", GENERATORS)
def test_counted_weights_are_declared_weights(layout: str, mixer: str) -> None:
    model = build(layout, mixer)
    counts = model.parameter_counts()
    assert counts["total"] == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert counts["embedding"] + counts["non_embedding"] == counts["total"]
    for part in model.mixers():
        assert part.count_parameters() == sum(p.numel() for p in part.parameters()), part.name


@mixers
@generators
@pytest.mark.parametrize("context", [1, 5, 8])
def test_state_bytes_are_the_bytes_that_the_state_holds(layout: str, mixer: str, context: int) -> None:
    model = build(layout, mixer)
    source = {"source": tokens(3, 5)} if layout == "encoder-decoder" else {}
    with torch.no_grad():
        _, state = model.prefill(tokens(3, context), **source)
    assert state.nbytes == 3 * model.state_bytes(context, 5, torch.float64)
    assert state.capacity_nbytes >= state.nbytes


def test_the_laws_can_fail() -> None:
    """The planted defect: a step that forgets what the prompt has left behind."""
    model = build("decoder-only", "attention")
    inputs = tokens(2, 6)
    with torch.no_grad():
        _, state = model.prefill(inputs[:, :5])
        y, _ = model.step(inputs[:, 5:], model.begin(2))
        right, _ = model.step(inputs[:, 5:], state)
    assert not torch.allclose(y, right)
    close(right[:, 0], logits(model, inputs)[:, 5])


def test_every_case_is_met() -> None:
    assert MIXERS.keys() == STYLES.keys()
    for layout in (*GENERATORS, "encoder-only"):
        for mixer in MIXERS:
            assert isinstance(build(layout, mixer), SequenceModel)
