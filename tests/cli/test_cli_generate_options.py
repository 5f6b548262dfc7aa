"""What `trilemma generate` is told on the command line: alignments, constraints, ensembles; and how it is reported."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import trilemma
from trilemma import laws
from trilemma.cli.main import main
from trilemma.decode import Line

MakeRun = Callable[..., Path]
LINES = ["ab cd", "", "e fg"]
TEXT = "\n".join(LINES) + "\n"


@pytest.fixture(autouse=True)
def _lawful(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws.admission, "require", lambda mixers, path, **options: {})


@pytest.fixture
def trilemma_of(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> Callable[..., tuple]:
    """`trilemma_of(verb, input, *arguments)`: (exit code, stdout, stderr), in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(verb: str, text: str, *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        code = main([verb, *map(str, arguments), "--device", "cpu"])
        captured = capfdbinary.readouterr()
        return code, captured.out.decode(), captured.err.decode()

    return run


def test_alignments_are_a_column(make_run: MakeRun, trilemma_of: Callable[..., tuple]) -> None:
    run = make_run()
    plain = trilemma_of("generate", TEXT, run)[1].split("\n")
    code, out, err = trilemma_of("generate", TEXT, run, "--alignments", "tokens")
    assert code == 0, err
    rows = [line.split("\t") for line in out.split("\n")[:3]]
    assert [row[0] for row in rows] == plain[:3]
    assert rows[1] == ["", ""]
    links = [tuple(map(int, link.split("-"))) for link in rows[0][1].split()]
    assert [target for _, target in links] == list(range(len(links)))
    assert all(0 <= source < 5 for source, _ in links)
    words = trilemma_of("generate", TEXT, run, "--alignments", "words", "--scores")[1].split("\n")[0].split("\t")
    assert len(words) == 3
    assert all(0 <= int(link.split("-")[0]) < 2 for link in words[2].split())
    values = [
        json.loads(line)
        for line in trilemma_of("generate", TEXT, run, "--alignments", "tokens", "--jsonl")[1].splitlines()
    ]
    assert [tuple(link) for link in values[0]["outputs"][0]["alignment"]] == links
    assert values[1]["outputs"][0]["alignment"] == []


def test_prefixes_and_phrases_go_line_by_line(make_run: MakeRun, trilemma_of: Callable[..., tuple]) -> None:
    run = make_run(decoding__max_length=20)
    Path("begin").write_text("Der\n\n\n")
    Path("hold").write_text("\n\nxy\tz\n")
    code, out, err = trilemma_of("generate", TEXT, run, "--prefixes", "begin", "--phrases", "hold", "--window", "1")
    assert code == 0, err
    lines = out.split("\n")
    assert lines[0].startswith("Der")
    assert lines[1] == ""
    assert "xy" in lines[2]
    assert "z" in lines[2]
    wanted = [Line("ab cd", prefix="Der"), "", Line("e fg", phrases=("xy", "z"))]
    assert lines[:3] == trilemma.load(run, device="cpu").translate(wanted)


def test_rules_that_act_are_reported(make_run: MakeRun, trilemma_of: Callable[..., tuple]) -> None:
    run = make_run(decoding__max_length=30)
    free = trilemma_of("generate", TEXT, run)
    assert "repetition" not in free[2]
    code, out, err = trilemma_of("generate", TEXT, run, "decoding.no_repeat_ngram=1", "--json")
    assert code == 0
    assert "a repetition was prevented (decoding.no_repeat_ngram) on 2 lines" in err
    assert json.loads(out.splitlines()[-1])["acted"] == {"no_repeat_ngram": 2}


def test_every_rule_has_its_words(make_run: MakeRun, trilemma_of: Callable[..., tuple]) -> None:
    run = make_run(decoding__max_length=30)
    Path("hold").write_text("xx\n\nyz\n")
    code, _, err = trilemma_of(
        "generate",
        TEXT,
        run,
        "--phrases",
        "hold",
        "decoding.no_repeat_ngram=1",
        f"decoding.banned={list(range(6, 100))}",
    )
    assert code == 0, err
    assert "a forbidden token was avoided (decoding.banned) on" in err
    assert "an output lacks a phrase: length limit or other rules left it no way on 1 lines" in err


def test_an_ensemble_generates_scores_and_is_evaluated(
    make_run: MakeRun, trilemma_of: Callable[..., tuple], tmp_path: Path
) -> None:
    one, two = make_run("one"), make_run("two", model__mixer="gru", model__num_layers=2)
    code, out, err = trilemma_of("generate", TEXT, one, "--with", two, "--scores")
    assert code == 0, err
    _, text = out.split("\n")[0].split("\t")
    pairs = f"{LINES[0]}\t{text}\n"
    given = trilemma_of("score", pairs, one, "--with", two, "--jsonl")[1]
    alone = [json.loads(trilemma_of("score", pairs, run, "--jsonl")[1])["log_probability"] for run in (one, two)]
    both = json.loads(given)["log_probability"]
    assert both == pytest.approx(
        json.loads(trilemma_of("score", pairs, two, "--with", one, "--jsonl")[1])["log_probability"]
    )
    assert both > sum(alone) / 2, "normalising a geometric mean adds probability"
    assert both != pytest.approx(
        json.loads(trilemma_of("score", pairs, one, "--with", two, "--jsonl", "--average", "probability")[1])[
            "log_probability"
        ]
    )
    (tmp_path / "s").write_text("ab\ncd\n")
    (tmp_path / "t").write_text("x\ny\n")
    code, out, err = trilemma_of("evaluate", "", one, "s", "t", "--with", two, "--metrics", "chrf,loss")
    assert (code, out.count("\n")) == (0, 2), err


def test_minimum_risk_in_a_config_is_for_evaluate_too(
    make_run: MakeRun, trilemma_of: Callable[..., tuple], tmp_path: Path
) -> None:
    run = make_run(decoding__mbr=4, decoding__coverage_penalty=0.2, decoding__no_repeat_ngram=2)
    (tmp_path / "s").write_text("ab\ncd\n")
    (tmp_path / "t").write_text("x\ny\n")
    code, out, err = trilemma_of("evaluate", "", run, "s", "t", "--metrics", "chrf")
    assert (code, out.count("\n")) == (0, 1), err
    values = [json.loads(line)["outputs"][0] for line in trilemma_of("generate", TEXT, run, "--jsonl")[1].splitlines()]
    assert 0 < values[0]["score"] <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefixes", "two"], "two ends after 2 lines, stdin goes on: they must go line by line"),
        (["--phrases", "four"], "four goes on after the 3 lines of stdin: they must go line by line"),
        (["--phrases", "nothing"], "nothing: no such file"),
        (["--prefixes", "long"], "line 1: 9 tokens in prefix and phrases, more than the output's limit less one"),
        (["--prefixes", "second"], "line 2 is empty and gives an empty output"),
        (["--phrases", "three", "decoding.method=sample"], "phrases need decoding.method=beam"),
        (["--alignments", "letters"], "alignments: Input should be 'words' or 'tokens', found 'letters'"),
        (["decoding.alignment_layer=2", "--alignments", "words"], "this model's decoder has the layers 1 to 1"),
        (["--average", "median", "--with", "RUN"], 'unknown average "median"; valid: log-probability, probability'),
        (["--average", "probability"], "there is no ensemble; name its other runs (--with RUN)"),
        (["--with", "gone"], "gone: no such folder"),
        (["--with", "OTHER"], "model.layout is decoder-only, that of"),
        (["decoding.beam_groups=3"], "decoding.beam_size=4 is no multiple of decoding.beam_groups=3"),
        (["decoding.mbr=5"], "decoding.mbr=5 is more than decoding.beam_size=4"),
        (["decoding.no_repeat_ngram=x"], "no_repeat_ngram"),
    ],
)
def test_mistakes(make_run: MakeRun, trilemma_of: Callable[..., tuple], arguments: list[str], message: str) -> None:
    run = make_run()
    if "OTHER" in arguments:
        make_run("other", model__layout="decoder-only")
    Path("two").write_text("a\n\n")
    Path("three").write_text("a\n\nb\n")
    Path("four").write_text("a\n\nb\nc\n")
    Path("long").write_text("123456789\n\nb\n")
    Path("second").write_text("\na\n\n")
    places = {"RUN": str(run), "OTHER": "other"}
    code, _, err = trilemma_of("generate", TEXT, run, *[places.get(one, one) for one in arguments])
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_models_without_a_source_to_look_at(make_run: MakeRun, trilemma_of: Callable[..., tuple]) -> None:
    run = make_run(model__layout="decoder-only", model__mixer="gru")
    for argument, message in (
        ("decoding.coverage_penalty=0.1", "coverage_penalty counts cross-attention, which only an encoder-decoder has"),
        ("decoding.alignments=words", 'alignments: a layer of "gru" has no map from token to token'),
    ):
        code, _, err = trilemma_of("generate", TEXT, run, argument)
        assert (code, message in err) == (2, True), err


def test_a_cache_in_eight_bits_is_named(make_run: MakeRun, trilemma_of: Callable[..., tuple]) -> None:
    run = make_run(model__layout="decoder-only", model__mixer="attention", data__task="language-model")
    code, text, message = trilemma_of("generate", TEXT, run, "--cache", "int8")
    assert (code, text.count("\n")) == (0, 3)
    assert "float64+cache-int8)" in message
    code, _, message = trilemma_of("generate", TEXT, run, "--cache", "float8")
    assert (code, message) == (2, 'trilemma: unknown cache "float8"; valid: int8\n')
