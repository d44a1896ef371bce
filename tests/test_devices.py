"""Choosing a device: the CPU where there is no GPU, one clear line where one is asked for in vain, and torch is not
imported for nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hasten.backends as backends
from hasten.backends import missing_for_cuda, open_backend
from hasten.errors import RequestError, ResourceError


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A path that passes for NVIDIA's driver, not there yet."""
    path = tmp_path / "nvidiactl"
    monkeypatch.setattr(backends, "_DRIVER", (path,))
    return path


def test_without_a_driver_auto_is_the_cpu(driver: Path) -> None:
    pytest.importorskip("hasten._core")
    assert type(open_backend()).__name__ == "CpuBackend"
    with pytest.raises(ResourceError, match=r"device cuda cannot be used: no NVIDIA driver was found.*--device cpu"):
        open_backend("cuda")


def test_without_torch_the_extra_is_named(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.touch()
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert missing_for_cuda() == "torch and Triton are not installed: pip install 'hasten[cuda]'"
    with pytest.raises(ResourceError, match=r"pip install 'hasten\[cuda\]'"):
        open_backend("cuda")


def test_a_torch_that_sees_no_gpu_says_so(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    driver.touch()
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no GPU: update the driver" in str(missing_for_cuda())


def test_without_a_compiler_triton_is_of_no_use(driver: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    driver.touch()
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs a C compiler and gcc or clang was not found: install gcc" in str(missing_for_cuda())
    compiler = tmp_path / "cc"
    compiler.touch(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(backends.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert f"{tmp_path} has none: install python3-dev" in str(missing_for_cuda())
    (tmp_path / "Python.h").touch()
    assert missing_for_cuda() is None


def test_what_a_cpu_cannot_do_is_refused(driver: Path) -> None:
    with pytest.raises(RequestError, match="device is 'tpu', expected one of auto, cpu, cuda, reference"):
        open_backend("tpu")
    with pytest.raises(RequestError, match="format fp8 on load needs a GPU"):
        open_backend("auto", format="fp8")


def test_choosing_imports_no_torch_where_there_is_no_driver() -> None:
    code = (
        "import sys, hasten.backends as b\n"
        "from pathlib import Path\n"
        "b._DRIVER = (Path('/nowhere'),)\n"
        "b.open_backend('reference'); b.open_backend('auto')\n"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    pytest.importorskip("hasten._core")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from hasten.backends.cuda.device import open_device

    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda handle: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda handle: "Old GPU")
    with pytest.raises(ResourceError, match=r"Old GPU has compute capability 7.5, expected 8.0 or newer: .*cpu"):
        open_device("cuda:0")


def test_a_gpus_memory_that_does_not_suffice_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from hasten.backends.cuda import CudaBackend, backend, load
    from hasten.model.checkpoint import open_checkpoint

    def full(*args: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    checkpoint = open_checkpoint(tiny_model("llama"))
    ready = CudaBackend(device="cpu")
    ready.load(checkpoint.spec, checkpoint.weights())
    monkeypatch.setattr(backend, "Attention", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda handle: (5_000_000_000, 80_000_000_000))
    with pytest.raises(ResourceError, match=r"KV cache needs .* 5.0 GB are free: lower max_len or memory, or use kv"):
        ready.allocate(64, 16, "bf16")
    monkeypatch.setattr(load, "_merged", full)
    facts = type("Facts", (), {"total_memory": 8e10})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda handle: facts)
    with pytest.raises(ResourceError, match=r"weights do not fit the GPU's 80.0 GB: use a smaller format"):
        CudaBackend(device="cpu").load(checkpoint.spec, checkpoint.weights())
