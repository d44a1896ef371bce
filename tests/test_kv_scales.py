"""Scales of keys and values, and how a folder is run, in what is made from it: kept where they hold, else dropped and
said so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file  # noqa: E402

from hasten.compress.folder import compress, run_of  # noqa: E402
from hasten.errors import ModelError  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.recipe import Calibration, Recipe, Run  # noqa: E402
from hasten.steps import Factorize, Prune, Quantize, QuantizeKv, Rotate, Shrink, Smooth, Step  # noqa: E402
from hasten.train.run import compress as with_training  # noqa: E402

SIZES = {"hidden_size": 96, "intermediate_size": 160}
RUN = Run(kv_cache="bf16", speculation="ngram")


def recipe(text: str, *steps: Step, run: Run = Run()) -> Recipe:
    return Recipe(steps, run, Calibration(text, 8, 32))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("It is a truth universally acknowledged, that a single man must be in want of a wife. " * 60)
    return str(file)


@pytest.fixture(scope="module")
def scaled(tiny_model: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scales, and with settings of its own."""
    out = tmp_path_factory.mktemp("scaled") / "model"
    compress(tiny_model("llama", **SIZES), recipe(text, QuantizeKv(), run=RUN), out, device="cpu")
    return out


def scales(folder: Path) -> dict[str, float]:
    """As other engines read them, by the tensors' names."""
    found = load_file(folder / "model.safetensors")
    return {name: float(value[0]) for name, value in found.items() if name.endswith(("k_scale", "v_scale"))}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize(
    "steps",
    [
        (Quantize("int8", 0),),
        (Quantize("int8", 0, method="gptq"),),
        (Quantize("int4", threshold=0.1), Quantize("int8", targets=("head",))),
        (Smooth(), Quantize("int8", 0, activations="int8")),
        (),
    ],
)
def test_what_only_rounds_keeps_them(steps: tuple[Step, ...], scaled: Path, text: str, tmp_path: Path) -> None:
    receipt = compress(scaled, recipe(text, *steps), tmp_path / "out", device="cpu")
    assert len(scales(scaled)) == 6
    assert scales(tmp_path / "out") == scales(scaled)
    scheme = config_of(scaled)["quantization_config"]["kv_cache_scheme"]
    assert config_of(tmp_path / "out")["quantization_config"]["kv_cache_scheme"] == scheme
    assert not [note for note in receipt.notes if "keys and values" in note]
    assert config_of(tmp_path / "out")["hasten"]["run"] == {"kv_cache": "bf16", "speculation": "ngram"}


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (Prune(method="wanda"), "prune"),
        (Prune(pattern="2:4"), "prune"),
        (Rotate(), "rotate"),
        (Shrink(neurons=0.2, rank_by="magnitude"), "shrink"),
        (Quantize("int4", 32, method="awq"), "quantize"),
    ],
)
def test_what_changes_keys_and_values_drops_them(
    step: Step, name: str, scaled: Path, text: str, tmp_path: Path
) -> None:
    receipt = compress(scaled, recipe(text, step, Quantize("int8", 0)), tmp_path / "out", device="cpu")
    assert not scales(tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert "kv_cache_scheme" not in config["quantization_config"]
    assert config["hasten"]["run"] == {"speculation": "ngram"}
    for lost in ("scales of keys and values were dropped", "kv_cache bf16, as the model was run, was not kept"):
        assert any(note.startswith(f"{lost}, since {name} changes") for note in receipt.notes), lost
    compress(scaled, recipe(text, step, QuantizeKv()), tmp_path / "new", device="cpu")
    assert scales(tmp_path / "new").keys() == scales(scaled).keys()
    assert scales(tmp_path / "new") != scales(scaled)


def test_training_drops_them(scaled: Path, text: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from hasten.steps import Finetune

    step = Finetune(steps=1, batch_size=1, sequence_len=16)
    receipt = with_training(scaled, recipe(text, step), tmp_path / "out", device="cpu")
    assert not scales(tmp_path / "out")
    assert any("dropped, since finetune changes" in note for note in receipt.notes)


def test_a_later_stage_of_the_recipe_keeps_them(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    model = tiny_model("llama", **SIZES)
    compress(model, recipe(text, QuantizeKv()), tmp_path / "kv", device="cpu")
    steps = (QuantizeKv(), Quantize("int4", threshold=0.1))  # two stages
    compress(model, recipe(text, *steps), tmp_path / "both", device="cpu")
    # Not the same numbers: of the same text, a threshold holds some sequences out.
    assert scales(tmp_path / "both") == pytest.approx(scales(tmp_path / "kv"), rel=0.5)
    assert "kv_cache_scheme" in config_of(tmp_path / "both")["quantization_config"]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_they_are_read_as_they_were_written(
    family: str, tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    """Where matrices are fused, and where keys are made by two thin matrices, too."""
    steps = (Factorize(rank=8), QuantizeKv()) if family in ("llama", "phi3") else (QuantizeKv(),)
    compress(tiny_model(family), recipe(text, *steps), tmp_path / "out", device="cpu")
    found = {name: float(w.data[0, 0]) for name, w in open_checkpoint(tmp_path / "out").kv_scales()}
    assert list(found)[:2] == ["layers.0.k_scale", "layers.0.v_scale"]
    assert sorted(found.values()) == sorted(scales(tmp_path / "out").values())
    assert len(found) == 6


def test_scales_that_are_not_one_a_layer_are_dropped_and_named(scaled: Path, tmp_path: Path) -> None:
    """As others make them, one a head."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in scaled.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(scaled / "model.safetensors")
    tensors["model.layers.0.self_attn.k_scale"] = np.ones(2, np.float32)
    save_file(tensors, copy / "model.safetensors")
    receipt = compress(copy, "int8", tmp_path / "out")
    (note,) = [note for note in receipt.notes if "keys and values" in note]
    assert note.startswith("1 scales of keys and values (model.layers.0.self_attn.k_scale, ...)")
    assert len(scales(tmp_path / "out")) == 5


def test_the_recipe_says_how_to_run_and_the_folder_where_it_does_not(scaled: Path, tmp_path: Path) -> None:
    compress(scaled, Recipe((Quantize("int8"),), Run(kv_cache="int8", threads=1)), tmp_path / "out")
    run = {"kv_cache": "int8", "speculation": "ngram", "threads": 1}
    assert config_of(tmp_path / "out")["hasten"]["run"] == run
    checkpoint = open_checkpoint(scaled)
    assert run_of(Recipe((Prune(),), Run(kv_cache="int8")), checkpoint) == Run("int8", "ngram")
    assert run_of(Recipe((Prune(),)), checkpoint) == Run(None, "ngram")
    config = config_of(tmp_path / "out")
    config["hasten"]["run"]["kv_cash"] = "int8"
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="unknown key 'kv_cash'"):
        compress(tmp_path / "out", "int8", tmp_path / "not")
    assert not (tmp_path / "not").exists()
