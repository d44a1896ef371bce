"""Training on a GPU: the losses of a CPU up to bfloat16's rounding, layers run again, and memory that is given back."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

import hasten  # noqa: E402
from hasten.recipe import Calibration  # noqa: E402
from hasten.steps import Distill, Finetune, Gradual, Prune, Recover, Shrink, Step, Training  # noqa: E402
from hasten.train import trainer  # noqa: E402

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife.\n"
WIDE = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
Model = Callable[..., Path]


def losses(model: Path, out: Path, device: str, *steps: Step) -> list[float]:
    text = next(step.text for step in steps if isinstance(step, Training | Recover))
    recipe = hasten.Recipe(steps, calibration=Calibration(text, num_sequences=8, sequence_len=24))
    receipt = hasten.compress(model, recipe, out, device=device)
    curves = [found["loss"] for found in receipt.settings.values() if isinstance(found, dict) and "loss" in found]
    return [loss for curve in curves for _, loss in curve]


def how(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text(TEXT * 40)
    given = {"text": str(tmp_path / "text.txt"), "steps": 6, "batch_size": 2, "sequence_len": 24, "learning_rate": 1e-3}
    return given | changes


@pytest.mark.parametrize("kind", ["finetune", "distill", "lora"])
def test_losses_are_those_of_a_cpu(kind: str, tiny_model: Model, tmp_path: Path) -> None:
    model, short = tiny_model("llama", dtype="bfloat16"), how(tmp_path)
    steps: dict[str, tuple[Step, ...]] = {
        "finetune": (Finetune(sparsity=Gradual(0.5, 0, 4, pattern="2:4", every=1), **short),),
        "distill": (Shrink(neurons=0.5, rank_by="magnitude"), Distill(hidden=1.0, attention=1.0, **short)),
        "lora": (Prune(method="magnitude"), Recover("lora", rank=4, **short)),
    }
    found, wanted = (losses(model, tmp_path / device, device, *steps[kind]) for device in ("cuda", "cpu"))
    np.testing.assert_allclose(found, wanted, rtol=0.03)


@pytest.mark.parametrize("samples", ["student", "teacher"])
def test_models_write_what_is_learned_from(samples: str, tiny_model: Model, tmp_path: Path) -> None:
    step = Distill(samples=samples, loss="jensen-shannon", **how(tmp_path))
    assert np.isfinite(losses(tiny_model("llama", dtype="bfloat16"), tmp_path / "out", "cuda", step)).all()


def test_layers_run_again_take_less_memory(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype="bfloat16", **WIDE)
    step = Finetune(**how(tmp_path, batch_size=16, sequence_len=128, steps=3))
    peaks, found = [], []
    for free in (trainer.free_memory, lambda device: 0.0):
        monkeypatch.setattr(trainer, "free_memory", free)
        torch.cuda.reset_peak_memory_stats()
        found.append(losses(model, tmp_path / str(len(found)), "cuda", step))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.8 * peaks[0]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)


def allocated() -> int:
    """Bytes, without the workspaces that cuBLAS keeps for each stream it has seen."""
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("samples", ["text", "teacher"])
def test_memory_is_given_back(samples: str, tiny_model: Model, tmp_path: Path) -> None:
    model, step = tiny_model("llama", dtype="bfloat16", **WIDE), Distill(samples=samples, **how(tmp_path))
    losses(model, tmp_path / "first", "cuda", step)
    gc.collect()
    before = allocated()
    gc.disable()
    try:
        losses(model, tmp_path / "second", "cuda", step)
        assert allocated() - before < 4 << 20  # the model alone has 18 million bytes
    finally:
        gc.enable()
