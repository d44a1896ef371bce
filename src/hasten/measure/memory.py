"""A model in use in a fresh process, where nothing that was loaded before counts: its peak memory, and what it says.
On a GPU, peak memory is the GPU's."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hasten.errors import HastenError, ResourceError

NUM_TOKENS = 64


@dataclass(frozen=True, slots=True)
class FreshRun:
    """Peak resident bytes, and the tokens that continue the prompt greedily. The weights' file is mapped; its pages
    count while they are resident. On a GPU the peak is of what torch has allocated there."""

    peak: int
    tokens: list[int]


def peak_memory(folder: str | Path, prompt: list[int], threads: int | None = None, kv_cache: str | None = None) -> int:
    """The peak of run_fresh."""
    return run_fresh(folder, prompt, threads, kv_cache).peak


def run_fresh(
    folder: str | Path,
    prompt: list[int],
    threads: int | None = None,
    kv_cache: str | None = None,
    device: str = "cpu",
) -> FreshRun:
    """A process loads `folder` and continues `prompt` by up to 64 tokens. threads, kv_cache, device: as of LLM.
    HastenError where the process fails."""
    given = {"folder": str(folder), "prompt": prompt, "threads": threads, "kv_cache": kv_cache, "device": device}
    request = json.dumps(given)
    done = subprocess.run([sys.executable, "-m", __name__], input=request, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise HastenError(f"{folder} does not run in a fresh process: {lines[-1] if lines else done.returncode}")
    return FreshRun(**json.loads(done.stdout))


def _serve() -> None:
    from hasten.engine.llm import LLM
    from hasten.engine.request import SamplingParams

    request = json.load(sys.stdin)
    on_gpu = request["device"] != "cpu"
    llm = LLM(
        request["folder"],
        device=request["device"],
        threads=request["threads"],
        kv_cache=request["kv_cache"],
        max_sequences=1 if on_gpu else None,  # or the cache takes all of a GPU
        max_step_tokens=512 if on_gpu else None,
    )
    room = llm.max_len - len(request["prompt"])
    found = llm.generate([request["prompt"]], SamplingParams(max_tokens=min(NUM_TOKENS, room), temperature=0.0))
    peak = _gpu_peak() if on_gpu else resident_peak()
    print(json.dumps({"peak": peak, "tokens": list(found[0].outputs[0].token_ids)}))


def _gpu_peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated()


def resident_peak() -> int:
    """Peak resident bytes of this process so far."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        raise ResourceError("peak memory cannot be read here: there is no /proc/self/status") from None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    _serve()
