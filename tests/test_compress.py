"""`compress`: what a step targets takes its format, what none targets stays bit for bit, nothing is half-written."""

from pathlib import Path

import numpy as np
import pytest

from hasten import compress
from hasten.compress.plan import resolve
from hasten.errors import RecipeError, ResourceError
from hasten.model import formats
from hasten.model.checkpoint import open_checkpoint
from hasten.receipt import Receipt, sha256, used_texts
from hasten.recipe import Calibration, Recipe, Run
from hasten.steps import Quantize


@pytest.fixture(scope="module")
def model(shared_data: Path) -> Path:
    return shared_data / "stories260K"


def test_targets_change_and_the_rest_is_untouched(model: Path, tmp_path: Path) -> None:
    recipe = Recipe((Quantize("int4", 32, targets=("attention",), ignore=("layers.0.*",)),), Run(kv_cache="int8"))
    told: list[tuple[int, int]] = []
    receipt = compress(model, recipe, tmp_path / "out", progress=lambda done, total, what: told.append((done, total)))
    before, after = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    plan = resolve(recipe, before.spec)
    original = dict(before.weights())
    for name, weight in after.weights():
        if name in plan.formats:
            assert weight.format == plan.formats[name]
            noise = formats.dequantize(weight) - formats.dequantize(original[name])
            assert 0 < np.square(noise).mean() < 0.02 * np.square(formats.dequantize(original[name])).mean()
        else:
            assert np.array_equal(weight.data, original[name].data), name
    assert after.config["hasten"] == {"run": {"kv_cache": "int8"}}
    assert Recipe.load(tmp_path / "out") == recipe
    assert Receipt.load(tmp_path / "out") == receipt
    assert receipt.inputs["model.safetensors"] == sha256(model / "model.safetensors")
    assert receipt.settings["bytes_after"] < receipt.settings["bytes_before"]
    assert told[-1][0] == told[-1][1] == len(told)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "device is 'tpu', expected auto, cpu or cuda"),
        ("cpu:0", "device is 'cpu:0', expected auto"),
        (None, "device is None, expected auto"),
        ("cuda", "device cuda cannot be used: no NVIDIA driver was found on this machine: use --device cpu"),
        ("cuda:1", "device cuda:1 cannot be used: no NVIDIA driver"),
    ],
)
def test_a_device_that_is_not_there_is_refused_though_rounding_needs_none(
    device: str, message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.backends._DRIVER", ())
    with pytest.raises(ResourceError, match=message):
        compress(model, "int8", tmp_path / "out", device=device)
    assert not list(tmp_path.iterdir())


def test_text_that_no_step_reads_is_said_and_does_not_count_as_used(model: Path, tmp_path: Path) -> None:
    receipt = compress(model, Recipe((Quantize(),), calibration=Calibration("books.txt")), tmp_path / "out")
    assert receipt.notes == (
        "calibration text books.txt was not read, as no step looks at it, and is not recorded as used",
    )
    assert not used_texts(tmp_path / "out")
    assert Recipe.load(tmp_path / "out") == Recipe((Quantize(),))


def test_a_folder_without_a_name(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="the name of the new folder is empty"):
        compress(model, "int8", "")


def test_fallbacks_are_listed(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"layers.0.down has 172 inputs"):
        compress(model, "int4-g32", tmp_path / "out")
    receipt = compress(model, {"steps": [{"quantize": {"format": "int4", "fallback": "int8"}}]}, tmp_path / "out")
    assert receipt.notes == ("layers.*.down (5): int8 instead of int4-g32",)


def test_what_falls_back_keeps_its_activations_and_all_of_its_bits(model: Path, tmp_path: Path) -> None:
    """down's 172 inputs are in no groups of 32: int8, of 256 levels though the step says three bits."""
    step = Quantize("int4", 32, fallback="int8", bits=3, activations="int8")
    compress(model, Recipe((step,)), tmp_path / "out")
    found = dict(open_checkpoint(tmp_path / "out").weights())
    assert found["layers.0.down"].format == formats.Format("int8", activations="int8")
    assert len(np.unique(found["layers.0.down"].data)) > 100
    assert len(np.unique(found["layers.0.q"].data & 15)) == 8


def test_a_second_time_starts_from_what_is_left(model: Path, tmp_path: Path) -> None:
    compress(model, Recipe((Quantize("int8", 0),)), tmp_path / "one")
    receipt = compress(tmp_path / "one", Recipe((Quantize("int8", 32, fallback="int8"),)), tmp_path / "two")
    assert any("quantised already" in note for note in receipt.notes)


def test_a_dense_recipe_sets_the_dtype(model: Path, tmp_path: Path) -> None:
    compress(model, "bf16", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.spec.dtype == "bf16"
    assert {fmt.kind for _, _, fmt in checkpoint.matrices()} == {"bf16"}


def test_nothing_is_left_where_it_fails(model: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, "int8", tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(ResourceError, match="exists already"):
        compress(model, "int8", tmp_path / "out")


def test_transformers_reads_what_was_written(model: Path, tmp_path: Path) -> None:
    """Searched scales may be negative; Transformers must make the same numbers of them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    recipe = Recipe((Quantize("int4", 32, fallback="int8"), Quantize("int8", targets=("head",))))
    compress(model, recipe, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    with torch.no_grad():
        found = loaded(ids).logits[0].numpy()

    from hasten.backends.reference import ReferenceBackend
    from hasten.measure.quality import BLOCK_SIZE, _batches
    from hasten.measure.text import Window

    checkpoint = open_checkpoint(tmp_path / "out")
    backend = ReferenceBackend()
    backend.load(checkpoint.spec, checkpoint.weights())
    backend.allocate(1, BLOCK_SIZE, "fp32")
    batch, _ = next(_batches(Window(ids[0].numpy().astype(np.int32), 1), checkpoint.spec.vocab_size))
    np.testing.assert_allclose(backend.forward(batch), found[:-1], atol=2e-3)
