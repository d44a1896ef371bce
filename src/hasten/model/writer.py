"""Canonical weights -> a model folder that Transformers and hasten load: compressed-tensors where it is quantised.

How each Format is stored (docs/format.md has the same in full):

- Linear modules, int8 and symmetric int4: "pack-quantized", weight_packed int32 with 4 or 8 numbers to a word,
  weight_scale and weight_shape.
- Embeddings, and asymmetric int4: "naive-quantized", `weight` int8 (one byte a number for int4 too), weight_scale and
  weight_zero_point. Transformers (5.23, with compressed-tensors 0.20) cannot build a packed embedding, ties the head to
  a parameter named `weight` only, and expects packed zero points in an unpacked shape. All of these we read.
- A tied, quantised head: the matrix is stored once, as the embedding's `weight`; the head's weight_scale (and zero
  points) are repeated, since Transformers scales the two modules apart. tie_word_embeddings stays true.
- Modules that Transformers fuses (Phi-3, GPT-2, GPT-NeoX) are fused again; their parts must have one format.
- fp8: "float-quantized", `weight` as F8_E4M3 and weight_scale; input_scale where activations are static. int8 with
  activations of 8 bits: "int-quantized", one byte a number. Scales of keys and values: k_scale and v_scale of the
  attention module.
- 2:4 matrices are written with their zeros, for everybody, and named in config.json's `hasten.sparse24`.
- GPT-2's Conv1D modules cannot be quantised by Transformers. They are stored as Linear ones, under the format
  "hasten-conv1d", which Transformers refuses with an error.
- Vectors, and what is not quantised: the model's dtype, or float32 where that would lose something.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ModelError, ResourceError
from hasten.model.checkpoint import attention_modules
from hasten.model.compressed_tensors import CONV1D_PACKED, FLOATS8, INTEGERS, KV_SCALES, LOW_RANK, PACKED
from hasten.model.formats import Activations, Format, Weight, densify, dequantize, from_bf16, to_bf16, unpack_nibbles
from hasten.model.names import Source, sources
from hasten.model.spec import ModelSpec, config_of_text, spec_from_config
from hasten.model.tensor_file import SHARD_BYTES, TensorWriter, new_folder

NAIVE = "naive-quantized"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_DENSE = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_BYTES_PER_TENSOR = 160  # of header, beside the name
_Key = tuple[Format, str, Activations | None]  # how modules of one config group are stored


@dataclass(frozen=True, slots=True)
class _Stored:
    """How one module was written, for the configuration. scales: a quantised embedding's Weight without its data, which
    a tied head repeats. sparse: its matrices that are 2:4."""

    source: Source
    format: Format | None = None
    container: str = ""
    scales: Weight | None = None
    sparse: tuple[str, ...] = ()


def write_checkpoint(
    out_dir: str | Path,
    config: Mapping[str, Any],
    weights: Iterable[tuple[str, Weight]],
    tokenizer_files_from: str | Path | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder; it appears under its name when it is whole, or not at all.

    config: config.json of the original (a multimodal one is written as its text part). weights: canonical names, in any
    order; a module that Transformers fuses is held in memory until its parts are there. A "head" makes the model
    untied, whatever config says. "layers.I.k_scale" and "layers.I.v_scale", each one number, are scales of keys and
    values stored as fp8. tokenizer_files_from: a model folder whose tokenizer, chat template and
    generation_config.json are copied. extra_files: file name -> content.

    Raises ResourceError where the folder exists, the disk is full or permission is missing; ModelError for weights that
    the architecture does not have, lacks, or cannot store so.
    """
    out = Path(out_dir)
    text = config_of_text(config)
    spec = spec_from_config({**text, "tie_word_embeddings": False})
    table = {part.name: source for source in sources(spec, text) for part in source.parts}
    with new_folder(out) as folder:
        room = sum(5 * (len(s.module) + 20 + _BYTES_PER_TENSOR) for s in table.values()) + 4096
        writer = TensorWriter(folder, room, shard_bytes)
        try:
            kv_scales: list[str] = []
            without = _without_kv(writer, spec, attention_modules(spec, text), weights, kv_scales)
            stored = list(_write_modules(writer, spec, table, without))
            tied = _finish_head(writer, spec, stored, tied=_is_tied(text))
            writer.finish()
        finally:
            writer.close()
        _write_config(folder, text, stored, tied, bool(kv_scales))
        _copy_tokenizer(folder, tokenizer_files_from)
        for name, content in (extra_files or {}).items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _without_kv(
    writer: TensorWriter,
    spec: ModelSpec,
    attention: Mapping[str, str],
    weights: Iterable[tuple[str, Weight]],
    written: list[str],
) -> Iterator[tuple[str, Weight]]:
    """The weights but for scales of keys and values, which are written, and their names noted."""
    for name, weight in weights:
        layer, _, end = name.rpartition(".")
        if end not in KV_SCALES:
            yield name, weight
            continue
        _add_vector(writer, spec, f"{attention[layer]}.{end}", dequantize(weight)[:, 0])
        written.append(name)


def _write_modules(
    writer: TensorWriter, spec: ModelSpec, table: Mapping[str, Source], weights: Iterable[tuple[str, Weight]]
) -> Iterator[_Stored]:
    """Write each module when all its parts have come."""
    biases = {f"{name}.bias": source for name, source in table.items() if source.bias}
    wanted = {**table, **biases}
    missing = wanted.keys() - {"head", "head.bias"}
    waiting: dict[str, dict[str, Weight]] = {}
    for name, weight in weights:
        source = wanted.get(name)
        if source is None:
            raise ModelError(f"weight {name!r} is not part of a {spec.family} model with this configuration")
        missing.discard(name)
        parts = waiting.setdefault(source.module, {})
        parts[name] = weight
        if len(parts) == len(source.parts) * (2 if source.bias else 1):
            yield _write_module(writer, spec, source, waiting.pop(source.module))
    for name in sorted(missing):
        raise ModelError(f"weight {name!r} is missing: the model cannot be written")


def _write_module(writer: TensorWriter, spec: ModelSpec, source: Source, parts: Mapping[str, Weight]) -> _Stored:
    if source.bias:
        bias = np.empty(source.shape[0], np.float32)
        for part in source.parts:
            bias[part.rows] = dequantize(parts[f"{part.name}.bias"])[:, 0]
        _add_vector(writer, spec, f"{source.module}.bias", bias)
    if source.role == "norm":
        vector = dequantize(parts[source.parts[0].name])[:, 0] - np.float32(spec.norm_offset)
        _add_vector(writer, spec, f"{source.module}.weight", vector)
        return _Stored(source)
    sparse = tuple(part.name for part in source.parts if parts[part.name].mask is not None)
    weight = _join(source, {name: densify(part) for name, part in parts.items()})
    kind = weight.format.kind
    if kind in _DENSE:
        data: NDArray[Any] = weight.data.T if source.transposed else weight.data
        writer.add(f"{source.module}.weight", _DENSE[kind], data)
        return _Stored(source, sparse=sparse)
    if weight.perm is not None:
        raise ModelError(f"{source.parts[0].name}: columns in GPTQ's act-order cannot be written; requantise it")
    container = _container(source, weight.format)
    _add_quantized(writer, spec, source.module, weight, packed=container in (PACKED, CONV1D_PACKED))
    scales = replace(weight, data=weight.data[:0]) if source.parts[0].name == "embed" else None
    return _Stored(source, weight.format, container, scales, sparse)


def _container(source: Source, format: Format) -> str:
    if source.transposed:
        return CONV1D_PACKED
    if format.kind == "fp8":
        return FLOATS8
    if source.role == "embedding" or not format.symmetric:
        return NAIVE
    return INTEGERS if format.kind == "int8" and format.activations else PACKED


def _join(source: Source, parts: Mapping[str, Weight]) -> Weight:
    """The rows of a fused module's parts in one Weight."""
    weights = [parts[part.name] for part in source.parts]
    for part, weight in zip(source.parts, weights, strict=True):
        rows = len(np.arange(source.shape[0])[part.rows])
        if weight.shape != (rows, source.shape[1]):
            raise ModelError(f"{part.name} has shape {list(weight.shape)}, expected {[rows, source.shape[1]]}")
    if len(weights) == 1:
        return weights[0]
    first = weights[0]
    if any(w.format != first.format or w.perm is not None for w in weights):
        names = ", ".join(part.name for part in source.parts)
        raise ModelError(f"{names} are one matrix in Transformers ({source.module}): they must have one format")

    def joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
        whole = np.empty((source.shape[0], arrays[0].shape[1]), arrays[0].dtype)
        for part, array in zip(source.parts, arrays, strict=True):
            whole[part.rows] = array
        return whole

    scales = None if first.scales is None else joined([w.scales for w in weights if w.scales is not None])
    zeros = None if first.zeros is None else joined([w.zeros for w in weights if w.zeros is not None])
    data = joined([w.data for w in weights])
    return Weight(first.format, source.shape, data, scales, zeros, input_scale=first.input_scale)


def _add_vector(writer: TensorWriter, spec: ModelSpec, name: str, values: NDArray[np.float32]) -> None:
    writer.add(name, *_floats(values, spec))


def _floats(values: NDArray[np.float32], spec: ModelSpec) -> tuple[str, NDArray[Any]]:
    """Values in the model's dtype where it holds them exactly, else in float32."""
    if spec.dtype == "bf16":
        bits = to_bf16(values)
        if np.array_equal(from_bf16(bits), values):
            return "BF16", bits
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if spec.dtype != "fp32" and np.array_equal(halves.astype(np.float32), values):
        return "F16", halves
    return "F32", values


def _add_quantized(writer: TensorWriter, spec: ModelSpec, module: str, weight: Weight, packed: bool) -> None:
    data: NDArray[Any] = weight.data
    if weight.format.kind == "fp8":
        writer.add(f"{module}.weight", "F8_E4M3", data)
        if weight.input_scale is not None:
            _add_vector(writer, spec, f"{module}.input_scale", weight.input_scale)
    elif packed:
        octets = data if weight.format.kind == "int4" else data.view(np.uint8) ^ np.uint8(0x80)
        writer.add(f"{module}.weight_packed", "I32", _words(octets))
        writer.add(f"{module}.weight_shape", "I64", np.array(weight.shape, np.int64))
    else:
        numbers = data if weight.format.kind == "int8" else unpack_nibbles(data).view(np.int8) - np.int8(8)
        writer.add(f"{module}.weight", "I8", numbers)
    _add_scales(writer, spec, module, weight, packed)


def _add_scales(writer: TensorWriter, spec: ModelSpec, module: str, weight: Weight, packed: bool) -> None:
    assert weight.scales is not None
    writer.add(f"{module}.weight_scale", *_floats(weight.scales, spec))
    if weight.zeros is None:
        return
    if packed:
        writer.add(f"{module}.weight_zero_point", "I32", _pack_zeros(weight.zeros))
    else:
        writer.add(f"{module}.weight_zero_point", "I8", weight.zeros.view(np.int8) - np.int8(8))


def _words(octets: NDArray[np.uint8]) -> NDArray[np.int32]:
    """uint8 [N, n] -> int32 [N, ceil(n / 4)], padded with zeros."""
    rest = -octets.shape[1] % 4
    padded = np.pad(octets, ((0, 0), (0, rest))) if rest else np.ascontiguousarray(octets)
    return padded.view(np.int32)


def _pack_zeros(zeros: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Zero points 0..15 [N, G] -> int32 [ceil(N / 8), G], eight rows to a word."""
    rows, groups = zeros.shape
    padded = np.zeros((-(-rows // 8) * 8, groups), np.uint32)
    padded[:rows] = zeros
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[None, :, None]
    words: NDArray[np.uint32] = np.bitwise_or.reduce(padded.reshape(-1, 8, groups) << shifts, axis=1)
    return words.view(np.int32)


def _is_tied(config: Mapping[str, Any]) -> bool:
    return spec_from_config(config).tied_head


def _finish_head(writer: TensorWriter, spec: ModelSpec, stored: list[_Stored], tied: bool) -> bool:
    """Whether the head is tied after all: not if there was one. A tied one repeats the scales of the embedding."""
    found = {entry.source.parts[0].name: entry for entry in stored}
    if "head" in found:
        return False
    if not tied:
        raise ModelError("weight 'head' is missing: the model cannot be written")
    scales = found["embed"].scales
    if scales is not None:
        _add_scales(writer, spec, "lm_head", scales, packed=False)
    return True


def _write_config(folder: Path, text: Mapping[str, Any], stored: list[_Stored], tied: bool, kv_scales: bool) -> None:
    config = {key: value for key, value in text.items() if key != "quantization_config"}
    config["tie_word_embeddings"] = tied
    if config.get("model_type") == "gemma3_text":
        config["architectures"] = ["Gemma3ForCausalLM"]
    section = {key: value for key, value in dict(config.get("hasten") or {}).items() if key != "sparse24"}
    if sparse := [name for entry in stored for name in entry.sparse]:
        section["sparse24"] = sparse
    if section:
        config["hasten"] = section
    settings = _quantization_config(stored, tied)
    if kv_scales:
        settings = settings or {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
        settings["kv_cache_scheme"] = _float_args({"strategy": "tensor", "dynamic": False})
    if thin := sorted({entry.source.home for entry in stored if entry.source.home}):
        settings = settings or {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
        settings["config_groups"]["low_rank"] = {"targets": thin, "format": LOW_RANK}
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _quantization_config(stored: list[_Stored], tied: bool) -> dict[str, Any] | None:
    """Config groups, one for each way in which modules are stored. The Linear modules of the largest go by their class,
    all others by name."""
    groups: dict[_Key, list[str]] = {}
    classes: dict[_Key, int] = {}
    dense: list[str] = []
    for entry in stored:
        names = _names_in_transformers(entry.source, tied)
        is_linear = entry.source.role == "linear" and not entry.source.transposed
        if entry.format is None:
            dense += names if is_linear else names[1:]
            continue
        key = (replace(entry.format, sparse24=False), entry.container, entry.format.activations)
        classes[key] = classes.get(key, 0) + is_linear
        groups.setdefault(key, []).extend(names)
    if not groups:
        return None
    common = max(classes, key=lambda key: classes[key])
    by_class = classes[common] > 0
    linear = {entry.source.module for entry in stored if entry.source.role == "linear"}
    if by_class:
        groups[common] = ["Linear", *(name for name in groups[common] if name not in linear)]
    # compressed-tensors warns of every named target that a class matched first: the class comes last.
    ordered = sorted(groups.items(), key=lambda item: item[0] == common)
    containers = {container for _, container, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": containers.pop() if len(containers) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": targets,
                "weights": _weight_args(key[0]),
                "format": key[1],
                **({"input_activations": _activation_args(key[2])} if key[2] else {}),
            }
            for index, (key, targets) in enumerate(ordered)
        },
        "ignore": dense if by_class else [],
    }


def _names_in_transformers(source: Source, tied: bool) -> list[str]:
    """A module's name, and "lm_head" where that is another name of it (GPT-NeoX) or is tied to it."""
    name = source.parts[0].name
    other = (name == "embed" and tied) or (name == "head" and source.module != "lm_head")
    return [source.module, "lm_head"] if other else [source.module]


def _weight_args(format: Format) -> dict[str, Any]:
    grouped = {"strategy": "group", "group_size": format.group_size} if format.group_size else {"strategy": "channel"}
    if format.kind == "fp8":
        return _float_args({"dynamic": False, **grouped})
    bits = 4 if format.kind == "int4" else 8
    return {"num_bits": bits, "type": "int", "symmetric": format.symmetric, "dynamic": False, **grouped}


def _activation_args(activations: Activations) -> dict[str, Any]:
    if activations == "int8":
        return {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    if activations == "fp8":
        return _float_args({"dynamic": True, "strategy": "token"})
    return _float_args({"dynamic": False, "strategy": "tensor"})


def _float_args(more: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, **more}


def _copy_tokenizer(folder: Path, origin: str | Path | None) -> None:
    if origin is None:
        return
    if not Path(origin).is_dir():
        raise ResourceError(f"{origin}: no such folder to copy the tokenizer from")
    for name in TOKENIZER_FILES:
        if (Path(origin) / name).is_file():
            shutil.copyfile(Path(origin) / name, folder / name)
