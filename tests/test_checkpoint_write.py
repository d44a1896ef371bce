"""Folders that we write: bit for bit what we read back, and the same logits in Transformers."""

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from hasten.backends.reference import ReferenceBackend
from hasten.errors import ModelError, ResourceError
from hasten.model import tensor_file
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import Format, Weight, dequantize, quantize
from hasten.model.writer import write_checkpoint

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
INT4, INT4_ASYMMETRIC, INT8 = Format("int4", 32), Format("int4", 64, symmetric=False), Format("int8")


def chosen(checkpoint: Checkpoint, formats: dict[str, Format]) -> Iterator[tuple[str, Weight]]:
    """The checkpoint's weights, matrices quantised by the last part of their names."""
    for name, weight in checkpoint.weights():
        last = name.split(".")[-1]
        fmt = formats.get(last)
        yield name, weight if fmt is None else quantize(dequantize(weight), fmt, scale_dtype="fp16")


def rewrite(source: Path, out: Path, formats: dict[str, Format], **changes: object) -> dict[str, Weight]:
    checkpoint = open_checkpoint(source)
    weights = dict(chosen(checkpoint, formats))
    write_checkpoint(out, {**checkpoint.config, **changes}, weights.items(), tokenizer_files_from=source)
    return weights


def same(a: Weight, b: Weight) -> bool:
    arrays = ((a.data, b.data), (a.scales, b.scales), (a.zeros, b.zeros))
    equal = all((x is None) == (y is None) and (x is None or np.array_equal(x, y)) for x, y in arrays)
    return equal and (a.format, a.shape) == (b.format, b.shape)


def our_logits(path: Path, tokens: list[int]) -> np.ndarray:
    from test_reference_models import loaded, run

    return run(loaded(path), tokens, 0, [1, 0, 2])


def their_logits(path: Path, tokens: list[int]) -> np.ndarray:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    missing = {key for key in report["missing_keys"] if not key.endswith("embed_scale")}  # Gemma's computed buffer
    assert not missing, report
    assert not report["unexpected_keys"], report
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


LAYERS = {
    "int4-g32": dict.fromkeys(MATRICES, INT4),
    "int4-g64-asym": dict.fromkeys(MATRICES, INT4_ASYMMETRIC),
    "int4-g128": dict.fromkeys(MATRICES, Format("int4", 128)),
    "int4-g128-asym": dict.fromkeys(MATRICES, Format("int4", 128, symmetric=False)),
    "int4-row": dict.fromkeys(MATRICES, Format("int4")),
    "int8-row": dict.fromkeys(MATRICES, INT8),
    "int8-g64": dict.fromkeys(MATRICES, Format("int8", 64)),
    "mixed": {"q": INT8, "k": INT8, "o": INT4, "gate": INT4_ASYMMETRIC, "up": INT4, "down": Format("int8", 32)},
    "everything": dict.fromkeys((*MATRICES, "embed", "head"), INT4),
    "embed-int8-head-int4": {"embed": INT8, "head": INT4, "q": INT4},
    "embed-asym": {"embed": INT4_ASYMMETRIC, "head": INT4_ASYMMETRIC},
    "head-only": {"head": INT8},
}


TIED = ["int4-g32", "everything", "embed-int8-head-int4", "embed-asym"]
CASES = [(name, False) for name in LAYERS] + [(name, True) for name in TIED]


@pytest.mark.parametrize(("name", "tied"), CASES, ids=[name + ("-tied" if tied else "") for name, tied in CASES])
def test_transformers_loads_what_we_write(
    name: str, tied: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    formats = LAYERS[name]
    source = tiny_model("qwen3", **SIZES, tie_word_embeddings=tied)
    written = rewrite(source, tmp_path / "out", formats)
    checkpoint = open_checkpoint(tmp_path / "out")
    found = dict(checkpoint.weights())
    assert checkpoint.spec.tied_head == tied
    assert found.keys() == written.keys()
    assert all(same(found[name], weight) for name, weight in written.items())
    formats_told = {name: fmt for name, _, fmt in checkpoint.matrices()}
    assert all(formats_told[name] == weight.format for name, weight in written.items() if name in formats_told)
    tokens = np.random.default_rng(3).integers(3, tiny_models.VOCAB, 40).tolist()
    ours, theirs = our_logits(tmp_path / "out", tokens), their_logits(tmp_path / "out", tokens)
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gemma3", "granite", "olmo2"])
def test_fused_and_offset_families(family: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model(family, **SIZES)
    formats = {**dict.fromkeys(("q", "k", "v", "o"), INT8), **dict.fromkeys(("gate", "up", "down", "embed"), INT4)}
    written = rewrite(source, tmp_path / "out", formats)
    found = dict(open_checkpoint(tmp_path / "out").weights())
    matrices = [name for name, weight in written.items() if weight.scales is not None]
    assert matrices
    assert all(same(found[name], written[name]) for name in matrices)
    tokens = np.random.default_rng(3).integers(3, tiny_models.VOCAB, 40).tolist()
    ours, theirs = our_logits(tmp_path / "out", tokens), their_logits(tmp_path / "out", tokens)
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=1e-4)


def test_conv1d_is_written_for_us_and_refused_by_transformers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("gpt2", **SIZES)
    written = rewrite(source, tmp_path / "out", dict.fromkeys((*MATRICES, "embed"), INT4))
    found = dict(open_checkpoint(tmp_path / "out").weights())
    assert all(same(found[name], weight) for name, weight in written.items())
    with pytest.raises(Exception, match="hasten-conv1d"):
        their_logits(tmp_path / "out", [3, 4])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dense_model_round_trips(dtype: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("gemma2", dtype=dtype)
    written = rewrite(source, tmp_path / "out", {})
    checkpoint = open_checkpoint(tmp_path / "out")
    assert all(same(weight, written[name]) for name, weight in checkpoint.weights())
    assert "quantization_config" not in checkpoint.config
    kinds = {entry["dtype"] for entry in header(tmp_path / "out" / "model.safetensors").values()}
    if dtype != "float16":  # 1 + w in half precision can need more bits than w: then float32 is kept
        assert kinds == {{"bfloat16": "BF16", "float32": "F32"}[dtype]}


def header(file: Path) -> dict[str, dict[str, str]]:
    raw = file.read_bytes()
    found = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    found.pop("__metadata__")
    return found


def test_large_models_are_sharded(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))
    write_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.weights(), shard_bytes=200_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    found = dict(open_checkpoint(tmp_path / "out").weights())
    assert all(same(found[name], weight) for name, weight in checkpoint.weights())
    np.testing.assert_allclose(
        their_logits(tmp_path / "out", [5, 6, 7]), our_logits(checkpoint.path, [5, 6, 7]), atol=1e-4, rtol=1e-4
    )


def test_tokenizer_and_extra_files_come_along(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("llama")
    checkpoint = open_checkpoint(source)
    extra = {"recipe.yaml": "steps: []\n", "receipt.json": b"{}"}
    write_checkpoint(tmp_path / "o", checkpoint.config, checkpoint.weights(), source, extra)
    assert (tmp_path / "o" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (tmp_path / "o" / "recipe.yaml").read_text() == "steps: []\n"
    assert (tmp_path / "o" / "receipt.json").read_bytes() == b"{}"


def test_nothing_is_left_when_writing_fails(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))

    def cut() -> Iterator[tuple[str, Weight]]:
        for index, item in enumerate(checkpoint.weights()):
            if index == 7:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", checkpoint.config, cut())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"layers\.2.*missing"):
        write_checkpoint(
            tmp_path / "out", checkpoint.config, ((n, w) for n, w in checkpoint.weights() if n != "layers.2.down")
        )
    assert not list(tmp_path.iterdir())

    def full(self: tensor_file.TensorWriter, name: str, dtype: str, values: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file.TensorWriter, "add", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        write_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.weights())
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_touched(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))
    (tmp_path / "out").mkdir()
    with pytest.raises(ResourceError, match="exists already"):
        write_checkpoint(tmp_path / "out", checkpoint.config, checkpoint.weights())
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_checkpoint(tmp_path / "file" / "out", checkpoint.config, checkpoint.weights())


def test_parts_of_a_fused_module_must_agree(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="must have one format"):
        rewrite(tiny_model("phi3", **SIZES), tmp_path / "out", {"q": INT4, "k": INT8, "v": INT4})


def test_weights_of_another_architecture_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))
    extra = ("layers.0.q_norm", next(w for n, w in checkpoint.weights() if n == "final_norm"))
    with pytest.raises(ModelError, match=r"layers\.0\.q_norm.*not part"):
        write_checkpoint(tmp_path / "out", checkpoint.config, [*checkpoint.weights(), extra])


def test_quantised_activations_stay_close(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("qwen3", **SIZES)
    rewrite(source, tmp_path / "out", dict.fromkeys(MATRICES, INT8))
    checkpoint = open_checkpoint(tmp_path / "out")
    exact = our_logits(tmp_path / "out", [5, 9, 11, 30])
    backend = ReferenceBackend(act_quant=True)
    backend.load(replace(checkpoint.spec), checkpoint.weights())
    backend.allocate(4, 16, "fp32")
    from test_reference_models import run

    rounded = run(backend, [5, 9, 11, 30], 0, [0])
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.05
