"""Every weight format and KV cache of the native backend against the numpy reference, which quantises alike."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

_core = pytest.importorskip("hasten._core", reason="the compiled core is not built: run scripts/build.sh")
pytest.importorskip("torch")

import tiny_models  # noqa: E402
from cpu_tools import BLOCK, NUM_BLOCKS, batch, table  # noqa: E402

from hasten.backends.base import Backend  # noqa: E402
from hasten.backends.cpu import CpuBackend  # noqa: E402
from hasten.backends.reference import ReferenceBackend  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.model.formats import Format, Weight, dense_weight, dequantize, quantize  # noqa: E402
from hasten.model.spec import ModelSpec  # noqa: E402

TOKENS = np.random.default_rng(0).integers(3, tiny_models.VOCAB, 60).astype(np.int32)
FORMATS = [
    Format("fp16"),
    Format("bf16"),
    Format("int8"),
    Format("int8", 32),
    Format("int4", 32),
    Format("int4", 64, symmetric=False),
    Format("int4", 128),
    Format("fp8"),
    Format("bf16", sparse24=True),
    Format("int8", sparse24=True),
    Format("int4", 32, sparse24=True),
]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> tuple[ModelSpec, dict[str, Weight]]:
    checkpoint = open_checkpoint(tiny_model("qwen3", hidden_size=128, intermediate_size=256, num_attention_heads=8))
    return checkpoint.spec, {name: dense_weight(dequantize(weight)) for name, weight in checkpoint.weights()}


def stored(weights: dict[str, Weight], formats: dict[str, Format]) -> Iterator[tuple[str, Weight]]:
    """Matrices by the last part of their name, or "" for all others, in these formats."""
    for name, weight in weights.items():
        form = formats.get(name.split(".")[-1], formats.get(""))
        if weight.shape[1] == 1 or form is None:
            yield name, weight
        elif form.sparse24:
            values = dequantize(weight).copy()
            values.reshape(len(values), -1, 4)[..., 1::2] = 0
            yield name, quantize(values, form)
        elif form.kind in ("fp8", "int8", "int4"):
            yield name, quantize(dequantize(weight), form)
        else:
            yield name, dense_weight(dequantize(weight), form.kind)


def logits(backend: Backend, spec: ModelSpec, weights: Iterator[tuple[str, Weight]], kv: str) -> np.ndarray:
    backend.load(spec, weights)
    backend.allocate(NUM_BLOCKS, BLOCK, kv)
    return backend.forward(batch([(TOKENS, 0, table(1))])).copy()


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_formats_equal_the_reference(form: Format, isa: str, model: tuple[ModelSpec, dict[str, Weight]]) -> None:
    """An activation on the edge between two integers may fall to the other side: such a step moves the logits by about
    1 %, a wrong scale or column by far more."""
    spec, weights = model
    want = logits(ReferenceBackend(act_quant=True), spec, stored(weights, {"": form}), "fp32")
    got = logits(CpuBackend(2, isa), spec, stored(weights, {"": form}), "fp32")
    assert error(got, want) < (1e-5 if form.kind == "fp16" else 2.5e-2)


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize(("kv", "limit"), [("bf16", 6e-3), ("int8", 3e-3)])
def test_kv_kinds_equal_the_reference(
    kv: str, limit: float, isa: str, model: tuple[ModelSpec, dict[str, Weight]]
) -> None:
    spec, weights = model
    want = logits(ReferenceBackend(), spec, stored(weights, {}), kv)
    exact = logits(ReferenceBackend(), spec, stored(weights, {}), "fp32")
    got = logits(CpuBackend(2, isa), spec, stored(weights, {}), kv)
    assert error(got, want) < limit  # what queries and probabilities lose by rounding, which the reference does not do
    assert error(got, exact) < 3e-2


def test_mixed_formats_side_by_side(model: tuple[ModelSpec, dict[str, Weight]]) -> None:
    """q, k, v and gate, up are one matrix where their formats agree, and several where not."""
    spec, weights = model
    formats = {
        "q": Format("int8", 32),
        "k": Format("fp32"),
        "v": Format("int8", 32),
        "gate": Format("int4", 32),
        "up": Format("int8", 32),
        "head": Format("int8"),
    }
    want = logits(ReferenceBackend(act_quant=True), spec, stored(weights, formats), "fp32")
    got = logits(CpuBackend(2), spec, stored(weights, formats), "fp32")
    assert error(got, want) < 2.5e-2


def test_permuted_columns(model: tuple[ModelSpec, dict[str, Weight]]) -> None:
    """GPTQ's act-order: the columns of q are stored in another order than those of k and v."""
    spec, weights = model
    permuted = dict(weights)
    for name, weight in weights.items():
        if name.endswith((".q", ".down")):
            perm = np.random.default_rng(len(name)).permutation(weight.shape[1]).astype(np.int32)
            permuted[name] = Weight(weight.format, weight.shape, np.ascontiguousarray(weight.data[:, perm]), perm=perm)
    want = logits(CpuBackend(2), spec, iter(weights.items()), "fp32")
    got = logits(CpuBackend(2), spec, iter(permuted.items()), "fp32")
    assert error(got, want) < 1e-5
