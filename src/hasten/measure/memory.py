"""Peak memory of a model in use, in a fresh process: nothing that was loaded before counts, nothing is shared."""

import json
import subprocess
import sys
from pathlib import Path

from hasten.errors import HastenError, ResourceError

NUM_TOKENS = 64


def peak_memory(folder: str | Path, prompt: list[int], threads: int | None = None, kv_cache: str | None = None) -> int:
    """Peak resident bytes of a process that loads `folder` and continues `prompt` by up to 64 tokens. The weights' file
    is mapped; its pages count while they are resident. threads, kv_cache: as of LLM. HastenError where the process
    fails."""
    request = json.dumps({"folder": str(folder), "prompt": prompt, "threads": threads, "kv_cache": kv_cache})
    done = subprocess.run([sys.executable, "-m", __name__], input=request, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise HastenError(f"{folder} does not run in a fresh process: {lines[-1] if lines else done.returncode}")
    return int(json.loads(done.stdout)["peak"])


def _serve() -> None:
    from hasten.engine.llm import LLM
    from hasten.engine.request import SamplingParams

    request = json.load(sys.stdin)
    llm = LLM(request["folder"], threads=request["threads"], kv_cache=request["kv_cache"])
    room = llm.max_len - len(request["prompt"])
    llm.generate([request["prompt"]], SamplingParams(max_tokens=min(NUM_TOKENS, room), temperature=0.0))
    print(json.dumps({"peak": resident_peak()}))


def resident_peak() -> int:
    """Peak resident bytes of this process so far."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        raise ResourceError("peak memory cannot be read here: there is no /proc/self/status") from None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    _serve()
