"""What every test gets: one rotating, printed seed; NaN-poisoned allocation; one thread a worker."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: pytest-xdist runs one process a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

SEED_VARIABLE = "TRILEMMA_SEED"

_SLOW_MACHINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("fast", max_examples=10, deadline=None, suppress_health_check=_SLOW_MACHINE)
settings.register_profile("ci", max_examples=25, deadline=None, suppress_health_check=_SLOW_MACHINE, print_blob=True)
settings.register_profile("full", max_examples=300, deadline=None, suppress_health_check=_SLOW_MACHINE, print_blob=True)


# Files whose tests start whole processes, train studies or draw reports: `make fast` leaves them out.
SLOW_FILES = {
    "cli/test_cli_generate.py",
    "cli/test_cli_main.py",
    "compare/test_execute.py",
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the slow files' tests."""
    for item in items:
        if str(item.path.relative_to(Path(__file__).parent)) in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    """The controller draws the seed once; the workers of pytest-xdist inherit it through the environment."""
    os.environ.setdefault(SEED_VARIABLE, str(secrets.randbelow(2**31)))
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
