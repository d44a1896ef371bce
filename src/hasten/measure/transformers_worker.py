"""The original as users run it today: Transformers' `generate`, in a process of its own.

The process keeps torch, its threads and its memory away from what is measured here; it is asked for one timing at a
time, so that it takes its turn in interleaved rounds. Run as a module it is the worker: JSON lines in and out.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from hasten.errors import HastenError
from hasten.measure.speed import Timing, Workload


def available() -> bool:
    """Whether torch and transformers are installed; imports neither."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


class TransformersWorker:
    """A model loaded by Transformers in another process, with as many threads, on a device ("cpu", "cuda").
    HastenError where it cannot run it."""

    def __init__(self, folder: Path, threads: int, device: str = "cpu") -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        command = [sys.executable, "-m", __name__, str(folder), str(threads), device]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.versions: dict[str, str] = self._answer()

    def __enter__(self) -> "TransformersWorker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def time(self, work: Workload) -> Timing:
        """One run of a greedy workload."""
        assert self._process.stdin is not None
        assert work.temperature == 0
        print(
            json.dumps({"prompts": work.prompts, "num_tokens": work.num_tokens}), file=self._process.stdin, flush=True
        )
        return Timing(**self._answer())

    def peak_memory(self) -> int:
        """Peak resident bytes of the process so far."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._errors.seek(0)
        lines = [text.strip() for text in self._errors.read().splitlines() if text.strip()]
        self._process.wait()
        raise HastenError(f"Transformers cannot run this model: {lines[-1] if lines else 'its process ended'}")


def _serve(folder: str, threads: int, device: str) -> None:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(device)  # type: ignore[no-untyped-call]

    def seconds(ids: Any, num_tokens: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=num_tokens,
                max_new_tokens=num_tokens, pad_token_id=0,
            )  # fmt: skip
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ids = torch.tensor(request["prompts"], device=device)
        first = seconds(ids, 1)
        num_after = ids.shape[0] * (request["num_tokens"] - 1)
        decode = num_after / max(seconds(ids, request["num_tokens"]) - first, 1e-9) if num_after else 0.0
        print(json.dumps({"decode": decode, "prefill": ids.numel() / first, "ttft": first}), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
