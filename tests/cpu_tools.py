"""What tests of the native backend share: batches over shuffled blocks, a loaded tiny model, running it in pieces."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hasten.backends.base import Backend, Batch
from hasten.backends.cpu import CpuBackend
from hasten.model.checkpoint import open_checkpoint

BLOCK = 16
NUM_BLOCKS = 40


def table(seed: int, count: int = 10) -> NDArray[np.int32]:
    """Blocks in no order, so that a kernel that forgets the block table fails."""
    return np.random.default_rng(seed).permutation(NUM_BLOCKS)[:count].astype(np.int32)


def batch(
    parts: Sequence[tuple[NDArray[np.int32], int, NDArray[np.int32]]], rows: Sequence[int] | None = None
) -> Batch:
    """One step of several sequences, each (tokens, first position, block table)."""
    tokens = np.concatenate([part[0] for part in parts]).astype(np.int32)
    positions = [np.arange(first, first + len(ids), dtype=np.int32) for ids, first, _ in parts]
    slots = [blocks[p // BLOCK] * BLOCK + p % BLOCK for p, (_, _, blocks) in zip(positions, parts, strict=True)]
    return Batch(
        tokens=tokens,
        positions=np.concatenate(positions),
        slots=np.concatenate(slots).astype(np.int32),
        query_lens=np.array([len(ids) for ids, _, _ in parts], np.int32),
        context_lens=np.array([first + len(ids) for ids, first, _ in parts], np.int32),
        block_tables=np.stack([blocks for _, _, blocks in parts]),
        rows=np.arange(len(tokens), dtype=np.int32) if rows is None else np.array(rows, np.int32),
    )


def load(path: Path, isa: str | None = None, threads: int = 2, kv: str = "fp32") -> CpuBackend:
    checkpoint = open_checkpoint(path)
    backend = CpuBackend(threads, isa)
    backend.load(checkpoint.spec, checkpoint.weights())
    backend.allocate(NUM_BLOCKS, BLOCK, kv)
    return backend


def run(
    backend: Backend, tokens: NDArray[np.int32], sizes: Sequence[int], blocks: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Logits [T, V] of one sequence, fed in pieces of these sizes."""
    logits, first = [], 0
    for size in sizes:
        logits.append(backend.forward(batch([(tokens[first : first + size], first, blocks)])).copy())
        first += size
    return np.concatenate(logits)
