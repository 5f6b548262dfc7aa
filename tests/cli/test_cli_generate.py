"""`trilemma generate`: a filter that keeps order and empty lines, streams, and reports what it cannot read."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import trilemma
from trilemma import laws
from trilemma.cli.generate import Totals, _report, read_lines
from trilemma.cli.main import main
from trilemma.decode import Generated, Output
from trilemma.errors import DataError, LawError
from trilemma.mixers.base import Mixer

MakeRun = Callable[..., Path]
LINES = ["twenty-one", "", "a", "naïve – 犬", "   ", "zzz zzz"]


@pytest.fixture(autouse=True)
def _lawful(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws.admission, "require", lambda mixers, path, **options: {})


@pytest.fixture
def run_filter(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Callable[..., tuple]:
    """`run_filter(input, *arguments)`: (exit code, stdout, stderr)."""

    def run(text: bytes | str, *arguments: str | Path) -> tuple[int, str, str]:
        raw = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        code = main(["generate", *map(str, arguments)])
        captured = capfdbinary.readouterr()
        return code, captured.out.decode(), captured.err.decode()

    return run


def test_one_line_in_one_line_out(make_run: MakeRun, run_filter: Callable[..., tuple]) -> None:
    run = make_run()
    code, out, err = run_filter("\n".join(LINES) + "\n", run)
    assert code == 0, err
    lines = out.split("\n")
    assert lines.pop() == ""
    assert len(lines) == len(LINES)
    assert lines[1] == ""
    assert lines[4] == ""
    assert lines == trilemma.load(run).translate(LINES)
    assert "6 lines in" in err
    assert "(path plain/cpu/float64)" in err
    # the last line end is optional, and so is "\r"
    assert run_filter("\r\n".join(LINES), run)[1] == out
    assert run_filter("", run)[:2] == (0, "")


def test_order_and_window_change_nothing(make_run: MakeRun, run_filter: Callable[..., tuple]) -> None:
    run = make_run(decoding__method="sample", decoding__seed=3)
    text = "".join(f"line {'x' * (i % 17)} {i}\n" for i in range(60))
    outputs = {run_filter(text, run, "--window", str(window))[1] for window in (1, 7, 1000)}
    assert len(outputs) == 1
    assert len(set(outputs.pop().split("\n"))) > 10


def test_n_best_scores_and_jsonl(make_run: MakeRun, run_filter: Callable[..., tuple]) -> None:
    run = make_run()
    best = run_filter("a\n\nb\n", run)[1].split("\n")
    rows = [line.split("\t") for line in run_filter("a\n\nb\n", run, "--n-best", "3")[1].splitlines()]
    assert [row[0] for row in rows] == ["0", "0", "0", "1", "2", "2", "2"]
    assert rows[0][2] == best[0]
    assert float(rows[0][1]) >= float(rows[1][1]) >= float(rows[2][1])
    assert rows[3][2] == ""
    assert run_filter("a\n\nb\n", run, "decoding.n_best=3")[1].count("\n") == 7
    scored = [line.split("\t") for line in run_filter("a\n\nb\n", run, "--scores")[1].split("\n")[:3]]
    assert [row[1] for row in scored] == best[:3]
    assert scored[0][0] == rows[0][1]
    objects = [json.loads(line) for line in run_filter("a\n\nb\n", run, "--jsonl")[1].splitlines()]
    assert [value["outputs"][0]["text"] for value in objects] == best[:3]
    assert objects[0]["outputs"][0]["tokens"] > 0


def test_json_is_the_last_line(make_run: MakeRun, run_filter: Callable[..., tuple]) -> None:
    out = run_filter("a\n\nb\n", make_run(), "--json")[1].splitlines()
    assert len(out) == 4
    result = json.loads(out[-1])
    assert (result["lines"], result["empty"], result["skipped"]) == (3, 1, 0)


def test_over_long_lines_are_an_error_that_names_the_line(make_run: MakeRun, run_filter: Callable[..., tuple]) -> None:
    run = make_run()
    text = "a\nb\n" + "x" * 41 + "\nc\n"
    code, out, err = run_filter(text, run)
    assert code == 2
    assert "line 3: 41 tokens, more than data.max_source_length = 40" in err
    assert "--over-length skip" in err
    assert "Traceback" not in err
    assert out.count("\n") == 2, "what came before is written"
    code, out, err = run_filter(text, run, "--over-length", "skip")
    assert code == 0
    assert out.split("\n")[2] == ""
    assert out.count("\n") == 4
    assert "skipped line 3: 41 tokens" in err
    assert "1 too long and left empty" in err
    code, out, _ = run_filter("x" * 40 + "\n", run)
    assert code == 0


def test_the_models_positions_are_a_limit_too(make_run: MakeRun, run_filter: Callable[..., tuple]) -> None:
    run = make_run(model__positions="learned", model__max_length=20, model__layout="decoder-only")
    code, _, err = run_filter("x" * 18 + "\n", run, "decoding.max_length=50")
    assert code == 0, err
    code, _, err = run_filter("x" * 19 + "\n", run)
    assert code == 2
    assert "line 1: 19 tokens, more than model.max_length = 18" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decoding.beam_sise=3"], 'unknown key "beam_sise"; did you mean "beam_size"?'),
        (["decoding.beam_size=0"], "beam_size: Input should be greater than or equal to 1"),
        (["model.d_model=3"], 'override "model": only decoding.KEY=VALUE can be changed here'),
        (["--n-best", "9"], "decoding.n_best=9 is more than decoding.beam_size=4"),
        (["decoding.method=greedy", "--n-best", "2"], "greedy decoding gives one output"),
        (["--over-length", "cut"], '--over-length: unknown value "cut"'),
        (["--dtype", "float23"], 'unknown dtype "float23"; did you mean "float32"?'),
        (["--scores", "--jsonl"], "exclude each other"),
    ],
)
def test_mistakes(make_run: MakeRun, run_filter: Callable[..., tuple], arguments: list[str], message: str) -> None:
    code, out, err = run_filter("a\n", make_run(), *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_no_path_runs_without_a_law_record(
    make_run: MakeRun, run_filter: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(mixers: Iterable[Mixer], path: str, **options: object) -> dict[str, object]:
        asked.extend([path, *sorted({mixer.name for mixer in mixers})])
        raise LawError('mixer "attention" breaks the law on the path plain')

    monkeypatch.setattr(laws.admission, "require", refuse)
    code, out, err = run_filter("a\n", make_run())
    assert (code, out) == (2, "")
    assert "breaks the law" in err
    assert asked == ["plain", "attention", "cross_attention"]


def test_what_is_no_run_or_generates_nothing(
    make_run: MakeRun, run_filter: Callable[..., tuple], tmp_path: Path
) -> None:
    code, _, err = run_filter("a\n", tmp_path / "nothing")
    assert code == 2
    assert "no such folder" in err
    run = make_run(
        model__layout="encoder-only", model__num_labels=2, data__task="classification", data__labels=["no", "yes"]
    )
    code, _, err = run_filter("a\n", run)
    assert code == 2
    assert "use trilemma classify" in err


def test_input_that_is_no_text(make_run: MakeRun, run_filter: Callable[..., tuple]) -> None:
    code, _, err = run_filter(b"a\nb\xff\n", make_run())
    assert code == 2
    assert "stdin: line 2: invalid UTF-8 at byte 2" in err


def test_a_line_without_an_end_does_not_fill_the_memory() -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:
            Endless.taken += len(buffer)
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    with pytest.raises(DataError, match="line 1 is longer than 1,000 bytes"):
        list(read_lines(io.BufferedReader(Endless()), "stdin", limit=1000))
    assert Endless.taken < 100_000
    assert list(read_lines(io.BytesIO(b"x" * 1000 + b"\r\n" + b"y"), "stdin", limit=1000)) == ["x" * 1000, "y"]


# Runs the verb in a process of its own and says on stderr how much memory it needed at most (KiB).
# The peak counts from the first line on: importing and loading have a peak of their own, which differs by machine.
_PROCESS = """
import sys
from trilemma import laws
from trilemma.cli.main import main
from trilemma.measure.memory import peak_resident_bytes, reset_peak_resident
laws.admission.require = lambda mixers, path, **options: reset_peak_resident()
code = main(sys.argv[1:])
print("peak", peak_resident_bytes() // 1024, file=sys.stderr)
sys.exit(code)
"""


def filter_process(run: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS, "generate", str(run), "--device", "cpu", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_closed_pipe_is_no_error(make_run: MakeRun) -> None:
    """`trilemma generate RUN < lines | head -1`"""
    source = filter_process(make_run(), "--window", "1")
    assert source.stdin is not None
    assert source.stdout is not None
    assert source.stderr is not None
    source.stdin.write(b"a\n")
    source.stdin.flush()
    assert source.stdout.readline().endswith(b"\n"), "a window of one line answers at once"
    source.stdout.close()
    source.stdin.write(b"b\n" * 50)
    source.stdin.close()
    message = source.stderr.read().decode()
    source.wait(timeout=60)
    source.stderr.close()
    assert "Traceback" not in message
    assert "Error" not in message


def peak_kib(run: Path, lines: int, *arguments: str) -> int:
    """Peak memory of the filter over that many lines, which are never in memory or on disk together."""
    process = filter_process(run, "decoding.method=greedy", *arguments)
    feeder = subprocess.Popen(
        [sys.executable, "-c", f"for i in range({lines}): print('line number', i, 'x' * (i % 20))"],
        stdout=process.stdin,
    )
    assert process.stdin is not None
    process.stdin.close()
    assert process.stdout is not None
    assert process.stderr is not None
    written = sum(chunk.count(b"\n") for chunk in iter(lambda: process.stdout.read(1 << 16), b""))
    message = process.stderr.read().decode()
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 0, message
    assert feeder.wait() == 0
    assert written == lines
    return int(message.rsplit("peak", 1)[1])


@pytest.mark.turns(3)
@pytest.mark.slow
def test_a_hundred_thousand_lines_stream_in_bounded_memory(make_run: MakeRun) -> None:
    run = make_run(
        model__layout="decoder-only",
        model__mixer="gru",
        model__d_model=8,
        decoding__max_length=1,
        training__precision="float32",
    )
    bound = peak_kib(run, 3_000) + 32 * 1024
    assert peak_kib(run, 100_000) < bound
    # planted: a window that holds everything
    assert peak_kib(run, 100_000, "--window", "1000000") > bound


def test_lines_with_unknown_characters_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output("x", 0.0, 0.0, 1, True)
    totals = Totals()
    for number, unknown in enumerate([0, 2, 1]):
        totals.add(Generated(number, [output], unknown=unknown))
    _report(totals, "plain")
    assert "; 2 held characters or words that the tokenizer does not know" in capsys.readouterr().err
