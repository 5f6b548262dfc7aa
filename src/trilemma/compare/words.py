"""What a study's numbers allow one to say, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trilemma.compare.metrics import Metric
from trilemma.compare.records import PlannedRun, Role
from trilemma.compare.results import CandidateResult, Control
from trilemma.compare.statistics import MIN_SEEDS, PairTest
from trilemma.config import Source
from trilemma.study import StudyConfig

_UNITS = {"tokens": "scored tokens", "seconds": "seconds", "flops": "training FLOPs"}


def amount(value: float) -> str:
    """A quantity with a unit prefix: 1234567 -> "1.23 M"."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {prefix}"
    return f"{value:.3g}"


def setting(value: object) -> str:
    """A value of a setting, or of an environment, for people; a list holds those of runs that differ."""
    if isinstance(value, list):
        return " / ".join(setting(one) for one in value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:,}" if isinstance(value, int) else str(value)


def task(study: StudyConfig) -> str:
    """What was learned, from what."""
    data = study.base.data
    sources = data.train if isinstance(data.train, list) else [data.train]
    described = ", ".join(_source(source) for source in sources)
    languages = f", {data.source_language} to {data.target_language}" if data.target_language else ""
    return f"{data.task}{languages}: {described}"


def _source(source: Source) -> str:
    if source.generated is not None:
        size = f" ({source.size:,} examples)" if source.size else ""
        return f'generated "{source.generated}"{size}'
    return source.path or f"{source.source} with {source.target}"


def criterion(task: str) -> str:
    """What a learning rate is chosen by."""
    return "validation error" if task == "probe" else "validation loss"


def budget(lock: str, value: float) -> str:
    """The locked budget in words."""
    return f"{amount(value)} {_UNITS[lock]} for each run"


def verdicts(tests: Sequence[PairTest], rows: Mapping[str, CandidateResult], metric: Metric, scale: str) -> list[str]:
    """A sentence for each pair that has seeds enough, and a single one for all others."""
    if len(tests) > 1 and all(test.p is None for test in tests):
        names = dict.fromkeys(name for test in tests for name in (test.first, test.second))
        fewest = min(test.seeds for test in tests)
        return [f"{', '.join(names)}: no verdict: {_too_few(fewest)} ({scale})."]
    tested, others = [[test for test in tests if (test.p is not None) is known] for known in (True, False)]
    sentences = [verdict(test, rows, metric, len(tested), scale) for test in tested]
    if len(others) < 2:
        return sentences + [verdict(test, rows, metric, len(tested), scale) for test in others]
    fewest = min(test.seeds for test in others)
    return [*sentences, f"The other {len(others)} pairs: no verdict: {_too_few(fewest)} ({scale})."]


def verdict(test: PairTest, rows: Mapping[str, CandidateResult], metric: Metric, pairs: int, scale: str) -> str:
    """One sentence on one pair. `scale` (the tested size and budget) stands in every one of them."""
    first, second = rows[test.first], rows[test.second]
    names = f"{test.first} and {test.second}"
    if test.p is None or test.adjusted is None:
        return f"{names}: no verdict: {_too_few(test.seeds)} ({scale})."
    width = metric.decimals
    gap = (
        f"difference {abs(test.difference):.{width}f}, 95 % interval {_ordered(test, width)}, "
        f"p = {test.adjusted:.2g} after Holm's correction over {pairs} {_plural('pair', pairs)}"
    )
    if not test.separated:
        return f"{names}: not distinguishable with this budget ({gap}; {scale})."
    better_first = (test.difference > 0) == metric.higher_is_better
    winner, loser = (first, second) if better_first else (second, first)
    means = winner.quality.interval.mean, loser.quality.interval.mean
    values = f"{metric.sentence(means[0])} against {metric.sentence(means[1])}"
    return f"{winner.name} is better than {loser.name}: {metric.label} {values} ({gap}; {scale})."


def _ordered(test: PairTest, width: int) -> str:
    low, high = (test.low, test.high) if test.difference >= 0 else (-test.high, -test.low)
    return f"{low:.{width}f} to {high:.{width}f}"


def scale(candidates: Sequence[CandidateResult], lock: str, value: float) -> str:
    """The tested scale, as it stands in every verdict."""
    sizes = sorted(row.parameters["non_embedding"] for row in candidates)
    low, high = amount(sizes[0]), amount(sizes[-1])
    size = low if low == high else f"{low} to {high}"
    return f"tested at {size} non-embedding parameters and {amount(value)} {_UNITS[lock]}"


def control(name: str, role: str, test: PairTest, metric: Metric) -> tuple[bool | None, str]:
    """Whether a control came out as it must, and the sentence that says so."""
    width = metric.decimals
    gap = f"difference {test.difference:.{width}f}, 95 % interval {test.low:.{width}f} to {test.high:.{width}f}"
    if test.p is None:
        return None, f"{name}: cannot be judged: {_too_few(test.seeds)} ({gap})."
    gap = f"{gap}, p = {test.p:.2g}"
    if role == "same-twice":
        if test.separated:
            return False, f"A/A control failed: the reference differs from itself with other seeds ({gap})."
        return True, f"A/A control passed: the reference is not told apart from itself with other seeds ({gap})."
    reference_better = (test.difference > 0) == metric.higher_is_better
    if test.separated and reference_better:
        return True, f"Known-gap control passed: the handicapped reference is found to be worse ({gap})."
    return False, f"Known-gap control failed: the handicapped reference is not found to be worse ({gap})."


_CONTROLS: dict[Role, str] = {"same-twice": "A/A control", "known-gap": "Known-gap control"}


def unfinished(role: Role, finished: int, planned: int) -> str:
    """What is said of a control whose runs have not all been trained and scored, so that it cannot be judged yet."""
    return f"{_CONTROLS[role]} has not finished: {finished} of {planned} {_plural('run', planned)} trained and scored."


def without_reference(role: Role, reference: str) -> str:
    """What is said of a control while the candidate that it is compared with has no finished run."""
    return f"{_CONTROLS[role]} cannot be judged: {reference}, the reference, has no finished run."


def withheld(outcomes: Sequence[Control]) -> str:
    """Why no verdict may be printed at all; empty where verdicts stand.

    A control was asked for to show that the study can be trusted: until it has passed, nothing shows that. So one that
    has not finished, or that too few seeds leave undecided, withholds verdicts as one that failed does.
    """
    failed = [outcome.text for outcome in outcomes if outcome.passed is False]
    open_ones = [outcome.text for outcome in outcomes if outcome.passed is None]
    if failed:
        return f"No verdict is printed, because a control failed. {' '.join([*failed, *open_ones])}"
    if open_ones:
        return f"No verdict is printed, because a control that was asked for is undecided. {' '.join(open_ones)}"
    return ""


def limits(
    study: StudyConfig, candidates: Sequence[CandidateResult], missing: Sequence[PlannedRun], validated: int | None
) -> list[str]:
    """What a study of this size cannot tell. `validated`: tokens that a validation read at most."""
    sizes = sorted(row.parameters["non_embedding"] for row in candidates)
    low, high = amount(sizes[0]), amount(sizes[-1])
    contexts = sorted({context for row in candidates if row.inference for context in row.inference.ms_per_token})
    lines = [
        f"Scale: models of {low if low == high else f'{low} to {high}'} non-embedding parameters and a budget of "
        f"{budget(study.budget.lock, study.budget.amount)}. Rankings at other sizes and budgets may differ.",
        "One task and one data set: nothing here says how the candidates rank on another one.",
    ]
    wanted = study.reference or study.candidates[0].name
    if wanted not in [row.name for row in candidates]:
        lines.append(f"{wanted}, the reference, has no finished run: {candidates[0].name} stands in for it.")
    if not study.learning_rates:
        rates = ", ".join(sorted({f"{row.training.learning_rate:g}" for row in candidates}))
        lines.append(
            f"No learning-rate sweep: every candidate trained at its configured rate ({rates}), which may suit some "
            "better than others."
        )
    elif study.sweep_share < 1:
        seeds_tried = f"{study.sweep_seeds} {_plural('seed', study.sweep_seeds)}"
        lines.append(
            f"The learning rate was chosen at {study.sweep_share:.0%} of the budget with {seeds_tried}; the best one "
            "for the full budget may differ."
        )
    seeds = min(row.quality.interval.seeds for row in candidates)
    if seeds < MIN_SEEDS:
        count = f"{seeds} {_plural('seed', seeds)}"
        if seeds < max(row.quality.interval.seeds for row in candidates):
            count = f"{count} of some candidates"
        lines.append(f"{count}: the luck of initialisation cannot be told from a real difference.")
    elif seeds <= 5:
        lines.append(f"{seeds} seeds: only differences well above the spread between seeds can be found.")
    if not study.controls.same_twice or study.controls.known_gap is None:
        lines.append(
            "Not both controls (A/A and known gap) were asked for: how well the study itself can see is not checked."
        )
    if study.workers > 1:
        lines.append(
            f"{study.workers} runs at a time shared the machine: their training times are not those of one alone."
        )
    if validated is not None:
        lines.append(f"Each validation along training read at most {validated:,} tokens of the validation data.")
    lines.append("Times were measured on one machine; on other hardware the costs, and which is cheaper, may differ.")
    if contexts:
        lines.append(f"Inference was measured up to {contexts[-1]:,} tokens of context; nothing is said beyond.")
    else:
        lines.append("Inference cost was not measured.")
    if missing:
        count = f"{len(missing)} planned {_plural('run', len(missing))}"
        lines.append(f"{count} had not finished when this report was drawn.")
    return lines


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _too_few(seeds: int) -> str:
    return f"{seeds} {_plural('seed', seeds)}, {'three' if MIN_SEEDS == 3 else MIN_SEEDS} are needed"
