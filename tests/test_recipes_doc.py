"""docs/recipes.md names every step with every field, and every preset's family."""

import re
from dataclasses import fields
from pathlib import Path

from hasten.recipe import Calibration, Recipe, presets
from hasten.steps import STEPS

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()


def section(name: str) -> str:
    found = re.search(rf"^### [^\n]*\b{name}\b.*?(?=^### |\Z)", PAGE, re.S | re.M)
    assert found, f"docs/recipes.md has no section on {name}"
    return found[0]


def test_every_step_and_field_is_described() -> None:
    for name, kind in STEPS.items():
        for item in fields(kind):
            assert f"`{item.name}`" in section(name), f"{name}: {item.name}"
    for item in fields(Calibration):
        assert f"`{item.name}`" in PAGE


def test_every_preset_is_listed() -> None:
    for name in presets():
        stem = re.sub(r"(-asym)?(-head8)?$", "", name)
        assert f"`{stem}`" in PAGE or f"`-{stem.rpartition('-')[2]}`" in PAGE, name


def test_the_example_is_a_recipe() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    assert len(Recipe.from_yaml(example).steps) == 3
