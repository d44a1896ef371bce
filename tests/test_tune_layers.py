"""The search layer by layer finds what is sensitive: a layer that int4 destroys is planted in a trained model, and in a
deep random one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hasten
from hasten.hardware import Hardware, probe
from hasten.measure.quality import summarize
from hasten.measure.text import BUNDLED, Window, first_token, make_windows, read_text
from hasten.model.checkpoint import open_checkpoint
from hasten.model.formats import Weight, dequantize, quantize
from hasten.model.tokenizer import Tokenizer
from hasten.model.writer import write_checkpoint
from hasten.recipe import Recipe, presets
from hasten.tune import candidates, layers
from hasten.tune.budget import Budget, Progress
from hasten.tune.lab import ORIGINAL, Lab
from hasten.tune.search import Search
from hasten.tune.state import State

pytest.importorskip("hasten._core", reason="needs the compiled core (scripts/build.sh)")
from hasten.backends.cpu import CpuBackend

DEMO = Path(hasten.__file__).parent / "demo"
LOW = presets()["int4-g32"]


def plant(folder: Path, out: Path, layer: int) -> Path:
    """A copy that computes the same, in which one of every 32 inputs of a layer's `down` is weighted 64 times as much
    and made as much smaller before: powers of two, so nothing is rounded. Of 32, int4 keeps only that one."""
    checkpoint = open_checkpoint(folder)

    def weights() -> Iterator[tuple[str, Weight]]:
        for name, weight in checkpoint.weights():
            if name in (f"layers.{layer}.down", f"layers.{layer}.up"):
                factor = np.where(np.arange(weight.shape[name.endswith("down")]) % 32 == 0, np.float32(64), 1)
                scale = factor if name.endswith("down") else 1 / factor[:, None]
                weight = quantize((dequantize(weight) * scale).astype(np.float32), weight.format)
            yield name, weight

    write_checkpoint(out, checkpoint.config, weights(), folder)
    return out


@pytest.fixture(scope="module")
def machine() -> Hardware:
    return probe(0.02)


def search_on(folder: Path, windows: tuple[Window, ...], machine: Hardware, tmp_path: Path, max_loss: float) -> Search:
    budget = Budget(3600)
    progress = Progress(None, budget)
    return Search(
        lab=Lab(open_checkpoint(folder), machine, 2, CpuBackend),
        state=State(tmp_path / "state.json", {}),
        budget=budget,
        progress=progress,
        windows=windows,
        workloads={},
        sampled={},
        goal="memory",
        max_loss=max_loss,
        rounds=1,
    )


def test_a_planted_layer_stays_high_and_the_rest_does_not(
    machine: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_MOST_PROBES", 20)
    planted = plant(DEMO, tmp_path / "planted", 3)
    tokenizer = Tokenizer(planted)
    windows = make_windows(read_text(BUNDLED), tokenizer.encode_plain, first_token(tokenizer), 128, most=24)
    search = search_on(planted, windows, machine, tmp_path, max_loss=0.01)
    whole = search.quality("whole", "int4", LOW, windows)
    assert whole.loss is not None
    assert whole.loss.low > 0.01, "int4 everywhere loses too much"
    recipe = layers.find(search, Recipe(), LOW)
    assert recipe is not None
    kept = {name for name, fmt in search.lab.formats(recipe).items() if fmt.kind != "int4"}
    assert "layers.3.down" in kept
    assert len(kept) <= 6, kept
    found = search.quality("mixed", "mixed", recipe, windows)
    assert found.loss is not None
    assert found.loss.high <= 0.01
    assert search.lab.weight_bytes(recipe) < 0.4 * search.lab.weight_bytes(Recipe())
    assert len(search.sensitivity()) <= 20 + 4


def test_it_is_found_among_a_hundred_in_a_few_probes(
    tiny_model: Callable[..., Path], machine: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_MOST_PROBES", 28)
    deep = tiny_model(
        "llama",
        num_hidden_layers=24,
        hidden_size=64,
        intermediate_size=192,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    planted = plant(deep, tmp_path / "planted", 2)
    random = np.random.default_rng(5)
    windows = tuple(Window(random.integers(3, 300, 48).astype(np.int32), 100) for _ in range(8))
    search = search_on(planted, windows, machine, tmp_path, max_loss=0.01)
    assert len(candidates.units(search.lab.spec)) == 98
    layers.find(search, Recipe(), LOW)
    harm = {name: value.median for name, value in search.sensitivity().items()}
    single = {name: value for name, value in harm.items() if ".." not in name}
    assert max(single, key=lambda name: single[name]) == "layers.2.down"
    assert len(harm) <= 28 + 4


def test_what_was_planted_changes_nothing_but_what_int4_does(machine: Hardware, tmp_path: Path) -> None:
    """The plant itself is sound: same numbers in bf16, other ones in int4."""
    planted = plant(DEMO, tmp_path / "planted", 3)
    one, two = (Lab(open_checkpoint(folder), machine, 2, CpuBackend) for folder in (DEMO, planted))
    tokenizer = Tokenizer(DEMO)
    windows = make_windows(read_text(BUNDLED), tokenizer.encode_plain, first_token(tokenizer), 128, most=4)
    scores = [lab.quality({"int4": LOW}, windows) for lab in (one, two)]
    np.testing.assert_allclose(scores[0][ORIGINAL].nll, scores[1][ORIGINAL].nll, rtol=2e-3)
    lost = [summarize(found["int4"], found[ORIGINAL]).divergence for found in scores]
    assert lost[0] is not None
    assert lost[1] is not None
    assert lost[1].median > 3 * lost[0].median


def test_no_time_is_said(machine: Hardware, tmp_path: Path) -> None:
    tokenizer = Tokenizer(DEMO)
    windows = make_windows(read_text(BUNDLED), tokenizer.encode_plain, first_token(tokenizer), 128, most=8)
    search = search_on(DEMO, windows, machine, tmp_path, max_loss=0.001)
    search = replace(search, budget=Budget(0.0))
    assert layers.find(search, Recipe(), LOW) is None
    assert search.notes == ["formats layer by layer were not tried: no time was left for them"]
