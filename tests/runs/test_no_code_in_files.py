"""Reliability row 11: no file of a run can cause code to run, neither by its format nor by what it names."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import trilemma

SOURCE = Path(trilemma.__file__).parent
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "zipfile", "tarfile"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {
    ("torch", "load"),
    ("torch", "save"),
    ("torch", "jit"),
    ("runpy", "run_path"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("np", "load"),
    ("numpy", "load"),
}


def sites(tree: ast.AST) -> list[str]:
    """Places that could read or run code, by line."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(f"{node.lineno}: {node.func.id}()")
        elif isinstance(node, ast.Attribute) and (ast.unparse(node.value), node.attr) in FORBIDDEN_METHODS:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if runs_a_variable_module(node):
            found.append(f"{node.lineno}: runpy.run_module")
        found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
    return found


def runs_a_variable_module(node: ast.AST) -> bool:
    """`runpy.run_module(x)` for any x but a name written in the source."""
    called = isinstance(node, ast.Call) and ast.unparse(node.func) == "runpy.run_module"
    return called and not (node.args and isinstance(node.args[0], ast.Constant))


def test_no_source_file_reads_code() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 50
    assert {str(path): sites(ast.parse(path.read_text())) for path in files if sites(ast.parse(path.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load('x')",
        "eval('1')",
        "yaml.load(f)",
        "runpy.run_module(name)",
    ],
)
def test_planted_defect_a_site_is_found(line: str) -> None:
    assert sites(ast.parse(line)) != []


# What happens while a run is opened is heard by the interpreter itself. A first run makes the imports, so that what
# follows is caused by files.
LISTENER = """
import json, sys
sys.path.insert(0, {tests!r})
from trilemma.train import train
from trilemma.runs.load import load_run
from trilemma.registry import available_mixers
available_mixers()
import conftest as tiny
config = tiny.tiny(steps=4)
train(config, out={run!r}, quiet=True)          # the first run imports and compiles what torch needs
load_run({run!r})
events, heard = [], False
HOOKED = ("pickle.find_class", "exec", "compile", "import", "socket.connect", "subprocess.Popen", "os.system",
          "marshal.loads", "ctypes.dlopen", "code.__new__")
def hook(event, arguments):
    if heard and event in HOOKED:
        events.append([event, repr(arguments)[:200], sys._getframe(1).f_code.co_filename])
sys.addaudithook(hook)
heard = True
load_run({run!r})
load_run({run!r}, checkpoint="last")
config["training"]["steps"] = 6
from trilemma.train.processes import is_first
train(config, out={run!r}, resume=True, quiet=True)
{planted}
heard = False
print(json.dumps(events))
"""


def heard(tmp_path: Path, planted: str = "") -> list[list[str]]:
    tests = str(Path(__file__).parents[1] / "train")
    program = LISTENER.format(tests=tests, run=str(tmp_path / "run"), planted=planted)
    environment = {"TRILEMMA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    events: list[list[str]] = json.loads(done.stdout)
    return [event for event in events if not harmless(*event)]


def harmless(event: str, arguments: str, caller: str) -> bool:
    """Late imports of installed packages, and annotations of our own source, which `typing` evaluates."""
    if event in ("compile", "exec"):
        return Path(caller).name == "typing.py" or "importlib" in caller
    asks_for_the_commit = event == "subprocess.Popen" and arguments.startswith("('git', ['git', '-C'")
    return asks_for_the_commit or (event == "import" and "plugin" not in arguments)


@pytest.mark.slow
def test_loading_and_resuming_run_no_code(tmp_path: Path) -> None:
    assert heard(tmp_path) == []


@pytest.mark.slow
def test_planted_defect_a_pickle_is_heard(tmp_path: Path) -> None:
    planted = "import pickle; from collections import OrderedDict; pickle.loads(pickle.dumps(OrderedDict))"
    assert any(event[0] == "pickle.find_class" for event in heard(tmp_path, planted))


@pytest.mark.slow
def test_planted_defect_an_eval_is_heard(tmp_path: Path) -> None:
    assert any(event[0] == "compile" for event in heard(tmp_path, "eval('1 + 1')"))
