"""config.json's `hasten.run` is read by one strict rule, whoever runs the model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten import LLM, evaluate
from hasten.errors import ModelError
from hasten.model.checkpoint import open_checkpoint
from hasten.model.settings import default_kv_cache, stated_run
from hasten.recipe import Run


@pytest.fixture
def folder(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def write(folder: Path, section: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hasten": section}))


def test_what_is_stated_is_found(folder: Path) -> None:
    assert stated_run(open_checkpoint(folder)) == Run()
    for section in ({}, {"run": {}}, {"of": "another version"}):
        write(folder, section)
        assert stated_run(open_checkpoint(folder)) == Run()
    write(folder, {"run": {"kv_cache": "int8", "threads": 2}})
    assert stated_run(open_checkpoint(folder)) == Run(kv_cache="int8", threads=2)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (5, "hasten is 5"),
        (None, "hasten is None"),
        (["run"], "hasten is"),
        ({"run": 5}, "hasten.run is int"),
        ({"run": None}, "hasten.run is empty"),
        ({"run": []}, "hasten.run is"),
        ({"run": {"kv_cash": "int8"}}, "did you mean 'kv_cache'"),
        ({"run": {"kv_cache": "int3"}}, "kv_cache is 'int3'"),
        ({"run": {"kv_cache": ["int8"]}}, "kv_cache is"),
        ({"run": {"kv_cache": {}}}, "kv_cache is {}"),
        ({"run": {"speculation": "magic"}}, "speculation is 'magic'"),
        ({"run": {"threads": "two"}}, "threads is 'two'"),
        ({"run": {"threads": 0}}, "threads is 0"),
        ({"run": {"threads": 1.5}}, "threads is 1.5"),
        ({"run": {"threads": True}}, "threads is True"),
    ],
)
def test_anything_else_is_refused_with_the_file_and_the_value(folder: Path, section: object, words: str) -> None:
    write(folder, section)
    uses: list[Callable[[], Any]] = [
        lambda: stated_run(open_checkpoint(folder)),
        lambda: LLM(folder),
        lambda: evaluate(folder),
    ]
    for use in uses:
        with pytest.raises(ModelError) as found:
            use()
        assert words in str(found.value)
        assert str(folder / "config.json") in str(found.value)


def test_the_default_is_what_the_device_has(folder: Path) -> None:
    spec = open_checkpoint(folder).spec
    assert spec.dtype == "fp32"
    assert default_kv_cache(spec) == "fp32"
    assert default_kv_cache(spec, ("bf16", "fp8")) == "bf16"
    assert default_kv_cache(spec, stated="int8") == "int8"
    assert default_kv_cache(spec, ("bf16", "fp8"), stated="int8") == "bf16"  # tuned on a CPU, run on a GPU
