"""What steps of an engine on a GPU are made of: graphs or kernel by kernel, the host's time, the device's idle time."""

import statistics
import time
from typing import Any

import torch

from hasten.backends.base import Batch
from hasten.backends.cuda import CudaBackend
from hasten.backends.cuda.sampling import PendingSample


class Profile:
    """A context in which steps are watched: how many were graphs, what the host took for one beside waiting for the
    device, and how long the device had nothing to do between two. Costs a few microseconds a step."""

    def __init__(self, backend: CudaBackend) -> None:
        self._backend = backend
        self._spans: list[tuple[Any, Any]] = []
        self._launching: list[float] = []
        self._replays = 0
        self._waited = 0.0

    def __enter__(self) -> "Profile":
        backend, forward, sample = self._backend, self._backend.forward, self._backend.sample
        self._replay, self._result = torch.cuda.CUDAGraph.replay, PendingSample.result

        def timed_forward(batch: Batch) -> Any:
            start, event = time.perf_counter(), torch.cuda.Event(enable_timing=True)
            event.record()
            logits = forward(batch)
            self._spans.append((event, torch.cuda.Event(enable_timing=True)))
            self._launching.append(time.perf_counter() - start)
            return logits

        def timed_sample(logits: Any, params: Any) -> Any:
            pending = sample(logits, params)
            self._spans[-1][1].record()
            return pending

        def counted(graph: Any) -> None:
            self._replays += 1
            self._replay(graph)

        def awaited(pending: Any) -> Any:
            start = time.perf_counter()
            found = self._result(pending)
            self._waited += time.perf_counter() - start
            return found

        backend.forward, backend.sample = timed_forward, timed_sample  # type: ignore[method-assign]
        torch.cuda.CUDAGraph.replay, PendingSample.result = counted, awaited  # type: ignore[method-assign]
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize()
        self._taken = time.perf_counter() - self._start
        del self._backend.forward, self._backend.sample  # the class's own are found again
        torch.cuda.CUDAGraph.replay, PendingSample.result = self._replay, self._result  # type: ignore[method-assign]

    def summary(self) -> dict[str, float]:
        spans, steps = self._spans, len(self._spans)
        gaps = [max(0.0, spans[i][1].elapsed_time(spans[i + 1][0])) for i in range(steps - 1)]
        return {
            "seconds": self._taken,
            "steps": steps,
            "graphs": self._replays,
            "step_ms": statistics.median(start.elapsed_time(end) for start, end in spans),
            "launch_ms": 1e3 * statistics.median(self._launching),
            "longest_launch_ms": 1e3 * max(self._launching),
            "host_ms": 1e3 * (self._taken - self._waited) / steps,
            "wait_ms": 1e3 * self._waited / steps,
            "idle_share": sum(gaps) / (1e3 * self._taken),
        }


def report_profile(seen: dict[str, float] | None) -> None:
    """A line, where there was a profile."""
    if seen is None:
        return
    print(
        f"    {seen['seconds']:.2f} s: {seen['steps']} steps, {seen['graphs']} of them graphs, {seen['step_ms']:.2f} ms"
        f" each on the device, idle for {seen['idle_share']:.1%}; the host: {seen['host_ms']:.2f} ms a step (launching"
        f" {seen['launch_ms']:.2f}, at most {seen['longest_launch_ms']:.0f}), waiting {seen['wait_ms']:.2f}",
        flush=True,
    )
