"""Speed on one NVIDIA GPU: whole models with random weights, through the backend and through LLM, beside the bandwidth
of a copy measured in the same run.

    python benchmarks/gpu.py [--models 8b,0.6b] [--formats bf16,fp8,int4] [--batches 1,8,64,256] [--engine] [--runs 3]
                             [--profile] [--skip-backend] [--tune 64]

Prints a table and writes a JSON named after the GPU, anew after each part, so that a run that is cut leaves one.
Times are medians of whole runs; tokens are greedy. --tune: tiles are first tried in steps of these batch sizes (a
minute each) and kept in the user's cache; put into src/hasten/backends/cuda/tables/, that file serves all such GPUs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_profile import Profile, report_profile

from hasten.backends.base import Batch
from hasten.backends.cuda import CudaBackend
from hasten.engine.llm import LLM
from hasten.engine.request import SamplingParams
from hasten.engine.sampling import greedy_batch
from hasten.model.formats import Format, Weight
from hasten.model.spec import ModelSpec, spec_from_config
from hasten.model.tensor_file import TensorWriter

BLOCK = 32
CONFIGS: dict[str, dict[str, Any]] = {
    "8b": {  # Llama-3.1-8B
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
        "dtype": "bfloat16", "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    },
    "0.6b": {  # Qwen3-0.6B
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_act": "silu",
        "dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}  # fmt: skip
# batch -> (prompt tokens, output tokens)
RUNS = {1: (32, 512), 8: (32, 256), 64: (512, 256), 256: (512, 256)}
# vLLM 0.24 on such a machine: tokens/s by batch, then milliseconds of prefills of 1,024 and 4,000 tokens.
VLLM = {
    ("8b", "bf16"): ({1: 202, 8: 1589, 64: 6521, 256: 9603}, {1024: 26, 4000: 101}),
    ("8b", "fp8"): ({1: 286, 8: 2239, 64: 8765, 256: 12581}, {1024: 17, 4000: 65}),
    ("0.6b", "bf16"): ({1: 612, 8: 4841, 64: 19297, 256: 29120}, {1024: 13, 4000: 15}),
}


VLLM_MIXED = {("8b", "bf16"): 9866, ("8b", "fp8"): 11997, ("0.6b", "bf16"): 23168}


def random_weights(spec: ModelSpec, format: str) -> Iterator[tuple[str, Weight]]:
    """Canonical weights, views of one random array, so that making 16 GB of them takes no time. format: of the layers'
    matrices, "bf16" or "int4" (groups of 128)."""
    rng = np.random.default_rng(0)
    count = 80_000_000
    bits = (rng.standard_normal(count, np.float32) * 0.02).view(np.uint32) >> 16
    dense, packed = bits.astype(np.uint16), rng.integers(0, 256, count, np.uint8)
    at = 0

    def take(pool: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        nonlocal at
        size = shape[0] * shape[1]
        at = (at + 4096 * 31) % 4_000_000
        if size + at > count:
            return np.resize(pool, size).reshape(shape)
        return pool[at : at + size].reshape(shape)

    def matrix(n: int, k: int, dense_only: bool = False) -> Weight:
        if format == "int4" and not dense_only:
            scales = np.full((n, k // 128), 0.0078125, np.float32)
            return Weight(Format("int4", 128), (n, k), take(packed, (n, k // 2)), scales)
        return Weight(Format("bf16"), (n, k), take(dense, (n, k)))

    def vector(n: int) -> Weight:
        return Weight(Format("fp32"), (n, 1), np.ones((n, 1), np.float32))

    hidden = spec.hidden_size
    yield "embed", matrix(spec.vocab_size, hidden, True)
    for index, layer in enumerate(spec.layers):
        name = f"layers.{index}"
        q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        yield f"{name}.attn_norm", vector(hidden)
        yield f"{name}.mlp_norm", vector(hidden)
        if spec.qk_norm == "head":
            yield f"{name}.q_norm", vector(layer.head_dim)
            yield f"{name}.k_norm", vector(layer.head_dim)
        for part, n, k in (
            ("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q),
            ("gate", layer.intermediate_size, hidden), ("up", layer.intermediate_size, hidden),
            ("down", hidden, layer.intermediate_size),
        ):  # fmt: skip
            yield f"{name}.{part}", matrix(n, k)
    yield "final_norm", vector(hidden)
    if not spec.tied_head:
        yield "head", matrix(spec.vocab_size, hidden, True)


def step_bytes(spec: ModelSpec, format: str) -> float:
    """Bytes of weights that a step reads: all but the embedding, where that is not the head."""
    per = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5 + 2 / 128}[format]
    layers = sum(
        spec.hidden_size * layer.head_dim * (2 * layer.num_heads + 2 * layer.num_kv_heads)
        + 3 * spec.hidden_size * layer.intermediate_size
        for layer in spec.layers
    )
    return layers * per + 2 * spec.vocab_size * spec.hidden_size


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read plus written."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(times[5:])


class Sequences:
    """B sequences of one length that run in step, driven as the engine does: step n + 1 before n's tokens are read."""

    def __init__(self, backend: CudaBackend, vocab: int, batch: int, prompt: int, output: int, chunk: int) -> None:
        self.backend, self.batch, self.prompt, self.output, self.chunk = backend, batch, prompt, output, chunk
        width = -(-(prompt + output) // BLOCK)
        self.tables = np.arange(batch * width, dtype=np.int32).reshape(batch, width)
        self.tokens = np.random.default_rng(1).integers(0, vocab, (batch, prompt)).astype(np.int32)

    def prefill(self) -> Any:
        """Run the prompts, `chunk` tokens a step; the pending first tokens, all in the last step's order."""
        per_step = max(1, self.chunk // self.prompt)
        pending = None
        for first in range(0, self.batch, per_step):
            pending = self._prompts(range(first, min(first + per_step, self.batch)))
        return pending

    def _prompts(self, which: range) -> Any:
        count, places = len(which), np.arange(self.prompt, dtype=np.int32)
        tables = self.tables[which.start : which.stop]
        slots = tables[:, places // BLOCK] * BLOCK + places % BLOCK
        lens = np.full(count, self.prompt, np.int32)
        logits = self.backend.forward(
            Batch(
                tokens=self.tokens[which.start : which.stop].reshape(-1), positions=np.tile(places, count),
                slots=slots.reshape(-1).astype(np.int32), query_lens=lens, context_lens=lens, block_tables=tables,
                rows=np.cumsum(lens, dtype=np.int32) - 1,
            )
        )  # fmt: skip
        return self.backend.sample(logits, greedy_batch(count))

    def decode(self, steps: int, first: int = 0) -> None:
        """Steps from the token after the prompt on, `first` steps in. Each takes what the one before has chosen."""
        ones, rows = np.ones(self.batch, np.int32), np.arange(self.batch, dtype=np.int32)
        before = None
        for i in range(first, first + steps):
            position = self.prompt + i
            slots = self.tables[:, position // BLOCK] * BLOCK + position % BLOCK
            places = np.full(self.batch, position, np.int32)
            logits = self.backend.forward(
                Batch(rows, places, slots, ones, places + 1, self.tables, rows, None if i == 0 else rows)
            )
            pending = self.backend.sample(logits, greedy_batch(self.batch))
            if before is not None:
                before.result()
            before = pending
        assert before is not None
        before.result()


def measure_backend(
    model: str, format: str, batches: list[int], prefills: list[int], runs: int, tuned: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Tokens/s by batch (prefill included), milliseconds a step, prefill times, watts; with tiles tuned for some."""
    spec = spec_from_config(CONFIGS[model])
    backend = CudaBackend(format="fp8" if format == "fp8" else None)
    start = time.perf_counter()
    backend.load(spec, random_weights(spec, "int4" if format == "int4" else "bf16"))
    torch.cuda.synchronize()
    found: dict[str, Any] = {"model": model, "format": format, "load_s": time.perf_counter() - start, "runs": {}}
    backend.allocate(256 * 24 + 64, BLOCK, "bf16")
    if tuned:
        found["tuned"] = backend.tune_kernels(lambda line: print(f"  {line}", flush=True), tuned)
    for batch in batches:
        prompt, output = RUNS[batch]
        run = Sequences(backend, spec.vocab_size, batch, prompt, output, 8192)
        run.prefill().result()
        run.decode(output - 1 if batch <= 8 else 5)  # few sequences change to another graph as they grow
        backend.finish_captures()
        times, decode_times, joules = [], [], []
        for _ in range(runs if batch < 64 else max(1, runs - 1)):
            torch.cuda.synchronize()
            energy, start = _energy(), time.perf_counter()
            run.prefill().result()
            middle = time.perf_counter()
            run.decode(output - 1)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            decode_times.append(times[-1] - (middle - start))
            joules.append(_energy() - energy)
        total = statistics.median(times)
        step = statistics.median(decode_times) / (output - 1)
        found["runs"][batch] = {
            "prompt": prompt, "output": output, "tokens_per_s": batch * output / total, "step_ms": 1e3 * step,
            "weights_gb_per_s": step_bytes(spec, format) / step / 1e9,
            "joules_per_token": statistics.median(joules) / (batch * output),
        }  # fmt: skip
    for length in prefills:
        run = Sequences(backend, spec.vocab_size, 1, length, 1, 8192)
        times = []
        for _ in range(8):
            backend.finish_captures()
            torch.cuda.synchronize()
            start = time.perf_counter()
            run.prefill().result()
            times.append(1e3 * (time.perf_counter() - start))
        found.setdefault("prefill_ms", {})[length] = statistics.median(times[3:])
    return found


FILE_NAMES = {
    "embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head", "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def write_folder(folder: Path, model: str) -> None:
    """A model folder with random bf16 weights and a tokenizer of as many words as the vocabulary has ids."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import WordLevel

    config = CONFIGS[model]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(config["vocab_size"])}, unk_token="w0"))
    words.decoder = ByteLevel()  # as the models themselves have it
    words.save(str(folder / "tokenizer.json"))
    writer = TensorWriter(folder, 1 << 20)
    for name, weight in random_weights(spec_from_config(config), "bf16"):
        *prefix, role = name.split(".")
        spelt = ".".join(["model", *prefix, FILE_NAMES[role]] if prefix else [FILE_NAMES[role]])
        if weight.shape[1] == 1:
            writer.add(f"{spelt}.weight", "BF16", np.full(weight.shape[0], 0x3F80, np.uint16))
        else:
            writer.add(f"{spelt}.weight", "BF16", np.ascontiguousarray(weight.data))
    writer.finish()
    writer.close()


def measure_engine(
    folder: Path, model: str, format: str, batches: list[int], runs: int, profile: bool = False
) -> dict[str, Any]:
    """The same runs as whole requests of LLM.generate, and 256 requests of 100 to 1,024 tokens in and out at once.
    profile: the last of each once more, watched."""
    llm = LLM(folder, device="cuda", format="fp8" if format == "fp8" else None)
    rng = np.random.default_rng(3)
    found: dict[str, Any] = {"model": model, "format": format, "runs": {}}

    def run(lengths: list[tuple[int, int]]) -> float:
        prompts = [rng.integers(0, CONFIGS[model]["vocab_size"], size).tolist() for size, _ in lengths]
        params = [SamplingParams(max_tokens=out, ignore_eos=True, temperature=0.0) for _, out in lengths]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        taken = time.perf_counter() - start
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == sum(out for _, out in lengths)
        return taken

    def watched(lengths: list[tuple[int, int]]) -> dict[str, float]:
        with Profile(llm.backend) as seen:  # type: ignore[arg-type]
            run(lengths)
        return seen.summary()

    for batch in batches:
        prompt, output = RUNS[batch]
        run([(prompt, 8)] * batch)
        llm.backend.finish_captures()  # type: ignore[attr-defined]
        times = [run([(prompt, output)] * batch) for _ in range(runs if batch < 64 else max(1, runs - 1))]
        found["runs"][batch] = {
            "prompt": prompt,
            "output": output,
            "tokens_per_s": batch * output / statistics.median(times),
        }
        if profile:
            found["runs"][batch]["profile"] = watched([(prompt, output)] * batch)
    lengths = [(int(a), int(b)) for a, b in rng.integers(100, 1025, (256, 2))]
    times = [run(lengths) for _ in range(2)]  # the first captures graphs beside its steps
    found["mixed_tokens_per_s"] = sum(out for _, out in lengths) / min(times)
    found["mixed_first_tokens_per_s"] = sum(out for _, out in lengths) / times[0]
    if profile:
        found["mixed_profile"] = watched(lengths)
    llm.close()
    return found


FIRST_TOKEN = """
import sys
from hasten.engine.llm import LLM
from hasten.engine.request import SamplingParams
llm = LLM(sys.argv[1], device="cuda")
print(next(llm.stream([1, 2, 3, 4], SamplingParams(max_tokens=2, ignore_eos=True))), flush=True)
"""


def first_token_seconds(folder: Path) -> list[float]:
    """From the start of a process to its first token, three times: kernels compiled, then from Triton's cache."""
    times = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(3):
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-c", FIRST_TOKEN, str(folder)],
                stdout=subprocess.PIPE, env=os.environ | {"TRITON_CACHE_DIR": cache},
            )  # fmt: skip
            assert process.stdout is not None
            assert process.stdout.readline()
            times.append(time.perf_counter() - start)
            assert process.wait() == 0
    return times


def _energy() -> float:
    """Joules that the GPU has used since the driver was loaded; NaN where NVML does not say."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except Exception:
        return float("nan")


def report(found: dict[str, Any], bandwidth: float) -> None:
    model, format = found["model"], found["format"]
    speeds, prefills = VLLM.get((model, format), ({}, {}))
    print(f"{model} {format}: loaded in {found['load_s']:.1f} s")
    for batch, run in found["runs"].items():
        versus = f"{run['tokens_per_s'] / speeds[batch]:.2f}x vLLM" if batch in speeds else ""
        share = run["weights_gb_per_s"] * 1e9 / bandwidth
        print(
            f"  batch {batch:3}: {run['tokens_per_s']:8.0f} tokens/s, {run['step_ms']:7.3f} ms a step, "
            f"{100 * share:3.0f} % of copy, {run['joules_per_token']:.3f} J/token  {versus}",
            flush=True,
        )
    for length, ms in found.get("prefill_ms", {}).items():
        versus = f"{prefills[length] / ms:.2f}x vLLM" if length in prefills else ""
        print(f"  prefill {length}: {ms:.1f} ms  {versus}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="8b,0.6b")
    parser.add_argument("--formats", default="bf16,fp8,int4")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--prefills", default="1024,4000")
    parser.add_argument("--engine", action="store_true", help="also through LLM, with a model folder on disk")
    parser.add_argument("--profile", action="store_true", help="with --engine: graphs, host time and idle device")
    parser.add_argument("--skip-backend", action="store_true", help="only what --engine adds")
    parser.add_argument("--tune", default="", help="batch sizes whose tiles are tried first")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--runs", type=int, default=3, help="of each batch size; one less from 64 on")
    options = parser.parse_args()
    name = torch.cuda.get_device_name().replace("NVIDIA ", "").lower().replace(" ", "-")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s; torch {torch.__version__}", flush=True)
    batches = [int(b) for b in options.batches.split(",") if b]
    prefills = [int(p) for p in options.prefills.split(",") if p]
    tuned = tuple(int(b) for b in options.tune.split(",") if b)
    summary: dict[str, Any] = {"gpu": name, "torch": torch.__version__, "copy_bytes_per_s": bandwidth}
    options.out.mkdir(parents=True, exist_ok=True)
    for model in options.models.split(","):
        for format in [] if options.skip_backend else options.formats.split(","):
            found = measure_backend(model, format, batches, prefills, options.runs, tuned)
            report(found, bandwidth)
            summary.setdefault("backend", []).append(found)
            torch.cuda.empty_cache()
            write(options.out / f"{name}.json", summary)
        if options.engine:
            with tempfile.TemporaryDirectory() as folder:
                write_folder(Path(folder), model)
                seconds = first_token_seconds(Path(folder))
                said = ", ".join(f"{each:.1f}" for each in seconds)
                print(f"{model} process start to first token: {said} s, nothing compiled before the first", flush=True)
                summary.setdefault("first_token_s", {})[model] = seconds
                for format in options.formats.split(","):
                    if format not in ("bf16", "fp8"):
                        continue
                    found = measure_engine(Path(folder), model, format, batches, options.runs, options.profile)
                    report_engine(found)
                    summary.setdefault("engine", []).append(found)
                    torch.cuda.empty_cache()
                    write(options.out / f"{name}.json", summary)


def write(path: Path, summary: dict[str, Any]) -> None:
    path.write_text(json.dumps(summary, indent=1) + "\n")


def report_engine(found: dict[str, Any]) -> None:
    speeds, _ = VLLM.get((found["model"], found["format"]), ({}, {}))
    for batch, run in found["runs"].items():
        versus = f"{run['tokens_per_s'] / speeds[batch]:.2f}x vLLM" if batch in speeds else ""
        print(f"  LLM batch {batch:3}: {run['tokens_per_s']:8.0f} tokens/s  {versus}", flush=True)
        report_profile(run.get("profile"))
    mixed = VLLM_MIXED.get((found["model"], found["format"]))
    versus = f"{found['mixed_tokens_per_s'] / mixed:.2f}x vLLM" if mixed else ""
    print(f"  LLM 256 mixed requests: {found['mixed_tokens_per_s']:.0f} tokens/s  {versus}", flush=True)
    report_profile(found.get("mixed_profile"))


if __name__ == "__main__":
    main()
