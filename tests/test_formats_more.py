"""Eight-bit floats against torch's own, and 2:4 matrices against the dense ones that they stand for."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hasten.errors import ModelError, RecipeError
from hasten.model import formats, sparse
from hasten.model.formats import Format
from hasten.model.fp8 import from_fp8, to_fp8


def pruned(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    smaller = np.argsort(np.abs(values).reshape(rows, -1, 4), axis=2)[..., :2]
    np.put_along_axis(values.reshape(rows, -1, 4), smaller, 0, axis=2)
    return values


def test_fp8_is_torchs_e4m3() -> None:
    torch = pytest.importorskip("torch")
    bits = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(from_fp8(bits), expected, equal_nan=True)
    halves = np.abs(expected[np.isfinite(expected)])
    halves = np.unique(halves)
    ties = (halves[1:] + halves[:-1]) / 2
    random = np.random.default_rng(1).normal(size=20000).astype(np.float32) * np.float32(40)
    values = np.concatenate((halves, ties, -ties, random, random / 4096, [0.0, -0.0, 448, -448])).astype(np.float32)
    values = np.clip(values, -448, 448)
    mine, theirs = to_fp8(values), torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(mine, theirs)
    assert np.array_equal(to_fp8(np.array([1e30, -1e30, np.nan], np.float32)), [0x7E, 0xFE, 0x7F])


@pytest.mark.parametrize("group", [0, 32])
def test_fp8_matrices(group: int) -> None:
    values = np.random.default_rng(2).normal(size=(20, 64)).astype(np.float32)
    values[3] = 0
    weight = formats.quantize(values, Format("fp8", group))
    found = formats.dequantize(weight)
    assert np.abs(found - values).max() < 0.04 * np.abs(values).max()
    assert (found[3] == 0).all()
    x = np.random.default_rng(3).normal(size=(4, 64)).astype(np.float32)
    assert np.allclose(formats.product(x, weight), x @ found.T)
    assert formats.bytes_of(Format("fp8", group), (20, 64)) == 20 * 64 + 20 * (2 if group else 1) * 2


@pytest.mark.parametrize(
    "fmt", [Format("fp32"), Format("fp16"), Format("bf16"), Format("fp8"), Format("int8", 32), Format("int4", 32)]
)
@pytest.mark.parametrize("columns", [64, 96, 12])
def test_what_is_kept_of_a_2_of_4_matrix_stands_for_the_whole(fmt: Format, columns: int) -> None:
    if fmt.group_size and columns % fmt.group_size:
        fmt = replace(fmt, group_size=0)
    values = pruned(7, columns)
    values[2, :4] = 0  # fewer than two
    whole = formats.quantize(values, fmt)
    kept = formats.sparsify(whole)
    assert kept.format == replace(fmt, sparse24=True)
    assert kept.data.nbytes == whole.data.nbytes // 2
    assert kept.mask is not None
    assert kept.mask.shape == (7, -(-columns // 8))
    columns_kept = sparse.columns_of(kept.mask, columns)
    assert (columns_kept.reshape(7, -1, 4).sum(axis=2) == 2).all()
    assert np.array_equal(formats.densify(kept).data, whole.data)
    assert np.array_equal(formats.dequantize(kept), formats.dequantize(whole))
    x = np.random.default_rng(4).normal(size=(3, columns)).astype(np.float32)
    assert np.array_equal(formats.product(x, kept), formats.product(x, whole))
    counted = kept.data.nbytes + kept.mask.nbytes + (0 if kept.scales is None else 2 * kept.scales.size)
    assert formats.bytes_of(kept.format, (7, columns)) == counted


def test_three_of_four_are_refused() -> None:
    values = np.ones((1, 8), np.float32)
    with pytest.raises(RecipeError, match="three numbers in four successive columns"):
        formats.sparsify(formats.dense_weight(values))
    with pytest.raises(RecipeError, match="2:4 does not fit a matrix of 6 columns"):
        formats.check_format(Format("int8", sparse24=True), (1, 6))


def test_activations_are_no_part_of_how_a_matrix_is_stored() -> None:
    assert Format("int8", activations="int8") == Format("int8")
    assert Format("int8", sparse24=True) != Format("int8")


@pytest.mark.parametrize(("block", "scale_shape"), [(None, (1,)), (None, ()), ([128, 128], None)])
def test_folders_of_8_bit_floats_as_others_publish_them(
    block: list[int] | None, scale_shape: tuple[int, ...] | None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    from hasten.model.checkpoint import open_checkpoint

    folder = tiny_model("llama", hidden_size=192, intermediate_size=256)
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name]
        rows, columns = block or weight.shape
        scale = torch.rand(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)) + 0.5
        spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[name + ("_scale_inv" if block else "_scale")] = (
            scale if scale_shape is None else scale.reshape(scale_shape)
        )
        expected[name] = (tensors[name].float() * spread).numpy()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = dict(open_checkpoint(tmp_path).weights())
    assert found["layers.1.down"].format == Format("fp8", 128 if block else 0)
    assert np.array_equal(formats.dequantize(found["layers.1.down"]), expected["model.layers.1.mlp.down_proj.weight"])
    assert np.array_equal(formats.dequantize(found["layers.0.k"]), expected["model.layers.0.self_attn.k_proj.weight"])
    broken = "model.layers.1.mlp.down_proj.weight" + ("_scale_inv" if block else "_scale")
    tensors[broken] = tensors[broken] * float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"down_proj\.weight_scale.* holds NaN"):
        dict(open_checkpoint(tmp_path).weights())
