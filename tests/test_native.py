"""tests/native, built with the address and undefined-behaviour sanitizers and run. One instruction set and the portable
kernels, unoptimised, which compile in a minute; scripts/sanitize.sh runs all of them, and the thread sanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cmake = shutil.which("cmake")
    if cmake is None or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("needs cmake and a C++ compiler")
    folder = tmp_path_factory.mktemp("native")
    options = ["PYTHON=OFF", "NATIVE_TESTS=ON", "QUICK=ON", "SANITIZE=address,undefined"]
    subprocess.run([cmake, "-S", ROOT, "-B", folder, *(f"-DHASTEN_{option}" for option in options)], check=True)
    jobs = str(len(os.sched_getaffinity(0)))
    subprocess.run([cmake, "--build", folder, "--parallel", jobs], check=True)
    return folder


@pytest.mark.parametrize("name", ["pool", "products", "decoder"])
def test_native(name: str, built: Path) -> None:
    environment = {**os.environ, "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    done = subprocess.run([built / f"test_{name}"], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
