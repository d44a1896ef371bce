"""Layers of widths of their own and low-rank matrices in the native backend: as the reference has them, in a batch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cpu_tools import BLOCK, NUM_BLOCKS, load, run, table
from test_compress_strip import choice, logits

pytest.importorskip("torch")
from test_load_torch import reformed

from hasten import compress
from hasten.backends.cpu import CpuBackend
from hasten.backends.cpu.split import expert_pieces
from hasten.compress import strip
from hasten.errors import ModelError
from hasten.model.checkpoint import open_checkpoint
from hasten.model.formats import Format, Weight, densify, dequantize, quantize
from hasten.model.writer import write_checkpoint

TOKENS = np.random.default_rng(5).integers(3, 300, 30).astype(np.int32)
FAMILIES = ("llama_bias", "qwen3", "phi3", "olmo2", "gemma3", "gpt2", "gpt_neox")


def agree(folder: Path, tolerance: float = 2e-4, rows: float = 1.0) -> None:
    """Of `rows` of the tokens at least the logits agree with the reference; of all of them with any other batch."""
    checkpoint = open_checkpoint(folder)
    want = logits(checkpoint.spec, checkpoint.weights(), TOKENS.tolist())
    backend = load(folder)
    found = run(backend, TOKENS, [30], table(1))
    close = np.abs(found - want).max(1) <= tolerance * np.abs(want).max()
    assert close.mean() >= rows, f"{close.mean():.0%} of the rows agree"
    assert np.array_equal(run(backend, TOKENS, [1, 12, 1, 1, 15], table(2)), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_widths_of_their_own(family: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model(family))
    kept = choice(checkpoint.spec, hidden=not family.startswith("gpt"))
    config = strip.stripped_config(checkpoint.config, checkpoint.spec, kept)
    write_checkpoint(tmp_path / "out", config, strip.strip(checkpoint.weights(), checkpoint.spec, kept))
    agree(tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank(family: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    reformed(tiny_model(family), tmp_path / "out", experts=0)
    agree(tmp_path / "out")


@pytest.mark.parametrize("preset", ["int8", "bf16"])
def test_low_rank_rounded(preset: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Products of rounded inputs differ from the reference that does not round them; a batch changes nothing."""
    reformed(tiny_model("llama_bias"), tmp_path / "dense", experts=0)
    compress(tmp_path / "dense", preset, tmp_path / "out")
    names = {name: fmt.kind for name, _, fmt in open_checkpoint(tmp_path / "out").matrices()}
    assert names["layers.0.down.a"] == names["layers.0.k.b"] == preset
    agree(tmp_path / "out", 0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts(family: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Low rank is of attention alone: neither step of a recipe factorises what is split."""
    reformed(tiny_model(family), tmp_path / "out", ranks=(("k", 7),))
    agree(tmp_path / "out")


def test_experts_of_low_rank_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    reformed(tiny_model("llama_bias"), tmp_path / "out")
    with pytest.raises(ModelError, match="layer 0: down is of low rank in an MLP that is split into experts"):
        load(tmp_path / "out")


@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int4", 32), ("int4", 0)])
def test_experts_rounded(kind: str, group: int, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """128 neurons in 4 experts: groups of 32 of `down` are cut whole. Where two experts score alike, rounded inputs may
    choose the other one, so a few tokens differ."""
    model = tiny_model("llama_bias", intermediate_size=128, hidden_size=96)
    reformed(model, tmp_path / "dense", ranks=())
    steps = {"steps": [{"quantize": {"format": kind, "group_size": group, "targets": ["mlp"]}}]}
    compress(tmp_path / "dense", steps, tmp_path / "out")
    agree(tmp_path / "out", 0.1, rows=0.8)


@pytest.mark.parametrize("fmt", [Format("int8", 128), Format("int4", 128, symmetric=False), Format("fp8", 64)], ids=str)
@pytest.mark.parametrize(("size", "group"), [(128, 0), (96, 32), (64, 64), (20, None)])
def test_down_of_an_expert_keeps_its_format_where_a_group_ends_with_it(
    fmt: Format, size: int, group: int | None, tiny_model: Callable[..., Path]
) -> None:
    """group: of the pieces, 0 is the matrix's own; None: no group ends there, so they are in bfloat16."""
    spec = open_checkpoint(tiny_model("llama_bias")).spec
    spec = replace(spec, layers=(replace(spec.layers[0], intermediate_size=4 * size, experts=4, active_experts=1),))
    columns = -(-4 * size // 128) * 128 if group is None else 4 * size
    down = quantize(np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32), fmt)
    pieces = [weight for _, weight in expert_pieces(spec, [("layers.0.down", down)])]
    for expert, piece in enumerate(pieces):
        want = dequantize(down)[:, expert * size : (expert + 1) * size]
        if group is None:
            assert piece.format == Format("bf16")
        else:
            assert piece.format == replace(fmt, group_size=min(fmt.group_size, group or fmt.group_size))
            assert np.array_equal(dequantize(piece), want)


def test_two_of_four_in_experts_and_thin_matrices(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The bits of the same matrices with their zeros."""
    model = tiny_model("llama_bias", intermediate_size=128, hidden_size=192)
    reformed(model, tmp_path / "dense", ranks=(("k", 8),))
    checkpoint = open_checkpoint(tmp_path / "dense")
    sparse: list[tuple[str, Weight]] = []
    for name, weight in checkpoint.weights():
        if name.startswith("layers.") and weight.shape[1] > 1 and not name.endswith("router"):
            values = dequantize(weight).copy()
            values.reshape(len(values), -1, 4)[..., 1:3] = 0
            weight = quantize(values, Format("int8", sparse24=True))
        sparse.append((name, weight))
    found = []
    for weights in (sparse, [(name, densify(weight)) for name, weight in sparse]):
        backend = CpuBackend(2)
        backend.load(checkpoint.spec, iter(weights))
        backend.allocate(NUM_BLOCKS, BLOCK, "fp32")
        found.append(run(backend, TOKENS, [1, 12, 17], table(1)))
    assert np.array_equal(found[0], found[1])
