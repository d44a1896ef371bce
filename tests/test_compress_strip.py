"""Stripping is masking: a model without its structures computes what the whole one does with them masked."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_reference import step

from hasten.backends.reference import ReferenceBackend
from hasten.compress import strip
from hasten.compress.strip import Kept
from hasten.model.checkpoint import open_checkpoint
from hasten.model.formats import Weight
from hasten.model.spec import ModelSpec, spec_from_config
from hasten.model.writer import write_checkpoint

TOKENS = np.random.default_rng(0).integers(3, 300, 30).tolist()


def some(count: int, share: float, seed: int) -> np.ndarray:
    """Rising indices of about this share of `count`, at least one."""
    left = max(1, round(share * count))
    return np.sort(np.random.default_rng(seed).permutation(count)[:left])


def choice(spec: ModelSpec, hidden: bool, heads: bool = True, free: bool = True) -> Kept:
    """Some of everything goes; per-layer widths differ where `free`."""
    count = len(spec.layers)
    groups = [some(layer.num_kv_heads, 0.6 if heads else 1, i) for i, layer in enumerate(spec.layers)]
    shares = [0.3 + 0.2 * i if free else 0.5 for i in range(count)]
    neurons = [
        some(layer.intermediate_size, share, i)
        for (i, layer), share in zip(enumerate(spec.layers), shares, strict=True)
    ]
    layers = np.array([index for index in range(count) if index != 1])
    return Kept(layers, tuple(groups), tuple(neurons), some(spec.hidden_size, 0.75 if hidden else 1, 9))


def masked(name: str, weight: Weight, spec: ModelSpec, kept: Kept) -> Weight:
    """The weight with zeros for all that goes."""
    data = np.array(weight.data)
    parts = name.split(".")
    gone = np.setdiff1d(np.arange(spec.hidden_size), kept.hidden)
    if parts[0] != "layers":
        if parts[0] in ("embed", "position_embed"):
            data[:, gone] = 0
        return replace(weight, data=data)
    index, role, bias = int(parts[1]), parts[2], parts[-1] == "bias"
    layer = spec.layers[index]
    if role in ("o", "down"):
        data[gone] = 0
        if index not in kept.layers:
            data[:] = 0
    dead = np.setdiff1d(np.arange(layer.num_kv_heads), kept.groups[index])
    queries = (
        dead[:, None] * (width := layer.head_dim * layer.num_heads // layer.num_kv_heads) + np.arange(width)
    ).ravel()
    keys = (dead[:, None] * layer.head_dim + np.arange(layer.head_dim)).ravel()
    if role in ("q", "k"):  # for a norm over all heads at once
        data[queries if role == "q" else keys] = 0
    if role == "o" and not bias:
        data[:, queries] = 0
    if role == "down" and not bias:
        data[:, np.setdiff1d(np.arange(layer.intermediate_size), kept.neurons[index])] = 0
    return replace(weight, data=data)


def logits(spec: ModelSpec, weights: object, tokens: list[int] = TOKENS) -> np.ndarray:
    backend = ReferenceBackend()
    backend.load(spec, weights)  # type: ignore[arg-type]
    backend.allocate(24, 16, "fp32")
    return step(backend, [(tokens, 0, [3, 7, 1])])[0]


@pytest.mark.parametrize(
    ("family", "hidden"),
    [("llama_bias", True), ("qwen3", True), ("phi3", True), ("olmo2", True), ("gemma2", True), ("gemma3", True),
     ("smollm3", True), ("granite", True), ("qwen2_window", True), ("gpt2", False), ("gpt_neox", False)],
)  # fmt: skip
def test_stripped_is_masked(family: str, hidden: bool, tiny_model: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_model(family))
    spec = checkpoint.spec
    kept = choice(spec, hidden)
    whole = logits(spec, ((name, masked(name, weight, spec, kept)) for name, weight in checkpoint.weights()))
    left = logits(strip.stripped_spec(spec, kept), strip.strip(checkpoint.weights(), spec, kept))
    np.testing.assert_allclose(left, whole, atol=2e-4 * np.abs(whole).max())


@pytest.mark.parametrize("family", ["llama_bias", "llama", "qwen2_window", "qwen3", "phi3", "olmo2", "gemma2", "gemma3",
                                    "smollm3", "granite", "mistral", "gpt2", "gpt_neox"])  # fmt: skip
def test_transformers_loads_what_is_left(family: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint(tiny_model(family))
    spec = checkpoint.spec
    own = not family.startswith("gpt")
    kept = choice(spec, hidden=own, heads=own, free=False)
    config = strip.stripped_config(checkpoint.config, spec, kept)
    write_checkpoint(tmp_path / "out", config, strip.strip(checkpoint.weights(), spec, kept))
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert "layers" not in written.get("hasten", {})
    found, want = spec_from_config(written), strip.stripped_spec(spec, kept)
    assert found.layers == want.layers
    assert found.norm_eps == pytest.approx(want.norm_eps)
    assert found.embedding_scale == pytest.approx(want.embedding_scale)
    left = open_checkpoint(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].numpy()
    np.testing.assert_allclose(logits(left.spec, left.weights()), theirs, atol=1e-3 * np.abs(theirs).max())


def test_nothing_kept_back_changes_nothing(tiny_model: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_model("gemma2"))
    kept = strip.everything(checkpoint.spec)
    assert strip.stripped_spec(checkpoint.spec, kept).layers == checkpoint.spec.layers
    after = dict(strip.strip(checkpoint.weights(), checkpoint.spec, kept))
    for name, weight in checkpoint.weights():
        assert np.array_equal(after[name].data, weight.data), name
