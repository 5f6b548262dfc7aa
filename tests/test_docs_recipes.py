"""Every recipe loads, and builds the models that it describes."""

from __future__ import annotations

from pathlib import Path

import pytest

from trilemma.compare.expand import expand
from trilemma.compare.matching import skeleton
from trilemma.compare.tasks import check_tasks, task_study
from trilemma.config import RunConfig, load_config, read_yaml
from trilemma.data.dataset import check_layout
from trilemma.study import load_study
from trilemma.train.choices import choose

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
NEWCOMERS = {"copy.yaml", "translation.yaml", "language-model.yaml", "classification.yaml"}


def configs(recipe: Path) -> list[RunConfig]:
    """The run configurations that a recipe stands for; a study's, matched and budgeted."""
    if "candidates" in read_yaml(recipe):
        study = load_study(recipe)
        check_tasks(study)
        studies = [task_study(study, task) for task in study.tasks] or [study]
        return [variant.config for one in studies for variant in expand(one).variants]
    return [load_config(recipe)]


def test_what_a_newcomer_wants_is_there() -> None:
    assert {recipe.name for recipe in RECIPES} >= NEWCOMERS


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_builds_its_models(recipe: Path) -> None:
    for config in configs(recipe):
        check_layout(config)
        choose(config)  # something must end the run
        labels = 2 if config.data.task == "classification" else None
        model = skeleton(config.model.model_copy(update={"num_labels": config.model.num_labels or labels}))
        assert model.parameter_counts()["non_embedding"] > 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_says_how_it_is_used(recipe: Path) -> None:
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
