"""Choosing tokens on the device, in the order and meaning of base.SamplingBatch: the best by one kernel, draws by one.

Probabilities are in double, as in reference_sampling.py; sums run in another order there, so that a draw may differ
where a number falls between two roundings.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.backends.base import Float32, Int32, Sampled, SamplingBatch
from hasten.backends.cuda.ops import Ops

_LOW = 0xFFFFFFFF
_MOST_RANKED = 1024  # ids of a row that are found without a sort of all


class PendingSample:
    """Results on their way to the host; see backends.base.Pending."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = {name: _to_host(tensor) for name, tensor in tensors.items()}
        self._event: torch.cuda.Event | None = None
        if tensors["tokens"].is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        self._done: Sampled | None = None

    def result(self) -> Sampled:
        """Wait until the step is done."""
        if self._done is None:
            if self._event is not None:
                self._event.synchronize()
            # Copies, for torch reuses pinned memory.
            self._done = Sampled(**{name: tensor.numpy().copy() for name, tensor in self._tensors.items()})
            self._tensors.clear()
        return self._done


@dataclass(frozen=True)
class Sampler:
    """Samples rows of logits into `sampled` int32 [most rows], where the next step finds its tokens."""

    ops: Ops
    sampled: torch.Tensor

    def greedy(self, logits: torch.Tensor) -> None:
        """Take the best token of each row of logits float32 [R, V]."""
        self.ops.argmax(logits, self.sampled[: len(logits)])

    def __call__(self, logits: torch.Tensor, params: SamplingBatch, chosen: bool = False) -> PendingSample:
        """Overwrites logits float32 [R, V]. chosen: `greedy` has run on them."""
        tokens = self.sampled[: len(logits)]
        if not params.any_special:
            if len(logits) and not chosen:
                self.greedy(logits)
            return PendingSample({"tokens": tokens})
        wants_top = bool((params.num_logprobs >= 0).any())
        wants_targets = bool((params.targets >= 0).any())
        results: dict[str, torch.Tensor] = {}
        # Before penalties and bias, which change the logits in place.
        logprobs = torch.log_softmax(logits.double(), dim=1) if wants_top or wants_targets else None
        best = _best(logits, max(0, int(params.num_logprobs.max(initial=0))))
        self._choose(logits, params, tokens)
        results["tokens"] = tokens
        if logprobs is not None and wants_top:
            taken = tokens.clamp_min(0).long()[:, None]
            results["logprobs"] = logprobs.gather(1, taken)[:, 0].float()
            results["top_ids"], results["top_logprobs"] = _top(logprobs, best, params.num_logprobs)
        if logprobs is not None and wants_targets:
            results["target_logprobs"] = _targets(logprobs, params.targets)
        return PendingSample(results)

    def _choose(self, logits: torch.Tensor, params: SamplingBatch, tokens: torch.Tensor) -> None:
        _penalize(logits, params)
        _add_bias(logits, params)
        self.ops.argmax(logits, tokens)
        rows = np.flatnonzero(params.temperature > 0)
        if not len(rows):
            return
        temperature = params.temperature[rows].astype(np.float64)
        seeds, counters = (whole[rows].view(np.int64) for whole in (params.seeds, params.counters))
        numbers = _upload(np.stack((rows, temperature.view(np.int64), seeds, counters)), logits)
        top_k, top_p, min_p = params.top_k[rows], params.top_p[rows], params.min_p[rows]
        least = None
        if (top_k > 0).any() or (top_p < 1).any() or (min_p > 0).any():
            drawn_from = logits if len(rows) == len(logits) else logits.index_select(0, numbers[0])
            least = _least(drawn_from, numbers[1].view(torch.float64)[:, None], top_k, top_p, min_p)
        self.ops.race(logits, tokens, numbers, least)


def _least(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: Int32, top_p: Float32, min_p: Float32
) -> torch.Tensor:
    """The key of the last id that may be drawn, int64 [R], of logits [R, V]; each filter works on what the one before
    has left."""
    vocab = logits.shape[1]
    # Where all rows are cut to some ids, only those are put in order.
    width = min(vocab, int(top_k.max())) if top_k.min() > 0 else vocab
    if width <= _MOST_RANKED:
        order = _best(logits, width)
        ordered = logits.gather(1, order)
    else:
        width = vocab
        ordered, order = (logits + 0.0).sort(dim=1, descending=True, stable=True)
    scaled = ordered.double() / temperature
    weights = (scaled - scaled[:, :1]).exp()
    ranks = torch.arange(width, device=logits.device)[None]
    limit = _upload(np.where(top_k > 0, top_k, vocab).astype(np.int64), logits)[:, None]
    kept = weights * (ranks < limit)
    cumulative = kept.cumsum(dim=1)
    share = _upload(top_p.astype(np.float64), logits)[:, None]
    keep = ((cumulative - kept < share * cumulative[:, -1:]) | (share >= 1) | (ranks == 0)) & (ranks < limit)
    lowest = _upload(min_p.astype(np.float64), logits)[:, None]
    keep &= weights >= lowest * weights[:, :1]
    last = keep.sum(dim=1, keepdim=True).clamp_min(1) - 1  # they are the first in order; of a row with NaN none is
    return _keys(ordered.gather(1, last), order.gather(1, last), vocab)[:, 0]


def _keys(logits: torch.Tensor, ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """Whole numbers in the order of logits float32, of equals the lowest id first: the upper half is the logit's."""
    bits = (logits + 0.0).view(torch.int32)  # no -0
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return (bits.long() << 32) + (vocab - 1 - ids)


def _best(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Ids int64 [R, count] of the largest logits float32 [R, V], in falling order, of equals the lowest id first. A
    sort of all would take as long as a step."""
    vocab = logits.shape[1]
    if count == 0:
        return torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
    keys = _keys(logits, torch.arange(vocab, device=logits.device), vocab)
    return vocab - 1 - keys.topk(min(count, vocab), dim=1).values.bitwise_and(_LOW)


def _penalize(logits: torch.Tensor, params: SamplingBatch) -> None:
    if not len(params.seen_ids):
        return
    counts = np.diff(params.seen_offsets)
    row = np.repeat(np.arange(len(counts)), counts)
    at = _upload(row * logits.shape[1] + params.seen_ids, logits)
    values = logits.view(-1)[at]
    repetition = _upload(params.repetition[row], logits)
    values = torch.where(values > 0, values / repetition, values * repetition)
    times = params.seen_counts
    values -= _upload((params.presence[row] * (times > 0)).astype(np.float32), logits)
    values -= _upload((params.frequency[row] * times).astype(np.float32), logits)
    logits.view(-1)[at] = values


def _add_bias(logits: torch.Tensor, params: SamplingBatch) -> None:
    if not len(params.bias_ids):
        return
    counts = np.diff(params.bias_offsets)
    at = _upload(np.repeat(np.arange(len(counts)), counts) * logits.shape[1] + params.bias_ids, logits)
    logits.view(-1)[at] += _upload(params.bias_values, logits)


def _top(logprobs: torch.Tensor, best: torch.Tensor, counts: Int32) -> tuple[torch.Tensor, torch.Tensor]:
    """The best ids and log-probabilities of each row, in falling order, padded with -1 and -inf."""
    ranks = torch.arange(best.shape[1], device=logprobs.device)[None]
    missing = ranks >= _upload(counts.astype(np.int64), logprobs)[:, None]
    values = logprobs.gather(1, best).float()
    return best.to(torch.int32).masked_fill(missing, -1), values.masked_fill(missing, float("-inf"))


def _targets(logprobs: torch.Tensor, targets: Int32) -> torch.Tensor:
    wanted = _upload(targets.astype(np.int64), logprobs)
    found = logprobs.gather(1, wanted.clamp_min(0)[:, None])[:, 0].float()
    return found.masked_fill(wanted < 0, float("-inf"))


def _upload(values: NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, non_blocking=True)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host
