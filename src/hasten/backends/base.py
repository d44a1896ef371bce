"""The contract between the engine and a device. The engine knows nothing else of backends.

A Batch is packed: all tokens of all sequences one after the other. Prefill, decode and speculative verification are the
same call with other lengths. A row's result does not depend on what shares its batch, bit for bit: the engine's
promises (a seeded request repeats, speculation changes nothing) rest on it. A device on which that costs speed may
offer it as a mode (open_backend's `deterministic`); without it the promises hold up to rounding.

One thread calls copy_blocks, forward and sample, and each sees the effects of those before it. They take what they need
of their arguments before they return: the engine reuses its arrays. Only Pending.result() waits for the device.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hasten.model.formats import Weight
from hasten.model.spec import ModelSpec

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
DRAW_GROUP = 16  # ids that share one number of a draw, see SamplingBatch
# float32 [R, vocab_size] where the backend keeps it; only the backend that made it knows what it is.
Logits: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step runs: T tokens of B sequences, R rows where logits are wanted. All int32.

    tokens [T], positions [T]; slots [T] is where each token's key and value go: block * block_size + offset.
    query_lens [B] sums to T. context_lens [B] is each sequence's length after this step, this step's tokens included.
    block_tables [B, N] lists each sequence's blocks in order; entries past ceil(context_len / block_size) are ignored.
    rows [R] indexes tokens, ascending.
    sampled_from [T], or None for all -1: where it is not -1, the token is not known to the host yet. It is what row
    sampled_from[t] of the last sample() call chose (a -1 there counts as token 0), and tokens[t] is 0. Only where
    `overlaps`.
    """

    tokens: Int32
    positions: Int32
    slots: Int32
    query_lens: Int32
    context_lens: Int32
    block_tables: Int32
    rows: Int32
    sampled_from: Int32 | None = None


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each of the R rows is sampled. Order: penalties and bias, temperature, top-k, top-p, min-p, draw.

    temperature f32 [R]: 0 is greedy (lowest id wins a tie). top_k i32 [R]: 0 is off. top_p, min_p f32 [R]: 1 and 0 are
    off. repetition, presence, frequency f32 [R]: 1, 0, 0 are off. repetition divides positive and multiplies negative
    logits of tokens seen in prompt or output (Keskar et al. 2019); presence and frequency subtract, from tokens seen in
    the output only (OpenAI's definition).
    seeds u64 [R] and counters u64 [R]: the draw is a pure function of the two (Philox 4x32-10, Salmon et al. 2011). Ids
    in groups of DRAW_GROUP race: a group's kept probability over an exponential number of its own, the greatest wins;
    within it, ids are walked until their probabilities exceed a uniform share of the group's. Two models that nearly
    agree then nearly always draw the same token, which drafting lives on: by the exponential race (the Gumbel-max
    trick), as Daliri et al. 2024 show. One walk over all ids would have them part at the first difference.
    reference_sampling.py is exact about it.
    num_logprobs i32 [R]: -1 none; else that many best tokens are returned besides the sampled one's.
    targets i32 [R]: -1, or a token whose log-probability is wanted.
    Log-probabilities are of the model's own distribution: before penalties, bias and temperature.
    seen_* : for rows with penalties, CSR over rows: seen_offsets i32 [R + 1], seen_ids i32 [S], seen_counts i32 [S]
    (times in the output; 0 means only in the prompt). bias_*: CSR likewise with bias_values f32.
    any_special False promises that every row is plain greedy without log-probabilities, penalties or bias.
    """

    temperature: Float32
    top_k: Int32
    top_p: Float32
    min_p: Float32
    repetition: Float32
    presence: Float32
    frequency: Float32
    seeds: NDArray[np.uint64]
    counters: NDArray[np.uint64]
    num_logprobs: Int32
    targets: Int32
    seen_offsets: Int32
    seen_ids: Int32
    seen_counts: Int32
    bias_offsets: Int32
    bias_ids: Int32
    bias_values: Float32
    any_special: bool


@dataclass(frozen=True, slots=True)
class Sampled:
    """tokens i32 [R], -1 where a logit is NaN; the rest is None unless some row asked: logprobs f32 [R] of the sampled
    token, target_logprobs f32 [R], top_ids i32 [R, K] and top_logprobs f32 [R, K] in falling order, padded with -1 and
    -inf."""

    tokens: Int32
    logprobs: Float32 | None = None
    target_logprobs: Float32 | None = None
    top_ids: Int32 | None = None
    top_logprobs: Float32 | None = None

    def result(self) -> "Sampled":
        """Itself: a Pending that is done."""
        return self


class Pending(Protocol):
    """What a step has sampled, or will have. May be dropped without asking."""

    def result(self) -> Sampled:
        """Wait for the device. Raises what went wrong there. May be called again."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step that will come: T, B and R of its Batch."""

    max_tokens: int
    max_sequences: int
    max_rows: int


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device once the weights are loaded.

    total: all that one process can have. free: what nobody has taken. reserved: what steps will take beside the KV
    cache and have not taken yet (activations, logits, workspaces, graphs). shared: other programs live there too, so
    unless told otherwise the cache takes what is usual; where it is False the cache takes all that is left.
    """

    total: int
    free: int
    reserved: int = 0
    shared: bool = True


class Backend(Protocol):
    """Runs batches of one model on one device.

    kv_dtypes: those that allocate() takes, of "fp32", "bf16", "int8", "fp8". overlaps: forward() of step n + 1 may be
    called before result() of step n, and its tokens may be named by Batch.sampled_from. usual: the largest step that is
    of use on such a device, for an engine that is not told otherwise.
    """

    kv_dtypes: tuple[str, ...]
    overlaps: bool
    usual: StepLimits

    def beside(self) -> "Backend":
        """An empty backend for another model on the same device, which takes turns with this one: it shares its threads
        or its stream. For a drafter."""

    def load(self, spec: ModelSpec, weights: Iterable[tuple[str, Weight]]) -> None:
        """Take the model's weights (canonical names, see model/spec.py), in any order, once."""

    def memory(self, limits: StepLimits) -> DeviceMemory:
        """Room for the KV cache. Called after load()."""

    def block_bytes(self, block_size: int, dtype: str) -> int:
        """Bytes of one KV block over all layers."""

    def allocate(self, num_blocks: int, block_size: int, dtype: str) -> None:
        """Make the KV cache, dropping an earlier one. block_size is a multiple of 16, on a GPU a power of two."""

    def forward(self, batch: Batch) -> Logits:
        """Run one step; its logits, valid until the next call."""

    def sample(self, logits: Logits, params: SamplingBatch) -> Pending:
        """Choose one token a row of `logits`, which it may overwrite."""

    def fetch(self, logits: Logits) -> Float32:
        """The logits as numpy float32 [R, vocab_size], valid until the next forward()."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination), for n > 1 sharing a partly filled block."""
