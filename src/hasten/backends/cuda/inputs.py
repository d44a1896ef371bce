"""A Batch -> one int32 buffer on the device, by a single copy, and views of its parts."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.backends.base import Batch, Int32
from hasten.backends.cuda.device import Device

MAX_RUN = 16  # tokens of a sequence, at most, where its keys are read anew for each of them
_ALIGN = 4  # numbers: every part begins at a multiple of 16 bytes, which kernels are compiled for


@dataclass(frozen=True)
class Inputs:
    """What kernels read of a step, int32 on the device. T tokens, of which padding has slot -1.

    lengths [T]: of each token's sequence, this step included. tables [B, width], width [1]. num_decodes single tokens:
    decode_rows, decode_sequences [D], or None where that is every token, in order. The rest in tiles [I], see
    kernels.attention.prefill. rows [R]: whose logits are wanted, None for all tokens'. longest: of the lengths.
    runs: tokens of one sequence may follow each other though each is a decode with a row of `tables` of its own; so all
    keys are stored before any is read.
    """

    tokens: torch.Tensor
    sources: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    width: torch.Tensor
    num_decodes: int
    longest: int
    runs: bool = False
    decode_rows: torch.Tensor | None = None
    decode_sequences: torch.Tensor | None = None
    tile_tokens: torch.Tensor | None = None
    tile_counts: torch.Tensor | None = None
    tile_sequences: torch.Tensor | None = None
    rows: torch.Tensor | None = None


def is_short(batch: Batch) -> bool:
    """Whether every sequence runs so few tokens (drafts to be verified, say) that each may be a decode by itself."""
    return int(batch.query_lens.max()) <= MAX_RUN


class Stager:
    """Copies steps to one device. tile_tokens: of an attention tile. all_tiles: single tokens run as tiles too."""

    def __init__(self, device: Device, block_size: int, tile_tokens: int, all_tiles: bool) -> None:
        self._device = device
        self._block_size = block_size
        self._tile_tokens = tile_tokens
        self._all_tiles = all_tiles

    def general(self, batch: Batch) -> Inputs:
        """Any step."""
        lens = batch.query_lens
        starts = np.cumsum(lens, dtype=np.int32) - lens
        single = np.zeros(len(lens), np.bool_) if self._all_tiles else lens == 1
        decodes = np.flatnonzero(single).astype(np.int32)
        tables, width = self._tables(batch)
        parts = [
            width, batch.tokens, _sources(batch), batch.positions, batch.slots,
            np.repeat(batch.context_lens, lens), starts[decodes], decodes,
            *_tiles(starts, lens, np.flatnonzero(~single), self._tile_tokens), batch.rows, tables,
        ]  # fmt: skip
        sizes = [part.size for part in parts]
        buffer = torch.empty(_total(sizes), dtype=torch.int32, device=self._device.handle)
        views = _views(buffer, sizes)
        self._send(parts, buffer)
        return Inputs(
            width=views[0], tokens=views[1], sources=views[2], positions=views[3], slots=views[4], lengths=views[5],
            decode_rows=views[6], decode_sequences=views[7], tile_tokens=views[8], tile_counts=views[9],
            tile_sequences=views[10], rows=views[11], tables=views[12], num_decodes=len(decodes),
            longest=int(batch.context_lens.max()),
        )  # fmt: skip

    def fixed(self, size: int, max_blocks: int, runs: bool = False) -> tuple[torch.Tensor, Inputs]:
        """A buffer for decode steps of `size` tokens, to be filled by `refill`, and its views."""
        sizes = [1, size, size, size, size, size, size * max_blocks]
        buffer = torch.zeros(_total(sizes), dtype=torch.int32, device=self._device.handle)
        views = _views(buffer, sizes)
        inputs = Inputs(
            width=views[0], tokens=views[1], sources=views[2], positions=views[3], slots=views[4], lengths=views[5],
            tables=views[6], num_decodes=size, longest=max_blocks * self._block_size, runs=runs,
        )  # fmt: skip
        return buffer, inputs

    def refill(self, batch: Batch, size: int, buffer: torch.Tensor) -> None:
        """Fill a buffer of `fixed` with a step of up to `size` tokens, each a decode."""
        missing = size - len(batch.tokens)
        tables, width = self._tables(batch)
        lengths = batch.context_lens
        if len(lengths) < len(batch.tokens):
            tables, lengths = (np.repeat(array, batch.query_lens, axis=0) for array in (tables, lengths))
        columns = [batch.tokens, _sources(batch), batch.positions, batch.slots, lengths]
        if missing:
            columns = [np.concatenate((column, _PADDING[i][:missing])) for i, column in enumerate(columns)]
        self._send([width, *columns, tables], buffer)

    def _tables(self, batch: Batch) -> tuple[Int32, Int32]:
        """Block tables as wide as the longest sequence needs, and that width."""
        width = -(-int(batch.context_lens.max()) // self._block_size)
        return batch.block_tables[:, :width], np.array([width], np.int32)

    def _send(self, parts: list[Int32], buffer: torch.Tensor) -> None:
        sizes = [part.size for part in parts]
        total = _total(sizes)
        # Pinned memory comes from torch's cache, which waits with reuse until the copy is done.
        staged = torch.empty(total, dtype=torch.int32, pin_memory=self._device.is_cuda)
        numbers: NDArray[np.int32] = staged.numpy()
        for start, part in zip(_starts(sizes), parts, strict=True):
            numbers[start : start + part.size].reshape(part.shape)[...] = part
        buffer[:total].copy_(staged, non_blocking=True)


# Of a sequence that is not there: token 0, not sampled, at position 0, no slot, of length 1.
_PADDING = [np.full(1024, value, np.int32) for value in (0, -1, 0, -1, 1)]


def _sources(batch: Batch) -> Int32:
    return np.full(len(batch.tokens), -1, np.int32) if batch.sampled_from is None else batch.sampled_from


def _tiles(starts: Int32, lens: Int32, sequences: NDArray[np.int64], most: int) -> list[Int32]:
    """First token, number of tokens, and sequence of each tile of up to `most` tokens. A sequence's last tiles, which
    see most keys, come first, or they would be what all the others wait for."""
    first: list[int] = []
    counts: list[int] = []
    owners: list[int] = []
    for sequence in sequences.tolist():
        start, length = int(starts[sequence]), int(lens[sequence])
        for at in range((length - 1) // most * most, -1, -most):
            first.append(start + at)
            counts.append(min(most, length - at))
            owners.append(sequence)
    return [np.array(column, np.int32) for column in (first, counts, owners)]


def _starts(sizes: list[int]) -> list[int]:
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at += -(-size // _ALIGN) * _ALIGN
    return starts


def _total(sizes: list[int]) -> int:
    return sum(-(-size // _ALIGN) * _ALIGN for size in sizes)


def _views(buffer: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    return [buffer[start : start + size] for start, size in zip(_starts(sizes), sizes, strict=True)]
