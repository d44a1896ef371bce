"""Folders of every method: Transformers with compressed-tensors gives the numbers that our reader gives, where the
standard has the format; what it has not is still an ordinary folder."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import tiny_models  # noqa: E402

from hasten.backends.torch.load import load_torch  # noqa: E402
from hasten.compress.folder import compress  # noqa: E402
from hasten.model import formats  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.model.formats import Format  # noqa: E402
from hasten.recipe import Calibration, Recipe  # noqa: E402
from hasten.steps import Prune, Quantize, QuantizeKv, Smooth, Step  # noqa: E402

SIZES = {"hidden_size": 96, "intermediate_size": 160}
RECIPES: dict[str, tuple[Step, ...]] = {
    "gptq": (Quantize("int4", 32, method="gptq"),),
    "gptq act-order": (Quantize("int4", 32, method="gptq", act_order=True),),
    "gptq asymmetric": (Quantize("int4", 32, False, method="gptq"),),
    "gptq 3 bits": (Quantize("int4", 32, method="gptq", bits=3),),
    "awq": (Quantize("int4", 32, False, method="awq"),),
    "w8a8": (Smooth(), Quantize("int8", 0, activations="int8")),
    "w4a8": (Quantize("int4", 0, method="gptq", activations="int8"),),
    "fp8 dynamic": (Quantize("fp8", activations="fp8"),),
    "fp8 static": (Quantize("fp8", activations="fp8-static"),),
    "2:4": (Prune(pattern="2:4"),),
    "2:4 int8": (Prune(pattern="2:4"), Quantize("int8", 0, method="gptq")),
    "kv": (Quantize("int8", 0), QuantizeKv()),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("It is a truth universally acknowledged, that a single man must be in want of a wife. " * 60)
    return str(file)


CASES = [("llama", name) for name in RECIPES]
CASES += [("phi3", "fp8 static"), ("phi3", "gptq act-order"), ("gemma3", "2:4 int8")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_transformers_reads_the_same_numbers(
    name: str, family: str, tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    recipe = Recipe(RECIPES[name], calibration=Calibration(text, 8, 32))
    compress(tiny_model(family, **SIZES), recipe, tmp_path / "out", device="cpu")
    tokens = torch.randint(3, tiny_models.VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = load_torch(tmp_path / "out")(tokens).logits
    assert distance(tmp_path / "out", tokens, expected) < 0.3
    config = json.loads((tmp_path / "out/config.json").read_text())
    for group in config.get("quantization_config", {}).get("config_groups", {}).values():
        group.pop("input_activations", None)
    config.get("quantization_config", {}).pop("kv_cache_scheme", None)
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    # Where inputs, keys and values are not rounded there either, outputs are the same.
    assert distance(tmp_path / "out", tokens, expected) < 1e-5


def distance(folder: Path, tokens: "torch.Tensor", expected: "torch.Tensor") -> float:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float((loaded(tokens).logits - expected).norm() / expected.norm())


def test_what_the_folders_say(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    folders = {}
    for name in ("w8a8", "fp8 dynamic", "fp8 static", "2:4 int8", "2:4", "kv"):
        recipe = Recipe(RECIPES[name], calibration=Calibration(text, 8, 32))
        folders[name] = tmp_path / name.replace(":", "of")
        compress(tiny_model("llama", **SIZES), recipe, folders[name], device="cpu")
    configs = {name: json.loads((folder / "config.json").read_text()) for name, folder in folders.items()}
    groups = {name: config.get("quantization_config", {}) for name, config in configs.items()}
    one = {name: found["config_groups"]["group_0"] for name, found in groups.items() if found.get("config_groups")}
    assert one["w8a8"]["format"] == "int-quantized"
    assert one["w8a8"]["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token",
    }  # fmt: skip
    assert one["fp8 dynamic"]["format"] == "float-quantized"
    assert one["fp8 static"]["input_activations"]["dynamic"] is False
    assert groups["kv"]["kv_cache_scheme"]["type"] == "float"
    found = {name: dict(open_checkpoint(folder).weights()) for name, folder in folders.items()}
    assert found["fp8 static"]["layers.1.down"].format == Format("fp8")
    assert found["fp8 static"]["layers.1.down"].format.activations == "fp8-static"
    scale = found["fp8 static"]["layers.1.down"].input_scale
    assert scale is not None
    assert scale.shape == (1,)
    assert scale[0] > 0
    assert np.array_equal(found["fp8 static"]["layers.1.q"].input_scale, found["fp8 static"]["layers.1.k"].input_scale)
    assert found["2:4 int8"]["layers.0.gate"].format == Format("int8", sparse24=True)
    assert found["2:4"]["layers.0.gate"].format == Format("fp32", sparse24=True)
    assert set(configs["2:4"]["hasten"]["sparse24"]) == {name for name, w in found["2:4"].items() if w.mask is not None}
    assert np.mean(formats.dequantize(found["2:4"]["layers.0.down"]) == 0) == 0.5


def test_a_second_recipe_starts_from_such_a_folder(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    calibration = Calibration(text, 8, 32)
    compress(
        tiny_model("llama", **SIZES), Recipe((Prune(pattern="2:4"),), calibration=calibration), tmp_path / "one",
        device="cpu",
    )  # fmt: skip
    gptq = Recipe((Quantize("int8", 0, method="gptq"),), calibration=calibration)
    compress(tmp_path / "one", gptq, tmp_path / "two", device="cpu")
    compress(tmp_path / "one", "int8", tmp_path / "three", device="cpu")
    for name in ("two", "three"):
        weight = dict(open_checkpoint(tmp_path / name).weights())["layers.2.up"]
        assert np.mean(formats.dequantize(weight) == 0) >= 0.5, name
