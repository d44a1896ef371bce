"""docs/methods.md: its numbers are what our functions give, and the files that it names are there."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"


def test_every_number_is_what_the_code_gives() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    try:
        found = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    finally:
        torch.set_printoptions(profile="default")
    assert found.attempted > 40
    assert found.failed == 0


def test_files_that_it_names_are_there() -> None:
    named = re.findall(r"`((?:backends|compress|model|train)/\w+\.py)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / "src" / "hasten" / name).is_file()]
