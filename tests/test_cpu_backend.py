"""What the native backend refuses, and in which words; its environment variables; its probes."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_core = pytest.importorskip("hasten._core", reason="the compiled core is not built: run scripts/build.sh")
pytest.importorskip("torch")

from cpu_tools import batch, load, table  # noqa: E402

from hasten.backends.base import Batch  # noqa: E402
from hasten.backends.cpu import CpuBackend  # noqa: E402
from hasten.engine.sampling import greedy_batch  # noqa: E402
from hasten.errors import ModelError, ResourceError  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.model.formats import Weight, dense_weight  # noqa: E402

Change = Callable[[dict[str, Weight]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.1.k"), "layers.1.k is missing"),
        (lambda w: w.pop("layers.2.o"), "layers.2.o is missing"),
        (lambda w: w.pop("layers.0.mlp_norm"), "layers.0.mlp_norm is missing"),
        (lambda w: w.pop("embed"), "embed is missing"),
        (lambda w: w.pop("head"), "head is missing"),
        (lambda w: w.update(extra=dense_weight(np.zeros((3, 4), np.float32))), "extra is not part"),
        (lambda w: w.update({"layers.0.q_norm": dense_weight(np.zeros(12, np.float32))}), "q_norm is not part"),
        (
            lambda w: w.update({"layers.0.q": dense_weight(np.zeros((72, 71), np.float32))}),
            r"\[72, 71\], expected \[72, 72\]",
        ),
        (lambda w: w.update({"final_norm": dense_weight(np.zeros(71, np.float32))}), "71 numbers, expected 72"),
        (
            lambda w: w.update({"layers.0.o": replace(w["layers.0.o"], data=np.zeros((72, 70), np.float32))}),
            "does not fit",
        ),
    ],
)
def test_damaged_models_are_refused(change: Change, message: str, tiny_model: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))
    weights = dict(checkpoint.weights())
    change(weights)
    with pytest.raises(ModelError, match=message):
        CpuBackend(2).load(checkpoint.spec, weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [3, 307]}, "token 307 is outside"),
        ({"slots": [0, 40 * 16]}, "slot 640 is outside"),
        ({"slots": [5, 5]}, "slot 5, which is not its place"),
        ({"rows": [2]}, "row 2 is outside"),
        ({"rows": [1, 1]}, "not ascending"),
        ({"positions": [0, 2]}, "token 1 has position 2, expected 1"),
        ({"context_lens": [3]}, "expected 1 from"),
        ({"query_lens": [1], "context_lens": [1]}, "sum to 1"),
        ({"query_lens": [3], "context_lens": [3]}, "3 queries"),
        ({"block_tables": [[40]]}, "block 40 is outside"),
        ({"block_tables": np.zeros((1, 0))}, "longer than its block table"),
        ({"positions": [0]}, "1 entries, expected 2"),
    ],
)
def test_impossible_batches_are_refused(changes: dict[str, Any], message: str, tiny_model: Callable[..., Path]) -> None:
    backend = load(tiny_model("llama"))
    good = batch([(np.array([3, 4], np.int32), 0, table(1))])
    backend.forward(good)
    with pytest.raises(ValueError, match=message):
        backend.forward(replace(good, **{name: np.array(value, np.int32) for name, value in changes.items()}))


def test_cache_errors(tiny_model: Callable[..., Path]) -> None:
    backend = load(tiny_model("llama"))
    with pytest.raises(ResourceError, match="multiple of 16"):
        backend.allocate(4, 24, "bf16")
    with pytest.raises(ResourceError, match="more slots than 32 bits"):
        backend.allocate(2**28, 16, "bf16")
    with pytest.raises(ResourceError, match="fp8"):
        backend.block_bytes(16, "fp8")
    assert backend.block_bytes(32, "fp32") == 2 * backend.block_bytes(16, "fp32") == 2 * backend.block_bytes(32, "bf16")
    with pytest.raises(ValueError, match="block 40"):
        backend.copy_blocks([(0, 40)])
    with pytest.raises(ModelError, match="load"):
        CpuBackend(1).allocate(4, 16, "bf16")


def test_a_core_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _core.interface
    for found, word in ((expected - 1, "older"), (expected + 1, "newer")):
        monkeypatch.setattr(_core, "interface", found)
        with pytest.raises(ResourceError, match=f"is {word} than .* expected {expected}.: build it again"):
            CpuBackend(1)
    monkeypatch.delattr(_core, "interface")
    with pytest.raises(ResourceError, match="older"):
        CpuBackend(1)


def test_two_threads_share_a_backend(tiny_model: Callable[..., Path]) -> None:
    """Each step is done by itself: without a lock, the pool's phases and the steps' buffers mix, and it crashes."""
    backend = load(tiny_model("llama"), threads=3)
    steps = [batch([(np.arange(3, 3 + count, dtype=np.int32), 0, table(1))], rows=[0]) for count in (50, 9)]
    logits = np.random.default_rng(0).normal(size=(256, 5_000)).astype(np.float32)
    best = logits.argmax(axis=1).tolist()
    failures: list[BaseException] = []
    end = time.monotonic() + 1.5

    def work(step: Batch) -> None:
        try:
            while time.monotonic() < end:
                assert backend.forward(step).shape[0] == 1
                assert backend.sample(logits, greedy_batch(256)).tokens.tolist() == best
                backend.copy_blocks([(38, 39)])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(step,), daemon=True) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not failures
    assert np.isfinite(backend.forward(steps[0])).all()


def test_threads_that_the_system_refuses_are_one_line() -> None:
    """In a process of its own, which an exception from a half-made pool would end."""
    code = """
import resource
from hasten.backends.cpu import CpuBackend
from hasten.errors import ResourceError

CpuBackend(1)  # everything is imported and mapped
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (12 << 20), limits[1]))  # one stack, and no more
try:
    CpuBackend(4)
except ResourceError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, limits)
print(CpuBackend(2).threads)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    refusal, threads = done.stdout.splitlines()
    assert re.fullmatch(r"the system gave [123] of 4 threads \(.*\); ask for fewer threads", refusal)
    assert threads == "2"


def test_absurdly_many_threads_are_refused() -> None:
    with pytest.raises(ResourceError, match=r"threads is 100000, expected 0 \(all cores\) to \d+, four for each CPU"):
        CpuBackend(100_000)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_ISA", "portable")
    monkeypatch.setenv("HASTEN_THREADS", "3")
    backend = CpuBackend()
    assert (backend.isa, backend.threads) == ("portable", 3)
    assert CpuBackend(1, _core.isas()[0]).threads == 1
    monkeypatch.setenv("HASTEN_ISA", "mmx")
    with pytest.raises(ResourceError, match="'mmx' is not available here, only"):
        CpuBackend()
    monkeypatch.delenv("HASTEN_ISA")
    monkeypatch.setenv("HASTEN_THREADS", "many")
    with pytest.raises(ResourceError, match="'many'"):
        CpuBackend()


def test_missing_core_is_a_clear_error() -> None:
    code = (
        "import sys; sys.modules['hasten._core'] = None\n"
        "from hasten.backends.cpu import CpuBackend\n"
        "from hasten.errors import ResourceError\n"
        "try: CpuBackend()\n"
        "except ResourceError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "compiled core" in out
    assert "scripts/build.sh" in out


def test_probes_measure_something() -> None:
    assert _core.read_bandwidth(1, 1 << 24, 0.02) > 1e8
    assert _core.arithmetic_peak("int8", 1, 0.02) > 1e8
    assert _core.arithmetic_peak("bf16", 1, 0.02) > 1e8
    with pytest.raises(ValueError, match="fp8"):
        _core.arithmetic_peak("fp8", 1, 0.02)


def test_old_logits_stay_readable(tiny_model: Callable[..., Path]) -> None:
    """A later, larger step takes a new buffer: the earlier array must not point to freed memory."""
    backend = load(tiny_model("llama"))
    first = backend.forward(batch([(np.array([3], np.int32), 0, table(1))]))
    want = first.copy()
    backend.forward(batch([(np.arange(3, 103, dtype=np.int32), 0, table(1))]))
    del backend
    assert np.array_equal(first, want)
