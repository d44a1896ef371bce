"""docs/recipes.md names every step with every field, and every preset's family."""

import re
from dataclasses import fields
from pathlib import Path

from hasten.compress.refusals import check_order
from hasten.recipe import Calibration, Recipe, presets
from hasten.steps import STEPS, Shrink

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


def test_the_order_of_the_page_is_one_that_is_accepted() -> None:
    headings = re.findall(r"^### (.*)$", PAGE, re.M)
    assert [name for heading in headings for name in heading.split(", ")] == list(STEPS)
    steps = {name: Shrink(neurons=0.5) if name == "shrink" else kind() for name, kind in STEPS.items()}
    without = {"prune"}, {"factorize", "split_experts"}, {"factorize", "prune"}
    for left_out in without:
        check_order(Recipe(tuple(step for name, step in steps.items() if name not in left_out)))


def test_every_preset_is_listed() -> None:
    for name in presets():
        stem = re.sub(r"(-asym)?(-head8)?$", "", name)
        assert f"`{stem}`" in PAGE or f"`-{stem.rpartition('-')[2]}`" in PAGE, name


def test_the_example_is_a_recipe() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    assert len(Recipe.from_yaml(example).steps) == 3
