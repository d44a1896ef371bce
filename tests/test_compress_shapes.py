"""Prune, Factorize, SplitExperts and Recover as steps of recipes on tiny models: what they leave, ranks, errors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hasten.compress.folder import compress  # noqa: E402
from hasten.errors import RecipeError  # noqa: E402
from hasten.model import formats  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.recipe import Calibration, Recipe  # noqa: E402
from hasten.steps import Prune, Quantize, Step  # noqa: E402

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 40)
    return str(file)


def recipe(text: str, *steps: Step) -> Recipe:
    return Recipe(steps, calibration=Calibration(text, num_sequences=12, sequence_len=32))


def numbers(folder: Path) -> dict[str, np.ndarray]:
    return {name: formats.dequantize(weight) for name, weight in open_checkpoint(folder).weights()}


@pytest.mark.parametrize("family", ["llama_bias", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_pruned_matrices_hold_their_zeros_and_the_rest_is_untouched(
    family: str, tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    step = Prune(pattern="2:4", targets=("mlp", "layers.*.q"), ignore=("layers.0.*",))
    compress(model, recipe(text, step), tmp_path / "out", device="cpu")
    before, after = numbers(model), numbers(tmp_path / "out")
    for name, values in after.items():
        if name.startswith(("layers.1", "layers.2")) and name.endswith((".gate", ".up", ".down", ".q")):
            kept = (values.reshape(len(values), -1, 4) != 0).sum(-1)
            assert kept.max() == 2, name
            assert kept.min() == 2, name
        else:
            assert np.array_equal(values, before[name]), name


def test_pruning_methods_rank_as_in_their_papers(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """By the error of each matrix's outputs; the first block's, since later ones read what earlier ones made."""
    total = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        out = tmp_path / method
        receipt = compress(tiny_model("llama"), recipe(text, Prune(method=method)), out, device="cpu")
        errors = receipt.settings["errors"]
        assert len(errors) == 21
        total[method] = sum(
            error for name, error in errors.items() if name in ("layers.0.q", "layers.0.k", "layers.0.v")
        )
        zeros = [np.mean(values == 0) for name, values in numbers(out).items() if name in errors]
        assert np.mean(zeros) == pytest.approx(0.5, abs=0.01)
    assert total["sparsegpt"] < total["wanda"] < total["magnitude"]


def test_quantising_keeps_the_zeros(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    steps = (Prune(pattern="2:4", targets=("mlp",)), Quantize("int8", 0))
    compress(tiny_model("llama"), recipe(text, *steps), tmp_path / "out", device="cpu")
    for name, values in numbers(tmp_path / "out").items():
        if name.endswith((".gate", ".up", ".down")):
            assert ((values.reshape(len(values), -1, 4) != 0).sum(-1) <= 2).all()


@pytest.mark.parametrize(
    ("changes", "step", "message"),
    [
        ({"intermediate_size": 174}, Prune(pattern="2:4"), r"layers.0.down has 174 inputs, 2:4 needs a multiple of 4"),
        ({}, Prune(targets=("Linear", "head")), r"prune works on matrices of decoder layers, found head: ignore it"),
    ],
)
def test_what_does_not_fit_is_said_before_any_weight_is_read(
    changes: dict[str, int], step: Step, message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        compress(tiny_model("llama", **changes), Recipe((step,)), tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())
