"""Kernels of the CUDA backend go through Triton's front end, some of them to machine code; that needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

KERNELS = {
    "activate_rows", "add_norm", "argmax", "decode", "decode_few", "embed", "expand", "expand24", "gemv", "gemv24",
    "gemv_columns", "gemv_int4", "prefill", "product8", "race", "rope_and_store", "route", "skinny", "skinny24",
}  # fmt: skip


def test_every_kernel_compiles() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} == KERNELS
