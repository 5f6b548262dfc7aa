"""The token cache: found again, rebuilt when a source changes or a file is damaged, built in constant memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from trilemma.config import RunConfig, parse
from trilemma.data import Dataset, prepare
from trilemma.data.cache import (
    StoreBuilder,
    TokenStore,
    content_hash,
    damage,
    default_cache_dir,
    hash_file,
    open_or_build,
)
from trilemma.data.tokenizer import Tokenizer
from trilemma.errors import DataError


def settings(path: Path, **data: Any) -> RunConfig:
    values = {"task": "language-model", "train": {"path": str(path)}, "valid": {"path": str(path)}, **data}
    return parse(RunConfig, {"model": {"layout": "decoder-only"}, "data": values, "tokenizer": {"kind": "byte"}})


def stores(cache: Path) -> set[str]:
    return {folder.name for folder in (cache / "tokens").iterdir() if folder.is_dir()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "train.txt"
    path.write_text("one\ntwo\nthree\n")
    return path


def prepared(path: Path, cache: Path, **data: Any) -> Dataset:
    return prepare(settings(path, **data), cache_dir=cache)[0]


def test_a_second_run_reads_the_cache(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = prepared(source, cache)
    before = {path: path.stat().st_mtime_ns for path in (cache / "tokens").rglob("*.tokens")}
    assert len(before) == 2  # train without its text, valid with it

    def never(*arguments: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokenizer, "encode_batch", never)
    again = prepared(source, cache)
    assert again.data_hash == first.data_hash
    assert {path: path.stat().st_mtime_ns for path in before} == before
    copy = tmp_path / "copy.txt"  # the content counts, not the name
    copy.write_bytes(source.read_bytes())
    assert prepared(copy, cache).data_hash == first.data_hash


def test_a_changed_source_is_read_again(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = prepared(source, cache)
    status = source.stat()
    source.write_text("one\ntwo\nthrew\n")  # same size and, below, the same time
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = prepared(source, cache)
    assert second.eval_texts("valid")[0] == ["one", "two", "threw"]
    assert second.data_hash != first.data_hash and len(stores(cache)) == 4


@pytest.mark.parametrize("change", [{"lowercase": True}, {"packing": False}])
def test_changed_settings_make_another_store(source: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    prepared(source, tmp_path / "cache")
    before = stores(tmp_path / "cache")
    prepared(source, tmp_path / "cache", **change)
    assert stores(tmp_path / "cache") > before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["text.tokens", "text.offsets", "text.text", "text.text_offsets", "meta.json"])
@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-4])])
def test_damage_is_named_and_the_store_built_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, harm: Any
) -> None:
    cache = tmp_path / "cache"
    first = prepared(source, cache)
    folder = first.stores["valid"][0].folder
    content = hash_file(folder / name)
    harm(folder / name)
    reason = damage(folder)
    assert reason is not None
    if name != "meta.json":  # a damaged meta.json may also be no JSON, or of no known version
        assert reason in (f"{name} was altered", f"{name} is missing")
    again = prepared(source, cache)
    message = capsys.readouterr().err
    assert str(folder) in message and "building it again" in message
    assert damage(folder) is None and again.data_hash == first.data_hash
    assert hash_file(folder / name) == content


@pytest.mark.parametrize("key", ["size", "bytes", "meta", "fields", "text", "key"])
def test_no_value_of_the_meta_file_can_change_unseen(source: Path, tmp_path: Path, key: str) -> None:
    """Sizes and byte counts stand under scores: another number there must be named, not used."""
    folder = prepared(source, tmp_path / "cache").stores["valid"][0].folder
    assert damage(folder) is None
    values = json.loads((folder / "meta.json").read_text())
    values[key] = 7
    (folder / "meta.json").write_text(json.dumps(values))
    assert damage(folder) == "meta.json was altered"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.tsv"
    path.write_bytes(b"a\tb\n" * 5000 + b"no tab\n")
    values = {"data": {"train": {"path": str(path)}}, "tokenizer": {"kind": "byte"}}
    with pytest.raises(DataError, match=r"bad.tsv:5001: 1 tab-separated"):
        prepare(parse(RunConfig, values), cache_dir=tmp_path / "cache")
    assert stores(tmp_path / "cache") == set()


def test_what_a_killed_build_left_is_removed_after_a_day(source: Path, tmp_path: Path) -> None:
    old, recent = (tmp_path / "cache" / "tokens" / f"building-{name}" for name in ("1-old", "2-recent"))
    for folder in (old, recent):
        folder.mkdir(parents=True)
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    prepared(source, tmp_path / "cache")
    assert not old.exists() and recent.exists()


def test_unwritable_cache_says_what_to_do(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the token cache cannot be written.*TRILEMMA_CACHE"):
        prepared(source, tmp_path / "file" / "cache")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRILEMMA_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("TRILEMMA_CACHE")
    assert default_cache_dir().name == "trilemma"


def test_large_files_are_hashed_again_only_when_they_change(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trilemma.data.cache._LARGE", 1)
    first = content_hash(source, tmp_path)
    monkeypatch.setattr("trilemma.data.cache.hash_file", lambda path: "read")
    assert content_hash(source, tmp_path) == first == hash_file(source)
    source.write_text("changed")
    assert content_hash(source, tmp_path) == "read"


def test_stores_hold_any_pieces(tmp_path: Path) -> None:
    def build() -> TokenStore:
        with StoreBuilder(tmp_path, "key", ("a", "b"), keep_text=True) as builder:
            for ids, text in (([1, 2], "é"), ([], ""), ([70_000], "x")):
                builder.append("a", ids, text)
                builder.append("b", ids, text)
                builder.append("b", ids, text)
                builder.finish_example()
            return builder.publish({"note": 1})

    store = open_or_build(tmp_path, "key", build)
    assert store.size == 3 and store.meta == {"note": 1} and store.bytes == {"a": 3, "b": 6}
    assert [store.ids("a", i).tolist() for i in range(3)] == [[1, 2], [], [70_000]]
    assert [store.ids("b", i).tolist() for i in range(3)] == [[1, 2, 1, 2], [], [70_000, 70_000]]
    assert list(store.texts("b")) == ["éé", "", "xx"]
    assert store.lengths("b").tolist() == [4, 0, 2]
    assert json.loads((tmp_path / "key" / "meta.json").read_text())["size"] == 3


def _prepare_in_process(path: Path, cache: Path, queue: Any) -> None:
    queue.put(prepared(path, cache).data_hash)


@pytest.mark.slow
def test_processes_that_start_together_share_one_build(source: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_prepare_in_process, args=(source, tmp_path / "cache", queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    hashes = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert len(hashes) == 1 and len(stores(tmp_path / "cache")) == 2


def peak(path: Path, cache: Path) -> int:
    values = {"task": "language-model", "train": {"path": str(path)}, "valid": {"path": str(path)}}
    words = {"kind": "word", "vocab_size": 100}
    config = parse(RunConfig, {"model": {"layout": "decoder-only"}, "data": values, "tokenizer": words})
    tracemalloc.start()
    prepare(config, cache_dir=cache)
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return highest


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """More text may cost the per-line arrays of the batch plan (some 40 bytes a line), not the text (60)."""
    sizes = (4_000, 24_000)
    peaks = []
    for size in sizes:
        path = tmp_path / f"{size}.txt"
        with path.open("w") as stream:
            for number in range(size):
                stream.write(f"line {number} {'characters ' * 5}\n")
        peaks.append(peak(path, tmp_path / f"cache-{size}"))
    grown = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    assert grown < 60, f"{grown:.0f} bytes a line"
