"""Takes every kernel of the CUDA backend through Triton's front end, and some to machine code, for an H100, which need
not be there: the interpreter takes programs that the compiler refuses. Nothing is computed. test_cuda_compile.py runs
this in a process of its own, without the interpreter; it prints how often each kernel was compiled."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from traceback import extract_tb
from typing import Any

import numpy as np
import torch
from attention_tools import CASES, check_attention
from cuda_tools import check_experts, check_low_rank, check_normed, check_product
from sampling_tools import check_draws, check_sampling
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import JITFunction

import hasten
from hasten.model.formats import Format

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv", torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8",
    torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
ON_A_GPU = {"ASM", "PDL"}
OPTIONS = ("num_warps", "num_stages", "launch_pdl")
WHOLE = {"decode_few", "gemv_int4", "prefill"}  # with inline assembly: their first variants become machine code
SHARED = 227 << 10
SEEN: set[tuple[str, str]] = set()
COUNTS: Counter[str] = Counter()


def compiled(kernel: JITFunction, *args: Any, grid: object, warmup: bool, **given: Any) -> None:
    """In place of a launch."""
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    values = dict(zip(kernel.arg_names, args, strict=False)) | given
    assert set(values) == set(kernel.arg_names), set(values) ^ set(kernel.arg_names)
    signature, constants = {}, {}
    for param in kernel.params:
        value = values[param.name]
        if param.is_constexpr:
            signature[param.name], constants[param.name] = "constexpr", param.name in ON_A_GPU or value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = TYPES[value.dtype]
        elif isinstance(value, int) and value == 1:  # as Triton does
            signature[param.name], constants[param.name] = "constexpr", 1
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
    name = kernel.fn.__name__
    key = name, f"{signature} {constants}"
    if key in SEEN:
        return
    SEEN.add(key)
    COUNTS[name] += 1
    source = ASTSource(kernel, signature, constants)
    if name in WHOLE and COUNTS[name] == 1:
        assert compile(source, TARGET, options).metadata.shared <= SHARED
        return
    if name == "skinny" and constants["BM"] == 64 and not COUNTS["skinny of 64 rows"]:
        COUNTS["skinny of 64 rows"] += 1
        text = compile(source, TARGET, options).asm["ptx"]
        assert 0 < text.find("prefetch.global.L2") < text.find("griddepcontrol.wait"), "weights are fetched too late"
        return
    backend = make_backend(TARGET)
    parsed, context = backend.parse_options(options), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(TARGET, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)


@contextmanager
def uncomputed() -> Iterator[None]:
    """The tests' own checks fail on what nothing has computed; others do not."""
    try:
        yield
    except (AssertionError, IndexError) as error:
        where = extract_tb(error.__traceback__)[-1].filename
        if where == __file__ or Path(hasten.__file__).parent in Path(where).parents:
            raise


@np.errstate(all="ignore")
def main() -> None:
    JITFunction.run = compiled

    variants: tuple[dict[str, Any], ...] = (
        {}, {"head_dim": 80}, {"window": 20, "softcap": 5.0}, {"dtype": "fp32", "kv": "fp32"},
        {"kv": "fp8", "heads": 6, "normed": True},
    )  # fmt: skip
    for case, variant in product(CASES.values(), variants):
        with uncomputed():
            check_attention("cpu", **case, **variant)
    formats = [
        *(Format(kind) for kind in ("bf16", "fp32", "int8", "fp8")), Format("int8", 32), Format("int4", 32),
        Format("int4", 64, False), Format("fp8", 64), Format("int8", activations="int8"), None,
        *(Format(kind, sparse24=True) for kind in ("bf16", "fp16", "int8", "fp8")),
    ]  # fmt: skip
    for format, rows, gated in product(formats, (1, 3, 70), (False, True)):
        dtype = "fp32" if format is not None and format.kind == "fp32" else "bf16"
        with uncomputed():
            check_product("cpu", format, dtype, rows, 64, 256, gated, 0.0, 0)
    for format in (Format("int4", 128), Format("bf16", sparse24=True)):
        with uncomputed():
            check_normed(format, True)
    for format, rows in product((Format("fp32"), Format("int8"), Format("fp8")), (1, 3)):
        with uncomputed():
            check_experts("cpu", format, "fp32", rows, (64, 48, 4, 2, 1), 0.0)
    with uncomputed():
        check_low_rank("cpu", [20, 1], 0.0)
    with uncomputed():
        check_sampling("cpu", 24, 211, 0)
    with uncomputed():
        check_draws("cpu", 1500)
    print(*(f"{name} {count}" for name, count in sorted(COUNTS.items())), sep="\n")


if __name__ == "__main__":
    main()
