"""docs/cli.md is what the program says of itself, word for word."""

import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_page_is_current():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    if version("typer") != pins["typer"]:
        pytest.skip(f"typer lays out help differently by version: {version('typer')} here, {pins['typer']} in the page")
    spec = importlib.util.spec_from_file_location("write_cli_docs", ROOT / "scripts" / "write_cli_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "cli.md").read_text() == script.page(), "run: python scripts/write_cli_docs.py"
