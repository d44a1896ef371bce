"""GPTQ of a model of Llama-3.1-8B's shape with random weights, from a folder to a folder: time and memory.

    python benchmarks/gptq_8b.py --out DIR [--folder DIR] [--device cuda] [--layers 32] [--budget 540]

128 calibration sequences of 2,048 random tokens; int4 in groups of 128, int8 head and embedding. Writes gptq-8b.json
into --out. Where the budget of seconds ends first, the JSON says how many blocks were done and gives the whole as an
extrapolation, named so. --tiny is a shape of a few hundred kilobytes, to see that it runs.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.compress.folder import compress
from hasten.compress.targets import matrix_shapes
from hasten.hardware import cpu_model, versions
from hasten.model.formats import Format, Weight
from hasten.model.spec import spec_from_config
from hasten.model.writer import write_checkpoint
from hasten.recipe import Calibration, Recipe
from hasten.steps import Quantize

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "hidden_act": "silu", "dtype": "bfloat16", "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
TINY = {
    "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 16384,
}  # fmt: skip


class OutOfTimeError(Exception):
    """The budget has ended."""


def random_weights(config: dict[str, Any], device: str) -> Iterator[tuple[str, Weight]]:
    """Canonical weights of normal numbers, each a stretch of one random array that begins elsewhere."""
    spec = spec_from_config(config)
    shapes = matrix_shapes(spec)
    largest = max(rows * columns for rows, columns in shapes.values())
    normal = torch.randn(largest + len(shapes), device=device, generator=torch.Generator(device).manual_seed(0))
    pool = (normal * 0.02).bfloat16().view(torch.int16).cpu().numpy().view(np.uint16)
    for index, (name, (rows, columns)) in enumerate(shapes.items()):
        yield name, Weight(Format("bf16"), (rows, columns), pool[index : index + rows * columns].reshape(rows, columns))
    ones = np.ones((spec.hidden_size, 1), np.float32)
    norms = [f"layers.{i}.{norm}" for i in range(len(spec.layers)) for norm in ("attn_norm", "mlp_norm")]
    for name in (*norms, "final_norm"):
        yield name, Weight(Format("fp32"), ones.shape, ones)


def memory(key: str) -> int:
    """VmHWM (peak) or VmRSS of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    config = {**CONFIG, **(TINY if arguments.tiny else {})}
    config["num_hidden_layers"] = min(arguments.layers, config["num_hidden_layers"])
    sequences, length = (8, 64) if arguments.tiny else (128, 2048)
    started = time.monotonic()
    model = work / "model"
    write_checkpoint(model, config, random_weights(config, arguments.device))
    tokens = np.random.default_rng(1).integers(config["vocab_size"], size=(sequences, length), dtype=np.int32)
    np.save(work / "tokens.npy", tokens)
    made = time.monotonic() - started
    steps = (
        Quantize("int4", 128, method="gptq", act_order=arguments.act_order),
        Quantize("int8", 0, targets=("head", "embedding")),
    )
    recipe = Recipe(steps, calibration=Calibration(str(work / "tokens.npy"), sequences, length))
    started, marks = time.monotonic(), list[tuple[int, float]]()

    def tell(done: int, total: int, what: str) -> None:
        marks.append((done, time.monotonic() - started))
        print(f"{marks[-1][1]:7.1f} s  [{done}/{total}] {what}", flush=True)
        if marks[-1][1] > arguments.budget:
            raise OutOfTimeError

    result: dict[str, Any] = {
        "what": "GPTQ int4-g128, int8 head and embedding, folder to folder",
        "shape": "tiny" if arguments.tiny else "8b",
        "layers": config["num_hidden_layers"], "calibration": [sequences, length], "act_order": arguments.act_order,
        "seconds_to_make_the_model": made, "versions": versions(), "cpu": cpu_model(),
        "checkpoint_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device,
    }  # fmt: skip
    with contextlib.suppress(OSError):  # not every container lets it be forgotten
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was the making of the model
    try:
        receipt = compress(model, recipe, work / "out", device=arguments.device, progress=tell)
    except OutOfTimeError:
        done, seconds = marks[-1]
        first = marks[0][1]
        whole = first + (seconds - first) / max(done, 1) * config["num_hidden_layers"]
        result |= {"finished": False, "blocks_done": done, "extrapolated_seconds": whole}
    else:
        errors = list(receipt.settings["errors"].values())
        result |= {
            "finished": True, "seconds": time.monotonic() - started,
            "mean_relative_output_error": float(np.mean(errors)),
            "bytes_after": receipt.settings["bytes_after"],
        }  # fmt: skip
    result["seconds_by_block"] = [round(b[1] - a[1], 3) for a, b in itertools.pairwise(marks)]
    result["host_peak_bytes"] = memory("VmHWM")
    if arguments.device == "cuda":
        result["device_peak_bytes"] = torch.cuda.max_memory_reserved()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where the model lies meanwhile; by default a temporary folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--budget", type=float, default=540)
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="gptq-", dir=arguments.folder))
    try:
        result = measure(arguments, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gptq-8b.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "seconds_by_block"}, indent=1))


if __name__ == "__main__":
    main()
