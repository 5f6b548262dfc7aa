"""`trilemma bench` on a config: table, files, JSON line, messages."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from trilemma import laws, machine
from trilemma.cli.main import main
from trilemma.errors import LawError

CONFIG = """
model: {layout: decoder-only, d_model: 16, num_layers: 1, num_heads: 2, vocab_size: 40, mixer: retention}
"""
QUICK = ["--contexts", "8,16", "--batch", "1,2", "--new-tokens", "2", "--repeats", "1", "--device", "cpu"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    measured = machine.measure_ceilings("cpu", quick=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "measure_ceilings", lambda device: measured)
    monkeypatch.setattr(
        laws.admission, "require", lambda mixers, path, **options: {}
    )  # the laws have tests of their own
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    return file


def test_table_and_files(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["bench", str(config), *QUICK, "--out", str(out)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["context", "batch"]
    assert len(table) == 5
    with (out / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["context"], row["batch"]) for row in rows] == [("8", "1"), ("8", "2"), ("16", "1"), ("16", "2")]
    assert json.loads((out / "bench.json").read_text())["environment"]["device"] == "cpu"
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "bench.svg").read_text()


def test_json_is_the_only_line_on_stdout(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(config), "model.mixer=attention", *QUICK, "--json", "--train"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert [row["context"] for row in result["rows"]] == [8, 8, 16, 16]
    assert result["training"]["tokens_per_second"] > 0
    assert result["parameters"]["total"] > 0
    assert "context  batch" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "8,x"], '--contexts: "8,x" is not a list of positive numbers such as 128,512'),
        (["--batch", "0"], '--batch: "0" is not a list of positive numbers such as 128,512'),
        (["--max-seconds", "nan"], "--max-seconds: nan is no number of seconds above 0"),
        (["--max-seconds", "-3"], "--max-seconds: -3.0 is no number of seconds above 0"),
        (["--contexts", "8,64", "--source-length", "8"], "--source-length: 8 leaves nothing of a context of 8 tokens"),
        (["--out", __file__], "test_cli_bench.py is a file; name a folder"),
        (["--precision", "bfloat"], '--precision: unknown value "bfloat"; did you mean "bfloat16"?'),
        (["model.mixr=attention"], 'unknown key "model.mixr"; did you mean "mixer"?'),
        (["model.mixer=retenton"], 'unknown mixer "retenton"; did you mean "retention"?'),
    ],
)
def test_mistakes(config: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(config), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("trilemma: ")
    assert message in captured.err


def test_a_missing_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path / "none.yaml"), "--device", "cpu"]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err


def test_no_path_is_measured_without_a_law_record(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def refuse(mixers: list[object], path: str, **options: object) -> None:
        asked.extend([path, *(mixer.name for mixer in mixers)])  # type: ignore[attr-defined]
        raise LawError('mixer "retention" breaks the law')

    monkeypatch.setattr(laws.admission, "require", refuse)
    assert main(["bench", str(config), *QUICK]) == 2
    assert asked == ["plain", "retention"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert 'trilemma: mixer "retention" breaks the law' in captured.err


def test_a_backend_that_cannot_serve_is_an_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(config), *QUICK, "--backend", "fla"]) == 2
    assert capsys.readouterr().err == "trilemma: backend fla runs on cuda, not on cpu\n"
    assert main(["bench", str(config), *QUICK, "--backend", "flaa"]) == 2
    assert 'unknown backend "flaa"; did you mean "fla"?' in capsys.readouterr().err


def test_a_cache_in_eight_bits(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for arguments in ([], ["--cache", "int8"]):
        assert (
            main(
                [
                    "bench",
                    str(config),
                    "model.mixer=[attention,gru]",
                    "model.num_layers=2",
                    *QUICK,
                    *arguments,
                    "--json",
                ]
            )
            == 0
        )
        captured = capsys.readouterr()
        row = json.loads(captured.out)["rows"][0]
        sizes[row["path"]] = row["state_bytes"]
    assert "without keys and values, and as before: gru" in captured.err
    assert sizes["plain/cpu/float32+cache-int8"] < sizes["plain/cpu/float32"]


def test_a_config_is_measured_as_it_would_be_trained(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(CONFIG.replace(", vocab_size: 40", "") + "tokenizer: {kind: byte}\n")
    assert main(["bench", str(config), *QUICK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["embedding"] == 262 * 16
    config.write_text(CONFIG.replace("decoder-only", "encoder-only").replace("retention", "attention"))
    classes = ["data.task=classification", "data.labels=[no,so,yes]", "tokenizer.kind=character"]
    assert main(["bench", str(config), *classes, *QUICK, "--json", "--train"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["tokens_per_second"] > 0


def test_a_training_step_is_timed_in_the_type_that_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for precision in ("auto", "bfloat16", "float64"):
        assert main(["bench", str(config), *QUICK, "--precision", precision, "--train", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["training"]["path"] == found["environment"]["precision"].join(["plain/cpu/", ""])
        assert found["environment"]["precision"] == ("float32" if precision == "auto" else precision)


def test_what_cannot_be_trained_is_said_before_anything_is_measured(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(CONFIG.replace("retention", "attention"))
    assert main(["bench", str(config), *QUICK, "--cache", "int8", "--train"]) == 2
    captured = capsys.readouterr()
    assert "nothing is trained through a cache in int8; leave out --train or --cache" in captured.err
    assert "context" not in captured.out


def test_memory_that_cannot_be_had_is_a_cell_without_a_number(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(config), *QUICK, "--contexts", "8,10000000000000", "--batch", "1", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert first["ms_per_token"] > 0
    assert second["reason"].startswith("out of memory: ")
