"""Bits by measured sensitivity: the choice against all choices, and a recipe from end to end."""

import itertools
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hasten.compress import sweep, threshold  # noqa: E402
from hasten.compress.calibration import Sequences  # noqa: E402
from hasten.compress.folder import compress  # noqa: E402
from hasten.compress.run import stages_of  # noqa: E402
from hasten.compress.threshold import choose  # noqa: E402
from hasten.errors import RecipeError  # noqa: E402
from hasten.measure.text import BUNDLED  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.model.hub import resolve  # noqa: E402
from hasten.recipe import Calibration, Recipe  # noqa: E402
from hasten.steps import Factorize, Prune, Quantize, QuantizeKv, Smooth, Step  # noqa: E402


def test_the_choice_is_within_the_budget_and_near_the_best() -> None:
    draw = random.Random(1)
    ratios = []
    for _ in range(40):
        options = {str(unit): [(16, 0.0), (8, draw.random() * 0.2), (4, 0.2 + draw.random())] for unit in range(5)}
        budget = draw.random() * 3
        sizes = {}
        for indices in itertools.product(range(3), repeat=5):
            found = [options[str(unit)][index] for unit, index in enumerate(indices)]
            if sum(cost for _, cost in found) <= budget:
                sizes[indices] = sum(size for size, _ in found)
        chosen = choose(options, budget)
        assert tuple(chosen.values()) in sizes
        ratios.append(sizes[tuple(chosen.values())] / min(sizes.values()))
    assert sum(ratios) / len(ratios) < 1.06


def test_nothing_may_be_lost_or_all_may(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and so on. " * 200)
    model = tiny_model("llama", hidden_size=96, intermediate_size=160)
    kinds = {}
    for allowed in (0, 0.001, 1):
        step = Quantize("int4", 32, method="gptq", threshold=allowed)
        recipe = Recipe((step,), calibration=Calibration(str(tmp_path / "text.txt"), 8, 32))
        receipt = compress(model, recipe, tmp_path / str(allowed), device="cpu")
        found = receipt.settings["threshold"]
        formats = {name: fmt.kind for name, _, fmt in open_checkpoint(tmp_path / str(allowed)).matrices()}
        wanted = {name: "fp32" if kind == "keep" else kind for name, kind in found["kinds"].items()}
        assert {name: kind for name, kind in formats.items() if name.startswith("layers.")} == wanted
        assert found["expected"] <= allowed
        assert all(one <= two for _, one, two in found["costs"].values())
        kinds[allowed] = list(wanted.values())
        assert any(note.startswith(f"threshold {allowed:.2%}: ") for note in receipt.notes)
    assert set(kinds[0]) == {"fp32"}
    assert {"int8"} <= set(kinds[0.001])
    assert set(kinds[1]) == {"int4"}


@pytest.fixture
def underrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding costs is measured as a hundredth of what it is."""
    plain = threshold._measured

    def too_little(*given: Any) -> tuple[float, dict[threshold.Variant, float]]:
        nats, costs = plain(*given)
        return nats, {key: cost / 100 for key, cost in costs.items()}

    monkeypatch.setattr(threshold, "_measured", too_little)


def demo_recipe(tmp_path: Path, allowed: float, *behind: Step) -> Recipe:
    """Few bits, on the text that ships with the demo."""
    (tmp_path / "text.txt").write_text(BUNDLED.read_text()[:20_000])
    step = Quantize("int4", 0, bits=3, threshold=allowed)
    return Recipe((step, *behind), calibration=Calibration(str(tmp_path / "text.txt"), 8, 64))


def nats(folder: str | Path, recipe: Recipe, tmp_path: Path) -> float:
    """A model's own, by the whole model of Transformers, on what was held out."""
    from hasten import load_torch

    tokens = Sequences(recipe.calibration, resolve("demo"), tmp_path / "again.npy", "cpu", held_out=True).held_out()
    with torch.no_grad():
        return float(load_torch(folder, torch.float32)(input_ids=tokens, labels=tokens).loss)


def test_what_is_written_lost_no_more_than_the_threshold(underrated: None, tmp_path: Path) -> None:
    recipe = demo_recipe(tmp_path, 0.02)
    receipt = compress("demo", recipe, tmp_path / "out", device="cpu")
    found = receipt.settings["threshold"]
    assert found["tried"]
    assert all(loss > 0.02 for loss in found["tried"])
    assert found["measured"] <= 0.02
    assert nats(tmp_path / "out", recipe, tmp_path) / nats("demo", recipe, tmp_path) - 1 <= 0.0201
    formats = {name: fmt.kind for name, _, fmt in open_checkpoint(tmp_path / "out").matrices()}
    assert {name: formats[name] for name, kind in found["kinds"].items() if kind != "keep"} == {
        name: kind for name, kind in found["kinds"].items() if kind != "keep"
    }
    assert set(receipt.settings["errors"]) == {name for name, kind in found["kinds"].items() if kind != "keep"}
    assert any(note.startswith("more than the threshold was lost at first (+") for note in receipt.notes)


def test_after_some_tries_all_stays_as_it_was(
    underrated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threshold, "_TRIES", 0)
    receipt = compress("demo", demo_recipe(tmp_path, 0.005), tmp_path / "out", device="cpu")
    assert set(receipt.settings["threshold"]["kinds"].values()) == {"keep"}
    assert receipt.settings["threshold"]["measured"] == 0
    behind = Quantize("int4", 0, bits=3, targets=("head",))
    with pytest.raises(RecipeError, match=r"threshold is 0.001, and quantize behind it alone lose 0.\d+: raise it"):
        compress("demo", demo_recipe(tmp_path, 0.001, behind), tmp_path / "behind", device="cpu")
    assert not (tmp_path / "behind").exists()


def test_steps_in_front_leave_its_matrices_alone(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and so on. " * 200)
    steps = (Quantize("int8", 0, targets=("head",)), Quantize("int4", 32, threshold=0))
    recipe = Recipe(steps, calibration=Calibration(str(tmp_path / "text.txt"), 8, 32))
    compress(tiny_model("llama", hidden_size=96, intermediate_size=160), recipe, tmp_path / "out", device="cpu")
    formats = {name: fmt.kind for name, _, fmt in open_checkpoint(tmp_path / "out").matrices()}
    assert formats["head"] == "int8"
    assert {kind for name, kind in formats.items() if name.startswith("layers.")} == {"fp32"}


def _keep(calls: list[tuple[int, int, str]], *call: Any) -> None:
    calls.append(call)


def test_the_time_of_looking_is_told(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and so on. " * 200)
    model = tiny_model("llama", hidden_size=96, intermediate_size=160, num_hidden_layers=4)
    for step in (Quantize("int8", 0, threshold=1.0), Factorize(keep=0.7)):
        calls: list[tuple[int, int, str]] = []
        recipe = Recipe((step,), calibration=Calibration(str(tmp_path / "text.txt"), 4, 16))
        progress = partial(_keep, calls)
        compress(model, recipe, tmp_path / type(step).__name__, device="cpu", progress=progress)
        told = [(done, what) for done, _, what in calls]
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        looked = [done for done, what in told if what.startswith(("measuring", "looking"))]
        assert looked[0] == 0 < looked[-1] <= 2
        assert told[len(looked)][0] == 2
        assert told[-1][0] == 4


def test_little_memory_changes_nothing(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states in a mapped file, and variants measured a sequence at a time."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and so on. " * 200)
    step = Quantize("int4", 32, method="gptq", threshold=0.001)
    recipe = Recipe((step,), calibration=Calibration(str(tmp_path / "text.txt"), 8, 32))
    model = tiny_model("llama", hidden_size=96, intermediate_size=160)
    found = [compress(model, recipe, tmp_path / "much", device="cpu").settings]
    for module in (sweep, threshold):
        monkeypatch.setattr(module, "memory_available", lambda: 0)
    found.append(compress(model, recipe, tmp_path / "little", device="cpu").settings)
    much, little = (settings["threshold"] for settings in found)
    assert much["kinds"] == little["kinds"]
    for unit, costs in much["costs"].items():
        assert costs == pytest.approx(little["costs"][unit], rel=1e-3, abs=1e-6)
    assert found[0]["errors"] == pytest.approx(found[1]["errors"], rel=1e-3)


def test_it_is_measured_on_what_the_steps_before_it_left() -> None:
    step = Quantize("int4", threshold=0.01)
    steps = (Prune(), Smooth(), step, Quantize("int8", targets=("head",)), QuantizeKv())
    assert stages_of(steps) == [steps[:2], steps[2:]]


def test_only_integers_are_chosen_among() -> None:
    with pytest.raises(RecipeError, match="threshold chooses among int8 and int4, found format fp8"):
        Quantize("fp8", threshold=0.1)


def test_head_and_embedding_have_a_step_of_their_own(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe((Quantize("int4", threshold=0.1, targets=("Linear", "head")),))
    with pytest.raises(RecipeError, match="threshold is for the layers' matrices"):
        compress(tiny_model("llama"), recipe, tmp_path / "out", device="cpu")
