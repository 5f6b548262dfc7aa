"""Questions about passages: SQuAD's files, windows, and labels that lead back to the raw text."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilemma.config import DataConfig, RunConfig, Source, TokenizerConfig, parse
from trilemma.data import prepare, train_tokenizer
from trilemma.data.questions import NONE, Question, read_questions, rows_of, windows
from trilemma.errors import ConfigError, DataError

DATA = Path(__file__).parents[3] / "shared" / "data"  # real data, where they stand beside the checkout
PASSAGE = "Die Größe der Stadt: 日本の首都 liegt im Osten.\nSie hat 14 Millionen Einwohner, sagt man dort."


def squad(passage: str, *questions: tuple[str, str]) -> dict[str, Any]:
    qas = [
        {"id": str(n), "question": q, "answers": [{"text": a, "answer_start": passage.index(a)}]}
        for n, (q, a) in enumerate(questions)
    ]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": passage, "qas": qas}]}]}


def written(folder: Path, value: Any, name: str = "q.json") -> Source:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return Source(path=str(folder / name))


@pytest.mark.parametrize("name", ["q.json", "q.json.gz"])
def test_a_file_in_squads_layout(tmp_path: Path, name: str) -> None:
    source = written(tmp_path, squad(PASSAGE, ("Wo?", "Osten"), ("Wie viele?", "14 Millionen")), name)
    first, second = read_questions(source)
    assert (first.question, first.answers, first.passage) == ("Wo?", ("Osten",), PASSAGE)
    assert PASSAGE[second.start :].startswith("14 Millionen")


def test_mistakes_name_file_and_place(tmp_path: Path) -> None:
    shifted = squad(PASSAGE, ("Wo?", "Osten"))
    shifted["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] += 1
    unanswerable = squad(PASSAGE, ("Wo?", "Osten"))
    unanswerable["data"][0]["paragraphs"][0]["qas"][0]["answers"] = []
    flat: Any = {"data": [{"paragraphs": [{"context": PASSAGE}]}]}
    cases: list[tuple[Any, str]] = [
        (shifted, r"qas\[0\]: the answer 'Osten' does not stand at character \d+ of its context"),
        (unanswerable, r"qas\[0\]: no answer; questions without one \(SQuAD 2\) are not supported"),
        (flat, r'paragraphs\[0\]: an object with a list "qas" is needed'),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r'the text "context" is needed'),
        ([], r'q.json: an object with a list "data" is needed'),
        ({"data": []}, "q.json: holds no question"),
        (b"{", "q.json: not JSON in UTF-8"),
        (b"\xff\xfe", "q.json: not JSON in UTF-8"),
        (b"", "q.json: the file is empty"),
    ]
    for value, message in cases:
        with pytest.raises(DataError, match=message):
            list(read_questions(written(tmp_path, value)))
    with pytest.raises(DataError, match="no such file"):
        list(read_questions(Source(path=str(tmp_path / "other.json"))))
    with pytest.raises(ConfigError, match=r"one \.json file in SQuAD's layout"):
        list(read_questions(Source(path="a.tsv")))
    with pytest.raises(ConfigError, match='unknown option "header"'):
        list(read_questions(Source(path="a.json", options={"header": True})))


@given(st.integers(0, 12), st.integers(0, 90), st.integers(4, 30), st.integers(0, 20))
def test_windows_cover_the_passage_and_overlap(question: int, passage: int, length: int, overlap: int) -> None:
    data = DataConfig(context_length=length, window_overlap=overlap)
    found = windows(question, passage, data)
    room = length - 3 - question
    if room <= overlap:
        assert not found
        return
    assert (found[0].first, found[-1].stop) == (0, passage)
    assert all(window.stop - window.first <= room for window in found)
    for before, after in itertools.pairwise(found):
        assert before.stop - after.first == overlap
        assert after.stop > before.stop


@pytest.mark.parametrize("kind", ["byte", "character", "bpe"])
@pytest.mark.parametrize("answer", ["Größe", "日本の首都", "Osten", "14 Millionen Einwohner", "Die", "dort."])
def test_labels_lead_back_to_the_answer(kind: Any, answer: str) -> None:
    tokenizer = train_tokenizer([PASSAGE] * 2, TokenizerConfig(kind=kind, vocab_size=300))
    item = Question("Wo?", PASSAGE, (answer,), PASSAGE.index(answer), "here")
    data = DataConfig(context_length=60, window_overlap=30)
    passage = tokenizer.encode_with_offsets(PASSAGE)
    rows = list(rows_of(item, passage, tokenizer, data))
    held = [(tokens, span) for tokens, span in rows if span[1] != NONE]
    assert held
    for tokens, (begin, first, last) in held:
        assert tokens[begin - 1] == tokenizer.sep
        assert begin <= first <= last < len(tokens) <= 60 - 2
        assert answer in tokenizer.decode(tokens[first : last + 1])
        assert answer not in tokenizer.decode(tokens[first + 1 : last + 1])
        assert answer not in tokenizer.decode(tokens[first:last])


def run_config(source: Source, **data: Any) -> RunConfig:
    return parse(
        RunConfig,
        {
            "model": {"layout": "encoder-only", "pooling": "none", **data.pop("model", {})},
            "data": {"task": "question-answering", "train": {"path": source.path}, "context_length": 40, **data},
            "tokenizer": {"kind": "character"},
            "training": {"batch_tokens": 200},
        },
    )


def test_batches(tmp_path: Path) -> None:
    source = written(tmp_path, squad(PASSAGE, ("Wo?", "Osten"), ("Wie viele leben da?", "14 Millionen")))
    dataset, tokenizer = prepare(run_config(source, window_overlap=16), cache_dir=tmp_path / "cache")
    assert dataset.sizes["train"] > 2
    seen = 0
    for k in range(dataset.batches_per_epoch):
        batch = dataset.micro_batch(k)
        assert batch.inputs.shape[1] <= 40
        assert batch.num_targets == len(batch.inputs)
        assert batch.prefix is not None
        assert batch.types is not None
        assert bool((batch.inputs[torch.arange(len(batch.inputs)), batch.prefix - 1] == tokenizer.sep).all())
        assert bool((batch.inputs[torch.arange(len(batch.inputs)), batch.lengths - 1] == tokenizer.eos).all())
        assert bool((batch.types.sum(1) == batch.inputs.shape[1] - batch.prefix).all())
        for row, (first, last) in zip(batch.inputs, batch.labels.tolist(), strict=True):
            if first:
                assert tokenizer.decode(row[first : last + 1].tolist()) in ("Osten", "14 Millionen")
                seen += 1
            else:
                assert last == 0
    assert seen >= 2
    resolved = dataset.resolved(dataset.config)
    assert resolved.model.num_labels == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"window_overlap": 38}, "leaves no room for its passage: data.context_length is 40"),
        ({"model": {"pooling": "mean"}}, "needs model.pooling=none, not mean"),
        ({"model": {"num_labels": 3}}, "question answering has 2"),
        ({"model": {"max_length": 39}}, "data.context_length: 40 is more than model.max_length 39"),
        ({"task": "classification"}, "needs model.pooling=mean or first, not none"),
        ({"model": {"layout": "decoder-only"}}, "needs model.layout encoder-only"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    source = written(tmp_path, squad(PASSAGE, ("Wo?", "Osten")))
    with pytest.raises(Exception, match=message) as caught:
        prepare(run_config(source, **data), cache_dir=tmp_path / "cache")
    assert type(caught.value).__module__ == "trilemma.errors"
    with pytest.raises(ConfigError, match=r"reads \.json files: no data can be given"):
        prepare(run_config(source), cache_dir=tmp_path / "cache", data=[("a", "b")])


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "count"),
    [("jaquad/dev.json.gz", 3939), ("xquad/xquad.en.json", 1190), ("xquad/xquad.zh.json", 1190)],
)
def test_published_sets_are_read_whole(name: str, count: int) -> None:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"the published set {path} is not beside this checkout")
    questions = list(read_questions(Source(path=str(path))))
    assert len(questions) == count
    for question in questions[::50]:
        assert question.passage[question.start :].startswith(question.answers[0])
