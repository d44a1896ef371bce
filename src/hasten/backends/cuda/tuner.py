"""Measures tiles on the GPU at hand, each in whole decode steps of a loaded model: what is fastest alone may crowd out
the kernel beside it. And where a stored format's products take longer than those of bf16.

Knows which tiles are worth a try; what they mean is the kernels'. The cache's contents are overwritten.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import triton

from hasten.backends.base import Batch
from hasten.backends.cuda.decoder import Decoder
from hasten.backends.cuda.device import CAPTURING
from hasten.backends.cuda.inputs import Inputs, Sizes, Stager
from hasten.backends.cuda.linear import Linear
from hasten.backends.cuda.matrix import DENSE, INT4, KINDS, Matrix
from hasten.backends.cuda.sampling import Sampler
from hasten.backends.cuda.tuning import Tile

TUNED_BATCHES = (1, 8, 64)
COMPARED_BATCHES = (1, 8, 32, 64, 128, 256)
_LENGTH = 256  # tokens of each sequence in the steps that are timed
_GAIN = 0.997  # a tile must be faster by more than what a step's time wavers
_LIMITS = (16, 32, 48, 64, 96, 128, 192, 256)  # rows at which our products are compared with the libraries'
_MARGIN = 1.03  # times as long as theirs before ours are left: theirs add no residual and norm nothing on the way

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Steps:
    """Times decode steps of a model whose cache has `num_blocks` blocks of block_size tokens."""

    decoder: Decoder
    sampler: Sampler
    stager: Stager
    num_blocks: int
    block_size: int

    def milliseconds(self, sequences: int) -> float:
        """Of one step, as a graph."""
        inputs = self._inputs(sequences)
        return graph_ms(lambda: self.sampler.greedy(self.decoder.logits(self.decoder.hidden(inputs), None)))

    def compile(self, sequences: int, key: str, worth: list[Tile]) -> None:
        """What a step needs with each of these tiles, at once."""
        device, inputs = self.decoder.device, self._inputs(sequences)

        def launch() -> None:
            for tile in worth:
                device.tiles[key] = tile
                self.sampler.greedy(self.decoder.rehearse(inputs, None))

        device.rehearse(launch)

    def _inputs(self, sequences: int) -> Inputs:
        width = max(1, min(_LENGTH // self.block_size, self.num_blocks // sequences))
        tables = np.arange(sequences * width, dtype=np.int32).reshape(sequences, width) % self.num_blocks
        last = np.full(sequences, width * self.block_size - 1, np.int32)
        ones, rows = np.ones(sequences, np.int32), np.arange(sequences, dtype=np.int32)
        slots = tables[:, -1] * self.block_size + self.block_size - 1
        batch = Batch(rows, last, slots, ones, last + 1, tables, rows)
        sizes = Sizes(sequences, sequences, 0, sequences, sequences)
        room = self.stager.room(sizes, width)
        buffer = torch.zeros(room, dtype=torch.int32, device=self.decoder.device.handle)
        inputs = self.stager.fixed(sizes, width, buffer)
        assert self.stager.refill(batch, sizes, width, buffer)
        return inputs


def graph_ms(run: Callable[[], object]) -> float:
    """Milliseconds that the device takes for what `run` launches."""
    new_event: Any = torch.cuda.Event
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with CAPTURING, torch.cuda.graph(graph):
        run()
    times: list[float] = []
    for _ in range(4):
        start, stop = (new_event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(12):
            graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 12)
    return median(times[1:])


def tune_tiles(steps: Steps, batches: tuple[int, ...], tell: Tell) -> dict[str, float]:
    """Try tiles for every shape of product at these batch sizes; those that make the step faster are left in
    Device.tiles. Milliseconds a step before and after, by name."""
    tiles = steps.decoder.device.tiles
    found: dict[str, float] = {}
    for batch in batches:
        now = found[f"{batch} before"] = steps.milliseconds(batch)
        for linear in (shape for shape in steps.decoder.shapes() if shape.has_tile(batch)):
            key, default = linear.tile_of(batch)
            best = tiles.get(key)
            worth = list(_worth_a_try(linear, batch, best or default))
            steps.compile(batch, key, worth)
            for tile in worth:
                tiles[key] = tile
                took = _or_never(partial(steps.milliseconds, batch))
                if took < now * _GAIN:
                    now, best = took, tile
            if best is None:
                tiles.pop(key, None)
            else:
                tiles[key] = best
            tell(f"batch {batch}, {key}: {best or default}, {now:.3f} ms a step")
        found[f"{batch} after"] = now
    return found


def measure_few_rows(decoder: Decoder) -> dict[str, int]:
    """Of each way in which the layers' matrices are stored, up to how many rows the kernels that unpack and multiply at
    once are faster than cuBLAS, which may need the numbers expanded first. From now on the decoder goes by it."""
    ways: dict[str, list[Linear]] = {}
    for linear in decoder.products():
        (matrix, *others) = linear.matrices
        if type(linear) is Linear and not others and not matrix.int8_inputs:
            ways.setdefault(matrix.stored, []).append(linear)
    found: dict[str, int] = {}
    for stored, linears in ways.items():
        found[stored] = _LIMITS[0] // 2
        for rows in _LIMITS:
            decoder.limit_rows({stored: rows})
            ours = _or_never(partial(_products_ms, linears, rows))
            decoder.limit_rows({stored: 1})
            if ours > _MARGIN * _products_ms(linears, rows):
                break
            found[stored] = rows
    decoder.limit_rows(found)
    return found


def _or_never(milliseconds: Callable[[], float]) -> float:
    """Infinite for a tile that does not fit the GPU."""
    try:
        return milliseconds()
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _worth_a_try(linear: Linear, batch: int, now: Tile) -> Iterator[Tile]:
    matrix = linear.matrices[0]
    if batch > 1:
        for rows, warps in ((64, 4), (128, 8), (32, 4)):
            yield replace(now, rows=rows, warps=warps)
        for splits in (now.splits * 2, now.splits // 2):
            if 1 <= splits <= 16:
                yield replace(now, splits=splits)
        yield replace(now, stages=max(2, now.stages - 1))
    elif matrix.mask is not None:
        for rows in (1, 2, 4):
            for warps in (2, 4, 8):
                if 1 <= rows * now.columns // (64 * warps) <= 4:
                    yield from (
                        replace(now, rows=rows, warps=warps, splits=n // warps) for n in (8, 12, 16) if n >= warps
                    )
    elif matrix.kind == INT4:
        for rows in (2, 4, 8):
            for warps in (2, 4, 8):
                # Units of four words that a thread has in flight; more spill, fewer wait.
                if 2 <= rows * matrix.k // (1024 * warps) <= 16:
                    yield from (replace(now, rows=rows, warps=warps, splits=splits) for splits in (2, 3, 4, 6))
    else:
        for rows in (4, 8, 16):
            for columns in (512, 1024, 2048):
                for warps in (1, 2, 4, 8):
                    share = rows * columns // (32 * warps) * (2 if linear.gated else 1) * matrix.data.itemsize
                    if columns < 2 * matrix.k and 64 <= share <= 128:
                        yield replace(now, rows=rows, columns=columns, warps=warps)


def signature(decoder: Decoder) -> str:
    """The kind of layer: formats and shapes of its products."""
    parts = []
    for linear in decoder.products():
        kinds = " and ".join(dict.fromkeys(matrix.stored for matrix in linear.matrices))
        pieces = f" in {len(linear.matrices)}" if len(linear.matrices) > 1 else ""
        experts = f" {linear.running.active} of {linear.running.taken.shape[1]}" if linear.running else ""
        parts.append(f"{kinds}{pieces} {linear.n}x{linear.k}{experts}")
    return ", ".join(parts)


def all_dense(decoder: Decoder) -> bool:
    """Whether products are of dense matrices alone, all of them."""
    return all(
        len(linear.matrices) == 1 and linear.running is None and linear.matrices[0].stored == KINDS[DENSE]
        for linear in decoder.products()
    )


def compare_with_dense(decoder: Decoder, batches: tuple[int, ...]) -> dict[int, tuple[float, float]]:
    """Milliseconds of one layer's products as they are and in bf16, by batch size."""
    linears = decoder.products()
    dense = [_dense_twin(linear) for linear in linears]
    return {batch: (_products_ms(linears, batch), _products_ms(dense, batch)) for batch in batches}


def _dense_twin(linear: Linear) -> Linear:
    data = torch.randn((linear.n, linear.k), dtype=torch.bfloat16, device=linear.device.handle)
    return Linear(linear.device, linear.ops, [Matrix(DENSE, linear.n, linear.k, data)], None, linear.gated, False)


def _products_ms(linears: list[Linear], rows: int) -> float:
    """A layer's products one after the other. Where all of its weights fit the GPU's cache that is what is measured."""
    device = linears[0].device.handle
    inputs = [torch.randn((rows, linear.k), dtype=torch.bfloat16, device=device) for linear in linears]

    def run() -> None:
        for linear, x in zip(linears, inputs, strict=True):
            linear(x, activation="silu" if linear.gated else "none")

    return graph_ms(run)
