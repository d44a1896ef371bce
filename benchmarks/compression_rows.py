"""What benchmarks/compression.py tries, and which order the papers let one expect. Data; measures nothing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hasten import Distill, Factorize, Finetune, Prune, Quantize, Recover, Rotate, Shrink, Smooth, SplitExperts
from hasten.compress.targets import matrix_shapes
from hasten.model.spec import ModelSpec
from hasten.steps import Step


@dataclass(frozen=True)
class Row:
    """A way to change a model. planted: it starts from the model with outlier channels, which computes the same.
    int8_inputs: what its matrices read is rounded to int8, one scale a token, when its quality is measured."""

    name: str
    steps: tuple[Step, ...] = ()
    planted: bool = False
    int8_inputs: bool = False


@dataclass(frozen=True)
class Order:
    """`better` is expected to have fewer bits per byte than `worse`, or, where a tie will do, no more of them."""

    better: str
    worse: str
    tie_will_do: bool = False

    @property
    def claim(self) -> str:
        return f"{self.better} {'<=' if self.tie_will_do else '<'} {self.worse}"


@dataclass(frozen=True)
class Training:
    """What every row with training shares, so that all see the same tokens in the same order."""

    text: str
    steps: int
    batch_size: int
    sequence_len: int

    def alone(self) -> Finetune:
        return Finetune(learning_rate=LEARNING_RATE, **vars(self))

    def fresh(self) -> Finetune:
        return Finetune(learning_rate=LEARNING_RATE, fresh=True, **vars(self))

    def taught(self) -> Distill:
        return Distill(learning_rate=LEARNING_RATE, **vars(self))


LEARNING_RATE = 2e-3  # of all rows with training: small models take it, trained or fresh

ORIGINAL = "original"

ORDERS = (
    Order("gptq 4 bits", "rtn 4 bits"),
    Order("awq 4 bits", "rtn 4 bits"),
    Order("gptq 3 bits", "rtn 3 bits"),
    Order("awq 3 bits", "rtn 3 bits"),
    *(
        order
        for pattern in ("50 %", "2:4")
        for order in (
            Order(f"sparsegpt {pattern}", f"wanda {pattern}", tie_will_do=True),
            Order(f"wanda {pattern}", f"magnitude {pattern}"),
        )
    ),
    Order("smoothquant w8a8, outliers", "w8a8, outliers"),
    Order("rotated w8a8, outliers", "w8a8, outliers"),
    Order("rotated w4a8", "w4a8"),
    Order("svd-llm 60 %", "svd 60 %"),
    Order("spectral experts", "random experts"),
    *(Order(f"{row}, recovered", row) for row in ("wanda 50 %", "svd-llm 60 %", "spectral experts")),
    *(Order(f"3/4 of the neurons by {rank}", "3/4 of the neurons by magnitude") for rank in ("activation", "gradient")),
    Order("half the layers, distilled", "half the layers, trained alone"),
    Order("half the width, distilled", "half the width, from scratch"),
)


def rows(spec: ModelSpec, training: Training | None) -> Iterator[Row]:
    """All rows, those without training first."""
    group_size = group_of(spec)
    neurons = math.gcd(*(layer.intermediate_size for layer in spec.layers))
    experts = next((count for count in (8, 6, 4, 3, 2) if neurons % count == 0), 1)
    yield Row(ORIGINAL)
    for bits in (4, 3):
        for method in ("rtn", "gptq", "awq"):
            yield Row(f"{method} {bits} bits", (Quantize("int4", group_size, method=method, bits=bits),))
    for pattern, name in (("unstructured", "50 %"), ("2:4", "2:4")):
        for method in ("magnitude", "wanda", "sparsegpt"):
            yield Row(f"{method} {name}", (Prune(0.5, pattern, method),))
    yield from _activations()
    for method in ("svd", "svd-llm"):
        yield Row(f"{method} 60 %", (Factorize(keep=0.6, method=method),))
    for method in ("random", "kmeans", "spectral"):
        yield Row(f"{method} experts", (SplitExperts(experts, experts // 2, method),))
    yield Row("wanda 50 %, recovered", (Prune(0.5, method="wanda"), Recover()))
    yield Row("svd-llm 60 %, recovered", (Factorize(keep=0.6), Recover()))
    yield Row("spectral experts, recovered", (SplitExperts(experts, experts // 2), Recover()))
    for rank in ("magnitude", "activation", "gradient"):
        yield Row(f"3/4 of the neurons by {rank}", (Shrink(neurons=0.25, rank_by=rank),))
    if training is not None:
        yield from _trained(training, len(spec.layers))


def group_of(spec: ModelSpec) -> int:
    """128 inputs a scale, as GPTQ and AWQ are usually compared, where that divides every matrix; else a whole row."""
    matrices = (shape for name, shape in matrix_shapes(spec).items() if name.startswith("layers."))
    return 0 if any(inputs % 128 for _, inputs in matrices) else 128


def _activations() -> Iterator[Row]:
    w8a8 = Quantize("int8", 0, activations="int8")
    yield Row("w8a8", (w8a8,), int8_inputs=True)
    yield Row("outliers planted", planted=True)
    yield Row("w8a8, outliers", (w8a8,), planted=True, int8_inputs=True)
    yield Row("smoothquant w8a8, outliers", (Smooth(0.5), w8a8), planted=True, int8_inputs=True)
    yield Row("rotated w8a8, outliers", (Rotate(), w8a8), planted=True, int8_inputs=True)
    w4a8 = Quantize("int4", 0, method="gptq", activations="int8")
    yield Row("w4a8", (w4a8,), int8_inputs=True)
    yield Row("rotated w4a8", (Rotate(), w4a8), int8_inputs=True)
    yield Row("fp8 weights", (Quantize("fp8"),))


def _trained(training: Training, layers: int) -> Iterator[Row]:
    half = Shrink(layers=(layers // 2) / layers)
    narrow = Shrink(heads=0.5, neurons=0.5)
    yield Row("half the layers", (half,))
    yield Row("half the layers, trained alone", (half, training.alone()))
    yield Row("half the layers, distilled", (half, training.taught()))
    yield Row("half the width", (narrow,))
    yield Row("half the width, distilled", (narrow, training.taught()))
    yield Row("half the width, from scratch", (narrow, training.fresh()))
