"""What every test gets: one rotating, printed seed; NaN-poisoned allocation; one thread a worker.

Oracle tests compare by the fixture `agrees`. To write down what they find, for `verify` and the pages in docs/mixers/:

    TRILEMMA_RECORD_ORACLES=1 TRILEMMA_SEED=1 python -m pytest tests/mixers tests/ops -k oracles
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import secrets
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Before torch is imported: pytest-xdist runs one process a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from trilemma.laws.oracles import Agreement, write_shipped

SEED_VARIABLE = "TRILEMMA_SEED"
RECORD_VARIABLE = "TRILEMMA_RECORD_ORACLES"
TURNS_VARIABLE = "TRILEMMA_TURNS"
AGREEMENTS: list[Agreement] = []

_SLOW_MACHINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("fast", max_examples=10, deadline=None, suppress_health_check=_SLOW_MACHINE)
settings.register_profile("ci", max_examples=25, deadline=None, suppress_health_check=_SLOW_MACHINE, print_blob=True)
settings.register_profile("full", max_examples=300, deadline=None, suppress_health_check=_SLOW_MACHINE, print_blob=True)


# Files whose tests start whole processes, train studies or draw reports: `make fast` leaves them out.
SLOW_FILES = {
    "cli/test_cli_generate.py",
    "cli/test_cli_main.py",
    "compare/test_execute.py",
    "compare/test_hostile_text.py",
    "compare/test_report.py",
    "compare/test_tasks.py",
    "runs/test_bit_rot.py",
    "runs/test_disk_failures.py",
    "runs/test_no_code_in_files.py",
    "runs/test_power_cut.py",
    "runs/test_run_lock.py",
    "test_docs.py",
    "train/test_distributed.py",
    "train/test_kill_resume.py",
    "train/test_signals.py",
    "train/test_train_disk_failures.py",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the slow files' tests, and deselects those whose turn it is not."""
    for item in items:
        if str(item.path.relative_to(Path(__file__).parent)) in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
    if os.environ[TURNS_VARIABLE] == "1":
        places = enumerate(items, start=int(os.environ[SEED_VARIABLE]))
        waiting = [item for place, item in places if any(place % mark.args[0] for mark in item.iter_markers("turns"))]
        config.hook.pytest_deselected(items=waiting)
        items[:] = [item for item in items if item not in set(waiting)]


def pytest_configure(config: pytest.Config) -> None:
    """The controller decides on the seed and on turns once; the workers of pytest-xdist inherit the environment.

    Turns are taken where all tests are asked for: what somebody names is run.
    """
    os.environ.setdefault(SEED_VARIABLE, str(secrets.randbelow(2**31)))
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    turns = everything and os.environ.get("TRILEMMA_LAWS") != "full"
    os.environ.setdefault(TURNS_VARIABLE, str(int(turns)))
    settings.load_profile(os.environ.get("TRILEMMA_LAWS", "ci"))


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {os.environ[SEED_VARIABLE]} (replay with {SEED_VARIABLE}={os.environ[SEED_VARIABLE]})"


@pytest.fixture(scope="session")
def session_seed() -> int:
    """The seed of this test session; tests that draw at random derive their generator from it."""
    return int(os.environ[SEED_VARIABLE])


@pytest.fixture(autouse=True)
def _seeded(session_seed: int) -> None:
    random.seed(session_seed)
    np.random.seed(session_seed % 2**32)  # noqa: NPY002 - third-party code may use the global generator
    torch.manual_seed(session_seed)


@pytest.fixture(autouse=True, scope="session")
def _poisoned_allocation() -> Iterator[None]:
    """torch.empty and its kind return NaN (integers: the largest value), so that reading what nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def agrees(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Asserts that a mixer agrees with an oracle, and notes how closely.

    agrees(mixer, what, got, want, oracle="transformers Mamba2Mixer")

    Args:
        mixer: its name.
        what: the layer or an operator; whole, in cached steps, gradients.
        got, want: tensors, or sequences of them.
        oracle: an installed package and its part, or "numbers stored from REPOSITORY@COMMIT, PART".
        no_oracle: in its place, why none can be had; `want` are then the equations written out.
        share: the largest error allowed, of the largest value wanted in each tensor; 1e-5 in float32, 1e-10 in float64
            (1e-5 with an oracle that computes parts of it in float32).
    """
    test = f"{request.path.relative_to(request.config.rootpath).as_posix()}::{request.function.__name__}"

    def check(
        mixer: str, what: str, got: Any, want: Any, *, oracle: str = "", no_oracle: str = "", share: float | None = None
    ):
        assert bool(oracle) != bool(no_oracle)
        for one, other in zip(_tensors(got), _tensors(want), strict=True):
            allowed = share or {torch.float32: 1e-5, torch.float64: 1e-10}[other.dtype]
            torch.testing.assert_close(one, other, rtol=0, atol=allowed * float(other.abs().max()))
        if RECORD_VARIABLE in os.environ:
            (dtype,) = {str(tensor.dtype).removeprefix("torch.") for tensor in _tensors(got)}
            pairs = zip(_tensors(got), _tensors(want), strict=True)
            error = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
            day, commit = f"{datetime.now(UTC):%Y-%m-%d}", _commit(request.config.rootpath)
            rounded = float(f"{error:.1e}")
            AGREEMENTS.append(Agreement(mixer, _versioned(oracle), no_oracle, what, dtype, rounded, test, day, commit))

    return check


def _tensors(value: Any) -> list[Tensor]:
    return [value.detach()] if isinstance(value, Tensor) else [tensor for item in value for tensor in _tensors(item)]


def _versioned(oracle: str) -> str:
    """With its version behind the package's name, if it begins with one."""
    package, _, part = oracle.partition(" ")
    try:
        version = importlib.metadata.version(package).partition("+")[0] if package else ""
    except importlib.metadata.PackageNotFoundError:
        return oracle
    return f"{package} {version} {part}".strip()


def _commit(root: Path) -> str:
    """The commit checked out, and whether the package differs from it."""
    commands = ["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain", "src", "tests"]
    head, changes = (
        subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        for command in commands
    )
    changed = [line for line in changes.splitlines() if not line.endswith("oracles.json")]
    return f"{head} with changes" if changed else head


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Writes down what oracles agreed with, if nothing failed."""
    if AGREEMENTS and exitstatus == pytest.ExitCode.OK:
        if "PYTEST_XDIST_WORKER" in os.environ:
            raise pytest.UsageError(f"{RECORD_VARIABLE} needs one process: leave out -n")
        write_shipped(AGREEMENTS)
