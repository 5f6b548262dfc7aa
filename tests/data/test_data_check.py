"""`trilemma data check`: what is planted in the files is found, with its line; exit codes; one JSON line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from trilemma.cli.main import main
from trilemma.config import Source, TokenizerConfig
from trilemma.data.check import CheckReport, check_data
from trilemma.data.tokenizer import train_tokenizer


def sentence(number: int) -> str:
    return f"sentence number {number} of the corpus, of ordinary length"


def write(path: Path, lines: list[bytes]) -> Path:
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, Path]:
    source = [sentence(number).encode() for number in range(60)]
    target = [sentence(number).upper().encode() for number in range(60)]
    source[10] = b"broken \xff line"
    source[20] = b""
    source[30], target[30] = source[5], target[5]
    source[40] = b"x" * 30
    target[40] = b"y" * 400
    target[50] = source[50]
    source[55] = "lost \ufffd character".encode()
    test_source, test_target = [b"new one", source[7], source[3]], [b"neu eins", target[7], b"something else"]
    return {
        "source": write(tmp_path / "train.en.gz", source),
        "target": write(tmp_path / "train.de", target),
        "test_source": write(tmp_path / "test.en", test_source),
        "test_target": write(tmp_path / "test.de", test_target),
    }


def pair(source: Path, target: Path) -> list[Source]:
    return [Source.model_validate({"source": str(source), "target": str(target)})]


def report(corpus: dict[str, Path], **options: Any) -> CheckReport:
    splits = {
        "train": pair(corpus["source"], corpus["target"]),
        "test": pair(corpus["test_source"], corpus["test_target"]),
    }
    return check_data(splits, "seq2seq", **options)


def test_everything_planted_is_found_at_its_line(corpus: dict[str, Path]) -> None:
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    found = report(corpus, tokenizer=tokenizer, limits={"source": 100, "target": 100}, tokens_per_second=1000.0)
    train, test = found.splits
    assert train.examples == 59 and test.examples == 3
    assert train.unreadable.lines == ["11"] and found.errors == 1
    assert "train.en.gz:11: invalid UTF-8 at byte 8" in train.unreadable.messages[0]
    assert train.empty["source"].lines == ["21"]
    assert train.duplicates.lines == ["31"] and train.duplicate_sources.lines == ["31"]
    assert "41" in train.ratio_outliers.lines and train.ratio_outliers.count <= 2
    assert train.identical_sides.lines == ["51"]
    assert train.replacement_characters.lines == ["56"]
    assert train.fields["target"].over_limit.lines == ["41"]
    assert found.overlaps[0].examples.lines == ["2"]
    assert found.overlaps[0].sides["source"].lines == ["2", "3"]
    assert found.overlaps[0].sides["target"].lines == ["2"]
    assert found.seconds_per_epoch == found.tokens_per_epoch / 1000


def test_a_clean_corpus_has_no_findings(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, [sentence(n).encode() + end for n in range(50)]) for name, end in SIDES]
    (train,) = check_data({"train": pair(*paths)}, "seq2seq").splits
    for finding in (train.unreadable, train.duplicates, train.duplicate_sources, train.ratio_outliers):
        assert finding.count == 0
    assert train.empty == {} and train.identical_sides.count == 0


SIDES = [("a.en", b""), ("a.de", b"!")]


def test_token_counts_are_exact_with_a_tokenizer(corpus: dict[str, Path]) -> None:
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    found = report(corpus, tokenizer=tokenizer)
    for split in found.splits:
        for field in split.fields.values():
            assert field.tokens.total == field.bytes.total and field.bytes_per_token == 1.0
    target = found.splits[0].fields["target"]
    assert target.bytes.quantiles["max"] == 400 and sum(target.bytes.counts) == 59


def test_what_the_tokenizer_does_not_have_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", [b"ab", "a b 字 ö".encode(), b"", b"ba"])
    splits = {"train": [Source.model_validate({"path": str(path)})]}
    tokenizer = train_tokenizer(["ab ba"], TokenizerConfig(kind="character"))
    unknown = check_data(splits, "language-model", tokenizer).splits[0].fields["text"].unknown
    assert (unknown.lines, unknown.messages) == (["2"], ["2 of 7 tokens"])
    assert not check_data(splits, "language-model").splits[0].fields["text"].unknown.count  # an estimate says nothing


def test_estimated_tokens_are_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", [sentence(number).encode() for number in range(400)])
    splits = {"train": [Source.model_validate({"path": str(path)})]}
    whole = check_data(splits, "language-model")
    monkeypatch.setattr("trilemma.data.check._SAMPLE", 100)
    part = check_data(splits, "language-model")
    assert abs(part.tokens_per_epoch / whole.tokens_per_epoch - 1) < 0.15
    assert "estimated" in part.tokenizer


def test_unequal_sides_and_labels(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.en", [b"1", b"2", b"3"]), write(tmp_path / "a.de", [b"1", b"2"])
    (train,) = check_data({"train": pair(first, second)}, "seq2seq").splits
    assert "a.en:3: this line has no partner" in train.unreadable.messages[0] and train.unreadable.lines == ["3"]
    table = write(tmp_path / "a.tsv", [b"good\t1", b"bad\t0", b"fine\t1"])
    (train,) = check_data({"train": [Source.model_validate({"path": str(table)})]}, "classification").splits
    assert train.labels == {"1": 2, "0": 1} and list(train.fields) == ["text"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["data", "check", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_line(corpus: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    files = [corpus["source"], corpus["target"], "--test", corpus["test_source"], "--test", corpus["test_target"]]
    code, out, _ = run(capsys, *files)
    assert code == 1 and "training would stop: 1 unreadable" in out and "test examples in train" in out
    code, out, _ = run(capsys, *files, "--json", "--tokens-per-second", 100)
    values = json.loads(out)
    assert code == 1 and out.count("\n") == 1
    assert values["splits"][0]["duplicates"] == {"count": 1, "lines": ["31"], "messages": []}
    assert values["errors"] == 1 and values["seconds_per_epoch"] > 0
    code, out, _ = run(capsys, corpus["test_source"], corpus["test_target"])
    assert code == 0 and "3 examples" in out


def test_several_files_are_named_with_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / f"{name}.txt", [b"same text", name.encode()]) for name in "abc"]
    code, out, _ = run(capsys, *files, "--task", "language-model")
    assert code == 0 and "b.txt:1" in out and "c.txt:1" in out
    code, _, err = run(capsys, *files)  # two sides and a third file, or three texts?
    assert code == 2 and err.startswith("trilemma: 3 text files: say --task language-model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt: no such file"),
        ("empty.txt", b"", "empty.txt: the file is empty"),
        ("cut.txt.gz", gzip.compress(b"text\n" * 9, mtime=0)[:-10], "cut.txt.gz: damaged or truncated"),
    ],
)
def test_unreadable_files_end_with_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = run(capsys, tmp_path / name)
    assert code == 2 and message in err and out == "" and "Traceback" not in err


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.txt", [b"text"])
    code, _, err = run(capsys, path, "--task", "translation")
    assert code == 2 and 'unknown task "translation"' in err
    code, _, err = run(capsys, path, "--tokens-per-second", 0)
    assert code == 2 and "a positive number is needed" in err
    config = tmp_path / "c.yaml"
    config.write_text("data: {train: {generated: numbers}}\n")
    code, _, err = run(capsys, config)
    assert code == 2 and "there are no files to check" in err
    config.write_text(f"data: {{task: language-model, train: {{path: {path}}}}}\n")
    assert run(capsys, config)[0] == 0
