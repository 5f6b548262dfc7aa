"""Law records: which code has been found lawful, on which path. No path runs without one.

A record belongs to a fingerprint: the source of the mixer and of everything it stands on, torch's version, and the
path. Records of our own mixers are shipped in `records.json`; whatever has none (a plug-in, another torch) is held to
the laws when it is first used, and the result is kept in the user's cache.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import trilemma
from trilemma.errors import ConfigError, LawError, nearest
from trilemma.laws.registered import verify
from trilemma.laws.report import FAIL, NOT_APPLICABLE, PASS, Report
from trilemma.laws.trial import CACHE_LAWS
from trilemma.mixers.base import Mixer
from trilemma.ops import backends
from trilemma.ops.dispatch import plainly, trying
from trilemma.registry import mixer_class
from trilemma.state import CacheKind

PATHS = ("plain", "compiled")
CODED = "+cache-int8"  # ends the path of a mixer that holds keys and values in 8 bits
SHIPPED = Path(__file__).with_name("records.json")
_PACKAGE = Path(trilemma.__file__).parent
_FORMAT = 1
_ROOMS = tuple(f"trilemma.{room}" for room in ("ops.", "nn.", "mixers.", "state", "ragged"))


def fingerprint(name: str, path: str = "plain", device: str = "cpu") -> str:
    """sha256 of what runs: sources of mixer, bases and what they import of ours, torch's version, path, device.

    The path of the backends in use, such as "plain+fla", stands on them too: their versions and adapters. A path may
    end with "+cache-int8".

    Raises:
        ConfigError: unknown mixer or path.
    """
    known = {*PATHS, *(form + CODED for form in ("plain", backends.path())), backends.path()}
    if path not in known:
        raise ConfigError(f'unknown path "{path}"{nearest(path, known)}')
    bases = [cls for cls in mixer_class(name).__mro__ if issubclass(cls, Mixer)]
    files = _closure({Path(source) for cls in bases if (source := inspect.getsourcefile(cls)) is not None})
    public_version = torch.__version__.partition("+")[0]
    digest = hashlib.sha256(f"{path}/{device}/{public_version}".encode())
    contents = sorted((file.name, file.read_bytes()) for file in files)  # names repeat: ops/attention, mixers/attention
    for file_name, content in contents:
        digest.update(f"\n{file_name}\n".encode() + content)
    if path.removesuffix(CODED) not in PATHS:
        digest.update(backends.identity().encode())
    return digest.hexdigest()


def _closure(files: set[Path]) -> set[Path]:
    """These files and what they import, directly or not, of the rooms that decide a mixer's answer."""
    found: set[Path] = set()
    waiting = set(files)
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= {path for path in _imported(file.read_bytes()) - found if path.is_file()}
    return found


@lru_cache
def _imported(source: bytes) -> frozenset[Path]:
    """Where the modules of those rooms would lie that a file names in its imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    inner = [name.split(".") for name in names if name.startswith(_ROOMS)]
    return frozenset(_PACKAGE.joinpath(*parts[1:]).with_suffix(".py") for parts in inner)


def record(
    name: str,
    path: str = "plain",
    *,
    level: str = "quick",
    seed: int | None = None,
    device: str = "cpu",
    progress: Callable[[Report], None] | None = None,
) -> dict[str, Any]:
    """Runs the laws and writes down the outcome.

    Args:
        name: the mixer.
        path: plain (every law but compile), compiled (the law compile), or that of the backends in use (as plain; calls
            that they do not serve, such as those in float64, run in our own form); with "+cache-int8" behind it keys
            and values are in 8 bits.
        level, seed, device, progress: as in `verify`.

    Returns:
        fingerprint, path, torch, level, seed, ok, and for each law its outcome, the worst error as a fraction of what
        is allowed, and where it fails.
    """
    print_of = fingerprint(name, path, device)
    form, cache = path.removesuffix(CODED), kind_of(path)
    with plainly() if form in PATHS else trying():
        reports = verify(
            name, laws=laws_of(path), level=level, seed=seed, device=device, cache=cache, progress=progress
        )
    return _record(print_of, path, device, reports)


def records_of(prints: dict[str, str], reports: list[Report], device: str = "cpu") -> dict[str, dict[str, Any]]:
    """The record of each path from the reports of a run over all laws; `prints`: path -> fingerprint before the run."""
    return {path: _record(print_of, path, device, reports) for path, print_of in prints.items()}


def laws_of(path: str) -> list[str]:
    """The laws that a path's record stands on."""
    if path.endswith(CODED):
        return list(CACHE_LAWS)
    from_plain = ["split", "causality", "raggedness", "state", "cost", "training", "truth"]
    return ["compile"] if path == "compiled" else from_plain


def kind_of(path: str) -> CacheKind:
    """How a path holds keys and values."""
    return "int8" if path.endswith(CODED) else None


def shipped_paths(name: str) -> list[str]:
    """The paths that a mixer's shipped records are for."""
    return [*PATHS, "plain" + CODED] if mixer_class(name).capabilities.keeps_keys else list(PATHS)


def _record(print_of: str, path: str, device: str, reports: list[Report]) -> dict[str, Any]:
    laws = {law: _merged([report[law] for report in reports]) for law in laws_of(path)}
    return {
        "fingerprint": print_of,
        "path": path,
        "device": device,
        "torch": torch.__version__.partition("+")[0],
        "level": reports[0].level,
        "seed": reports[0].seed,
        "variants": len(reports),
        "ok": all(law["outcome"] != FAIL for law in laws.values()),
        "laws": laws,
    }


def _merged(results: list[Any]) -> dict[str, Any]:
    """One law over all variants: failed if it fails in one, n/a if it says nothing about any."""
    failed = [result for result in results if result.outcome == FAIL]
    passed = [result for result in results if result.outcome == PASS]
    if failed:
        return {"outcome": FAIL, "reason": failed[0].reason, "reproduce": failed[0].reproduce}
    if not passed:
        return {"outcome": NOT_APPLICABLE, "reason": results[0].reason}
    return {"outcome": PASS, "variants": len(passed), "worst": float(f"{max(r.worst or 0.0 for r in passed):.2g}")}


def require(
    mixers: Iterable[Mixer | str],
    path: str = "plain",
    *,
    device: str = "cpu",
    say: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The records of these mixers on a path; what has none is held to the laws now (level quick) and remembered.

    Args:
        mixers: instances or names.
        path: plain, compiled, or that of the backends in use; mixers tell by themselves how they hold keys and values.
        device: cpu, cuda or mps.
        say: told when laws have to run.

    Returns:
        name -> record.

    Raises:
        LawError: a law does not hold.
    """
    device = torch.device(device).type
    runs = sorted(
        {(mixer, path) if isinstance(mixer, str) else (mixer.name, _path_of(mixer, path)) for mixer in mixers}
    )
    found = {}
    for name, taken in runs:
        print_of = fingerprint(name, taken, device)
        known = _lookup(name, taken, print_of)
        if known is None:
            if say is not None:
                say(f'no law record for "{name}" on the path {taken} ({device}): running the laws once')
            known = record(name, taken, device=device)
            _remember(known)
        if not known["ok"]:
            broken = {law: result for law, result in known["laws"].items() if result["outcome"] == FAIL}
            lines = [f"{law}: {result['reason']}; again: {result['reproduce']}" for law, result in broken.items()]
            raise LawError(f'mixer "{name}" breaks the law on the path {taken}:\n  ' + "\n  ".join(lines))
        found[name] = known
    return found


def _path_of(mixer: Mixer, path: str) -> str:
    return path if mixer.cache is None else path + CODED


def shipped_records() -> dict[str, dict[str, dict[str, Any]]]:
    """name -> path -> record, as shipped."""
    records: dict[str, dict[str, dict[str, Any]]] = _read(SHIPPED)
    return records


def write_shipped(records: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Merges records into the shipped file (for the authors of this package)."""
    merged = {**shipped_records(), **records}
    _write(SHIPPED, dict(sorted(merged.items())))


def _lookup(name: str, path: str, print_of: str) -> dict[str, Any] | None:
    shipped: dict[str, Any] | None = shipped_records().get(name, {}).get(path)
    if shipped is not None and shipped["fingerprint"] == print_of:
        return shipped
    cached: dict[str, Any] | None = _read(cache_file()).get(print_of)
    return cached


def _remember(known: dict[str, Any]) -> None:
    """A failure is not kept: the file may be mended, and a rotating seed may be the one that finds it."""
    if known["ok"]:
        _write(cache_file(), {**_read(cache_file()), known["fingerprint"]: known})


def cache_file() -> Path:
    """Where this user's records are kept; follows XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "trilemma" / "laws.json"


def _read(file: Path) -> dict[str, Any]:
    """An unreadable or foreign file counts as empty: the laws can be run again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if (
        not isinstance(content, dict)
        or content.get("format") != _FORMAT
        or not isinstance(content.get("records"), dict)
    ):
        return {}
    records: dict[str, Any] = content["records"]
    return records


def _write(file: Path, records: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": _FORMAT, "records": records}, indent=1, sort_keys=True) + "\n"
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
