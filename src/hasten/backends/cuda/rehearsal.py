"""Kernels of steps that are new, compiled several at a time: one after the other, as launches ask for them, they would
keep a first token waiting for ten seconds."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from hasten.backends.cuda.decoder import Decoder
from hasten.backends.cuda.inputs import Inputs
from hasten.backends.cuda.linear import MAX_SKINNY
from hasten.backends.cuda.ops import Ops
from hasten.backends.cuda.sampling import Sampler

Step = tuple[Inputs, torch.Tensor | None]  # with the rows whose logits are wanted, None for all


class Rehearsals:
    """Knows which kinds of steps have been rehearsed."""

    def __init__(self, decoder: Decoder, sampler: Sampler) -> None:
        self._decoder = decoder
        self._sampler = sampler
        self._seen: set[tuple[object, ...]] = set()

    def __call__(self, *steps: Step) -> None:
        """Return when the kernels of these steps are there, or say so themselves where they are launched. Their inputs
        need not be filled but for the rows."""
        new = {kind: step for step in steps if (kind := _kind(step)) not in self._seen}
        if new:
            self._decoder.device.rehearse(lambda: self._run(new.values()))
            self._seen.update(new)

    def _run(self, steps: Iterable[Step]) -> None:
        for inputs, rows in steps:
            self._sampler.greedy(self._decoder.rehearse(inputs, rows))


@contextmanager
def wakened(ops: Ops, vocab_size: int) -> Iterator[None]:
    """Beside what the block does, a first kernel is compiled: Triton takes half a second to get ready for one."""
    device = ops.device

    def wake() -> None:
        torch.cuda.set_device(device.handle)
        logits = torch.zeros((1, vocab_size), device=device.handle)
        device.rehearse(lambda: ops.argmax(logits, torch.zeros(1, dtype=torch.int32, device=device.handle)))

    with ThreadPoolExecutor(1) as beside:
        if device.is_cuda:
            beside.submit(wake)
        yield


def _kind(step: Step) -> tuple[object, ...]:
    """Steps of one kind launch the same kernels, give or take one."""
    inputs, rows = step
    tiles = inputs.tile_tokens is not None and len(inputs.tile_tokens) > 0
    count = len(inputs.tokens)
    wanted = count if rows is None else len(rows)
    return _width(count), _width(wanted), inputs.num_decodes > 0, tiles, inputs.alone, inputs.few


def _width(rows: int) -> int:
    """1, up to 16, 32 or 64, or more, as products have kernels for."""
    return rows if rows < 2 else 1 << (min(max(rows, 16), MAX_SKINNY + 1) - 1).bit_length()
