"""Quantised folders as others write them: packed here by the published formats, without any of the reader's code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hasten.errors import ModelError
from hasten.model.checkpoint import open_checkpoint
from hasten.model.formats import dequantize

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 1}
Tensors = dict[str, np.ndarray]


def folder_with(
    source: Path, out: Path, settings: dict[str, Any], pack: Callable[[np.ndarray], tuple[Tensors, np.ndarray]]
) -> tuple[Path, dict[str, np.ndarray]]:
    """A copy of a dense folder whose projections are packed; and what each stands for, by module."""
    out.mkdir()
    tensors, values = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = tensor
            continue
        packed, values[module] = pack(tensor)
        tensors |= {f"{module}.{key}": np.ascontiguousarray(value) for key, value in packed.items()}
    save_file(tensors, out / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return out, values


def check(path: Path, values: dict[str, np.ndarray]) -> None:
    names = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
             "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}  # fmt: skip
    found = dict(open_checkpoint(path).weights())
    for module, want in values.items():
        weight = found[f"layers.0.{names[module.removeprefix('model.layers.0.')]}"]
        np.testing.assert_allclose(dequantize(weight), want, rtol=1e-6)


def words(values: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Numbers packed into int32 along an axis, the first in the lowest bits."""
    moved = np.moveaxis(values.astype(np.uint64), axis, -1)
    per_word = 32 // bits
    moved = np.concatenate([moved, np.zeros((*moved.shape[:-1], -moved.shape[-1] % per_word), np.uint64)], axis=-1)
    split = moved.reshape(*moved.shape[:-1], -1, per_word)
    joined = sum(split[..., i] << np.uint64(bits * i) for i in range(per_word))
    return np.moveaxis(joined.astype(np.uint32).view(np.int32), -1, axis)


def rounded(w: np.ndarray, group: int, bits: int, asymmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers 0.. [N, K], scales float16 [N, G], zeros [N, G]."""
    grouped = w.reshape(len(w), -1, group).astype(np.float64)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    top = 2**bits - 1
    if asymmetric:
        scales = ((high - low) / top).astype(np.float16)
        zeros = np.clip(np.rint(-low / scales), 0, top)
    else:
        scales = (np.maximum(-low, high) / (top / 2)).astype(np.float16)
        zeros = np.full(low.shape, (top + 1) / 2)
    q = np.clip(np.rint(grouped / scales[..., None]) + zeros[..., None], 0, top)
    return q.reshape(w.shape), scales, zeros


def meaning(q: np.ndarray, scales: np.ndarray, zeros: np.ndarray, index: np.ndarray) -> np.ndarray:
    return ((q - zeros[:, index]) * scales.astype(np.float64)[:, index]).astype(np.float32)


def gptq(
    w: np.ndarray, bits: int, group: int, asymmetric: bool, act_order: bool, v2: bool
) -> tuple[Tensors, np.ndarray]:
    n, k = w.shape
    group = k if group == -1 else group
    order = np.random.default_rng(n).permutation(k) if act_order else np.arange(k)
    q, scales, zeros = rounded(w[:, order], group, bits, asymmetric)
    index = np.empty(k, np.int32)
    index[order] = np.arange(k) // group
    original = np.empty_like(q)
    original[:, order] = q
    stored = words(zeros.T, bits, 1).view(np.uint32)
    if not v2:
        stored = stored - np.uint32(0x11111111 if bits == 4 else 0x01010101)
    tensors = {
        "qweight": words(original.T, bits, 0), "qzeros": stored.view(np.int32), "scales": scales.T, "g_idx": index,
    }  # fmt: skip
    return tensors, meaning(original, scales, zeros, index)


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(
    ("bits", "group", "asymmetric", "act_order"),
    [(4, 128, False, False), (4, 32, True, False), (4, 64, True, True), (4, -1, False, False), (8, 128, False, True),
     (8, -1, False, False)],
)  # fmt: skip
def test_gptq(
    bits: int, group: int, asymmetric: bool, act_order: bool, v2: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": not asymmetric, "desc_act": act_order}
    if v2:
        settings["checkpoint_format"] = "gptq_v2"
    path, values = folder_with(
        tiny_model("llama", **SIZES),
        tmp_path / "m",
        settings,
        lambda w: gptq(w, bits, group, asymmetric, act_order, v2),
    )
    check(path, values)
    weight = dict(open_checkpoint(path).weights())["layers.0.down"]
    assert (weight.perm is not None) == act_order
    assert weight.format.symmetric == (not asymmetric)


def test_gptq_with_empty_biases_and_large_groups(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    def pack(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        tensors, values = gptq(w, 4, w.shape[1], True, False, False)
        return {**tensors, "bias": np.zeros(len(w), np.float16)}, values

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 256, "sym": False}
    source = tiny_model("llama", **{**SIZES, "hidden_size": 256, "intermediate_size": 256})
    path, values = folder_with(source, tmp_path / "m", settings, pack)
    check(path, values)
    assert dict(open_checkpoint(path).weights())["layers.0.q"].format.group_size == 128
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError, match="up_proj: a bias that is not zero"):
        list(open_checkpoint(path).weights())


@pytest.mark.parametrize("group", [32, 128])
def test_awq(group: int, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    def pack(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        q, scales, zeros = rounded(w, group, 4, asymmetric=True)
        order = np.array([0, 2, 4, 6, 1, 3, 5, 7])

        def interleaved(x: np.ndarray) -> np.ndarray:  # [rows, N] -> words along N
            return words(x.reshape(len(x), -1, 8)[:, :, order].reshape(x.shape), 4, 1)

        index = np.arange(w.shape[1]) // group
        tensors = {"qweight": interleaved(q.T), "qzeros": interleaved(zeros.T), "scales": scales.T}
        return tensors, meaning(q, scales, zeros, index)

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    check(*folder_with(tiny_model("llama", **SIZES), tmp_path / "m", settings, pack))


def scheme(bits: int, group: int | None, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    how = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **how, **more}
    group_0 = {"targets": ["re:.*self_attn.*", "Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "quantization_status": "compressed", "config_groups": {"group_0": group_0}}  # fmt: skip


def packed(w: np.ndarray, bits: int, group: int | None, asymmetric: bool) -> tuple[Tensors, np.ndarray]:
    q, scales, zeros = rounded(w, group or w.shape[1], bits, asymmetric)
    index = np.arange(w.shape[1]) // (group or w.shape[1])
    tensors = {"weight_packed": words(q, bits, 1), "weight_scale": scales, "weight_shape": np.array(w.shape, np.int64)}
    if asymmetric:
        tensors["weight_zero_point"] = words(zeros, bits, 0)
    return tensors, meaning(q, scales, zeros, index)


@pytest.mark.parametrize(
    ("bits", "group", "asymmetric"), [(4, 32, True), (4, 128, False), (4, None, True), (8, 64, False), (8, None, False)]
)
def test_compressed_tensors_packed(
    bits: int, group: int | None, asymmetric: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    settings = scheme(bits, group, not asymmetric)
    source = tiny_model("llama", **SIZES)
    check(*folder_with(source, tmp_path / "m", settings, lambda w: packed(w, bits, group, asymmetric)))


def test_compressed_tensors_by_activation_order(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    def pack(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        order = np.random.default_rng(1).permutation(w.shape[1])
        q, scales, zeros = rounded(w[:, order], 32, 4, False)
        index = np.empty(w.shape[1], np.int32)
        index[order] = np.arange(w.shape[1]) // 32
        original = np.empty_like(q)
        original[:, order] = q
        tensors = {"weight_packed": words(original, 4, 1), "weight_scale": scales, "weight_g_idx": index,
                   "weight_shape": np.array(w.shape, np.int64)}  # fmt: skip
        return tensors, meaning(original, scales, zeros, index)

    settings = scheme(4, 32, actorder="group")
    check(*folder_with(tiny_model("llama", **SIZES), tmp_path / "m", settings, pack))


def test_int8_with_dynamic_activations(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    def pack(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        q, scales, zeros = rounded(w, w.shape[1], 8, False)
        index = np.zeros(w.shape[1], int)
        return {"weight": (q - 128).astype(np.int8), "weight_scale": scales}, meaning(q, scales, zeros, index)

    settings = scheme(8, None)
    settings["format"] = "int-quantized"
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    settings["config_groups"]["group_0"]["input_activations"] = inputs
    path, values = folder_with(tiny_model("llama", **SIZES), tmp_path / "m", settings, pack)
    check(path, values)
    inputs["dynamic"] = False
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ModelError, match="input activations must be dynamic int8 or float8"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported; supported: compressed-tensors"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, "activation_scheme 'none' is not supported"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits is not supported; supported: 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin' is not supported"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv' with 4 bits is not supported"),
        ({**scheme(4, 32), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ({**scheme(4, 32), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not supported"),
        (scheme(4, 32, type="float"), "supported: int of 4 bits, symmetric int or float of 8"),
        (scheme(3, 32), "weights of 3 bits"),
        (scheme(8, 32, symmetric=False), "asymmetric int weights of 8 bits"),
        (scheme(4, 48), "group size 48 is not supported"),
        (scheme(4, None, strategy="block"), "strategy 'block' is not supported"),
        ({**scheme(4, 32), "format": "marlin-24"}, "format 'marlin-24' is not supported"),
        ({"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}, "named preset"),
        ({"quant_method": "compressed-tensors", "config_groups": ["x"]}, "config_groups is .* expected an object"),
        ({**scheme(4, 32), "ignore": [None]}, r"ignore is \[None\], expected a list of names"),
        ({**scheme(4, 32), "ignore": ["re:("]}, r"ignore: 're:\(' is no regular expression"),
        (scheme(8, None, strategy="block", type="float"), "block_structure is None, expected two positive numbers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size is .* expected two positive"),
    ],
)
def test_schemes_that_are_refused(
    settings: dict[str, Any], message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    path, _ = folder_with(
        tiny_model("llama", **SIZES), tmp_path / "m", settings, lambda w: packed(w, 4, 32, asymmetric=False)
    )
    with pytest.raises(ModelError, match=message):
        open_checkpoint(path)


def test_scales_that_are_not_finite(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    def pack(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        tensors, values = packed(w, 4, 32, asymmetric=False)
        tensors["weight_scale"][-1, -1] = np.inf
        return tensors, values

    path, _ = folder_with(tiny_model("llama", **SIZES), tmp_path / "m", scheme(4, 32), pack)
    with pytest.raises(ModelError, match=r"q_proj\.weight_scale' holds NaN or infinity"):
        list(open_checkpoint(path).weights())
