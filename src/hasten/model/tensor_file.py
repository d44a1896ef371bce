"""Tensors out: safetensors files written one tensor at a time, and folders that appear whole or not at all.

Knows nothing of models. The header's size must be known before the first tensor, so room is left for it and filled up
with spaces, as the format allows.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ResourceError
from hasten.model.tensors import DTYPES, INDEX, SINGLE

SHARD_BYTES = 4_000_000_000
_ALIGN = 8


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, beside `path`; takes its name when the block ends well, and is removed when it does not.

    Raises ResourceError if `path` exists already, cannot be written, or the disk fills up.
    """
    if path.exists() or path.is_symlink():
        raise ResourceError(f"{path} exists already: remove it or choose another folder")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if path.exists():
            raise ResourceError(f"{path} has appeared meanwhile: remove it or choose another folder")
        partial.rename(path)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class TensorWriter:
    """Writes tensors into a folder's safetensors files, a new one every SHARD_BYTES; finish() completes them.

    header_bytes: room for a file's header, enough for the names, dtypes and shapes of all tensors.
    """

    def __init__(self, folder: Path, header_bytes: int, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._room = -(-header_bytes // 64) * 64 - 8  # so that data begin at a multiple of 64
        self._shard_bytes = shard_bytes
        self._shards: list[dict[str, dict[str, Any]]] = []
        self._at = 0
        self._deferred: list[tuple[str, str, NDArray[Any]]] = []
        self._handle = self._start()

    def add(self, name: str, dtype: str, values: NDArray[Any]) -> None:
        """Write a tensor. dtype is its name in the file, "BF16" for an array of bits.

        A tensor that would leave the next one unaligned waits for the end of its file: safetensors allows no gaps, and
        readers map tensors in place.
        """
        if values.dtype != DTYPES[dtype]:
            raise AssertionError(f"{name}: array of {values.dtype} for {dtype}")
        if self._at and self._at + values.nbytes > self._shard_bytes:
            self._complete()
            self._handle = self._start()
        if values.nbytes % _ALIGN:
            self._deferred.append((name, dtype, values.copy()))
        else:
            self._write(name, dtype, values)

    def finish(self) -> None:
        """Complete the last file; give the files their names and write their index, if there are several."""
        self._complete()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._folder / SINGLE)
            return
        weight_map = {}
        for index, shard in enumerate(self._shards):
            file = f"model-{index + 1:05}-of-{count:05}.safetensors"
            self._part(index).rename(self._folder / file)
            weight_map.update(dict.fromkeys(shard, file))
        total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for s in self._shards for entry in s.values())
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(content, indent=2), "utf-8")

    def close(self) -> None:
        """Close the open file, finished or not."""
        self._handle.close()

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index:05}"

    def _start(self) -> IO[bytes]:
        handle = open(self._part(len(self._shards)), "wb")  # noqa: SIM115
        handle.seek(8 + self._room)
        self._shards.append({})
        self._at = 0
        return handle

    def _write(self, name: str, dtype: str, values: NDArray[Any]) -> None:
        end = self._at + values.nbytes
        self._shards[-1][name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [self._at, end]}
        self._handle.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._at = end

    def _complete(self) -> None:
        for name, dtype, values in sorted(self._deferred, key=lambda item: -item[2].itemsize):
            self._write(name, dtype, values)
        self._deferred.clear()
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._shards[-1]}, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise AssertionError(f"header of {len(header)} bytes, room for {self._room}")
        self._handle.seek(0)
        self._handle.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._handle.close()
