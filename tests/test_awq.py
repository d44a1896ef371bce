"""AWQ in whole blocks: scales go into norms and into matrices in front, and the model computes the same."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hasten.compress.folder import compress  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.model.formats import dense_weight, dequantize  # noqa: E402
from hasten.model.spec import config_of_text  # noqa: E402
from hasten.model.writer import write_checkpoint  # noqa: E402
from hasten.recipe import Calibration, Recipe  # noqa: E402
from hasten.steps import Quantize  # noqa: E402

LARGE = 64.0
IN_FRONT = {"o": "v", "down": "up"}


def planted(model: Path, out: Path) -> Path:
    """The same function, in which a few inputs of `o` and `down` are LARGE times as large, and their columns small."""
    checkpoint = open_checkpoint(model)

    def changed():
        for name, weight in checkpoint.weights():
            layer, _, role = name.rpartition(".")
            values = np.array(dequantize(weight))
            if role in IN_FRONT.values():
                values[::24] *= LARGE
            if role in IN_FRONT:
                values[:, ::24] /= LARGE
            yield name, dense_weight(values, weight.format.kind) if layer else weight

    write_checkpoint(out, config_of_text(checkpoint.config), changed(), model)
    return out


def test_inputs_of_every_matrix_are_scaled(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=160, num_key_value_heads=6)
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged, that a man must be in want. " * 60)
    recipe = Recipe((Quantize("int4", 32, method="awq"),), calibration=Calibration(str(tmp_path / "text.txt"), 8, 32))
    plain, hard = (
        compress(folder, recipe, tmp_path / f"{folder.name}-4", device="cpu").settings["errors"]
        for folder in (model, planted(model, tmp_path / "planted"))
    )
    for layer in range(3):
        for role in IN_FRONT:
            name = f"layers.{layer}.{role}"
            assert hard[name] < 3 * plain[name], name  # nine times as much where they are left as they are
