"""Rotation changes no logit, spreads planted outliers, and is folded into an ordinary folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402

from hasten.compress.folder import compress  # noqa: E402
from hasten.compress.rotate import hadamard, orthogonal  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.model.formats import dequantize  # noqa: E402
from hasten.recipe import Calibration, Recipe  # noqa: E402
from hasten.steps import Quantize, Rotate  # noqa: E402


@pytest.mark.parametrize("size", [8, 12, 72, 128])
def test_matrices_are_orthogonal_and_mix_all_channels(size: int) -> None:
    matrix = orthogonal(size, 3)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size).double(), atol=1e-12)
    assert not torch.equal(matrix, orthogonal(size, 4))
    if size & (size - 1) == 0:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))
        assert torch.equal(hadamard(size).sign()[:, 0], torch.ones(size).double())


@pytest.mark.parametrize("family", ["llama_bias", "llama3", "qwen3", "phi3", "granite"])
def test_a_rotated_folder_gives_the_same_logits(family: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    compress(tiny_model(family), Recipe((Rotate(seed=1),)), tmp_path / "out", device="cpu")
    tokens = torch.randint(3, tiny_models.VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = tiny_models.make(family)(tokens).logits, loaded(tokens).logits
    assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()))
    weights = dict(open_checkpoint(tmp_path / "out").weights())
    assert (dequantize(weights["layers.0.attn_norm"]) == 1).all()
    assert "head" in weights


def test_rotation_then_gptq_in_one_recipe(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    steps = (Rotate(), Quantize("int4", 0, method="gptq", activations="int8"))
    recipe = Recipe(steps, calibration=Calibration(str(tmp_path / "text.txt"), 8, 32))
    receipt = compress(tiny_model("llama"), recipe, tmp_path / "out", device="cpu")
    formats = {name: fmt.kind for name, _, fmt in open_checkpoint(tmp_path / "out").matrices()}
    assert {name for name, kind in formats.items() if kind == "int4"} == set(receipt.settings["errors"])
    assert 0 < np.mean(list(receipt.settings["errors"].values())) < 0.05
