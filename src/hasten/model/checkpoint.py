"""A model folder as Hugging Face writes it -> its configuration, ModelSpec, and a stream of canonical weights.

Knows which tensors an architecture must have (names.py) and refuses a folder where one is missing, left over, wrongly
shaped or not finite. Weights are views of mapped files, given back to the system as soon as the next one is asked for.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ModelError, RecipeError
from hasten.model.formats import Format, Kind, Weight, from_bf16, sparsify
from hasten.model.jsonfile import read_json
from hasten.model.names import Part, Source, base_prefix, sources
from hasten.model.quantized import Expected, Quantization, quantization_of
from hasten.model.spec import ModelSpec, config_of_text, spec_from_config
from hasten.model.tensors import TensorFolder

_DENSE: dict[str, Kind] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
# Buffers that older Transformers versions saved: computed from the configuration, never read.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\battn\.(bias|masked_bias)|\battention\.(bias|masked_bias))$")
_VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
_CHECK_CHUNK = 1 << 20  # numbers: smaller ones would have threads wait for Python's lock
_CHECK_THREADS = 8


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model folder. config: config.json as written; spec: what it describes, dtype and tied head as found.

    Matrices that config.json's `hasten.sparse24` names are stored with their zeros, and come without (formats.py).
    """

    path: Path
    config: dict[str, Any]
    spec: ModelSpec
    _tensors: TensorFolder
    _names: dict[str, str]  # module name + parameter, as names.py spells it -> tensor name in the files
    _quantization: Quantization
    _sparse: frozenset[str] = frozenset()

    def weights(self, prefix: str = "") -> Iterator[tuple[str, Weight]]:
        """Every weight whose name begins so, once, in the order of the forward pass. Raises ModelError for numbers that
        are not finite.

        A Weight's arrays may be views of the file: copy what is to outlive the checkpoint's files.
        """
        for source in sources(self.spec, self.config):
            if not source.parts[0].name.startswith(prefix):
                continue
            yield from self._read(source)
            for name in self._tensor_names(source):
                self._tensors.release(name)

    def kv_scales(self, prefix: str = "") -> Iterator[tuple[str, Weight]]:
        """Scales of keys and values for a cache of 8-bit floats, "layers.I.k_scale" and "layers.I.v_scale", whose names
        begin so. They are no weights: no backend reads them, a folder made from this one keeps them (writer.py)."""
        for name, key in self._kv_keys():
            if name.startswith(prefix) and self._is_number(key):
                yield name, _as_weight(np.atleast_1d(self._vector(key)))

    def other_kv_scales(self) -> list[str]:
        """Tensors that are scales of keys and values too, but not one number a layer, which nothing here writes."""
        known = {key for _, key in self._kv_keys() if self._is_number(key)}
        ends = tuple(f".{end}" for end in self._quantization.kv_scales)
        return sorted(name for key, name in self._names.items() if key.endswith(ends) and key not in known)

    def _kv_keys(self) -> Iterator[tuple[str, str]]:
        for layer, attention in attention_modules(self.spec, self.config).items():
            keys = ((f"{layer}.{end}", f"{attention}.{end}") for end in self._quantization.kv_scales)
            yield from ((name, key) for name, key in keys if key in self._names)

    def _is_number(self, key: str) -> bool:
        return self._tensors.infos[self._names[key]].shape in ((), (1,))

    def matrices(self) -> Iterator[tuple[str, tuple[int, int], Format]]:
        """Canonical name, shape and format of every matrix, without reading any."""
        for source in sources(self.spec, self.config):
            if source.role == "norm":
                continue
            for part in source.parts:
                rows = len(np.arange(source.shape[0])[part.rows])
                sparse = part.name in self._sparse
                yield part.name, (rows, source.shape[1]), replace(self._format(source), sparse24=sparse)

    def _tensor_names(self, source: Source) -> list[str]:
        keys = (f"{source.module}.{parameter}" for parameter in self._parameters(source))
        return [self._names[key] for key in keys if key in self._names]

    def _parameters(self, source: Source) -> tuple[str, ...]:
        return (*_expected(source, self._quantization), *self._quantization.optional(source))

    def _format(self, source: Source) -> Format:
        found = self._quantization.format_of(source)
        if found is not None:
            return found
        return Format(_DENSE[self._tensors.infos[self._names[f"{source.module}.weight"]].dtype])

    def _read(self, source: Source) -> Iterator[tuple[str, Weight]]:
        if source.role == "norm":
            weight = self._vector(f"{source.module}.weight")
            if self.spec.norm_offset:
                weight = weight + np.float32(self.spec.norm_offset)
            yield source.parts[0].name, _as_weight(weight)
        else:
            whole = self._matrix(source)
            for part in source.parts:
                mine = _take_rows(whole, part)
                yield part.name, self._sparsified(part.name, mine) if part.name in self._sparse else mine
        if source.bias:
            bias = self._vector(f"{source.module}.bias")
            for part in source.parts:
                yield f"{part.name}.bias", _as_weight(bias[part.rows])

    def _sparsified(self, name: str, weight: Weight) -> Weight:
        try:
            return sparsify(weight)
        except RecipeError as error:
            raise ModelError(f"{self.path}: {name}, which config.json's hasten.sparse24 names: {error}") from None

    def _vector(self, key: str) -> NDArray[np.float32]:
        name = self._names[key]
        info = self._tensors.infos[name]
        values = self._tensors.read(name)
        check_finite(values, info.dtype, f"{info.file}: tensor {name!r}")
        return from_bf16(values) if info.dtype == "BF16" else values.astype(np.float32)

    def _matrix(self, source: Source) -> Weight:
        if self._quantization.format_of(source) is not None:
            return self._quantized(source)
        name = self._names[f"{source.module}.weight"]
        info = self._tensors.infos[name]
        values = self._tensors.read(name)
        check_finite(values, info.dtype, f"{info.file}: tensor {name!r}")
        if source.transposed:
            values = np.ascontiguousarray(values.T)
        return Weight(Format(_DENSE[info.dtype]), source.shape, values)

    def _quantized(self, source: Source) -> Weight:
        keys = {parameter: f"{source.module}.{parameter}" for parameter in self._parameters(source)}
        names = {parameter: self._names[key] for parameter, key in keys.items() if key in self._names}
        arrays = {parameter: np.atleast_1d(self._tensors.read(name)) for parameter, name in names.items()}
        for parameter in names.keys() & {"weight_scale", "weight_scale_inv", "input_scale", "scales"}:
            info = self._tensors.infos[names[parameter]]
            check_finite(arrays[parameter], info.dtype, f"{info.file}: tensor {names[parameter]!r}")
        return self._quantization.read(source, arrays, f"{self.path}: {source.module}")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model folder; reads config.json and the tensors' headers, no weight.

    Raises ModelError where the folder or a file of it is missing or damaged, the architecture is not supported, or a
    tensor is missing, left over or has another shape than the configuration asks for.
    """
    folder = Path(path)
    config = read_config(folder)
    spec = spec_from_config(config)
    tensors = TensorFolder(folder)
    names = _module_names(tensors, config, spec)
    quantization = quantization_of(config_of_text(config), frozenset(names))
    spec = _as_stored(spec, config, tensors, names)
    _check_tensors(folder, config, spec, tensors, names, quantization)
    return Checkpoint(folder, config, spec, tensors, names, quantization, _sparse_names(config, spec))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError where it is missing or is not a JSON object."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    config = read_json(folder / "config.json")
    if config is None:
        raise ModelError(f"{folder}: no config.json, so this is not a model folder")
    return config


def attention_modules(spec: ModelSpec, config: dict[str, Any]) -> dict[str, str]:
    """By layer ("layers.0"), the module whose scales of keys and values are stored beside its matrices."""
    found = {}
    for source in sources(spec, config):
        for part in source.parts:
            if key := re.fullmatch(r"(layers\.\d+)\.k(\.a)?", part.name):
                found[key[1]] = (source.home or source.module).rpartition(".")[0]
    return found


def _sparse_names(config: dict[str, Any], spec: ModelSpec) -> frozenset[str]:
    section = config.get("hasten")
    names = section.get("sparse24", []) if isinstance(section, dict) else []
    known = {part.name for source in sources(spec, config) if source.role != "norm" for part in source.parts}
    if not isinstance(names, list) or not set(names) <= known:
        raise ModelError(f"config.json: hasten.sparse24 is {names!r:.120}, expected names of matrices of this model")
    return frozenset(names)


def check_finite(values: NDArray[Any], dtype: str, where: str) -> None:
    """Raise ModelError if floats (bfloat16 as bits) hold NaN or infinity.

    Two integer maxima a chunk in cache, without a temporary: exponent bits all set make the largest signed numbers, or,
    with the sign, the largest unsigned ones. Large tensors on several threads: here the mapped file's pages are touched
    first, which takes one core longer than it takes a bus to carry them to a GPU.
    """
    exponent = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}.get(dtype)
    if exponent is None:
        raise ModelError(f"{where} has dtype {dtype}, expected F32, F16 or BF16")
    width = 32 if dtype == "F32" else 16
    flat = values.reshape(-1)
    signed, unsigned = flat.view(f"i{width // 8}"), flat.view(f"u{width // 8}")
    negative = exponent | (1 << (width - 1))

    def is_finite(first: int) -> bool:
        part = slice(first, first + _CHECK_CHUNK)
        return bool(signed[part].max() < exponent and unsigned[part].max() < negative)

    chunks = range(0, flat.size, _CHECK_CHUNK)
    if len(chunks) < 2:
        finite = all(map(is_finite, chunks))
    else:
        with ThreadPoolExecutor(min(len(chunks), _CHECK_THREADS, os.cpu_count() or 1)) as pool:
            finite = all(pool.map(is_finite, chunks))
    if not finite:
        raise ModelError(f"{where} holds NaN or infinity: the checkpoint is damaged")


def _module_names(tensors: TensorFolder, config: dict[str, Any], spec: ModelSpec) -> dict[str, str]:
    """Tensor names as names.py spells them -> as the files do: multimodal and bare-model checkpoints differ."""
    prefix = base_prefix(spec)
    multimodal = config.get("model_type") == "gemma3"
    bare = not any(prefix in name for name in tensors.infos)
    names = {}
    for name in tensors.infos:
        if _BUFFERS.search(name) or (multimodal and _VISION.match(name)):
            continue
        key = name
        if multimodal:
            key = re.sub(
                r"^model\.language_model\.", "model.", re.sub(r"^language_model\.(?=model\.|lm_head)", "", key)
            )
        if spec.family == "gpt_neox":
            key = re.sub(r"^lm_head\.", "embed_out.", key)
        if bare and not key.startswith(("lm_head.", "embed_out.")):
            key = prefix + key
        names[key] = name
    return names


def _as_stored(spec: ModelSpec, config: dict[str, Any], tensors: TensorFolder, names: dict[str, str]) -> ModelSpec:
    """The spec with what only the tensors tell: a head of its own despite the configuration, and an unstated dtype."""
    modules = {role.parts[0].name: role.module for role in sources(replace(spec, tied_head=False), config)}
    embed, head = modules["embed"], modules["head"]
    if spec.tied_head and any(key.startswith(head + ".") for key in names):
        embed_name, head_name = names.get(f"{embed}.weight"), names.get(f"{head}.weight")
        if embed_name is None and head_name is not None:
            names[f"{embed}.weight"] = names.pop(f"{head}.weight")
        elif head_name is not None and embed_name is not None and _equal(tensors, embed_name, head_name):
            del names[f"{head}.weight"]
        elif head_name is None and f"{head}.weight_packed" not in names and f"{head}.qweight" not in names:
            _drop_shared_scales(embed, head, tensors, names)
        else:
            spec = replace(spec, tied_head=False)  # as Transformers: two different matrices are not tied
    text = config_of_text(config)
    if not (text.get("dtype") or text.get("torch_dtype")) and f"{embed}.weight" in names:
        kind = _DENSE.get(tensors.infos[names[f"{embed}.weight"]].dtype)
        if kind in ("fp32", "fp16", "bf16"):
            spec = replace(spec, dtype=kind)
    return spec


def _drop_shared_scales(embed: str, head: str, tensors: TensorFolder, names: dict[str, str]) -> None:
    """A tied, quantised head repeats the embedding's scales, for Transformers; they must be the same."""
    for parameter in ("weight_scale", "weight_zero_point"):
        repeated, name = names.pop(f"{head}.{parameter}", None), names.get(f"{embed}.{parameter}")
        if repeated is not None and (name is None or not _equal(tensors, name, repeated)):
            raise ModelError(f"{head}.{parameter} differs from {embed}.{parameter}, though the two are tied")


def _equal(tensors: TensorFolder, one: str, other: str) -> bool:
    a, b = tensors.infos[one], tensors.infos[other]
    same = (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(tensors.read(one), tensors.read(other))
    tensors.release(one)
    tensors.release(other)
    return same


def _check_tensors(
    folder: Path,
    config: dict[str, Any],
    spec: ModelSpec,
    tensors: TensorFolder,
    names: dict[str, str],
    quantization: Quantization,
) -> None:
    left = set(names)
    for source in sources(spec, config):
        for parameter, (dtypes, shape) in _expected(source, quantization).items():
            key = f"{source.module}.{parameter}"
            if key not in names:
                raise ModelError(f"{folder}: tensor {key!r} of shape {list(shape)} is missing")
            left.discard(key)
            info = tensors.infos[names[key]]
            if info.shape != shape and not (info.shape == () and shape == (1,)):  # AutoFP8's scales
                raise ModelError(f"{folder}: tensor {key!r} has shape {list(info.shape)}, expected {list(shape)}")
            if info.dtype not in dtypes:
                raise ModelError(f"{folder}: tensor {key!r} has dtype {info.dtype}, expected {' or '.join(dtypes)}")
        left -= {f"{source.module}.{parameter}" for parameter in quantization.optional(source)}
    for key in sorted(key for key in left if not key.endswith(tuple(f".{end}" for end in quantization.kv_scales))):
        raise ModelError(
            f"{folder}: tensor {names[key]!r} is not part of a {spec.family} model with this configuration"
        )


def _expected(source: Source, quantization: Quantization) -> Expected:
    """The tensors that a module must have, with the dtypes that each may have."""
    rows, columns = source.shape
    dense = tuple(_DENSE)
    bias: Expected = {"bias": (dense, (rows,))} if source.bias else {}
    if source.role == "norm":
        return {"weight": (dense, (rows,)), **bias}
    if quantization.format_of(source) is not None:
        return {**quantization.expected(source), **bias}
    return {"weight": (dense, (columns, rows) if source.transposed else (rows, columns)), **bias}


def _take_rows(weight: Weight, part: Part) -> Weight:
    if isinstance(part.rows, slice) and part.rows == slice(0, weight.shape[0]):
        return weight
    data = weight.data[part.rows]
    scales = None if weight.scales is None else weight.scales[part.rows]
    zeros = None if weight.zeros is None else weight.zeros[part.rows]
    return replace(weight, shape=(data.shape[0], weight.shape[1]), data=data, scales=scales, zeros=zeros)


def _as_weight(vector: NDArray[np.float32]) -> Weight:
    return Weight(Format("fp32"), (len(vector), 1), np.ascontiguousarray(vector).reshape(-1, 1))
