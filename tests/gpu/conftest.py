"""Tests on a GPU spend their time in compilers, on one core: --part I/N runs every Nth test, so that N processes share
them (scripts/gpu_tests.sh)."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="I/N: every Nth test from the Ith on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("part", "1/1").split("/"))  # there is no such option for all of tests/
    config.hook.pytest_deselected(items=[item for index, item in enumerate(items) if index % parts != part - 1])
    items[:] = items[part - 1 :: parts]
