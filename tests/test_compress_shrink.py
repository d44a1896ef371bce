"""Shrink: structures rank as planted, widths are those of the plan, what is written runs, errors come first."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_compress_strip import TOKENS, logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hasten.compress import shrink, taylor  # noqa: E402
from hasten.compress.folder import compress  # noqa: E402
from hasten.compress.plan import resolve, shrunk_width  # noqa: E402
from hasten.errors import RecipeError  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.recipe import Calibration, Recipe  # noqa: E402
from hasten.steps import Quantize, Shrink, Step  # noqa: E402

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 40)
    return str(file)


def recipe(text: str, *steps: Step) -> Recipe:
    return Recipe(steps, calibration=Calibration(text, num_sequences=6, sequence_len=32))


def test_gradients_of_gates_are_the_loss_of_removal(tiny_model: Callable[..., Path]) -> None:
    """First order: scaling a structure by 1 - e changes the loss by -e times its gate's gradient."""
    checkpoint = open_checkpoint(tiny_model("qwen3"))
    tokens = torch.tensor([TOKENS])
    groups, neurons, hidden = taylor.scores(checkpoint, tokens, "cpu", lambda part, what: None)
    assert [len(found) for found in groups] == [2, 2, 2]
    assert [len(found) for found in neurons] == [172] * 3
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float64)

    def loss_with(change: Callable[[float], None], size: float) -> float:
        with torch.no_grad():
            change(1 + size)
            value = float(model(tokens, labels=tokens).loss)
            change(1 / (1 + size))
        return value

    def neuron(factor: float) -> None:
        model.model.layers[1].mlp.down_proj.weight[:, 17] *= factor

    def group(factor: float) -> None:
        model.model.layers[2].self_attn.o_proj.weight[:, 96:] *= factor

    for change, found in ((neuron, neurons[1][17]), (group, groups[2][1])):
        slope = (loss_with(change, 1e-2) - loss_with(change, -1e-2)) / 2e-2  # Transformers' loss is float32
        assert slope**2 == pytest.approx(found, rel=2e-2)
    assert (hidden > 0).all()


def test_block_influence() -> None:
    """A layer that only adds to the length of its input has none; one that turns it by a right angle has one."""

    class Turn:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([-x[..., 1], x[..., 0]], dim=-1)

    from hasten.compress.blocks import Inputs

    inputs = Inputs(torch.randn(5, 7, 2), torch.device("cpu"), 2)
    assert shrink.advance(lambda x: 3 * x, inputs) == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]
    assert shrink.advance(Turn(), inputs) == pytest.approx(1, abs=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank_by", ["activation", "gradient", "magnitude"])
def test_what_does_nothing_goes_first(rank_by: str, tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Half of the neurons, one key-value head and a layer are made idle: those go, and the logits stay."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama_bias"))
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight.T):
                matrix[4::2] = 0
            for matrix in (layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight.T):
                matrix[:48] = 0
        last = model.model.layers[1]
        for matrix in (last.mlp.down_proj, last.self_attn.o_proj):
            matrix.weight.zero_()
            matrix.bias.zero_()
    model.save_pretrained(tmp_path / "idle")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "idle" / name).write_bytes((tiny_model("llama_bias") / name).read_bytes())
    step = Shrink(heads=0.5, neurons=0.48, layers=0.34, rank_by=rank_by)
    receipt = compress(tmp_path / "idle", recipe(text, step), tmp_path / "out", device="cpu")
    assert receipt.settings["shrink"]["layers"] == [0, 2]
    before, after = open_checkpoint(tmp_path / "idle"), open_checkpoint(tmp_path / "out")
    assert [(layer.num_heads, layer.num_kv_heads, layer.intermediate_size) for layer in after.spec.layers] == [
        (3, 1, 88)
    ] * 2
    np.testing.assert_allclose(logits(after.spec, after.weights()), logits(before.spec, before.weights()), atol=1e-3)


def test_idle_hidden_units_go_first(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"))
    idle = torch.arange(0, 72, 3)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, idle] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[idle] = 0
            layer.mlp.down_proj.weight[idle] = 0
    model.save_pretrained(tmp_path / "idle")
    (tmp_path / "idle/tokenizer.json").write_bytes((tiny_model("qwen3") / "tokenizer.json").read_bytes())
    compress(tmp_path / "idle", recipe(text, Shrink(hidden=0.3)), tmp_path / "out", device="cpu")
    before, after = open_checkpoint(tmp_path / "idle"), open_checkpoint(tmp_path / "out")
    assert after.spec.hidden_size == 48
    found, want = logits(after.spec, after.weights()), logits(before.spec, before.weights())
    np.testing.assert_allclose(found, want, atol=1e-3)
    names = {name for name, weight in after.weights() if weight.shape[1] > 1}
    assert names == {name for name, weight in before.weights() if weight.shape[1] > 1}


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "gpt_neox", "phi3", "smollm3"])
def test_families_shrink_and_quantise(family: str, tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Canonical names make fused, transposed and interleaved modules alike; later steps see the new shapes."""
    step = Shrink(neurons=0.25, layers=0.3)
    receipt = compress(tiny_model(family), recipe(text, step, Quantize("int8", 0)), tmp_path / "out", device="cpu")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {layer.intermediate_size for layer in checkpoint.spec.layers} == {128}
    assert resolve(receipt.recipe, open_checkpoint(tiny_model(family)).spec).spec.layers[0].intermediate_size == 128
    assert np.isfinite(logits(checkpoint.spec, checkpoint.weights())).all()


def test_what_stays_makes_up_for_what_goes(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each second neuron, and its reader's column, is a small copy of the one before: what it gave is not lost."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
                matrix[1::2] = matrix[::2]
            layer.mlp.down_proj.weight[:, 1::2] *= 0.1
    model.save_pretrained(tmp_path / "twins")
    (tmp_path / "twins/tokenizer.json").write_bytes((tiny_model("llama") / "tokenizer.json").read_bytes())
    before = open_checkpoint(tmp_path / "twins")
    expected = logits(before.spec, before.weights())
    errors = {}
    for name in ("fitted", "plain"):
        receipt = compress(
            tmp_path / "twins", recipe(text, Shrink(neurons=0.49)), tmp_path / name, device="cpu"
        ).settings["errors"]
        after = open_checkpoint(tmp_path / name)
        errors[name] = float(np.abs(logits(after.spec, after.weights()) - expected).mean())
        assert (set(receipt) == {f"layers.{index}.down" for index in range(3)}) == (name == "fitted")
        monkeypatch.setattr(shrink, "refitted", lambda *arguments: {})
    assert errors["fitted"] < 0.3 * errors["plain"]


def test_gradients_of_a_model_whose_layers_have_widths_of_their_own(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    first = Shrink(neurons=0.25, rank_by="magnitude", ignore=("layers.0.down",))
    again = Shrink(neurons=0.25, rank_by="gradient")
    compress(tiny_model("llama"), recipe(text, first, again), tmp_path / "out", device="cpu")
    widths = [layer.intermediate_size for layer in open_checkpoint(tmp_path / "out").spec.layers]
    assert widths == [128, 96, 96]


def test_a_quantised_model_is_refused_before_the_work(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    compress(tiny_model("llama"), Recipe((Quantize("int8", 0),)), tmp_path / "int8")
    with pytest.raises(RecipeError, match=r"layers.0.q is quantised, shrink takes unquantised models"):
        compress(tmp_path / "int8", recipe(text, Shrink(neurons=0.5)), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out.work").exists()


def test_widths_that_stay_are_friendly() -> None:
    assert [shrunk_width(width, 0.5) for width in (14336, 4864, 768, 172, 40)] == [7168, 2432, 384, 88, 20]
    assert shrunk_width(100, 0) == 100
    assert shrunk_width(1024, 0.999) == 64
    assert [shrunk_width(4096, 0.3, 24), shrunk_width(896, 0.3, 14), shrunk_width(72, 0.5, 7)] == [2880, 672, 32]


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("llama", Shrink(heads=0.1), "of layer 0's 2 key-value heads that leaves 2: whole ones go with their queries"),
        ("llama", Shrink(heads=0.9), "that leaves 0"),
        ("llama", Shrink(layers=0.1), "layers is 0.1, of 3 that removes 0"),
        ("gpt2", Shrink(hidden=0.5), "gpt2 ties the width of heads to it"),
        ("llama", Shrink(neurons=0.5, layers=0.4, ignore=("layers.0.down",)), "layers of different widths"),
        ("llama", Shrink(neurons=0.5, targets=("layers.7.*",)), "matches no matrix"),
    ],
)
def test_what_cannot_be_is_said_before_any_weight_is_read(
    family: str, step: Step, message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        compress(tiny_model(family), Recipe((step,)), tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())
