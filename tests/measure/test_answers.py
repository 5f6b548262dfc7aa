"""Spans, answers as parts of the raw passage, and SQuAD's scores, against brute force and a reference written out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trilemma.config import RunConfig, TokenizerConfig, parse
from trilemma.data import train_tokenizer
from trilemma.data.batch import question_batch
from trilemma.data.languages import is_unspaced
from trilemma.errors import CapabilityError, LengthError
from trilemma.measure.answers import exact, f1, find_answers
from trilemma.measure.spans import best_spans, span_log_probabilities
from trilemma.models import build_model
from trilemma.predictor import Predictor
from trilemma.train import objective

PASSAGE = "  Die Größe  der Stadt:\n日本の首都 liegt im Osten. " * 3


def reader(kind: Any = "byte", **model: Any) -> Predictor:
    torch.manual_seed(6)
    tokenizer = train_tokenizer([PASSAGE], TokenizerConfig(kind=kind, vocab_size=300))
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": tokenizer.vocab_size}
    values = {
        "model": {"layout": "encoder-only", "pooling": "none", "num_labels": 2, **sizes, **model},
        "data": {"task": "question-answering", "context_length": 48, "window_overlap": 12},
    }
    config = parse(RunConfig, values)
    network = build_model(config.model).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return Predictor(network, tokenizer, config)


def test_the_question_and_padding_have_no_probability() -> None:
    logits = torch.randn(3, 9, 2).double()
    logits[:, 1] = 50.0  # the question
    logits[1, 7:] = 90.0  # padding
    passage, lengths = torch.tensor([3, 4, 8]), torch.tensor([9, 7, 9])
    shares = span_log_probabilities(logits, passage, lengths).exp()
    torch.testing.assert_close(shares.sum(1), torch.ones(3, 2).double())
    for row, (begin, length) in enumerate([(3, 9), (4, 7), (8, 9)]):
        allowed = {0, *range(begin, length - 1)}
        assert {place for place in range(9) if float(shares[row, place].sum()) > 0} == allowed


def brute(scores: Tensor, starts: Tensor, ends: Tensor, longest: int) -> list[float]:
    best = []
    for row in range(len(scores)):
        pairs = itertools.product(range(scores.shape[1]), repeat=2)
        kept = [(a, b) for a, b in pairs if starts[row, a] and ends[row, b] and 0 <= b - a < longest]
        best.append(max((float(scores[row, a, 0] + scores[row, b, 1]) for a, b in kept), default=-np.inf))
    return best


@pytest.mark.parametrize("longest", [1, 3, 20])
def test_the_best_span_is_the_best_of_all(longest: int) -> None:
    scores = torch.randn(4, 11, 2).double()
    starts, ends = torch.rand(4, 11) < 0.5, torch.rand(4, 11) < 0.5
    starts[3] = False
    first, last, best = best_spans(scores, starts, ends, longest)
    assert best.tolist() == pytest.approx(brute(scores, starts, ends, longest))
    for row in range(3):
        if best[row] > -torch.inf:
            a, b = int(first[row]), int(last[row])
            assert float(scores[row, a, 0] + scores[row, b, 1]) == float(best[row])


@pytest.mark.parametrize("kind", ["byte", "character", "bpe", "word"])
@pytest.mark.parametrize("mixer", ["attention", "lstm", "retention"])
def test_an_answer_is_a_part_of_the_passage(kind: str, mixer: str) -> None:
    ours = reader(kind, mixer=mixer)
    pairs = [(f"Frage {n}?", PASSAGE[n:]) for n in range(0, 40, 9)]
    for (_, passage), found in zip(pairs, ours.answer(pairs), strict=True):
        assert found.text == passage[found.start : found.end] == found.text.strip() != ""
        assert 0 < found.probability <= 1
        assert len(ours.tokenizer.encode(found.text)) <= 30 + 2
    alone = [ours.answer([pair])[0] for pair in pairs]
    for one, together in zip(alone, ours.answer(pairs), strict=True):
        assert (one.text, one.start) == (together.text, together.start)
        assert one.probability == pytest.approx(together.probability)


def test_short_answers_and_passages_without_text() -> None:
    ours = reader()
    assert ours.answer([]) == []
    empty, blank, letter = ours.answer([("who?", ""), ("who?", " \n "), ("", " x ")])
    assert (empty.text, empty.probability, blank.text, blank.probability) == ("", 0.0, "", 0.0)
    assert (letter.text, letter.start, letter.end) == ("x", 1, 2)
    (short,) = ours.answer([("who?", PASSAGE)], longest=1)
    assert len(short.text) == 1


def test_windows_are_searched_for_the_likeliest() -> None:
    """The answer over all windows is the best of those that each window gives alone."""
    ours = reader("character")
    question, text = "wo?", PASSAGE.replace("\n", " ")
    room = 48 - 3 - len(question)
    (found,) = ours.answer([(question, text)])
    step = room - 12
    pieces = [text[start : start + room] for start in range(0, len(text) - 12, step)]
    alone = ours.answer([(question, piece) for piece in pieces])
    assert found.probability == pytest.approx(max(answer.probability for answer in alone))
    assert len(pieces) > 2


def test_what_cannot_be_answered() -> None:
    ours = reader()
    with pytest.raises(LengthError, match=r"line 4: a question of 40 tokens leaves no room for its passage"):
        ours.answer([("a", "b"), ("x" * 40, "b")], first_line=3)
    ours.config = ours.config.model_copy(
        update={"data": ours.config.data.model_copy(update={"task": "masked-language-model"})}
    )
    with pytest.raises(CapabilityError, match="task is masked-language-model, not question-answering"):
        find_answers(ours.model, ours.tokenizer, ours.config, [])


def test_token_types_tell_question_and_passage_apart() -> None:
    ours = reader(token_types=2)
    before = ours.answer([("wer?", PASSAGE)])[0].probability
    with torch.no_grad():
        types = ours.model.embedding.types
        assert types is not None
        types.weight[1].add_(torch.randn(16))
    assert ours.answer([("wer?", PASSAGE)])[0].probability != before


# The objective


def test_the_loss_and_its_gradient() -> None:
    """The mean of two cross-entropies over the window and place 0, written with torch's own loss row by row."""
    ours = reader()
    tokenizer = ours.tokenizer
    asked, window = np.array([70, 71, tokenizer.sep]), np.arange(80, 90)
    rows = [
        (np.concatenate([asked, window]), np.array([3, 5, 7])),
        (np.concatenate([asked, window[:4]]), np.array([3, -1, -1])),
    ]
    batch = question_batch(rows, tokenizer)  # type: ignore[arg-type]
    hidden = torch.randn(2, batch.inputs.shape[1], 16).double().requires_grad_()
    total = objective.backward_spans(ours.model.head, hidden, batch, 0.25)
    got, hidden.grad = hidden.grad, None
    wanted = torch.zeros((), dtype=torch.float64)
    for row, (length, labels) in enumerate([(15, (6, 8)), (9, (0, 0))]):
        places = [0, *range(4, length - 1)]
        logits = ours.model.head(hidden[row, places])
        for side in range(2):
            target = torch.tensor([places.index(labels[side])])
            wanted = wanted + torch.nn.functional.cross_entropy(logits[None, :, side], target) / 2
    (wanted * 0.25).backward()
    torch.testing.assert_close(total, wanted.detach())
    torch.testing.assert_close(got, hidden.grad)
    loss, hits = objective.evaluate_spans(ours.model.head, hidden.detach(), batch)
    torch.testing.assert_close(loss, wanted.detach())
    assert 0 <= int(hits) <= 2


def test_a_head_of_spans_counts_its_flops_at_every_place() -> None:
    ours = reader()
    assert ours.model.flops(9) - ours.model.stack.flops(9) == 9 * 2 * 16 * 2
    assert reader(head_transform=True).model.head_transform is None  # type: ignore[attr-defined]


# Scores


@pytest.mark.parametrize(
    ("answer", "right", "wanted", "share"),
    [
        ("The Norman dynasty.", ["norman Dynasty"], True, 1.0),
        ("a dynasty", ["an old dynasty"], False, 2 / 3),
        ("in 10th century", ["10th", "the 10th century"], False, 0.8),
        ("", ["x"], False, 0.0),
        ("the", ["a"], True, 1.0),
        ("to to be", ["to be be"], False, 2 / 3),
    ],
)
def test_squads_definition(answer: str, right: list[str], wanted: bool, share: float) -> None:
    assert exact(answer, right, False) is wanted
    assert f1(answer, right, False) == pytest.approx(share)


def test_characters_where_words_have_no_spaces() -> None:
    assert exact("「東京」、", ["東京"], True)
    assert not exact("「東京」、", ["東京"], False)
    assert f1("東京都", ["東京"], True) == pytest.approx(0.8)
    assert f1("東京都", ["東京"], False) == 0.0
    assert [is_unspaced(code) for code in ("ja", "zh-CN", "th", "de", "ko", None)] == [True] * 3 + [False] * 3
