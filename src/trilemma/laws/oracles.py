"""Oracle records: with whose implementation a mixer has been compared, and how closely the two agree.

The laws cannot see an equation that is wrong everywhere in the same way; an oracle can. The oracle tests write these
records (the fixture `agrees` of tests/conftest.py) into `oracles.json`, which is shipped. A mixer for which none can be
had says why, and is compared with its equations written out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

SHIPPED = Path(__file__).with_name("oracles.json")
_FORMAT = 1


@dataclass(frozen=True)
class Agreement:
    """One comparison.

    Attributes:
        mixer: its name.
        oracle: package, version and part, or where stored numbers come from; "" if there is none.
        no_oracle: why there is none; "" if there is one.
        what: what was compared: the layer or an operator that it stands on; whole, in cached steps, gradients.
        dtype: of our side.
        error: the largest difference, as a share of the oracle's largest value.
        test: file::function that made the comparison.
        date, commit: of the run.
    """

    mixer: str
    oracle: str
    no_oracle: str
    what: str
    dtype: str
    error: float
    test: str
    date: str
    commit: str


def shipped_oracles() -> dict[str, list[Agreement]]:
    """name -> comparisons, as shipped."""
    content = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return {name: [Agreement(**item) for item in items] for name, items in content["records"].items()}


def write_shipped(new: Iterable[Agreement]) -> None:
    """Merges comparisons into the shipped file (for the authors of this package).

    Those of the same test are replaced; of cases that differ in nothing but sizes the largest error is kept.
    """
    worst: dict[tuple[str, ...], Agreement] = {}
    for item in new:
        key = (item.mixer, item.test, item.oracle, item.what, item.dtype)
        if key not in worst or item.error > worst[key].error:
            worst[key] = item
    tests = {item.test for item in worst.values()}
    known = shipped_oracles() if SHIPPED.exists() else {}
    kept = [item for items in known.values() for item in items if item.test not in tests]
    records: dict[str, list[dict[str, object]]] = {}
    for item in sorted([*kept, *worst.values()], key=lambda item: (item.mixer, item.oracle, item.test, item.what)):
        records.setdefault(item.mixer, []).append(asdict(item))
    text = json.dumps({"format": _FORMAT, "records": records}, indent=1, ensure_ascii=False) + "\n"
    part = SHIPPED.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(SHIPPED)


def summary(items: Iterable[Agreement]) -> str:
    """One line about a mixer's comparisons."""
    items = list(items)
    if not items:
        return "no outside oracle: none is recorded"
    outside = [item for item in items if item.oracle]
    if not outside:
        return f"no outside oracle: {items[0].no_oracle} (it agrees {closeness(items)})"
    parts = []
    for oracle in dict.fromkeys(item.oracle for item in outside):
        mine = [item for item in outside if item.oracle == oracle]
        compared = sorted({item.what for item in mine}, key=lambda what: (len(what), what))
        parts.append(f"with {oracle} {closeness(mine)} ({', '.join(compared)})")
    return f"agrees {'; '.join(parts)}"


def closeness(items: Iterable[Agreement]) -> str:
    """The largest error of these comparisons, in words."""
    worst = max(item.error for item in items)
    return f"to {worst:.1e}" if worst else "exactly"
