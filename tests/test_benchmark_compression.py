"""benchmarks/compression.py: a small run from end to end, rows of two runs joined, and the parts that it stands on."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "dogs",
    "ran",
    "to",
    "trees",
    "while",
    "birds",
    "sang",
    "of",
    "may",
]


@pytest.fixture(scope="module", autouse=True)
def importable() -> None:
    sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture(scope="module")
def text() -> str:
    random = np.random.default_rng(0)
    return "\n".join(" ".join(random.choice(WORDS, 12)) + "." for _ in range(400))


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "stories260K"


def test_planted_outliers_compute_the_same_and_hurt_when_inputs_are_rounded(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from compression_tools import nll_of, plant_outliers

    from hasten.measure.text import Window

    model, planted = tiny_model("llama"), tmp_path / "planted"
    plant_outliers(model, planted)
    tokens = np.random.default_rng(1).integers(3, 250, (6, 20)).astype(np.int32)
    windows = [Window(row[: 20 - index], 20) for index, row in enumerate(tokens)]
    ((before,), (after,)) = (nll_of(folder, [windows], "cpu", False) for folder in (model, planted))
    np.testing.assert_allclose(after, before, rtol=1e-5)
    ((fine,), (coarse,)) = (nll_of(folder, [windows], "cpu", True) for folder in (model, planted))
    assert np.abs(coarse - before).mean() > 2 * np.abs(fine - before).mean()


def test_orders_are_judged_by_their_interval() -> None:
    from compression import judge
    from compression_rows import ORDERS, Order

    from hasten.receipt import Measurement

    def verdict(low: float, high: float, tie: bool = False) -> str:
        return judge(Order("a", "b", tie), Measurement((low + high) / 2, low, high, 9, "bits/byte"))

    assert verdict(-2, -1) == "held"
    assert verdict(1, 2) == verdict(1, 2, tie=True) == "LOST"
    assert verdict(-2, 1) == "undecided, leans to it"
    assert verdict(-1, 2) == "undecided, leans against it"
    assert verdict(-1, 2, tie=True) == "held (a tie)"
    assert Order("a", "b", True).claim == "a <= b"
    assert len({order.claim for order in ORDERS}) == len(ORDERS)


def test_every_order_is_of_rows_that_there_are(stories: Path) -> None:
    from compression_rows import ORDERS, Training, rows

    from hasten.model.checkpoint import open_checkpoint

    names = [row.name for row in rows(open_checkpoint(stories).spec, Training("text", 10, 2, 64))]
    assert len(set(names)) == len(names)
    assert {name for order in ORDERS for name in (order.better, order.worse)} <= set(names)


def test_runs_go_on_and_join(
    stories: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import compression

    for name, part in (("train", text[: len(text) // 2]), ("held", text[len(text) // 2 :])):
        (tmp_path / f"{name}.txt").write_text(part)
    common = ["--data", tmp_path, "--model", stories, "--train", tmp_path / "train.txt"]
    common += ["--heldout", tmp_path / "held.txt", "--window", 64, "--windows", 8, "--sequences", 4, "--train-steps", 0]

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["compression.py", *map(str, (*common, *arguments))])
        compression.main()
        return capsys.readouterr().out

    run("--only", "rtn 3", "--rounds", 0, "--json", tmp_path / "a.json", "--work", tmp_path / "a")
    again = run("--only", "3 bits", "--rounds", 1, "--json", tmp_path / "a.json", "--work", tmp_path / "a")
    report = json.loads((tmp_path / "a.json").read_text())
    assert list(report["rows"]) == ["original", "rtn 3 bits", "gptq 3 bits", "awq 3 bits"]
    assert all(row["decode"]["8"] > 0 and not row["error"] for row in report["rows"].values())
    assert "| gptq 3 bits < rtn 3 bits | " in again
    run("--only", "gptq 4", "--rounds", 0, "--json", tmp_path / "b.json")
    joined = run("--join", tmp_path / "a.json", tmp_path / "b.json", "--json", tmp_path / "c.json")
    assert list(json.loads((tmp_path / "c.json").read_text())["rows"])[-1] == "gptq 4 bits"
    measured = [line for line in joined.splitlines() if " 3 bits < " in line]
    assert len(measured) == 2
    assert not any("not measured" in line for line in measured)


def test_no_script_hides_a_package_that_transformers_looks_for() -> None:
    """A script's own folder comes first on the path: kernels.py there was taken for the package of that name."""
    from importlib.metadata import requires

    optional = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in requires("transformers") or ()}
    assert "kernels" in optional
    assert not optional & {path.stem for path in BENCHMARKS.glob("*.py")}
