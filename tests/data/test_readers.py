"""Readers: every format and compression gives the same examples, and every mistake its file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from trilemma.config import Source
from trilemma.data.readers import example_of, read_documents, read_records
from trilemma.errors import ConfigError, DataError

PAIRS = [("a cat", "eine Katze"), ("", "leer"), ("line\u2028break \x85 \x0b", "é 你好"), (" spaces ", "")]


def source(**values: Any) -> Source:
    return Source.model_validate({name: str(v) if isinstance(v, Path) else v for name, v in values.items()})


def records(task: str = "seq2seq", **values: Any) -> list[tuple[str, ...]]:
    return list(read_records(source(**values), task))


def tsv(pairs: list[tuple[str, str]]) -> bytes:
    return "".join(f"{a}\t{b}\n" for a, b in pairs).encode()


def jsonl(pairs: list[tuple[str, str]], names: tuple[str, str] = ("source", "target")) -> bytes:
    return "".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs).encode()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(("suffix", "write"), [(".tsv", tsv), (".jsonl", jsonl)])
def test_tables_in_every_compression(tmp_path: Path, packing: str, suffix: str, write: Callable[..., bytes]) -> None:
    path = tmp_path / f"data{suffix}{packing}"
    path.write_bytes(PACK[packing](write(PAIRS)))
    assert records(path=path) == PAIRS


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_aligned_text_splits_at_newlines_only(tmp_path: Path, packing: str, end: str) -> None:
    paths = [tmp_path / f"train.{side}{packing}" for side in ("en", "de")]
    for side, path in enumerate(paths):
        path.write_bytes(PACK[packing](end.join(pair[side] for pair in PAIRS).encode()))
    # The last target line is empty and has no line end: it is no line, so its source lacks a partner.
    with pytest.raises(DataError, match=r"has 4 lines, .* has 3"):
        records(source=paths[0], target=paths[1])
    for side, path in enumerate(paths):
        path.write_bytes(PACK[packing]("".join(pair[side] + end for pair in PAIRS).encode()))
    assert records(source=paths[0], target=paths[1]) == PAIRS


def test_several_zstandard_frames_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(PACK[".zst"](b"one\n") + PACK[".zst"](b"two\n"))
    assert records("language-model", path=path) == [("one",), ("two",)]


def test_parquet_and_other_key_names(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"src": ["a", "b"], "tgt": ["c", "d"]}), path)
    assert records(path=path) == [("a", "c"), ("b", "d")]
    assert records(path=path, options={"keys": ["tgt", "src"]}) == [("c", "a"), ("d", "b")]
    (tmp_path / "b.jsonl").write_bytes(jsonl(PAIRS, ("src", "tgt")))
    assert records(path=tmp_path / "b.jsonl") == PAIRS


def test_labels_may_be_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": "0"}\n')
    assert records("classification", path=path) == [("good", "1"), ("bad", "0")]


def test_tsv_columns_and_header(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("id\ten\tde\n1\ta\tb\n")
    assert records(path=path, options={"columns": [3, 2], "header": True}) == [("b", "a")]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert records("language-model", path=tmp_path / "a.txt") == [("one",), ("two",)]


def pieces(path: Path, documents: str) -> list[str]:
    result, current = [], ""
    for text, ends in read_documents(source(path=path), "language-model", documents):
        current += text
        if ends:
            result.append(current)
            current = ""
    assert current == ""
    return result


def test_documents_of_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\r\n\n\nthree")
    assert pieces(path, "line") == ["one", "two", "", "", "three"]
    assert pieces(path, "blank") == ["one\ntwo", "three"]
    assert pieces(path, "file") == ["one\ntwo\r\n\n\nthree"]
    with pytest.raises(ConfigError, match='"lines" of the option documents; did you mean "line"'):
        pieces(path, "lines")


BAD = [
    ("a.tsv", b"a\tb\nonly one\n", r"a.tsv:2: 1 tab-separated column\(s\), but 2 are needed"),
    ("a.tsv", b"a\tb\nc\t\xff\n", r"a.tsv:2: invalid UTF-8 at byte 3 of the line \(0xff\)"),
    ("a.jsonl", b'{"source": "a", "target": "b"}\n{"source": \n', r"a.jsonl:2: not a JSON object"),
    ("a.jsonl", b'["a"]\n', r'a.jsonl:1: an object with "source" and "target" is needed, found list'),
    ("a.jsonl", b'{"sorce": "a", "target": "b"}\n', r'"source" is missing; did you mean "sorce"'),
    ("a.jsonl", b'{"source": 1, "target": "b"}\n', r'a.jsonl:1: the key "source" must hold text, found int'),
    ("a.jsonl", b"[" * 100_000 + b"\n", r"a.jsonl:1: not a JSON object"),
    ("a.txt", b"one\n", r"plain text holds one text a line.*aligned files"),
    ("a.tsv", b"", r"a.tsv: the file is empty"),
    ("a.tsv.gz", gzip.compress(b"", mtime=0), r"a.tsv.gz: the file is empty"),
    ("a.tsv.gz", b"not gzip", r"a.tsv.gz: damaged or truncated after line 0"),
    ("a.tsv.gz", gzip.compress(b"a\tb\n" * 1000, mtime=0)[:-12], r"a.tsv.gz: damaged or truncated after line \d+"),
    ("a.tsv.zst", b"not zstandard", r"a.tsv.zst: damaged or truncated"),
    ("a.parquet", b"not parquet", r"a.parquet: not a readable parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_every_mistake_names_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        records(path=tmp_path / name)


def test_unequal_sides_name_the_first_line_without_partner(tmp_path: Path) -> None:
    long, short = tmp_path / "a.en", tmp_path / "a.de"
    long.write_text("1\n2\n3\n4\n")
    short.write_text("1\n2\n")
    message = r"a.en:3: this line has no partner in .*a.de: .*a.en has 4 lines, .*a.de has 2"
    for paths in ((long, short), (short, long)):
        with pytest.raises(DataError, match=message):
            records(source=paths[0], target=paths[1])


def test_invalid_utf8_of_an_aligned_side(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes(b"one\ntwo\n")
    (tmp_path / "a.de").write_bytes(b"eins\nzw\xe4i\n")
    with pytest.raises(DataError, match=r"a.de:2: invalid UTF-8 at byte 3"):
        records(source=tmp_path / "a.en", target=tmp_path / "a.de")


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.de").write_text("x\n")
    with pytest.raises(DataError, match=r'train.dee: no such file; did you mean "train.de"'):
        records("language-model", path=tmp_path / "train.dee")
    with pytest.raises(DataError, match="not a file"):
        records("language-model", path=tmp_path)


def test_unknown_option_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("a\tb\n")
    with pytest.raises(ConfigError, match='unknown option "colums"; did you mean "columns"'):
        records(path=tmp_path / "a.tsv", options={"colums": [1, 2]})


def test_items_of_iterables() -> None:
    assert example_of("text", "language-model", "item 1") == ("text",)
    assert example_of(["a", "b"], "seq2seq", "item 1") == ("a", "b")
    assert example_of({"tgt": "b", "src": "a"}, "seq2seq", "item 1") == ("a", "b")
    assert example_of(("good", 1), "classification", "item 1") == ("good", "1")
    with pytest.raises(DataError, match='item 3: seq2seq needs "source" and "target", found str'):
        example_of("text", "seq2seq", "item 3")
    with pytest.raises(DataError, match='item 4: the key "target" must hold text, found NoneType'):
        example_of(("a", None), "seq2seq", "item 4")
