"""Structure that import-linter cannot see: where imports stand, what they need, and what files must not contain.

The layering itself is a contract in pyproject.toml, run by `make layers`.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "trilemma"
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(file.relative_to(SOURCE)) for file in FILES]
OUTSIDE_CLI = [file for file in FILES if file.parent.name != "cli"]

# distribution -> import name where they differ
IMPORT_NAMES = {"pyyaml": "yaml", "tensorboard": "tensorboard", "zstandard": "zstandard"}
FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "tarfile", "zipfile"}


def function_level_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import inside a function."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    yield from ((node.lineno, alias.name) for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    yield node.lineno, "." * node.level + (node.module or "")


def all_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def dangerous_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """eval, exec, torch.load, torch.save and np.load(allow_pickle): what could run or write code."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        pickles = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
        if called in ("eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load") or pickles:
            yield node.lineno, called


def requirement_names(requirements: list[str]) -> set[str]:
    names = {re.split(r"[\[<>=!~ ]", requirement)[0].lower() for requirement in requirements}
    return {IMPORT_NAMES.get(name, name) for name in names}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = requirement_names(PROJECT["dependencies"]) | {"trilemma", *sys.stdlib_module_names}
OPTIONAL = requirement_names([r for extra in PROJECT["optional-dependencies"].values() for r in extra]) | {"fla"}


@pytest.mark.parametrize("file", OUTSIDE_CLI, ids=lambda file: str(file.relative_to(SOURCE)))
def test_internal_imports_stand_at_the_top_outside_the_command_line(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [(line, name) for line, name in function_level_imports(tree) if name.startswith(("trilemma", "."))]
    assert not found, f"{file}: internal imports inside functions: {found}"


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_every_imported_package_is_declared(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    lazy = {name.partition(".")[0] for _, name in function_level_imports(tree)}
    top = set(all_imports(tree)) - lazy
    assert top <= REQUIRED, f"{file}: needs packages that an install does not bring: {sorted(top - REQUIRED)}"
    assert lazy <= REQUIRED | OPTIONAL, f"{file}: undeclared: {sorted(lazy - REQUIRED - OPTIONAL)}"


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_nothing_that_can_run_code_from_a_file(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not FORBIDDEN.intersection(all_imports(tree))
    assert not list(dangerous_calls(tree))


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_files_stay_small(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize("file", sorted((SOURCE / "mixers").glob("[a-z]*.py")), ids=lambda file: file.stem)
def test_mixers_never_import_each_other(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    shared = {"trilemma.mixers.base", "trilemma.mixers.build"}  # the contract, and mixers from names
    others = {name for name in found if name.startswith("trilemma.mixers")} - shared
    assert not others, f"{file}: one file a mixer; imports {sorted(others)}"


def test_each_check_can_fail() -> None:
    tree = ast.parse(
        "import pickle\ndef f():\n    from trilemma.ops import x\n    return eval('1') + torch.load('a')\n"
    )
    assert list(function_level_imports(tree)) == [(3, "trilemma.ops")]
    assert FORBIDDEN.intersection(all_imports(tree)) == {"pickle"}
    assert [name for _, name in dangerous_calls(tree)] == ["eval", "torch.load"]


def test_every_room_is_in_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = {name.strip("() ") for layer in contracts[0]["layers"] for name in re.split("[:|]", layer)}
    rooms = {path.stem for path in SOURCE.iterdir() if path.name != "__pycache__" and not path.name.startswith("__")}
    assert rooms - {"py.typed", "py"} == layers
