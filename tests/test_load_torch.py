"""load_torch: every folder that hasten writes is a Transformers model with the logits of the reference backend."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_compress_strip import TOKENS, choice, logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hasten import compress, load_torch  # noqa: E402
from hasten.compress import strip  # noqa: E402
from hasten.errors import ModelError, ResourceError  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.model.formats import Weight, dense_weight, dequantize  # noqa: E402
from hasten.model.spec import Layer, configured, spec_from_config  # noqa: E402
from hasten.model.writer import write_checkpoint  # noqa: E402

FAMILIES = ("llama_bias", "llama3", "qwen3", "phi3", "olmo2", "gemma2", "gemma3", "gpt2", "gpt_neox", "granite")


def in_torch(folder: Path) -> np.ndarray:
    with torch.no_grad():
        return load_torch(folder, dtype=torch.float32)(torch.tensor([TOKENS])).logits[0].numpy()


def in_reference(folder: Path) -> np.ndarray:
    checkpoint = open_checkpoint(folder)
    return logits(checkpoint.spec, checkpoint.weights())


def agree(folder: Path) -> None:
    want = in_reference(folder)
    np.testing.assert_allclose(in_torch(folder), want, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_as_transformers_loads_it(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = theirs(torch.tensor([TOKENS])).logits[0].numpy()
    np.testing.assert_allclose(in_torch(folder), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("family", ["llama3", "phi3", "gemma3", "gpt2", "gpt_neox", "granite"])
def test_in_bfloat16_as_transformers_loads_it(family: str, tiny_model: Callable[..., Path]) -> None:
    """Rotary frequencies stay in float32, all that is multiplied is in bfloat16."""
    folder = tiny_model(family)
    ours = load_torch(folder, dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        if name.endswith("inv_freq"):
            torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=0)
    with torch.no_grad():
        found, want = (model(torch.tensor([TOKENS])).logits for model in (ours, theirs))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, want, rtol=0, atol=0.02 * want.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_widths_of_their_own(family: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model(family))
    kept = choice(checkpoint.spec, hidden=not family.startswith("gpt"))
    config = strip.stripped_config(checkpoint.config, checkpoint.spec, kept)
    assert config["hasten"]["layers"]
    write_checkpoint(tmp_path / "out", config, strip.strip(checkpoint.weights(), checkpoint.spec, kept))
    assert open_checkpoint(tmp_path / "out").spec.layers == strip.stripped_spec(checkpoint.spec, kept).layers
    agree(tmp_path / "out")
    with pytest.raises((RuntimeError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def reformed(
    model: Path, out: Path, experts: int = 4, ranks: tuple[tuple[str, int], ...] = (("down", 40), ("k", 7))
) -> list[Layer]:
    """Some of the model's matrices, of fused modules too, as two thin ones, and its MLPs split; the layers."""
    checkpoint = open_checkpoint(model)
    spec = checkpoint.spec
    split = {"experts": experts, "active_experts": experts // 2}
    layers = [replace(layer, ranks=ranks if i != 1 else (), **split) for i, layer in enumerate(spec.layers)]
    rng = np.random.default_rng(0)

    def weights() -> Iterator[tuple[str, Weight]]:
        for name, weight in checkpoint.weights():
            index, role = (int(name.split(".")[1]), name.split(".", 2)[2]) if name.startswith("layers.") else (1, "")
            rank = layers[index].rank_of(role.removesuffix(".bias"))
            if rank and role.endswith(".bias"):
                yield name.replace(".bias", ".b.bias"), weight
            elif rank:
                u, s, v = np.linalg.svd(dequantize(weight), full_matrices=False)
                yield f"{name}.a", dense_weight(v[:rank])
                yield f"{name}.b", dense_weight(u[:, :rank] * s[:rank])
            else:
                yield name, weight
        for index in range(len(layers) if experts else 0):
            router = rng.standard_normal((experts, spec.hidden_size)).astype(np.float32)
            yield f"layers.{index}.router", dense_weight(router)

    write_checkpoint(out, configured(checkpoint.config, layers), weights())
    return layers


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_and_experts(family: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    layers = reformed(tiny_model(family), tmp_path / "out")
    assert list(open_checkpoint(tmp_path / "out").spec.layers) == layers
    agree(tmp_path / "out")
    assert np.abs(in_reference(tmp_path / "out") - in_reference(tiny_model(family))).max() > 0.1
    with pytest.raises(ValueError, match="format"):  # rather than fill what it does not find with random numbers
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_hidden_width_that_is_no_multiple_of_the_heads(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))
    kept = replace(strip.everything(checkpoint.spec), hidden=np.arange(64))
    config = strip.stripped_config(checkpoint.config, checkpoint.spec, kept)
    write_checkpoint(tmp_path / "out", config, strip.strip(checkpoint.weights(), checkpoint.spec, kept))
    agree(tmp_path / "out")


def test_quantised_folders_are_the_numbers_that_they_stand_for(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = {"steps": [{"quantize": {"format": "int4", "fallback": "int8", "targets": ["Linear", "embedding"]}}]}
    compress(tiny_model("llama3"), recipe, tmp_path / "out")
    agree(tmp_path / "out")
    model = load_torch(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    loss = model(input_ids=torch.tensor([TOKENS]), labels=torch.tensor([TOKENS])).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{}], "hasten.layers must list 3 layers"),
        ([{"ranks": {"down": 0}}, {}, {}], r"layers\[0\].ranks.down is 0, expected a positive whole number"),
        ([{"ranks": {"dwn": 3}}, {}, {}], "has a key 'dwn'"),
        ([{}, {"experts": {"num": 3, "active": 1}}, {}], "172 neurons cannot be split into 3 equal experts"),
        ([{}, {}, {"experts": {"num": 4, "active": 5}}], "5 of 4 cannot be active"),
        ([{"num_heads": 3}, {}, {}], "num_heads 3, num_kv_heads 0"),
        ([{"ranks": {"down": 73}}, {}, {}], r"layers\[0\].ranks.down is 73, more than the matrix's 72"),
    ],
)
def test_what_a_configuration_must_not_say(entries: list, message: str, tiny_model: Callable[..., Path]) -> None:
    config = {**open_checkpoint(tiny_model("llama")).config, "hasten": {"layers": entries}}
    with pytest.raises(ModelError, match=message):
        spec_from_config(config)


def test_a_device_that_is_not_there_is_one_line(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ResourceError, match="device is 'cuda:1', and no such GPU that torch can use is here: use"):
        load_torch(tiny_model("llama"), device="cuda:1")
    with pytest.raises(ResourceError, match="device is 'gpu', expected a device of torch, such as cpu or cuda"):
        load_torch(tiny_model("llama"), device="gpu")
