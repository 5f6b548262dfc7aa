"""Where candidates' models differ in more than their mixers: what a study must say beside its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trilemma.compare.records import Inequality, RunRecord, flatten
from trilemma.compare.words import amount, setting
from trilemma.study import StudyConfig

# What a study compares, and d_model, of which the plan speaks.
_COMPARED = frozenset({"mixer", "encoder_mixer", "cross_mixer", "layout", "d_model"})
# What parameter matching moves, or what is derived: said only where the study itself sets it.
_FITTED = frozenset({"d_ff", "num_layers", "encoder_layers"})


def unequal_models(study: StudyConfig, groups: Mapping[str, Sequence[RunRecord]], reference: str) -> list[Inequality]:
    """Settings of the model, and embedding parameters, in which a candidate differs from the reference.

    Args:
        groups: finished runs by candidate. reference: one of them.
    """
    asked = {key.removeprefix("model.") for one in study.candidates for key in flatten(one.overrides)}
    compared = _COMPARED | (_FITTED - asked)
    found = []
    for candidate in study.candidates:
        if candidate.name != reference and candidate.name in groups:
            own, base = groups[candidate.name][0], groups[reference][0]
            texts = [*_settings(own, base, reference, compared), *_embedding(own, base, reference, study)]
            found += [Inequality(candidate.name, text) for text in texts]
    return found


def _settings(own: RunRecord, base: RunRecord, reference: str, compared: frozenset[str]) -> list[str]:
    first, second = own.config.model.model_dump(mode="json"), base.config.model.model_dump(mode="json")
    return [
        f"model.{key} is {setting(value)}, {reference}'s is {setting(second[key])}"
        for key, value in first.items()
        if key not in compared and value != second[key]
    ]


def _embedding(own: RunRecord, base: RunRecord, reference: str, study: StudyConfig) -> list[str]:
    first, second = (int(run.summary["parameters"]["embedding"]) for run in (own, base))
    if first == second or (second and abs(first / second - 1.0) <= study.budget.tolerance):
        return []
    off = f"{first / second - 1.0:+.1%} against {reference}" if second else f"{reference} has none"
    return [f"{amount(first)} embedding parameters, {off} (embeddings are not matched)"]
