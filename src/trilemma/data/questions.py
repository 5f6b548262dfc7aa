"""Extractive question answering: SQuAD's JSON layout, and passages in overlapping windows.

{"data": [{"paragraphs": [{"context": TEXT, "qas": [{"id", "question", "answers": [{"text", "answer_start"}]}]}]}]}
(Rajpurkar et al. 2016, arXiv 1606.05250; JaQuAD and XQuAD have the same layout.) `answer_start` counts characters.

A question with one window of its passage is one row, `[bos] question [sep] window [eos]` (Devlin et al. 2019, section
4.2). Windows overlap, so that an answer that one of them cuts stands whole in another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilemma.config import DataConfig, Source
from trilemma.data.backends import Offsets
from trilemma.data.readers import open_binary, source_files
from trilemma.data.tokenizer import Tokenizer
from trilemma.errors import ConfigError, DataError

NONE = -1  # the window does not hold the answer
SPECIAL = 3  # tokens of a row beside question and window


@dataclass(frozen=True)
class Question:
    """A question about a passage.

    Attributes:
        answers: right ones, each a part of the passage. start: first character of the first one.
        where: file and id, for messages.
    """

    question: str
    passage: str
    answers: tuple[str, ...]
    start: int
    where: str


@dataclass(frozen=True)
class Window:
    """Tokens `first` to `stop` of a passage."""

    first: int
    stop: int


def read_questions(source: Source) -> Iterator[Question]:
    """The questions of a .json file (also .json.gz, .json.zst) in SQuAD's layout.

    The file is read whole: it is one JSON value.

    Raises:
        ConfigError: not a .json file, or options. DataError: missing or malformed, or an answer that does not stand
            where the file says; names file and place.
    """
    files = source_files(source)
    if len(files) != 1 or ".json" not in files[0].suffixes:
        raise ConfigError("question-answering reads one .json file in SQuAD's layout: path: FILE.json (also .gz, .zst)")
    if source.options:
        raise ConfigError(f'{files[0]}: unknown option "{next(iter(source.options))}"; question-answering has none')
    found = False
    for number, article in enumerate(_list(_content(files[0]), "data", str(files[0]))):
        for place, paragraph in enumerate(_list(article, "paragraphs", f"{files[0]}: data[{number}]")):
            where = f"{files[0]}: data[{number}].paragraphs[{place}]"
            passage = _text(paragraph, "context", where)
            for rank, values in enumerate(_list(paragraph, "qas", where)):
                found = True
                yield _question(values, passage, f"{where}.qas[{rank}]")
    if not found:
        raise DataError(f"{files[0]}: holds no question")


def _content(path: Path) -> Any:
    try:
        with open_binary(path) as stream:
            return json.loads(stream.read().decode("utf-8-sig"))
    except (ValueError, RecursionError, OSError, EOFError) as error:
        raise DataError(f"{path}: not JSON in UTF-8: {error}") from None


def _question(values: Any, passage: str, where: str) -> Question:
    question = _text(values, "question", where)
    answers = [
        (_text(answer, "text", f"{where}.answers[{rank}]"), answer.get("answer_start"))
        for rank, answer in enumerate(_list(values, "answers", where))
    ]
    if not answers:
        raise DataError(f"{where}: no answer; questions without one (SQuAD 2) are not supported: leave them out")
    for text, start in answers:
        if type(start) is not int or not text.strip() or start < 0 or passage[start : start + len(text)] != text:
            raise DataError(f"{where}: the answer {text[:40]!r} does not stand at character {start!r} of its context")
    return Question(question, passage, tuple(text for text, _ in answers), answers[0][1], where)


def _list(values: Any, key: str, where: str) -> list[Any]:
    if not isinstance(values, Mapping) or not isinstance(values.get(key), list):
        raise DataError(f'{where}: an object with a list "{key}" is needed: SQuAD\'s layout')
    return list(values[key])


def _text(values: Any, key: str, where: str) -> str:
    if not isinstance(values, Mapping) or not isinstance(values.get(key), str):
        raise DataError(f'{where}: an object with the text "{key}" is needed')
    return str(values[key])


def windows(question: int, passage: int, data: DataConfig) -> list[Window]:
    """Windows over a passage, in order, each as long as rows of `data.context_length` allow; none if there is no room.

    Args:
        question, passage: their lengths in tokens.
    """
    room = data.context_length - SPECIAL - question
    if room <= data.window_overlap:
        return []
    step = room - data.window_overlap
    count = 1 + max(0, -(-(passage - room) // step))
    return [Window(k * step, min(k * step + room, passage)) for k in range(count)]


def no_room(question: int, data: DataConfig) -> str:
    """The message for a question that leaves no room for a window."""
    return (
        f"a question of {question} tokens leaves no room for its passage: data.context_length is "
        f"{data.context_length}, of which windows share {data.window_overlap} (data.window_overlap)"
    )


def span_of(offsets: Offsets, start: int, length: int) -> tuple[int, int]:
    """First and last token that hold some of the characters `start` to `start + length`.

    Args:
        offsets: of the passage's tokens.
    """
    held = [i for i, (low, high) in enumerate(offsets) if high > start and low < start + length]
    return (held[0], held[-1]) if held else (NONE, NONE)


def rows_of(
    question: Question, passage: tuple[list[int], Offsets], tokenizer: Tokenizer, data: DataConfig
) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens, labels) of each window: `question [sep] window`, and where in these the window starts, and the answer's
    first and last token, `NONE` where the window does not hold it whole.

    Args:
        passage: the question's, encoded with offsets.

    Raises:
        DataError: the question leaves no room for its passage.
    """
    asked = tokenizer.encode(question.question)
    ids, offsets = passage
    first, last = span_of(offsets, question.start, len(question.answers[0]))
    found = windows(len(asked), len(ids), data)
    if not found:
        raise DataError(f"{question.where}: {no_room(len(asked), data)}; raise data.context_length")
    begin = len(asked) + 1
    for window in found:
        holds = first != NONE and window.first <= first and last < window.stop
        shift = begin - window.first
        labels = [begin, first + shift, last + shift] if holds else [begin, NONE, NONE]
        yield [*asked, tokenizer.sep, *ids[window.first : window.stop]], labels
