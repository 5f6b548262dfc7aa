"""The documentation is true: commands parse, runnable ones run, links resolve, both languages say the same."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from trilemma.cli import main as cli
from trilemma.config import RunConfig, apply_overrides, parse
from trilemma.errors import TrilemmaError
from trilemma.study import StudyConfig

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAIRS = [("README.md", "README.zh-CN.md"), ("docs/tutorial.md", "docs/tutorial.zh-CN.md")]
VERBS_WITH_OVERRIDES = {"train": RunConfig, "bench": RunConfig, "compare": StudyConfig, "generate": RunConfig}
FOREIGN_OPTIONS = {"--no-deps", "--nproc-per-node"}  # of pip and torchrun

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_RUNNABLE = re.compile(r"<!-- runnable -->\n```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [body for name, body in _FENCE.findall(text) if name == language]


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return _FENCE.sub("", text)


def invocations(text: str) -> Iterator[list[str]]:
    """The arguments of every `trilemma ...` in the bash blocks of a page; shell variables stay as they are."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for start in (at for at, word in enumerate(words) if word == "trilemma" and _starts(words[:at])):
                rest = words[start + 1 :]
                yield rest[: rest.index("|")] if "|" in rest else rest


def _starts(before: list[str]) -> bool:
    """Whether a command begins after these words, or `python -m`; `cd trilemma` is none."""
    return not before or before[-1] in ("|", "&&", "-m")


def command_of(verb: str, arguments: list[str]) -> tuple[Any, list[str]]:
    """The parser of a verb, or of its sub-verb, and what it is to parse."""
    module = __import__(cli.VERBS[verb].module, fromlist=["x"])
    if not hasattr(module, "app"):
        app = typer.Typer()
        app.command(name=verb)(module.command)
        return typer.main.get_command(app), arguments
    group: Any = typer.main.get_command(module.app)
    return group.commands[arguments[0]], arguments[1:]


def check_invocation(arguments: list[str]) -> None:
    """Raises unless the verb, its options and its overrides exist."""
    _, arguments = cli._take_plugins(arguments)
    if arguments[0].startswith("-"):
        assert arguments[0] in ("--help", "--version"), arguments
        return
    assert arguments[0] in cli.VERBS, f"no verb {arguments[0]}"
    if "--help" in arguments:
        return
    command, rest = command_of(arguments[0], arguments[1:])
    command.make_context(arguments[0], list(rest))  # unknown options and wrong types raise
    overrides = [word for word in rest if re.match(r"[a-z_]+(\.\w+)*=", word)]
    section = VERBS_WITH_OVERRIDES.get(arguments[0], RunConfig)
    start: dict[str, Any] = {}
    if section is StudyConfig:
        start = {"candidates": [{"name": "a"}], "budget": {"amount": 1.0}}
    parse(section, apply_overrides(start, overrides), "documentation")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documentation_exists(page: Path) -> None:
    for arguments in invocations(page.read_text(encoding="utf-8")):
        try:
            check_invocation(arguments)
        except (TrilemmaError, KeyError, typer.BadParameter) as error:
            pytest.fail(f"{page.name}: trilemma {shlex.join(arguments)}: {error}")


def test_a_command_that_does_not_exist_is_found() -> None:
    found = list(
        invocations("```bash\nDATA=x\necho a | trilemma train c.yaml \\\n  --out r a.b=1 | cat  # words\n```\n")
    )
    assert found == [["train", "c.yaml", "--out", "r", "a.b=1"]]
    with pytest.raises(TrilemmaError, match='unknown key "a"'):
        check_invocation(found[0])
    with pytest.raises(AssertionError, match="no verb tarin"):
        check_invocation(["tarin", "c.yaml"])
    with pytest.raises(Exception, match="--oot"):
        check_invocation(["train", "c.yaml", "--oot", "r"])


def test_every_option_named_in_the_text_exists() -> None:
    known = {"--help", "--version", "--plugin", *FOREIGN_OPTIONS}
    for verb, sub in [*((verb, "") for verb in cli.VERBS if verb != "data"), ("data", "check")]:
        command, _ = command_of(verb, [sub])
        known |= {o for part in command.params for o in (*part.opts, *part.secondary_opts) if o.startswith("--")}
    for script in (ROOT / "benchmarks").glob("*.py"):
        known.update(re.findall(r'add_argument\("(--[a-z-]+)"', script.read_text(encoding="utf-8")))
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose(page.read_text(encoding="utf-8"))))
        assert named <= known, f"{page.name} names {sorted(named - known)}"


def test_every_key_named_in_a_table_exists() -> None:
    for page in PAGES:
        text = prose(page.read_text(encoding="utf-8"))
        sections = "model|data|tokenizer|training|decoding"
        for key in re.findall(rf"`((?:{sections})\.(?!json|safetensors|model`)[a-z_0-9]+)[`=]", text):
            section, name = key.split(".")
            assert name in type(getattr(RunConfig(), section)).model_fields, f"{page.name} names {key}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda name: Path(name).stem)
def test_both_languages_say_the_same(english: str, chinese: str) -> None:
    one, other = ((ROOT / name).read_text(encoding="utf-8") for name in (english, chinese))
    assert [mark for mark, _ in headings(one)] == [mark for mark, _ in headings(other)]
    assert [uncommented(body) for body in _FENCE.findall(one)] == [uncommented(body) for body in _FENCE.findall(other)]
    assert re.findall(r"<!-- \w+ -->", one) == re.findall(r"<!-- \w+ -->", other)
    assert re.findall(r"!\[[^]]*\]\(([^)]+)\)", one) == re.findall(r"!\[[^]]*\]\(([^)]+)\)", other)
    assert numbers(one) == numbers(other)


def headings(text: str) -> list[tuple[str, str]]:
    """(marks, words) of the headings."""
    return re.findall(r"^(#+) (.*)$", prose(text), re.MULTILINE)


def uncommented(fence: tuple[str, str]) -> tuple[str, list[str]]:
    """A fenced block without comments, which are translated."""
    return fence[0], [re.sub(r"\s+#.*$", "", line) for line in fence[1].splitlines()]


def numbers(text: str) -> list[str]:
    """The numbers outside code and links, in order of size; languages order them differently."""
    bare = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", " ", prose(text), flags=re.DOTALL)
    return sorted(number.rstrip(".,") for number in re.findall(r"\d[\d.,]*", bare))


def run_in(folder: Path, script: str, timeout: int = 280) -> subprocess.CompletedProcess[str]:
    """Runs bash where the recipes are, with this interpreter's `trilemma` and its own cache."""
    if not (folder / "recipes").exists():
        (folder / "recipes").symlink_to(ROOT / "recipes")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "TRILEMMA_CACHE": str(folder / "cache")}
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


RUNNABLE = [(page, script) for page in PAGES for script in _RUNNABLE.findall(page.read_text(encoding="utf-8"))]


def test_there_are_runnable_examples() -> None:
    assert {page.name for page, _ in RUNNABLE} >= {"train.md", "data.md"}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "script"), RUNNABLE, ids=[page.name for page, _ in RUNNABLE])
def test_runnable_examples_run(page: Path, script: str, tmp_path: Path) -> None:
    done = run_in(tmp_path, script)
    assert done.returncode == 0, done.stderr


def test_the_readme_checks_both_sides_of_the_validation_data(tmp_path: Path) -> None:
    check = next(item for item in invocations((ROOT / "README.md").read_text(encoding="utf-8")) if item[0] == "data")
    for name in (word for word in check if "." in word):
        (tmp_path / name).write_text("one\ntwo\n", encoding="utf-8")
    done = run_in(tmp_path, shlex.join(["trilemma", *check]))
    assert done.returncode == 0, done.stderr
    assert "val.en, val.de: 2 examples" in done.stdout


def mixer_page() -> tuple[str, list[str]]:
    """The mixer of add-a-mixer.md, and the commands that follow it."""
    text = (ROOT / "docs" / "add-a-mixer.md").read_text(encoding="utf-8")
    return blocks(text, "python")[0], [line for line in blocks(text, "bash")[0].splitlines() if line]


def test_the_mixer_of_the_page_trains(tmp_path: Path) -> None:
    source, commands = mixer_page()
    (tmp_path / "average.py").write_text(source, encoding="utf-8")
    (train,) = [command for command in commands if " train " in command]
    small = "training.steps=2 data.train.size=50 data.valid.size=5 data.test.size=5"
    done = run_in(tmp_path, f"{train} {small}")
    assert done.returncode == 0, done.stderr
    assert "done: 2 steps" in done.stderr
    kept = yaml.safe_load((tmp_path / "runs" / "average" / "config.yaml").read_text(encoding="utf-8"))
    assert kept["model"]["mixer"] == "average"


@pytest.mark.slow
@pytest.mark.laws
def test_the_mixer_of_the_page_is_lawful(tmp_path: Path) -> None:
    source, commands = mixer_page()
    (tmp_path / "average.py").write_text(source, encoding="utf-8")
    (verify,) = [command for command in commands if " verify " in command]
    done = run_in(tmp_path, verify)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "UNLAWFUL" not in done.stderr


@pytest.mark.slow
@pytest.mark.laws
def test_a_mistake_in_the_mixer_of_the_page_is_found(tmp_path: Path) -> None:
    source, _ = mixer_page()
    carried = "x.new_zeros(len(x), self.d_model) if state is None else state.mean"
    assert carried in source
    forgetful = source.replace(carried, "x.new_zeros(len(x), self.d_model)")
    (tmp_path / "average.py").write_text(forgetful, encoding="utf-8")
    done = run_in(tmp_path, "trilemma verify average --plugin average.py --law split")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "UNLAWFUL" in done.stderr
