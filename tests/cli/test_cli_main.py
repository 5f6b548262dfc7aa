"""The command line's top level: light help, one message and exit code 2 for a mistake, plug-ins, no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from trilemma.cli import common
from trilemma.cli import main as cli
from trilemma.errors import CheckpointError, ConfigError

HEAVY = ("torch", "numpy", "pydantic", "typer", "rich", "yaml", "matplotlib", "tokenizers", "transformers")


def python(code: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def heavy_imports_of(arguments: Sequence[str]) -> list[str]:
    code = f"""
import sys
from trilemma.cli.main import main
main({list(arguments)!r})
print("HEAVY", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    last = python(code).stdout.splitlines()[-1].split()
    assert last[0] == "HEAVY"
    return last[1:]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [], ["--version"], ["trian"]])
def test_the_top_level_imports_nothing_heavy(arguments: list[str]) -> None:
    assert heavy_imports_of(arguments) == []


def test_the_import_check_can_fail() -> None:
    assert "typer" in heavy_imports_of(["doctor", "--help"])


def test_importing_the_package_imports_no_torch() -> None:
    result = python("import sys, trilemma; print('torch' in sys.modules, trilemma.__version__)")
    assert result.stdout.split() == ["False", cli.__version__]


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in cli.VERBS)
    named = ["compare", "train", "evaluate", "generate", "classify", "verify", "bench", "show", "data", "doctor"]
    assert [verb for verb in cli.VERBS if verb in named] == named


def test_without_a_verb_the_help_is_shown_and_the_exit_code_is_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], 'trilemma: unknown verb "trian"; did you mean "train"?'),
        (["--versoin"], 'trilemma: unknown option "--versoin"; did you mean "--version"?'),
        (["doctor", "--plugin"], "trilemma: --plugin needs a file: --plugin my_mixer.py"),
        (["--plugin", "no_such.py", "doctor"], "trilemma: plug-in no_such.py: no such file"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [message]
    assert captured.out == ""


def test_a_wrong_option_of_a_verb_exits_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--jsno"]) == 2
    assert "--jsno" in capsys.readouterr().err


def install_verb(monkeypatch: pytest.MonkeyPatch, command: object) -> None:
    module = types.ModuleType("trilemma_test_verb")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trilemma_test_verb", module)
    monkeypatch.setitem(cli.VERBS, "testing", cli.Verb("trilemma_test_verb", "for tests"))


def test_errors_of_a_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(kind: str) -> None:
        if kind == "mistake":
            raise CheckpointError("runs/a/model.safetensors: altered")
        if kind == "interrupt":
            raise KeyboardInterrupt
        if kind == "status":
            raise SystemExit(1)
        raise ZeroDivisionError("a bug of ours")

    install_verb(monkeypatch, command)
    assert cli.main(["testing", "mistake"]) == 2
    assert capsys.readouterr().err == "trilemma: runs/a/model.safetensors: altered\n"
    assert cli.main(["testing", "interrupt"]) == 130
    assert cli.main(["testing", "status"]) == 1
    with pytest.raises(ZeroDivisionError):
        cli.main(["testing", "bug"])


def test_plugins_may_stand_anywhere_before_two_dashes() -> None:
    plugins, rest = cli._take_plugins(["--plugin", "a.py", "verify", "--plugin=b.py", "x", "--", "--plugin", "c"])
    assert plugins == ["a.py", "b.py"]
    assert rest == ["verify", "x", "--", "--plugin", "c"]


PLUGIN = """
from trilemma.mixers.attention import Attention
from trilemma.registry import register_mixer


@register_mixer("from-a-file")
class FromAFile(Attention):
    pass
"""


def test_a_plugin_s_mixer_is_there_for_the_verb(tmp_path: Path) -> None:
    file = tmp_path / "plugin.py"
    file.write_text(PLUGIN)
    code = "import sys; from trilemma.cli.main import main; sys.exit(main(sys.argv[1:]))"
    shown = python(code, "verify", "from-a-file", "--plugin", str(file), "--law", "nonsense")
    assert shown.returncode == 2
    assert "nonsense" in shown.stderr
    assert "unknown mixer" not in shown.stderr
    without = python(code, "verify", "from-a-file", "--law", "cost")
    assert 'unknown mixer "from-a-file"' in without.stderr


@pytest.mark.parametrize("arguments", ["--help", "data check /dev/stdin.txt --json", "verify --help"])
def test_a_closed_pipe_is_no_error(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    arguments = arguments.replace("/dev/stdin.txt", str(tmp_path / "a.txt"))
    code = f"{sys.executable} -m trilemma {arguments}; echo status=$? >&2"
    command = f"({code}) | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert "status=0" in result.stderr


def test_python_m_trilemma() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "trilemma", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == f"trilemma {cli.__version__}\n"


NO_SOCKETS = """
import sys
opened = []
def hook(event, arguments):
    if event.startswith(("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib")):
        opened.append(event)
sys.addaudithook(hook)
{planted}
from trilemma.cli.main import main
code = main(sys.argv[1:])
print("CODE", code, "SOCKETS", *opened, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["doctor", "--json"], ["train", "no_such_config.yaml", "--out", "x"]]
)
def test_no_socket_is_opened_with_local_paths(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    last = python(NO_SOCKETS.format(planted=""), *arguments).stderr.splitlines()[-1]
    assert last.split()[2:] == ["SOCKETS"], last


def test_the_socket_check_can_fail() -> None:
    planted = "import socket\ntry: socket.create_connection(('127.0.0.1', 9), timeout=0.1)\nexcept OSError: pass"
    last = python(NO_SOCKETS.format(planted=planted), "--help").stderr.splitlines()[-1]
    assert "socket.connect" in last


def test_json_is_one_strict_line(capsys: pytest.CaptureFixture[str]) -> None:
    common.print_json({"a": float("nan"), "b": [1.5, float("inf")], "path": Path("x"), "text": "zwölf\n"})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0]) == {"a": None, "b": [1.5, None], "path": "x", "text": "zwölf\n"}


def test_lazy_names_of_the_package() -> None:
    import trilemma

    assert {"attention", "retention"} <= set(trilemma.available_mixers())
    assert trilemma.build_mixer("attention", d_model=8, num_heads=2).d_model == 8
    assert callable(trilemma.train)
    assert callable(trilemma.load)
    assert callable(trilemma.laws.check)
    assert trilemma.build_model({"vocab_size": 9, "d_model": 8, "num_heads": 2}).layout == "encoder-decoder"
    assert set(trilemma.__all__) <= set(dir(trilemma))
    with pytest.raises(AttributeError, match="nonsense"):
        trilemma.nonsense  # noqa: B018


def test_config_errors_are_user_errors() -> None:
    assert ConfigError.exit_code == cli.EXIT_MISTAKE
