"""Folders as found: names of tensors, tied heads, shards, and everything that can be wrong with a file."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hasten.errors import ModelError, ResourceError
from hasten.model.checkpoint import _CHECK_CHUNK, check_finite, open_checkpoint
from hasten.model.formats import dequantize
from hasten.model.hub import resolve

Build = Callable[..., Path]


@pytest.fixture
def llama(tiny_model: Build, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "llama"))


def retensor(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def reconfigure(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    return {name: dequantize(weight) for name, weight in open_checkpoint(folder).weights()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_buffers_of_older_versions_are_ignored(llama: Path) -> None:
    before = read(llama)
    frequencies = np.ones(6, np.float32)
    retensor(llama, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies}))
    assert same(read(llama), before)


@pytest.mark.parametrize(
    ("family", "prefix"), [("gpt2", "transformer."), ("gpt_neox", "gpt_neox."), ("qwen2", "model.")]
)
def test_checkpoints_of_the_bare_model(family: str, prefix: str, tiny_model: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model(family), tmp_path / "m"))
    before = read(folder)
    bare = {name.removeprefix(prefix): value for name, value in load_file(folder / "model.safetensors").items()}
    if family == "gpt2":
        bare["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))  # a mask that was saved once
    save_file(bare, folder / "model.safetensors")
    assert same(read(folder), before)


def test_text_part_of_a_multimodal_checkpoint(tiny_model: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("gemma3"), tmp_path / "m"))
    before = read(folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    for new, old in (("language_model.model.", "model."), ("model.language_model.", "model.")):
        renamed = {new + name.removeprefix(old): value for name, value in tensors.items()}
        renamed["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
        renamed["multi_modal_projector.norm.weight"] = np.ones(2, np.float32)
        save_file(renamed, folder / "model.safetensors")
        assert same(read(folder), before)


def test_tied_heads(tiny_model: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama", tie_word_embeddings=True), tmp_path / "m"))
    before = read(folder)
    embed = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert open_checkpoint(folder).spec.tied_head
    retensor(folder, lambda t: t.update({"lm_head.weight": embed.copy()}))
    assert open_checkpoint(folder).spec.tied_head
    assert same(read(folder), before)
    retensor(folder, lambda t: t.pop("model.embed_tokens.weight"))
    assert same(read(folder), before), "the one that is there counts for both"
    other = {"lm_head.weight": 2 * embed, "model.embed_tokens.weight": embed}
    retensor(folder, lambda t: t.update(other))
    assert not open_checkpoint(folder).spec.tied_head
    np.testing.assert_array_equal(read(folder)["head"], 2 * embed)


def test_dtype_is_that_of_the_tensors_where_nothing_is_said(llama: Path) -> None:
    reconfigure(llama, dtype=None)
    assert open_checkpoint(llama).spec.dtype == "fp32"
    retensor(llama, lambda t: t.update({name: value.astype(np.float16) for name, value in t.items()}))
    assert open_checkpoint(llama).spec.dtype == "fp16"


def test_pages_are_given_back(tiny_model: Build) -> None:
    """Weights that nobody keeps stay in memory one at a time."""
    folder = tiny_model("llama", hidden_size=576, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=6)
    checkpoint = open_checkpoint(folder)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 100e6

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssFile"))

    before, most = resident(), 0
    for _, weight in checkpoint.weights():
        weight.data.max()
        most = max(most, resident())
    assert most - before < size / 3


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (
        lambda p: retensor(p, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' of shape \[172, 72\] is missing",
    ),
    "missing norm": (
        lambda p: retensor(p, lambda t: t.pop("model.norm.weight")),
        r"'model\.norm\.weight' of shape \[72\] is missing",
    ),
    "extra tensor": (
        lambda p: retensor(p, lambda t: t.update({"model.layers.0.mlp.router.weight": np.ones(3, np.float32)})),
        r"'model\.layers\.0\.mlp\.router\.weight' is not part of a llama model",
    ),
    "unexpected bias": (
        lambda p: retensor(p, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(72, np.float32)})),
        r"q_proj\.bias' is not part",
    ),
    "wrong shape": (
        lambda p: reconfigure(p, intermediate_size=171),
        r"gate_proj\.weight' has shape \[172, 72\], expected \[171, 72\]",
    ),
    "too many layers": (lambda p: reconfigure(p, num_hidden_layers=2), r"'model\.layers\.2\..*' is not part"),
    "integers": (
        lambda p: retensor(p, lambda t: t.update({"lm_head.weight": np.ones((307, 72), np.int8)})),
        r"'lm_head\.weight' has dtype I8, expected F32 or F16 or BF16",
    ),
    "truncated": (lambda p: cut(p, -100), r"'.*' ends at byte \d+, the file has \d+: it is cut short"),
    "header cut": (lambda p: cut(p, 200), "not a whole safetensors file"),
    "empty file": (lambda p: cut(p, 0), "not a whole safetensors file"),
    "huge header": (lambda p: poke(p, 0, struct.pack("<Q", 1 << 60)), "not a whole safetensors file"),
    "header not JSON": (lambda p: poke(p, 8, b"xx"), "damaged safetensors header"),
    "no config": (lambda p: (p / "config.json").unlink(), r"no config\.json, so this is not a model folder"),
    "config not JSON": (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), "expected a JSON object, found list"),
    "no tensors": (lambda p: (p / "model.safetensors").unlink(), r"no model\.safetensors"),
    "pickle only": (
        lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
        r"found pytorch_model\.bin: convert it to safetensors",
    ),
    "index of missing file": (
        lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        r"b\.safetensors is missing, though",
    ),
    "index out of the folder": (
        lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        "outside the folder",
    ),
    "index of missing tensor": (
        lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}'),
        "tensor 'a' is missing, though",
    ),
    "damaged index": (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "not an index"),
    "two files": (
        lambda p: (shutil.copy(p / "model.safetensors", p / "a.safetensors"),
                   (p / "model.safetensors").rename(p / "b.safetensors")),
        "2 .safetensors files and no",
    ),
}  # fmt: skip


def cut(folder: Path, length: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])


def poke(folder: Path, at: int, new: bytes) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:at] + new + raw[at + len(new) :])


@pytest.mark.parametrize(("spoil", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_damage_is_named(spoil: Callable[[Path], Any], message: str, llama: Path) -> None:
    spoil(llama)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(llama)


def entry(dtype: str, shape: list[int], first: int, last: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, "'b' starts at byte .*, expected .*: damaged"),
        ({"a": entry("F32", [2], 4, 12)}, "'a' starts at"),
        ({"a": entry("F32", [2], 0, 8)}, "tensors end at byte"),
        ({"a": entry("F32", [2], 0, 7)}, "spans 7 bytes, its shape .* needs 8"),
        ({"a": entry("F32", [3], 0, 12), "b": entry("F32", [2], 12, 20)}, "cut short"),
        ({"a": entry("F32", [-3], 0, 12)}, "damaged safetensors header at tensor 'a'"),
        ({"a": entry("F32", [2**40, 2**40], 0, 12)}, "spans 12 bytes"),
        ({"a": {"dtype": "F32"}}, "damaged safetensors header at tensor 'a'"),
        ({"a": entry("Q9", [3], 0, 12)}, "has dtype 'Q9'; supported: F64"),
        ([1], "damaged safetensors header"),
    ],
)
def test_offsets_are_not_trusted(header: Any, message: str, llama: Path) -> None:
    raw = json.dumps(header).encode()
    (llama / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(12))
    with pytest.raises(ModelError, match=message):
        open_checkpoint(llama)


def test_a_name_given_twice(llama: Path) -> None:
    raw = (
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    )
    (llama / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(12))
    with pytest.raises(ModelError, match="appears twice"):
        open_checkpoint(llama)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(bad: float, name: str, llama: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[-1] = bad

    retensor(llama, spoil)
    with pytest.raises(ModelError, match=f"{name}' holds NaN or infinity"):
        list(open_checkpoint(llama).weights())


@pytest.mark.parametrize(("dtype", "view"), [("F32", np.uint32), ("F16", np.uint16), ("BF16", np.uint16)])
def test_check_finite_knows_every_number(dtype: str, view: type) -> None:
    exponent, width = {"F32": (0x7F800000, 32), "F16": (0x7C00, 16), "BF16": (0x7F80, 16)}[dtype]
    sign = 1 << (width - 1)
    for bits in (0, 1, exponent - 1, sign, sign | (exponent - 1)):
        check_finite(np.array([0, bits, 0], view), dtype, "x")
    for bits in (exponent, exponent + 1, sign | exponent, sign | exponent | 1, 2**width - 1):
        with pytest.raises(ModelError, match="x holds NaN or infinity"):
            check_finite(np.array([0, bits, 0], view), dtype, "x")


@pytest.mark.parametrize("at", [0, _CHECK_CHUNK - 1, _CHECK_CHUNK, 3 * _CHECK_CHUNK])
def test_check_finite_reads_all_of_a_large_tensor(at: int) -> None:
    large = np.zeros((3 * _CHECK_CHUNK + 1, 1), np.uint16)
    check_finite(large, "BF16", "x")
    large[at] = 0x7F80
    with pytest.raises(ModelError, match="x holds NaN or infinity"):
        check_finite(large, "BF16", "x")


def test_names_of_models(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(llama) == llama
    with pytest.raises(ModelError, match="no such folder; did you mean llama"):
        resolve(llama.parent / "lama")
    with pytest.raises(ModelError, match="is a file, expected a model folder"):
        resolve(llama / "config.json")
    with pytest.raises(ModelError, match="does not exist either"):
        resolve("/no/such/place")
    monkeypatch.chdir(llama.parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve("llama") == Path("llama")
    with pytest.raises(ResourceError, match=r"no such folder; did you mean llama\?, and the hub cannot be reached"):
        resolve("lama")
    with pytest.raises(ResourceError, match="the hub cannot be reached"):
        resolve("someone/something")


def test_downloads_take_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("someone/something") == tmp_path
    assert asked["name"] == "someone/something"
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow_patterns"])
