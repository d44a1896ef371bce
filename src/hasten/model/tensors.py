"""Tensors in safetensors files, read in place: headers checked, each tensor a view of the mapped file.

Knows nothing of models. bfloat16 comes as uint16 bits. A header is not trusted: every offset is held against the file's
size, the shape and its neighbours before anything is read (the format: huggingface.co/docs/safetensors).
"""

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1"), "F8_E8M0": np.dtype("u1"),
}  # fmt: skip
_MAX_HEADER = 100 << 20  # the limit of the reference implementation


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: its file's dtype name and shape, and the bytes [first, last) of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


class TensorFolder:
    """All tensors of a folder's safetensors files, by name.

    Files are mapped when first read. A view stays valid as long as it is referenced; release() gives its pages back to
    the system, and touching the view again reads them from the file.
    """

    def __init__(self, folder: Path) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file, expected in _files(folder):
            found = _read_header(file)
            for name in expected - found.keys():
                raise ModelError(f"{file.name}: tensor {name!r} is missing, though {INDEX} places it there")
            for name in found.keys() & self.infos.keys():
                raise ModelError(f"{file.name}: tensor {name!r} is also in {self.infos[name].file.name}")
            self.infos.update(found)

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only array over the mapped file."""
        info = self.infos[name]
        if info.first == info.last:
            return np.empty(info.shape, DTYPES[info.dtype])
        buffer = self._map(info.file)
        count = math.prod(info.shape)
        array = np.frombuffer(buffer, DTYPES[info.dtype], count, info.first).reshape(info.shape)
        return array if array.flags.aligned else array.copy()

    def release(self, name: str) -> None:
        """Let the system take back the memory that reading this tensor has filled."""
        info = self.infos[name]
        buffer = self._maps.get(info.file)
        first = -(-info.first // mmap.PAGESIZE) * mmap.PAGESIZE
        last = info.last // mmap.PAGESIZE * mmap.PAGESIZE
        if buffer is not None and last > first:
            buffer.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with open(file, "rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def has_tensors(folder: Path) -> bool:
    """Whether the folder holds safetensors files."""
    return (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def _files(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """The files to read, each with the tensors that the index places there (none where there is no index)."""
    index = folder / INDEX
    if index.is_file():
        yield from _indexed_files(folder, index)
        return
    files = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f"; found {', '.join(others[:3])}: convert it to safetensors" if others else ""
        raise ModelError(f"{folder}: no {SINGLE}, {INDEX} or other .safetensors file{hint}")
    if len(files) > 1:
        raise ModelError(f"{folder}: {len(files)} .safetensors files and no {INDEX} to say which to read")
    yield files[0], set()


def _indexed_files(folder: Path, index: Path) -> Iterator[tuple[Path, set[str]]]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        by_file: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(str(file), set()).add(str(name))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of tensors (a JSON object with a weight_map): {error}") from None
    for file, names in sorted(by_file.items()):
        if Path(file).name != file:
            raise ModelError(f"{index}: names a file outside the folder: {file!r}")
        if not (folder / file).is_file():
            raise ModelError(f"{folder}: {file} is missing, though {INDEX} names it")
        yield folder / file, names


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            prefix = handle.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
                raise ModelError(
                    f"{file}: not a whole safetensors file: header of {length} bytes announced, file of {size} bytes"
                )
            raw = handle.read(length)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        header.pop("__metadata__", None)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: damaged safetensors header: {error}") from None
    infos = {name: _info(file, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_cover(file, infos, 8 + length, size)
    return infos


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _info(file: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise ModelError(f"{file}: damaged safetensors header at tensor {name!r}: {entry!r:.120}")
    if dtype not in DTYPES:
        raise ModelError(f"{file}: tensor {name!r} has dtype {dtype!r}; supported: {', '.join(DTYPES)}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if last - first != expected:
        raise ModelError(
            f"{file}: tensor {name!r} spans {last - first} bytes, its shape {shape} of {dtype} needs {expected}"
        )
    if start + last > size:
        raise ModelError(f"{file}: tensor {name!r} ends at byte {start + last}, the file has {size}: it is cut short")
    return TensorInfo(file, dtype, tuple(shape), start + first, start + last)


def _check_cover(file: Path, infos: dict[str, TensorInfo], start: int, size: int) -> None:
    """Tensors must follow one another to the end of the file: a hole or an overlap means a damaged header."""
    at = start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].first, item[1].last)):
        if info.first != at:
            raise ModelError(f"{file}: tensor {name!r} starts at byte {info.first}, expected {at}: damaged header")
        at = info.last
    if at != size:
        raise ModelError(f"{file}: tensors end at byte {at}, the file has {size}: damaged header")
