"""Start-up is part of speed: what is imported when, and how long it takes, in processes of their own."""

import json
import resource
import statistics
import subprocess
import sys

import pytest

import hasten

HEAVY = ["torch", "transformers", "tokenizers", "huggingface_hub", "numpy", "jinja2", "yaml", "safetensors"]


def median_seconds(*arguments: str, runs: int = 7) -> float:
    """Median processor time of a python process. Start-up waits for nothing, so on an idle machine that is the time
    that passes; on a busy one it is not the neighbours' time too."""
    seconds = []
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(seconds)


def loaded_by(code: str) -> list[str]:
    probe = f"{code}\nimport json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    return json.loads(done.stderr.strip().splitlines()[-1])


def test_import_takes_less_than_a_fifth_of_a_second():
    assert median_seconds("-c", "import hasten") < 0.2


def test_help_takes_less_than_three_tenths_of_a_second():
    assert median_seconds("-m", "hasten", "--help") < 0.3


def test_import_loads_nothing_heavy():
    assert loaded_by("import hasten; hasten.errors.HastenError; hasten.__version__") == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["tune", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments):
    code = f"""
import sys
from hasten.cli import main
sys.argv = ["hasten", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code"""
    assert loaded_by(code) == []


def test_generating_needs_neither_torch_nor_transformers():
    assert {"torch", "transformers"}.isdisjoint(loaded_by("import hasten; hasten.LLM; hasten.SamplingParams"))


def test_public_names():
    assert set(hasten.__all__) == {
        *("LLM", "SamplingParams", "Recipe", "Run", "Calibration", "Receipt"),
        *("Quantize", "QuantizeKv", "Smooth", "Rotate", "Prune", "Shrink", "Factorize", "SplitExperts"),
        *("Finetune", "Distill", "Gradual", "Recover"),
        *("tune", "compress", "evaluate", "load_torch", "errors", "__version__"),
    }
    for name in hasten.__all__:
        assert getattr(hasten, name) is not None
    assert dir(hasten) == sorted(hasten.__all__)


def test_unknown_name_lists_what_there_is():
    with pytest.raises(AttributeError, match=r"no attribute 'tuen'; it has LLM, "):
        hasten.tuen  # noqa: B018


def test_functions_stay_when_packages_of_the_same_name_are_imported_first():
    code = "import hasten.tune, hasten.compress, hasten; assert callable(hasten.tune) and callable(hasten.compress)"
    subprocess.run([sys.executable, "-c", code], check=True)
