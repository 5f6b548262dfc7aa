"""The laws over every registered mixer in every variant; quick by default, full under TRILEMMA_LAWS=full."""

from __future__ import annotations

import os

import pytest

from trilemma.laws import LAWS, verify
from trilemma.registry import available_mixers, mixer_class

pytestmark = pytest.mark.laws

LEVEL = "full" if os.environ.get("TRILEMMA_LAWS") == "full" else "quick"
SUBJECTS = [(name, number) for name in available_mixers() for number in range(len(mixer_class(name).law_variants()))]
TURNS = [pytest.param(*subject, marks=[pytest.mark.turns(2)] if subject[1] else []) for subject in SUBJECTS]
EAGER = [law for law in LAWS if law != "compile"]


@pytest.mark.parametrize(("name", "variant"), TURNS)
def test_the_laws_hold(name: str, variant: int, session_seed: int) -> None:
    (report,) = verify(name, laws=EAGER, level=LEVEL, seed=session_seed, variant=variant)
    report.require()


@pytest.mark.parametrize("name", available_mixers())
def test_compiled_is_plain(name: str, session_seed: int) -> None:
    """The variant that the seed picks; at level full the first one too, and by inductor in a quarter of the mixers.

    Inductor takes a minute or two for a mixer: they take turns as the seeds change. `trilemma verify --level full` asks
    it of each.
    """
    picked = session_seed % len(mixer_class(name).law_variants())
    turn = (session_seed + available_mixers().index(name)) % 4 == 0
    for variant in sorted({0, picked}) if LEVEL == "full" else [picked]:
        level = LEVEL if turn and variant == picked else "quick"
        (report,) = verify(name, laws=["compile"], level=level, seed=session_seed, variant=variant)
        report.require()


def test_there_is_something_to_hold_to_the_laws() -> None:
    assert {"attention", "cross_attention", "retention", "lstm", "gru", "bidirectional"} <= set(available_mixers())
    assert len(SUBJECTS) >= 30
