"""Prune, Factorize, SplitExperts and Recover as steps of recipes on tiny models: what they leave, ranks, errors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_compress_strip import logits as reference_logits

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hasten.compress.folder import compress  # noqa: E402
from hasten.errors import RecipeError  # noqa: E402
from hasten.model import formats  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.model.tokenizer import Tokenizer  # noqa: E402
from hasten.recipe import Calibration, Recipe  # noqa: E402
from hasten.steps import Prune, Quantize, Recover, Step  # noqa: E402

WORDS = ["".join(np.random.default_rng(seed).choice(list("etaoinshrdlu"), seed % 7 + 1)) for seed in range(3000)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(WORDS[:2500]))
    return str(file)


def recipe(text: str, *steps: Step) -> Recipe:
    return Recipe(steps, calibration=Calibration(text, num_sequences=20, sequence_len=40))


def made(model: Path, wanted: Recipe, out: Path) -> Path:
    compress(model, wanted, out, device="cpu")
    return out


def logits(folder: Path) -> np.ndarray:
    checkpoint = open_checkpoint(folder)
    unseen = Tokenizer(folder).encode(" ".join(WORDS[2500:]))[:48]
    return reference_logits(checkpoint.spec, checkpoint.weights(), unseen)


def numbers(folder: Path) -> dict[str, np.ndarray]:
    return {name: formats.dequantize(weight) for name, weight in open_checkpoint(folder).weights()}


@pytest.mark.parametrize("family", ["llama_bias", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_pruned_matrices_hold_their_zeros_and_the_rest_is_untouched(
    family: str, tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    step = Prune(pattern="2:4", targets=("mlp", "layers.*.q"), ignore=("layers.0.*",))
    compress(model, recipe(text, step), tmp_path / "out", device="cpu")
    before, after = numbers(model), numbers(tmp_path / "out")
    for name, values in after.items():
        if name.startswith(("layers.1", "layers.2")) and name.endswith((".gate", ".up", ".down", ".q")):
            kept = (values.reshape(len(values), -1, 4) != 0).sum(-1)
            assert kept.max() == 2, name
            assert kept.min() == 2, name
        else:
            assert np.array_equal(values, before[name]), name


def test_pruning_methods_rank_as_in_their_papers(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """By the error of each matrix's outputs; the first block's, since later ones read what earlier ones made."""
    total = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        out = tmp_path / method
        receipt = compress(tiny_model("llama"), recipe(text, Prune(method=method)), out, device="cpu")
        errors = receipt.settings["errors"]
        assert len(errors) == 21
        total[method] = sum(
            error for name, error in errors.items() if name in ("layers.0.q", "layers.0.k", "layers.0.v")
        )
        zeros = [np.mean(values == 0) for name, values in numbers(out).items() if name in errors]
        assert np.mean(zeros) == pytest.approx(0.5, abs=0.01)
    assert total["sparsegpt"] < total["wanda"] < total["magnitude"]


def test_quantising_keeps_the_zeros(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    steps = (Prune(pattern="2:4", targets=("mlp",)), Quantize("int8", 0))
    compress(tiny_model("llama"), recipe(text, *steps), tmp_path / "out", device="cpu")
    for name, values in numbers(tmp_path / "out").items():
        if name.endswith((".gate", ".up", ".down")):
            assert ((values.reshape(len(values), -1, 4) != 0).sum(-1) <= 2).all()


def test_recovering_lowers_the_error_and_keeps_the_zeros(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    prune = Prune(sparsity=0.6, method="wanda")
    plain = numbers(made(tiny_model("llama_bias"), recipe(text, prune), tmp_path / "plain"))
    last = made(tiny_model("llama_bias"), recipe(text, prune, Recover(steps=30, learning_rate=6e-3)), tmp_path / "fit")
    fitted = numbers(last)
    for name, values in plain.items():
        if name in ("embed", "head", "final_norm"):
            assert np.array_equal(values, fitted[name])
        elif name.startswith("layers.0") and values.shape[1] > 1:
            assert np.array_equal(values == 0, fitted[name] == 0), name
            assert not np.array_equal(values, fitted[name]), name
    wanted = logits(tiny_model("llama_bias"))
    lost = {folder: np.square(logits(tmp_path / folder) - wanted).mean() for folder in ("plain", "fit")}
    assert lost["fit"] < 0.8 * lost["plain"]


def test_recovering_norms_alone_and_what_does_not_help(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    prune = Prune(sparsity=0.3, targets=("mlp",), method="wanda")
    recover = Recover(steps=5, learning_rate=1e-3, parts=("norms",))
    before = numbers(made(tiny_model("gpt2"), recipe(text, prune), tmp_path / "plain"))
    after = numbers(made(tiny_model("gpt2"), recipe(text, prune, recover), tmp_path / "norms"))
    changed = {name.split(".", 2)[-1] for name, values in after.items() if not np.array_equal(values, before[name])}
    assert changed >= {"attn_norm", "mlp_norm"}
    assert not any(name.endswith(".bias") for name in changed)
    receipt = compress(
        tiny_model("gpt2"), recipe(text, prune, Recover(steps=3, learning_rate=0.9)), tmp_path / "bad", device="cpu"
    )
    assert any("recover did not help on held-out sequences" in note for note in receipt.notes)


@pytest.mark.parametrize(
    ("changes", "step", "message"),
    [
        ({"intermediate_size": 174}, Prune(pattern="2:4"), r"layers.0.down has 174 inputs, 2:4 needs a multiple of 4"),
        ({}, Recover(), r"put it right behind prune, factorize or split_experts"),
        ({}, Prune(targets=("Linear", "head")), r"prune works on matrices of decoder layers, found head: ignore it"),
    ],
)
def test_what_does_not_fit_is_said_before_any_weight_is_read(
    changes: dict[str, int], step: Step, message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        compress(tiny_model("llama", **changes), Recipe((step,)), tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())
