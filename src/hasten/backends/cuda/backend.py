"""CudaBackend: the Backend protocol on one NVIDIA GPU. Knows what is loaded and in which way a step runs; how is in the
modules beside it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from hasten.backends.base import Batch, DeviceMemory, Float32, Logits, SamplingBatch, StepLimits
from hasten.backends.cuda.attention import (
    KV_DTYPES,
    Attention,
    block_bytes,
    decode_programs,
    most_few_keys,
    tile_tokens,
)
from hasten.backends.cuda.decoder import Decoder
from hasten.backends.cuda.device import CAPTURING, Device, check_fp8, open_device
from hasten.backends.cuda.graphs import Graphs, most_tokens
from hasten.backends.cuda.inputs import Stager
from hasten.backends.cuda.load import TORCH_DTYPES, Loader
from hasten.backends.cuda.measured import write_measured
from hasten.backends.cuda.ops import Ops
from hasten.backends.cuda.rehearsal import Rehearsals, wakened
from hasten.backends.cuda.sampling import PendingSample, Sampler
from hasten.backends.cuda.tuner import (
    COMPARED_BATCHES,
    TUNED_BATCHES,
    Steps,
    all_dense,
    compare_with_dense,
    measure_few_rows,
    signature,
    tune_tiles,
)
from hasten.errors import ModelError, RequestError, ResourceError
from hasten.model.formats import Weight
from hasten.model.spec import ModelSpec

FORMATS = ("fp8",)
_MAX_ROWS = 4096  # of logits in a step
_GRAPH_BYTES = 1 << 30  # of graphs beside their activations, measured with room to spare


class CudaBackend:
    """See backends.base.Backend.

    format: "fp8" rounds the layers' dense matrices to e4m3 as they are loaded, a scale a row, without calibration.
    deterministic: one kernel for products and one for attention whatever the batch, so that a row's bits do not depend
    on it; slower. device: a torch device's name; "cpu" runs in Triton's interpreter, for tests.
    Raises ResourceError for a GPU that is too old, RequestError for a format that there is not.
    """

    kv_dtypes: tuple[str, ...] = tuple(KV_DTYPES)
    overlaps = True
    usual = StepLimits(max_tokens=8192, max_sequences=256, max_rows=512)

    def __init__(self, format: str | None = None, deterministic: bool = False, device: str | Device = "cuda") -> None:
        if format is not None and format not in FORMATS:
            raise RequestError(f"format on load is {format!r}, expected {' or '.join(FORMATS)}")
        self._device = open_device(device) if isinstance(device, str) else device
        if format == "fp8":
            check_fp8(self._device, "format fp8")
        self.kv_dtypes = tuple(name for name in KV_DTYPES if self._device.fp8 or name != "fp8")
        self._format = format
        self._deterministic = deterministic
        self._spec: ModelSpec | None = None
        self._decoder: Decoder | None = None
        self._sampler: Sampler | None = None
        self._stager: Stager | None = None
        self._allocated: tuple[int, int, str] | None = None
        self._graphs: Graphs | None = None
        self._rehearse: Rehearsals | None = None
        self._cache_size = (0, 0)
        self._chosen: torch.Tensor | None = None  # logits whose best tokens are in place already

    def __del__(self) -> None:
        """Captures that wait or are under way hold the weights and the cache: they end with the backend."""
        if getattr(self, "_graphs", None) is not None:
            self._graphs.close()  # type: ignore[union-attr]

    def beside(self) -> "CudaBackend":
        """An empty backend of the same kind that shares the GPU's stream and workspaces."""
        return CudaBackend(self._format, self._deterministic, self._device)

    def load(self, spec: ModelSpec, weights: Iterable[tuple[str, Weight]]) -> None:
        """Take the weights; arrays are not kept. Raises ModelError for one that is missing or left over, ResourceError
        where the GPU's memory does not suffice."""
        ops = Ops(self._device, spec.norm == "layer", spec.norm_eps)
        loader = Loader(self._device, ops, spec, self._format, self._deterministic)
        sampled = torch.zeros(_MAX_ROWS, dtype=torch.int32, device=self._device.handle)
        with CAPTURING, wakened(ops, spec.vocab_size):
            loaded = loader.load(weights)
        self._spec = spec
        self._decoder = Decoder(self._device, ops, spec, loaded, sampled)
        self._decoder.limit_rows(self._device.measured.few_rows.get(signature(self._decoder), {}))
        self._sampler = Sampler(ops, sampled)

    def memory(self, limits: StepLimits) -> DeviceMemory:
        """Room on the GPU for the KV cache; nobody else is expected on it. Raises ResourceError for steps larger than
        there is room for what they sample."""
        spec = self._loaded_spec
        if limits.max_rows > _MAX_ROWS:
            raise ResourceError(
                f"{limits.max_sequences} sequences at once with drafts or scores have {limits.max_rows} rows of logits,"
                f" expected at most {_MAX_ROWS} on a GPU: lower max_sequences"
            )
        size = TORCH_DTYPES[spec.dtype].itemsize
        widest = max(
            (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim + 3 * layer.intermediate_size
            for layer in spec.layers
        )
        assert self._decoder is not None
        tokens = limits.max_tokens
        if not self._deterministic:  # graphs have their own
            tokens += min(tokens, most_tokens(self._decoder))
        activations = tokens * (widest + 6 * spec.hidden_size) * size
        logits = limits.max_rows * spec.vocab_size * 4 * 2
        if not self._device.is_cuda:
            return DeviceMemory(1 << 30, 1 << 30, activations + logits)
        with CAPTURING:
            torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device.handle)
        return DeviceMemory(total, free, activations + logits + _GRAPH_BYTES, shared=False)

    def block_bytes(self, block_size: int, dtype: str) -> int:
        """Bytes of one KV block over all layers."""
        self._check_kv(block_size, dtype)
        return block_bytes(self._loaded_spec, block_size, dtype)

    def allocate(self, num_blocks: int, block_size: int, dtype: str) -> None:
        """Make the KV cache; an earlier one is dropped, but one just like it is kept, with its graphs."""
        self._check_kv(block_size, dtype)
        if self._allocated == (num_blocks, block_size, dtype):
            return
        self._allocated = None
        spec, decoder = self._loaded_spec, self._decoder
        assert decoder is not None
        if self._graphs is not None:
            self._graphs.close()
        decoder.attention = self._graphs = None
        try:
            with CAPTURING:
                decoder.attention = Attention(self._device, spec, num_blocks, block_size, dtype)
        except torch.cuda.OutOfMemoryError:
            needed = num_blocks * block_bytes(spec, block_size, dtype)
            free, _ = torch.cuda.mem_get_info(self._device.handle)
            raise ResourceError(
                f"the KV cache needs {needed / 1e9:.1f} GB of GPU memory, {free / 1e9:.1f} GB are free: lower max_len "
                "or memory, or use kv_cache fp8"
            ) from None
        self._cache_size = num_blocks, block_size
        self._allocated = num_blocks, block_size, dtype
        tile = tile_tokens(spec)
        programs = decode_programs(self._device, spec)
        self._stager = Stager(self._device, block_size, tile, programs, self._deterministic)
        assert self._sampler is not None
        self._rehearse = Rehearsals(decoder, self._sampler)
        if self._device.is_cuda and not self._deterministic:
            most = -(-spec.max_position // block_size)
            self._graphs = Graphs(
                decoder, self._sampler, self._stager, min(num_blocks, most), self.usual.max_rows, tile,
                most_few_keys(spec), self._rehearse,
            )  # fmt: skip

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Logits:
        """Run one step; logits as a float32 tensor [R, V] on the device."""
        if self._decoder is None or self._stager is None:
            raise ModelError("no model is loaded, or it has no cache: call load() and allocate() first")
        self._chosen = None
        try:
            return self._forward(batch)
        except torch.cuda.OutOfMemoryError:
            pass
        with CAPTURING, self._told_of_memory(len(batch.tokens)):
            torch.cuda.empty_cache()
            return self._decoder(self._stager.general(batch))

    def _forward(self, batch: Batch) -> torch.Tensor:
        assert self._decoder is not None
        assert self._stager is not None
        if self._graphs is not None:
            done = self._graphs(batch)
            if done is not None:
                logits, chosen = done
                self._chosen = logits if chosen else None
                return logits
        inputs = self._stager.general(batch)
        assert self._rehearse is not None
        self._rehearse((inputs, inputs.rows))
        return self._decoder(inputs)

    @torch.inference_mode()
    def sample(self, logits: Logits, params: SamplingBatch) -> PendingSample:
        """Choose one token a row, on the device."""
        assert self._sampler is not None
        with self._told_of_memory(len(logits)):
            return self._sampler(logits, params, chosen=logits is self._chosen)

    def finish_captures(self) -> None:
        """Wait for graphs that are being captured, for those who time or compare steps."""
        if self._graphs is not None:
            self._graphs.finish()

    def tune_kernels(self, tell: Callable[[str], None], batches: tuple[int, ...] = TUNED_BATCHES) -> dict[str, object]:
        """Measure which tiles suit this GPU and the loaded model, in decode steps of these batch sizes, up to how many
        rows our own kernels multiply, and how its products compare with bf16's; keep it in the user's cache, for later
        loads too. What the KV cache holds is lost. A summary as plain data."""
        if self._decoder is None or self._stager is None or self._graphs is None:
            raise ModelError(
                "kernels are tuned on a GPU, for a loaded model with a cache, in other than deterministic mode"
            )
        assert self._sampler is not None
        decoder, measured, kind = self._decoder, self._device.measured, signature(self._decoder)
        self._graphs.finish()
        steps = Steps(decoder, self._sampler, self._stager, *self._cache_size)
        with torch.inference_mode():
            milliseconds = tune_tiles(steps, batches, tell)
            few_rows = measured.few_rows[kind] = measure_few_rows(decoder)
            for stored, rows in few_rows.items():
                tell(f"{stored}: our own kernels up to {rows} rows")
            measured.products[kind] = compare_with_dense(decoder, COMPARED_BATCHES)
        self._graphs.forget()
        path = write_measured(torch.cuda.get_device_name(self._device.handle), measured)
        return {
            "step_ms": milliseconds,
            "few_rows": few_rows,
            "products_ms": measured.products[kind],
            "file": str(path),
        }

    @torch.inference_mode()
    def compare_with_dense(self) -> None:
        """Measure how this model's products compare with bf16's, unless that is known of this GPU or there is nothing
        to compare; it is kept in the user's cache."""
        if self._decoder is None or not self._device.is_cuda:
            return
        products, kind = self._device.measured.products, signature(self._decoder)
        if kind in products or all_dense(self._decoder):
            return
        self.finish_captures()
        with suppress(torch.cuda.OutOfMemoryError):
            products[kind] = compare_with_dense(self._decoder, COMPARED_BATCHES)
            with suppress(ResourceError):  # a cache that cannot be written: then it is measured again next time
                write_measured(torch.cuda.get_device_name(self._device.handle), self._device.measured)

    def slower_than_dense(self) -> dict[int, float]:
        """Batch sizes at which this model's products were measured to take longer than in bf16, and how many times as
        long: a format that saves memory may lose there. Empty where nothing was measured."""
        if self._decoder is None:
            return {}
        times = self._device.measured.products.get(signature(self._decoder), {})
        return {batch: ours / dense for batch, (ours, dense) in times.items() if ours > 1.02 * dense}

    def fetch(self, logits: Logits) -> Float32:
        """The logits as numpy float32 [R, V]."""
        numbers: Float32 = logits.cpu().numpy()
        return numbers

    @torch.inference_mode()
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination), one pair after the other."""
        if self._decoder is not None and self._decoder.attention is not None:
            self._decoder.attention.copy_blocks(list(pairs))

    @contextmanager
    def _told_of_memory(self, rows: int) -> Iterator[None]:
        """Where a step needs more memory than is left, in one line."""
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            free, total = torch.cuda.mem_get_info(self._device.handle)
            raise ResourceError(
                f"a step of {rows} rows does not fit the GPU, of whose memory {free / 1e9:.1f} of {total / 1e9:.1f} GB"
                " are free: lower memory (the share of the GPU that is taken) or max_step_tokens"
            ) from None

    @property
    def _loaded_spec(self) -> ModelSpec:
        if self._spec is None:
            raise ModelError("no model is loaded: call load() first")
        return self._spec

    def _check_kv(self, block_size: int, dtype: str) -> None:
        if dtype not in self.kv_dtypes:
            raise ResourceError(
                f"KV cache dtype {dtype!r} is not supported here on cuda; supported: {', '.join(self.kv_dtypes)}"
            )
        if block_size < 16 or block_size & (block_size - 1):
            raise ResourceError(f"KV block size is {block_size}, expected a power of two from 16 on")
