"""The chunked loss against torch's, and what must not count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.train import objective


class Model(nn.Module):
    """An embedding-like body and a tied head with a bias."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)
        self.body = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(vocab_size))

    def hidden(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.body(self.table(tokens)))

    def head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.table.weight, self.bias)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_are_exact(smoothing: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "_chunk", lambda vocab_size, hidden: chunk)
    model = Model(50, 8).double()
    tokens = torch.randint(50, (3, 11))
    labels = torch.randint(50, (3, 11))
    labels[0, 5:] = objective.IGNORE
    labels[2, 0] = objective.IGNORE
    loss = F.cross_entropy(
        model.head(model.hidden(tokens)).flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing
    )
    (loss / 7).backward()
    expected, loss = gradients(model), loss.detach()
    ours = objective.backward(model.head, model.hidden(tokens), labels, smoothing, 1 / 7, 50)
    assert float(ours) == pytest.approx(float(loss), rel=1e-12)
    for one, two in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    assert not ours.requires_grad


def test_label_smoothing_by_hand() -> None:
    """(1 - e) of the weight on the target and e / V on every class; padding takes no part in it."""
    logits = torch.randn(4, 6, dtype=torch.float64)
    labels = torch.tensor([2, 0, objective.IGNORE, 5])
    logp = logits.log_softmax(-1)
    wanted = -sum(0.9 * logp[i, labels[i]] + 0.1 / 6 * logp[i].sum() for i in (0, 1, 3))
    hidden = logits.clone().requires_grad_()
    loss = objective.backward(lambda x: x, hidden, labels, 0.1, 1.0, 6)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-12)
    assert hidden.grad is not None
    assert hidden.grad[2].abs().sum() == 0, "padding has a gradient"
    assert bool((hidden.grad[[0, 1, 3]] != 0).all())


def test_logits_of_the_whole_batch_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "_LOGIT_BYTES", {"cpu": 4 * 500 * 32})
    seen: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return hidden @ torch.ones(4, 500)

    hidden = torch.randn(2, 100, 4, requires_grad=True) * 1
    objective.backward(head, hidden, torch.randint(500, (2, 100)), 0.1, 1.0, 500)
    assert max(seen) == 32
    assert sum(seen) == 200


def test_nothing_scored_is_no_loss_and_no_error() -> None:
    model = Model(5, 4)
    labels = torch.full((2, 3), objective.IGNORE)
    assert float(objective.backward(model.head, model.hidden(torch.ones(2, 3).long()), labels, 0.1, 1.0, 5)) == 0
    assert all(not gradient.any() for gradient in gradients(model))


def test_classification_shapes_and_evaluation() -> None:
    hidden, labels = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    head = nn.Linear(4, 3).double()
    expected = F.cross_entropy(head(hidden), labels, reduction="sum").detach()
    assert float(objective.evaluate(head, hidden, labels, 3)[0]) == pytest.approx(float(expected))
    got = objective.backward(head, hidden.clone().requires_grad_(), labels, 0.0, 1.0, 3)
    assert float(got) == pytest.approx(float(expected))


def test_bfloat16_autocast_takes_the_loss_in_float32() -> None:
    model = Model(300, 16)
    tokens, labels = torch.randint(300, (2, 9)), torch.randint(300, (2, 9))
    exact = objective.backward(model.head, model.hidden(tokens), labels, 0.1, 1.0, 300)
    plain = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective.backward(model.head, model.hidden(tokens), labels, 0.1, 1.0, 300)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=0.02)
    for one, two in zip(gradients(model), plain, strict=True):
        assert one.dtype == torch.float32
        assert float((one - two).norm() / two.norm()) < 0.05


def naive_r_drop(
    one: Tensor, two: Tensor, labels: Tensor, smoothing: float, alpha: float, classes: int
) -> tuple[Tensor, Tensor]:
    """R-Drop written out over all logits at once, position by position: (mean of the cross-entropies, divergence)."""
    entropy = divergence = torch.zeros((), dtype=one.dtype)
    for p, q, label in zip(one.flatten(0, -2), two.flatten(0, -2), labels.flatten().tolist(), strict=True):
        if label != objective.IGNORE:
            ln_p, ln_q = p.log_softmax(-1), q.log_softmax(-1)
            for ln in (ln_p, ln_q):
                entropy = entropy - ((1 - smoothing) * ln[label] + smoothing / classes * ln.sum()) / 2
            kl = (ln_p.exp() * (ln_p - ln_q)).sum() + (ln_q.exp() * (ln_q - ln_p)).sum()
            divergence = divergence + alpha / 2 * kl / 2
    return entropy, divergence


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [2, 7, 1000])
def test_r_drop_by_chunks_is_r_drop_over_all_logits(
    smoothing: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "_chunk", lambda vocab_size, hidden: chunk)
    model = Model(50, 8).double()
    tokens, labels = torch.randint(50, (3, 11)), torch.randint(50, (3, 11))
    labels[0, 5:] = objective.IGNORE
    labels[2, 0] = objective.IGNORE
    masks = torch.rand(2, 3, 11, 8, dtype=torch.float64).gt(0.3) / 0.7
    one, two = (model.head(model.hidden(tokens) * mask) for mask in masks)
    entropy, divergence = naive_r_drop(one, two, labels, smoothing, 5.0, 50)
    assert float((divergence / entropy).detach()) > 0.01, "the divergence is too small to be seen"
    ((entropy + divergence) / 7).backward()
    expected = gradients(model)
    hidden = model.hidden(tokens.repeat(2, 1)) * masks.flatten(0, 1)
    ours = objective.backward_twice(model.head, hidden, labels, smoothing, 5.0, 1 / 7, 50)
    assert float(ours) == pytest.approx(float((entropy + divergence).detach()), rel=1e-12)
    for found, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert not ours.requires_grad


def test_r_drops_gradient_is_that_of_its_loss() -> None:
    """Against finite differences, in float64."""
    labels = torch.tensor([[2, objective.IGNORE, 0]])
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(4, 6, dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        return sum(naive_r_drop(values[:1] @ head, values[1:] @ head, labels, 0.1, 3.0, 6), torch.zeros(()))

    assert torch.autograd.gradcheck(loss, hidden)
    wanted = torch.autograd.grad(loss(hidden), hidden)[0]
    objective.backward_twice(lambda x: x @ head, hidden, labels, 0.1, 3.0, 1.0, 6)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, wanted, rtol=1e-10, atol=1e-12)
    assert not hidden.grad[:, 1].any(), "padding has a gradient"


def test_padding_counts_nowhere_in_r_drop() -> None:
    """What stands at positions that are not scored changes nothing, not even where it is no number."""
    labels = torch.tensor([[2, 1, objective.IGNORE, objective.IGNORE]])
    hidden = torch.randn(2, 4, 5, dtype=torch.float64)
    head = torch.randn(5, 5, dtype=torch.float64)
    found = []
    for filler in (0.0, float("nan")):
        values = hidden.clone()
        values[:, 2:] = filler
        values.requires_grad_()
        loss = objective.backward_twice(lambda x: x @ head, values, labels, 0.1, 2.0, 1.0, 5)
        assert values.grad is not None
        found.append((float(loss), values.grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_two_equal_passes_are_no_divergence() -> None:
    labels = torch.randint(6, (2, 3))
    hidden = torch.randn(2, 3, 6, dtype=torch.float64)
    once = objective.backward(lambda x: x, hidden.clone().requires_grad_(), labels, 0.1, 1.0, 6)
    twice = objective.backward_twice(
        lambda x: x, torch.cat([hidden, hidden]).requires_grad_(), labels, 0.1, 9.0, 1.0, 6
    )
    assert float(twice) == pytest.approx(float(once), rel=1e-12)


def test_r_drop_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many logits at once as without it: half as many positions, twice each."""
    monkeypatch.setattr(objective, "_LOGIT_BYTES", {"cpu": 4 * 500 * 32})
    seen: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return hidden @ torch.ones(4, 500)

    hidden = torch.randn(4, 100, 4, requires_grad=True) * 1
    objective.backward_twice(head, hidden, torch.randint(500, (2, 100)), 0.1, 5.0, 1.0, 500)
    assert max(seen) == 32
    assert sum(seen) == 400


def test_r_drop_of_classes_and_in_bfloat16() -> None:
    head, labels = nn.Linear(4, 3), torch.randint(3, (5,))
    hidden = torch.randn(10, 4)
    exact = objective.backward_twice(head, hidden.clone().requires_grad_(), labels, 0.1, 2.0, 1.0, 3)
    entropy, divergence = naive_r_drop(head(hidden[:5]), head(hidden[5:]), labels, 0.1, 2.0, 3)
    assert float(exact) == pytest.approx(float((entropy + divergence).detach()), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = objective.backward_twice(head, hidden.clone().requires_grad_(), labels, 0.1, 2.0, 1.0, 3)
    assert rough.dtype == torch.float32
    assert float(rough) == pytest.approx(float(exact), rel=0.05)
