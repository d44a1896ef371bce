"""`hasten inspect`: what a model is, what this machine is, and what to expect of both, before a weight is loaded."""

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.terminal import bytes_in_words, note, write_facts, write_json, write_table
from hasten.errors import RequestError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hasten.hardware import Gpu, Hardware, Limits
    from hasten.model.checkpoint import Checkpoint
    from hasten.model.spec import Layer
    from hasten.receipt import Prediction

STREAMS = (1, 8)


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="As elsewhere; without it, only the machine.", show_default=False),
    ] = None,
    context: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens that each stream has, for memory and speed.")
    ] = 4096,
    kv_cache: options.KvCacheOption = None,
    device: options.DeviceOption = "auto",
    json: options.JsonOption = False,
) -> None:
    """Say what a model is and what to expect of it here.

    The device's bandwidth and arithmetic are measured, about a second; of the model, the configuration and the headers
    of its files are read, no weight. Predictions are upper limits: what reading and multiplying alone would
    allow.
    """
    from hasten.backends import choose_device

    chosen = choose_device(device)
    checkpoint = None
    if model is not None:
        from hasten.model.checkpoint import open_checkpoint
        from hasten.model.hub import resolve

        checkpoint = open_checkpoint(resolve(model))
    kv = choose_kv_cache(checkpoint, chosen, kv_cache)
    note("Measuring this machine ...")
    found, facts, notes = look(chosen)
    expected: dict[str, Prediction] = {}
    if checkpoint is not None:
        context = min(context, checkpoint.spec.max_position)
        expected = predictions(checkpoint, found, kv, context)
    if json:
        write_json(_as_data(checkpoint, chosen, found, notes, expected, kv, context))
        return
    write_facts(facts)
    if checkpoint is not None:
        print()
        write_facts(model_facts(checkpoint))
        print()
        _write_predictions(checkpoint, found, expected, kv, context)
    for line in notes:
        note(f"note: {line}")


def choose_kv_cache(checkpoint: "Checkpoint | None", device: str, asked: str | None) -> str:
    """How keys and values are stored: as asked, as the folder says, as usual. RequestError where there is no such."""
    from hasten.model.settings import default_kv_cache, stated_run

    if device == "cuda":
        from hasten.backends.cuda import CudaBackend

        known = CudaBackend.kv_dtypes
    else:
        from hasten.backends.cpu import CpuBackend

        known = CpuBackend.kv_dtypes
    if asked is None and checkpoint is not None:
        asked = default_kv_cache(checkpoint.spec, known, stated_run(checkpoint).kv_cache)
    asked = asked or "bf16"
    if asked not in known:
        raise RequestError(f"kv_cache is {asked}, expected, on device {device}, {' or '.join(known)}")
    return asked


def look(device: str) -> "tuple[Hardware | Gpu, list[tuple[str, str]], tuple[str, ...]]":
    """The device as measured, in names and values, and what is to be noted."""
    if device == "cuda":
        from hasten.backends.cuda.probe import probe_gpu
        from hasten.measure.energy import open_meter

        gpu = probe_gpu()
        try:
            open_meter(device)
        except ResourceError as error:
            return gpu, gpu_facts(gpu), (f"no energy: {error}",)
        return gpu, gpu_facts(gpu), ()
    from hasten.hardware import probe

    hardware = probe()
    return hardware, machine_facts(hardware), hardware.notes


def predictions(checkpoint: "Checkpoint", limits: "Limits", kv_cache: str, context: int) -> dict[str, "Prediction"]:
    """Upper limits by format: as stored, then those that `tune` would try, by their presets' names."""
    from hasten.compress.plan import resolve
    from hasten.tune.candidates import uniform
    from hasten.tune.predict import predict

    found = {name: fmt for name, _, fmt in checkpoint.matrices()}
    ways = {"as stored": found}
    for name, recipe in uniform(checkpoint.spec, found).items():
        ways[name] = {**found, **resolve(recipe, checkpoint.spec, found).formats}
    return {
        name: predict(checkpoint.spec, formats, limits, kv_cache, context, STREAMS) for name, formats in ways.items()
    }


def machine_facts(hardware: "Hardware") -> list[tuple[str, str]]:
    """The machine in names and values, for what runs on its processor."""
    bandwidth = ", ".join(
        f"{value / 1e9:.1f} GB/s with {count} thread{'s' * (count != '1')}"
        for count, value in hardware.read_bandwidth.items()
    )
    caches = ", ".join(f"{level} {bytes_in_words(size)}" for level, size in hardware.caches.items())
    quota = "" if hardware.cpu_quota is None else f", of which {hardware.cpu_quota:g} may be used"
    return [
        ("processor", f"{hardware.cpu} ({hardware.architecture})"),
        ("instructions", f"{hardware.isa} (HASTEN_ISA forces another)"),
        ("cores", f"{hardware.cores}{quota}, {hardware.numa_nodes} NUMA node{'s' * (hardware.numa_nodes > 1)}"),
        ("caches", caches or "not known"),
        ("memory", f"{bytes_in_words(hardware.memory_available)} free of {bytes_in_words(hardware.memory_total)}"),
        ("huge pages", hardware.huge_pages or "not known"),
        ("reads", bandwidth),
        ("multiplies", ", ".join(f"{kind} {value / 1e12:.2f} TOPS" for kind, value in hardware.peak_ops.items())),
    ]


def gpu_facts(gpu: "Gpu") -> list[tuple[str, str]]:
    """The GPU in names and values."""
    return [
        ("GPU", f"{gpu.name}, {gpu.processors} multiprocessors"),
        ("capability", f"{gpu.capability}, CUDA {gpu.cuda}"),
        ("memory", f"{bytes_in_words(gpu.memory_available)} free of {bytes_in_words(gpu.memory_total)}"),
        ("copies", f"{gpu.bandwidth / 1e9:,.1f} GB/s, read and written"),
        ("multiplies", ", ".join(f"{kind} {value / 1e12:.1f} TOPS" for kind, value in gpu.peak_ops.items())),
    ]


def model_facts(checkpoint: "Checkpoint") -> list[tuple[str, str]]:
    """The model in names and values."""
    spec, layers = checkpoint.spec, checkpoint.spec.layers
    windows = sorted({layer.window for layer in layers if layer.window})
    heads, groups, neurons = (
        _span(getattr(layer, key) for layer in layers) for key in ("num_heads", "num_kv_heads", "intermediate_size")
    )
    head = "tied to the embedding" if spec.tied_head else "of its own"
    return [
        ("model", f"{spec.family}, in {checkpoint.path}"),
        ("parameters", f"{num_parameters(checkpoint):,} in matrices"),
        ("formats", ", ".join(f"{name} x {count}" for name, count in format_counts(checkpoint).items())),
        ("layers", f"{len(layers)} of width {spec.hidden_size}, MLP {neurons}"),
        ("attention", f"{heads} heads of {layers[0].head_dim}, {groups} with keys and values"),
        *_split_facts(layers),
        ("windows", ", ".join(str(window) for window in windows) or "none: every token sees all before it"),
        ("vocabulary", f"{spec.vocab_size:,} tokens, head {head}"),
        ("longest text", f"{spec.max_position:,} tokens"),
    ]


def _span(values: "Iterable[int]") -> str:
    """One number, or the smallest and the largest."""
    found = list(values)
    low, high = min(found), max(found)
    return f"{low}" if low == high else f"{low} to {high}"


def _split_facts(layers: "Sequence[Layer]") -> list[tuple[str, str]]:
    """What is factorised and split; nothing where nothing is."""
    facts = []
    if ranks := [rank for layer in layers for _, rank in layer.ranks]:
        facts.append(("low rank", f"{len(ranks)} matrices in two, of rank {_span(ranks)}"))
    if split := [layer for layer in layers if layer.experts]:
        experts, active = (_span(getattr(layer, key) for layer in split) for key in ("experts", "active_experts"))
        facts.append(("experts", f"{active} of {experts} run, in {len(split)} layers"))
    return facts


def num_parameters(checkpoint: "Checkpoint") -> int:
    return sum(rows * columns for _, (rows, columns), _ in checkpoint.matrices())


def format_counts(checkpoint: "Checkpoint") -> dict[str, int]:
    """How many matrices are stored in each format."""
    from hasten.compress.targets import describe

    return dict(Counter(describe(fmt) for _, _, fmt in checkpoint.matrices()))


def _write_predictions(
    checkpoint: "Checkpoint", limits: "Limits", expected: dict[str, "Prediction"], kv_cache: str, context: int
) -> None:
    from hasten.tune.predict import memory_needed

    rows = []
    for name, prediction in expected.items():
        needed = memory_needed(checkpoint.spec, prediction, kv_cache, context)
        rows.append(
            [
                name,
                bytes_in_words(prediction.weight_bytes),
                bytes_in_words(needed),
                "yes" if needed < limits.memory_available else "no",
                *(f"{prediction.decode[str(count)]:,.0f}" for count in STREAMS),
                f"{prediction.prefill:,.0f}",
            ]
        )
    columns = [
        "format",
        "weights",
        f"with {context} tokens of KV",
        "fits",
        "decode, 1 stream",
        "8 streams",
        "prefill 512",
    ]
    write_table(columns, rows, title="At most, tokens/s, from measured bandwidth and arithmetic")


def _as_data(
    checkpoint: "Checkpoint | None",
    device: str,
    found: "Hardware | Gpu",
    notes: tuple[str, ...],
    expected: dict[str, "Prediction"],
    kv_cache: str,
    context: int,
) -> dict[str, Any]:
    from dataclasses import asdict

    data: dict[str, Any] = {"device": device, "machine": {**asdict(found), "notes": notes}}
    if checkpoint is not None:
        from hasten.tune.predict import memory_needed

        spec = checkpoint.spec
        data["model"] = {
            "path": str(checkpoint.path),
            "family": spec.family,
            "parameters": num_parameters(checkpoint),
            "formats": format_counts(checkpoint),
            "layers": [asdict(layer) for layer in spec.layers],
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
            "max_position": spec.max_position,
            "tied_head": spec.tied_head,
            "eos_token_ids": list(spec.eos_token_ids),
        }
        data["predictions"] = {
            name: {
                **asdict(prediction),
                "memory": (needed := memory_needed(spec, prediction, kv_cache, context)),
                "fits": needed < found.memory_available,
            }
            for name, prediction in expected.items()
        }
        data["conditions"] = {"kv_cache": kv_cache, "context": context}
    return data
