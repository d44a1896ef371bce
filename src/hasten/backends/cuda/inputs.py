"""A Batch -> one int32 buffer on the device, by a single copy, and views of its parts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.backends.base import Batch, Int32
from hasten.backends.cuda.device import Device
from hasten.backends.cuda.tuning import FEW_SEQUENCES, share_quantum

_ALIGN = 8  # numbers: every part begins at a multiple of 32 bytes, which are fetched at once; kernels count on 16
MAX_RUN = 16  # tokens of a sequence, at most, where its keys are read anew for each of them
MAX_SPLITS = 32
_LEAST = 0.7  # of the programs that keep a device busy, those that a step with few keys too many may do with
WORK = 8  # numbers that a program of decode attention is told, see decode_work and kernels.decode.work_of
MAX_PROGRAMS = 1024  # of decode attention, where keys are shared at all; bounds the partial results' memory


Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Inputs:
    """What kernels read of a step, int32 on the device. T tokens, of which padding has slot -1.

    lengths [T]: of each token's sequence, this step included. tables [B, width], width [1]. work [P, WORK]: programs of
    decode attention, see decode_work, for num_decodes single tokens. The rest in tiles [I], see
    kernels.attention.prefill. rows [R]: whose logits are wanted, None for all tokens'. alone: all tokens are decodes of
    sequences of their own, so that no key is read that another token of the step has. few: and there are few, of
    sequences with few keys.
    """

    tokens: torch.Tensor
    sources: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    width: torch.Tensor
    num_decodes: int
    work: torch.Tensor
    alone: bool = False
    few: bool = False
    tile_tokens: torch.Tensor | None = None
    tile_counts: torch.Tensor | None = None
    tile_sequences: torch.Tensor | None = None
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class Sizes:
    """Room for a step in a buffer that is filled again and again: where tiles is 0, of one in which every token is a
    decode (runs: or runs as one, see Inputs; long: or sequences are); else of any step."""

    tokens: int
    decodes: int
    tiles: int
    rows: int
    sequences: int
    runs: bool = False
    long: bool = False


def is_decode(batch: Batch) -> bool:
    """Whether every sequence runs one token, and logits of all are wanted."""
    return len(batch.tokens) == len(batch.query_lens) == len(batch.rows)


def is_short(batch: Batch) -> bool:
    """Whether every sequence runs so few tokens (drafts to be verified, say) that each may run as a decode by itself.
    A step without rows must leave what was sampled last where it is."""
    return len(batch.rows) > 0 and int(batch.query_lens.max()) <= MAX_RUN


def share_keys(lengths: Int32, programs: int) -> Int32:
    """How many programs of decode attention each entry gets [D].

    Every program gets about as many keys, however much the lengths differ, and there are about `programs` of them where
    tiles suffice: long sequences are cut, and nobody waits for one. Parts may have up to a quarter more where that
    makes about `programs` of them instead of more: a key too many in each sequence would else make twice as many.
    """
    count = len(lengths)
    if not count:
        return np.zeros(0, np.int32)
    keys = share_quantum(count)
    longest, wanted = int(lengths.max()), _wanted(count, programs)
    tiles = max(1, -(-int(lengths.sum()) // (wanted * keys)), -(-longest // (MAX_SPLITS * keys)))
    if wanted + count > MAX_PROGRAMS:
        tiles = -(-longest // keys)
    each, fewer = (-(-lengths // (share * keys)) for share in (tiles, tiles + tiles // 4))
    return fewer if _LEAST * wanted <= fewer.sum() <= wanted < each.sum() else each


def decode_work(rows: Ints, sequences: Ints, batch: Batch, width: int, programs: int) -> Int32:
    """[P, WORK]: all that a program of decode attention must know, in one place, since each look-up that needs another
    one's result delays it by half a microsecond: its token (-1: nothing to do), where its sequence's block table
    begins, position, slot, length of the sequence, how many programs share its keys, the first of them. rows, sequences
    [D]: the token and the sequence of each entry."""
    lengths = batch.context_lens[sequences]
    each = share_keys(lengths, programs)
    columns = (
        rows, sequences * width, batch.positions[rows], batch.slots[rows], lengths, each, np.cumsum(each) - each,
    )  # fmt: skip
    work = np.zeros((len(rows), WORK), np.int32)
    for column, numbers in enumerate(columns):
        work[:, column] = numbers
    return work.repeat(each, axis=0)


def _wanted(count: int, programs: int) -> int:
    return max(programs, count)


class Stager:
    """Copies steps to one device. tile_tokens: of an attention tile. programs: see share_keys. all_tiles: single tokens
    run as tiles too."""

    def __init__(self, device: Device, block_size: int, tile_tokens: int, programs: int, all_tiles: bool) -> None:
        self._device = device
        self._block_size = block_size
        self._tile_tokens = tile_tokens
        self._programs = programs
        self._all_tiles = all_tiles
        self._layouts: dict[tuple[Sizes, int], tuple[list[int], list[int]]] = {}

    def general(self, batch: Batch) -> Inputs:
        """Any step, in a buffer of its own."""
        parts, num_decodes = self._general_parts(batch)
        sizes = [part.size for part in parts]
        buffer = torch.empty(_total(sizes), dtype=torch.int32, device=self._device.handle)
        self._send(parts, sizes, _starts(sizes), buffer)
        return _general_inputs(_views(buffer, sizes), num_decodes)

    def _general_parts(self, batch: Batch) -> tuple[list[Int32], int]:
        """What _general_inputs names, in its order, and the number of decodes."""
        lens = batch.query_lens
        starts = np.cumsum(lens, dtype=np.int32) - lens
        single = np.zeros(len(lens), np.bool_) if self._all_tiles else lens == 1
        decodes = np.flatnonzero(single)
        tables, width = self._tables(batch)
        parts = [
            width, batch.tokens, _sources(batch), batch.positions, batch.slots, np.repeat(batch.context_lens, lens),
            decode_work(starts[decodes], decodes, batch, int(width[0]), self._programs),
            *_tiles(starts, lens, np.flatnonzero(~single), self._tile_tokens), batch.rows, tables,
        ]  # fmt: skip
        return parts, len(decodes)

    def room(self, sizes: Sizes, max_blocks: int) -> int:
        """Numbers that a buffer must have."""
        return _total(self._sizes(sizes, max_blocks))

    def fixed(self, sizes: Sizes, max_blocks: int, buffer: torch.Tensor) -> Inputs:
        """Views of a buffer that is to be filled by `refill`."""
        views = _views(buffer, self._sizes(sizes, max_blocks))
        if sizes.tiles:
            return _general_inputs(views, sizes.decodes)
        return Inputs(
            width=views[0], tokens=views[1], sources=views[2], positions=views[3], slots=views[4], lengths=views[5],
            num_decodes=sizes.decodes, work=views[6], tables=views[7], alone=not sizes.runs,
            few=not sizes.runs and not sizes.long and sizes.decodes <= FEW_SEQUENCES,
        )  # fmt: skip

    def refill(self, batch: Batch, sizes: Sizes, max_blocks: int, buffer: torch.Tensor) -> bool:
        """Fill a buffer with a step; whether it had the room."""
        if sizes.tiles:
            parts, _ = self._general_parts(batch)
        else:
            tables, width = self._tables(batch)
            sequences = np.repeat(np.arange(len(batch.query_lens)), batch.query_lens)
            parts = [
                width, batch.tokens, _sources(batch), batch.positions, batch.slots, batch.context_lens[sequences],
                decode_work(np.arange(len(sequences)), sequences, batch, int(width[0]), self._programs), tables,
            ]  # fmt: skip
        if (sizes, max_blocks) not in self._layouts:
            room = self._sizes(sizes, max_blocks)
            self._layouts[sizes, max_blocks] = room, _starts(room)
        room, starts = self._layouts[sizes, max_blocks]
        for part, size in zip(parts, room, strict=True):
            if part.size > size:
                return False
        self._send(parts, room, starts, buffer)
        return True

    def _sizes(self, sizes: Sizes, max_blocks: int) -> list[int]:
        work = WORK * (_wanted(sizes.decodes, self._programs) + sizes.decodes)
        tables = sizes.sequences * max_blocks
        if not sizes.tiles:
            return [1, *[sizes.tokens] * 5, work, tables]
        return [1, *[sizes.tokens] * 5, work, *[sizes.tiles] * 3, sizes.rows, tables]

    def _tables(self, batch: Batch) -> tuple[Int32, Int32]:
        """Block tables as wide as the longest sequence needs, and that width."""
        width = -(-int(batch.context_lens.max()) // self._block_size)
        return batch.block_tables[:, :width], np.array([width], np.int32)

    def _send(self, parts: list[Int32], sizes: list[int], starts: list[int], buffer: torch.Tensor) -> None:
        """Parts to their places, padded as is right for each; nothing after the last one's numbers is sent."""
        total = starts[-1] + parts[-1].size
        # Pinned memory comes from torch's cache, which waits with reuse until the copy is done.
        staged = torch.empty(total, dtype=torch.int32, pin_memory=self._device.is_cuda)
        numbers: NDArray[np.int32] = staged.numpy()
        fills = _FILLS[len(parts)]
        for start, part, size, fill in zip(starts, parts, sizes, fills, strict=True):
            end = start + part.size
            if part.ndim == 1:
                numbers[start:end] = part
            else:
                numbers[start:end].reshape(part.shape)[...] = part
            if fill is not None and part.size < size:
                numbers[end : start + size] = fill
        buffer[:total].copy_(staged, non_blocking=True)


# Of tokens, programs and tiles that are not there, by the number of parts: token 0, not sampled, at position 0, without
# a slot, of length 1; programs without a token; tiles of no token.
_FILLS: dict[int, list[int | None]] = {
    8: [0, 0, -1, 0, -1, 1, -1, None],
    12: [0, 0, -1, 0, -1, 1, -1, 0, 0, 0, 0, None],
}


def _general_inputs(views: list[torch.Tensor], num_decodes: int) -> Inputs:
    return Inputs(
        width=views[0], tokens=views[1], sources=views[2], positions=views[3], slots=views[4], lengths=views[5],
        work=views[6], tile_tokens=views[7], tile_counts=views[8], tile_sequences=views[9], rows=views[10],
        tables=views[11], num_decodes=num_decodes,
    )  # fmt: skip


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
