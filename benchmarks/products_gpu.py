"""Ways of multiplying by compressed weights on an NVIDIA GPU, by rows of the input: what tuning.py's limits come from.

    python benchmarks/products_gpu.py [--rows 1,8,64,128,256,1024,4096] [--only WAY] [--json FILE]

Milliseconds of one layer's four products at the Llama-3.1-8B shape (q/k/v, o, gate and up with SiLU, down), one after
the other in a CUDA graph, their inputs in bf16: bf16; int8 unpacked by the kernel that multiplies, or once for cuBLAS,
or multiplied by inputs rounded to int8; 2:4 in bf16 and in int8, unpacked by the kernel, or once. Weights are random.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton

from hasten.backends.cuda import linear, sparse
from hasten.backends.cuda.device import Device, open_device
from hasten.backends.cuda.linear import Linear
from hasten.backends.cuda.matrix import DENSE, INT8, Matrix
from hasten.backends.cuda.ops import Ops
from hasten.backends.cuda.tuner import graph_ms

SHAPES = ((6144, 4096, False), (4096, 4096, False), (28672, 4096, True), (4096, 14336, False))
NEVER = 1 << 30
# "in the product" is up to 256 rows; with more it is what follows.
# Way -> kind, 2:4, rows up to which its kernel unpacks, rows from which int8 meets int8.
WAYS = {
    "bf16": (DENSE, False, 64, NEVER),
    "int8, unpacked in the product": (INT8, False, 256, NEVER),
    "int8, unpacked for cuBLAS": (INT8, False, 0, NEVER),
    "W8A8": (INT8, False, 0, 0),
    "2:4 bf16 in the product": (DENSE, True, 256, NEVER),
    "2:4 bf16 for cuBLAS": (DENSE, True, 1, NEVER),
    "2:4 int8 in the product": (INT8, True, 256, NEVER),
}


@contextmanager
def limits(kind: int, is_sparse: bool, few: int, int8: int) -> Iterator[None]:
    """Have products take one way."""
    old = linear.FEW_ROWS, linear.SPARSE_ROWS, linear.INT8_ROWS
    linear.FEW_ROWS = {**linear.FEW_ROWS, **({} if is_sparse else {kind: few})}
    linear.SPARSE_ROWS, linear.INT8_ROWS = few, int8
    try:
        yield
    finally:
        linear.FEW_ROWS, linear.SPARSE_ROWS, linear.INT8_ROWS = old


def layer(device: Device, kind: int, is_sparse: bool) -> list[Linear]:
    """Four products with random weights."""
    made = []
    ops = Ops(device, False, 1e-5)
    for n, k, gated in SHAPES:
        shape = (n, k // 2 if is_sparse else k)
        if kind == DENSE:
            data = torch.randn(shape, dtype=torch.bfloat16, device=device.handle) / 64
        else:
            data = torch.randint(-127, 128, shape, dtype=torch.int8, device=device.handle)
        scales = None if kind == DENSE else torch.full((1, n), 1e-4, device=device.handle)
        mask = None
        if is_sparse:
            pairs = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8, device=device.handle)
            low, high = (pairs[torch.randint(6, (n, k // 8), device=device.handle)] for _ in range(2))
            mask = sparse.packed_mask(low | high << 4, k)
        matrix = Matrix(kind, n, k, data, scales, mask=mask, int8_inputs=True)
        made.append(Linear(device, ops, [matrix], None, gated, False))
    return made


def milliseconds(linears: list[Linear], rows: int) -> float:
    inputs = [torch.randn((rows, linear.k), dtype=torch.bfloat16, device=linear.device.handle) for linear in linears]

    def run() -> None:
        for product, x in zip(linears, inputs, strict=True):
            product(x, activation="silu" if product.gated else "none")

    return graph_ms(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,64,128,256,1024,4096")
    parser.add_argument("--only", action="append", metavar="WAY")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [int(count) for count in arguments.rows.split(",")]
    device = open_device("cuda")
    found: dict[str, dict[int, float]] = {}
    print(f"| ms a layer | {' | '.join(f'{count} rows' for count in rows)} |\n|---|{'---|' * len(rows)}")
    for way, (kind, is_sparse, few, int8) in WAYS.items():
        if arguments.only and way not in arguments.only:
            continue
        linears = layer(device, kind, is_sparse)
        with torch.inference_mode(), limits(kind, is_sparse, few, int8):
            found[way] = {count: milliseconds(linears, count) for count in rows}
        print(f"| {way} | {' | '.join(f'{value:.3f}' for value in found[way].values())} |", flush=True)
    if arguments.json:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        arguments.json.write_text(json.dumps({**about, "layer_ms": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
