"""Choosing a device: the CPU where there is no GPU, one clear line where one is asked for in vain, and torch is not
imported for nothing."""

import subprocess
import sys
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
