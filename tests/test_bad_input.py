"""What a user can get wrong, and what the disk can: one clear line, exit code 2, nothing half-written."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import COMMAND, hasten

from hasten.compress.folder import check_out
from hasten.tune.state import State

TEXT = "Once upon a time"


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "stories260K"


@pytest.fixture
def copy(stories, tmp_path):
    """A copy of the model to damage."""
    folder = tmp_path / "model"
    shutil.copytree(stories, folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


def weights_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def read_header(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_with_header(file: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refuses(folder: Path) -> str:
    return hasten("generate", folder, TEXT, "--max-tokens", 4).complaint


# Models that are not there


@pytest.mark.parametrize("verb", [["generate", "{}", "text"], ["chat", "{}"], ["inspect", "{}"], ["bench", "{}"]])
def test_missing_folder(verb, tmp_path):
    missing = str(tmp_path / "nowhere")
    complaint = hasten(*(part.format(missing) for part in verb)).complaint
    assert missing in complaint


@pytest.mark.parametrize("verb", ["compress", "tune", "evaluate"])
def test_missing_folder_for_verbs_that_write(verb, tmp_path):
    missing = tmp_path / "nowhere"
    more = {"compress": ["int8", "-o", tmp_path / "out"], "tune": ["-o", tmp_path / "out"], "evaluate": []}[verb]
    assert str(missing) in hasten(verb, missing, *more).complaint
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_name_is_told_what_there_is():
    complaint = hasten("generate", "demoo", "text", env={"HF_HUB_OFFLINE": "1"}).complaint
    assert "demoo" in complaint
    assert "did you mean" in complaint


def test_a_folder_that_holds_no_model(tmp_path):
    assert "config.json" in refuses(tmp_path)


def test_a_file_instead_of_a_folder(stories):
    assert "config.json" in refuses(stories / "config.json")


# Models that are damaged


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000, -1])
def test_truncated_weights(copy, kept):
    file = weights_file(copy)
    file.write_bytes(file.read_bytes()[:kept])
    assert file.name in refuses(copy)


def test_header_length_that_cannot_be(copy):
    file = weights_file(copy)
    raw = bytearray(file.read_bytes())
    raw[:8] = struct.pack("<Q", 1 << 62)
    file.write_bytes(raw)
    assert file.name in refuses(copy)


def test_header_that_is_not_json(copy):
    file = weights_file(copy)
    raw = bytearray(file.read_bytes())
    raw[8:12] = b"\xff\xfe{{"
    file.write_bytes(raw)
    assert file.name in refuses(copy)


def test_tensor_that_lies_beyond_the_file(copy):
    header, data = read_header(weights_file(copy))
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"] = [len(data), 2 * len(data)]
    write_with_header(weights_file(copy), header, data)
    assert weights_file(copy).name in refuses(copy)


def test_tensor_of_another_shape_names_it(copy):
    header, data = read_header(weights_file(copy))
    name = next(name for name in header if name.endswith("down_proj.weight"))
    header[name]["shape"].reverse()
    write_with_header(weights_file(copy), header, data)
    assert name in refuses(copy)


def test_missing_tensor_names_it(copy):
    header, data = read_header(weights_file(copy))
    name = next(name for name in header if name.endswith("up_proj.weight"))
    header[name.replace("up_proj", "sideways_proj")] = header.pop(name)
    write_with_header(weights_file(copy), header, data)
    assert name in refuses(copy)


def test_left_over_tensor_names_it(copy):
    header, data = read_header(weights_file(copy))
    header["model.layers.0.extra.weight"] = {
        "dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]
    }  # fmt: skip
    write_with_header(weights_file(copy), header, data + b"\0\0\0\0")
    assert "model.layers.0.extra.weight" in refuses(copy)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_numbers(copy, value):
    header, data = read_header(weights_file(copy))
    name = next(name for name in header if name.endswith("v_proj.weight"))
    assert header[name]["dtype"] == "F32"
    raw = bytearray(data)
    start = header[name]["data_offsets"][0]
    raw[start + 40 : start + 44] = np.float32(value).tobytes()
    write_with_header(weights_file(copy), header, bytes(raw))
    complaint = refuses(copy)
    assert name in complaint
    assert "NaN or infinity" in complaint


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "mamba9"}, "mamba9"),
        ({"num_hidden_layers": 6}, "layers.5"),
        ({"num_attention_heads": "eight"}, "num_attention_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_act": "swishish"}, "swishish"),
    ],
)
def test_configuration_that_does_not_fit(copy, change, word):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    assert word in refuses(copy)


@pytest.mark.parametrize("verb", [["generate", TEXT], ["evaluate"], ["bench"], ["inspect"]])
def test_settings_that_were_tampered_with(copy, verb):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hasten": {"run": {"kv_cache": "int3"}}}))
    complaint = hasten(verb[0], copy, *verb[1:]).complaint
    assert str(copy / "config.json") in complaint
    assert "int3" in complaint


def test_configuration_that_is_not_json(copy):
    (copy / "config.json").write_text("{'model_type': llama}")
    assert "config.json" in refuses(copy)


def test_tokenizer_that_is_missing_or_damaged(copy):
    (copy / "tokenizer.json").write_text('{"version": "1.0"')
    assert "tokenizer.json" in refuses(copy)
    (copy / "tokenizer.json").unlink()
    assert "tokenizer" in refuses(copy)


# Prompts and flags


def test_prompt_too_long_for_the_model(stories):
    complaint = hasten("generate", stories, "word " * 600).complaint
    assert "tokens" in complaint
    assert "512" in complaint


def test_prompt_too_long_for_the_cache(stories):
    complaint = hasten("generate", stories, "The cat sat on the mat. " * 8, "--max-len", 16).complaint
    assert "16" in complaint


def test_huge_prompt_is_refused_in_seconds(stories):
    start = time.monotonic()
    complaint = hasten("generate", stories, stdin="lorem ipsum dolor " * 300_000).complaint
    assert "tokens" in complaint
    assert len(complaint) < 400
    assert time.monotonic() - start < 60


def test_prompt_that_is_not_text(stories, tmp_path):
    assert "UTF-8" in hasten("generate", stories, stdin=b"caf\xe9").complaint
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    assert "latin1.txt" in hasten("generate", stories, "-f", tmp_path / "latin1.txt").complaint
    assert "no.txt" in hasten("generate", stories, "-f", tmp_path / "no.txt").complaint


def test_max_len_beyond_the_model(stories):
    assert "512" in hasten("generate", stories, TEXT, "--max-len", 100_000).complaint


def test_an_instruction_set_that_is_not_there(stories):
    complaint = hasten("generate", stories, TEXT, env={"HASTEN_ISA": "z80"}).complaint
    assert "z80" in complaint


# Recipes


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("steps:\n  - quantize: {formt: int4}\n", "formt"),
        ("steps:\n  - quantise: {format: int4}\n", "quantise"),
        ("stages: []\n", "stages"),
        ("steps:\n  - quantize: {format: int5}\n", "int5"),
        ("steps:\n  - quantize: {format: int4, group_size: 48}\n", "48"),
        ("steps:\n  - quantize: {targets: [layers.9.down]}\n", "layers.9.down"),
        ("steps: [\n", "YAML"),
        ("", "recipe.yaml: a recipe is empty"),
    ],
)
def test_recipe_with_a_mistake_names_it(stories, tmp_path, text, word):
    (tmp_path / "recipe.yaml").write_text(text)
    complaint = hasten("compress", stories, tmp_path / "recipe.yaml", "-o", tmp_path / "out").complaint
    assert word in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_recipe_that_is_neither_preset_nor_file(stories, tmp_path):
    complaint = hasten("compress", stories, "int8-g33", "-o", tmp_path / "out").complaint
    assert "int8-g32" in complaint
    assert list(tmp_path.iterdir()) == []


def test_recipe_from_a_folder_that_has_none(stories, tmp_path):
    complaint = hasten("compress", stories, ".", cwd=tmp_path).complaint
    assert complaint == "folder . has no recipe.yaml: name a preset, a YAML file or a tuned folder"


def test_text_for_a_recipe_that_reads_none(stories, tmp_path):
    complaint = hasten("compress", stories, "int8", "--text", tmp_path / "books.txt", "-o", tmp_path / "out").complaint
    assert complaint == "int8 reads no calibration text: remove --text"
    assert list(tmp_path.iterdir()) == []


# Places that cannot be written


def test_output_without_a_name(stories, tmp_path):
    for verb in (["compress", stories, "int8"], ["tune", stories]):
        complaint = hasten(*verb, "-o", "", cwd=tmp_path).complaint
        assert complaint == "the name of the new folder is empty: name one"
    assert list(tmp_path.iterdir()) == []


def test_output_below_a_file(stories, tmp_path):
    (tmp_path / "file").write_text("")
    for verb in (["compress", stories, "int8"], ["tune", stories]):
        complaint = hasten(*verb, "-o", tmp_path / "file" / "out").complaint
        assert str(tmp_path / "file") in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_output_in_folders_that_are_not_there_yet(stories, tmp_path):
    deep = tmp_path / "a" / "b" / "int8"
    assert hasten("compress", stories, "int8", "-o", deep).good
    assert (deep / "receipt.json").is_file()
    check_out(tmp_path / "c" / "d" / "tuned")  # what tune asks before its work
    State(tmp_path / "c" / "d" / "tuned.tune.json", {}).put("part", "name", 1)
    assert (tmp_path / "c" / "d" / "tuned.tune.json").is_file()


def test_output_in_a_folder_without_permission(stories, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; test_output_below_a_file shows the same error")
    tmp_path.chmod(0o500)
    complaint = hasten("compress", stories, "int8", "-o", tmp_path / "out").complaint
    tmp_path.chmod(0o700)
    assert "out" in complaint
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_there_already_is_not_touched(stories, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "out" in hasten("compress", stories, "int8", "-o", out).complaint
    assert (out / "precious.txt").read_text() == "mine"


def test_files_that_may_not_grow(stories, tmp_path):
    """A limit on file size stands for a full disk where none can be made: writing fails in the midst of the weights."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))

    complaint = hasten("compress", stories, "int8", "-o", tmp_path / "out", preexec_fn=limit).complaint
    assert str(tmp_path) in complaint
    assert list(tmp_path.iterdir()) == []


def test_full_disk(stories, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here; test_files_that_may_not_grow stands for it")
    try:
        complaint = hasten("compress", stories, "int8", "-o", disk / "out").complaint
        assert "No space left" in complaint
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# Ctrl-C


def test_ctrl_c_during_compress_keeps_finished_blocks_and_a_rerun_goes_on(stories, tmp_path):
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.yaml"
    text.write_text("Once upon a time there was a little girl named Lily. " * 4000)
    recipe.write_text("calibration: {sequence_len: 256}\nsteps: [{quantize: {format: int8, method: gptq}}]\n")
    out, work = tmp_path / "out", tmp_path / "out.work"
    command = ["compress", str(stories), str(recipe), "--text", str(text), "-o", str(out), "--device", "cpu", "--json"]
    process = subprocess.Popen([*COMMAND, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(work.glob("*/block-0*")):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert f"kept in {work}: the same command goes on from there" in stderr
    assert not out.exists()
    receipt = json.loads(hasten(*command).good.stdout)
    assert not work.exists()
    assert json.loads((out / "receipt.json").read_text()) == receipt


def test_ctrl_c_during_tune_keeps_what_is_finished_and_a_rerun_goes_on(stories, tmp_path):
    out, state = tmp_path / "out", tmp_path / "out.tune.json"
    command = ["tune", str(stories), "-o", str(out), "--rounds", "1", "--minutes", "0.5", "--no-transformers", "--json"]
    process = subprocess.Popen([*COMMAND, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (state.exists() and "candidates" in json.loads(state.read_text())["parts"]):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "goes on from there" in stderr
    assert [path.name for path in tmp_path.iterdir()] == [state.name]
    finished = json.loads(state.read_text())["parts"]["candidates"]
    receipt = json.loads(hasten(*command).good.stdout)
    again = {candidate["name"]: candidate for candidate in (receipt["original"], *receipt["candidates"])}
    for name, candidate in finished.items():
        proven = again[name]["decode"]["1"]["n"] > 1  # the proof times what it judges anew, in rounds of its own
        assert proven or again[name]["decode"] == candidate["decode"], "measured again"
    assert not state.exists()
    assert json.loads((out / "receipt.json").read_text()) == receipt
    assert hasten("generate", out, TEXT, "--max-tokens", 8).good.stdout.strip()
