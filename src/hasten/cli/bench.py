"""`hasten bench`: how fast a model runs here, through the real engine. The timing itself is measure/speed.py's."""

import time
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.terminal import bytes_in_words, note, write_facts, write_json, write_table
from hasten.errors import RequestError, ResourceError

if TYPE_CHECKING:
    from hasten.engine.engine import Engine
    from hasten.engine.llm import LLM
    from hasten.hardware import Limits
    from hasten.measure.speed import Energy, Timing, Workload

START = 16  # tokens of prompt before decoding
_ENERGY_SECONDS = 2.0  # a workload at least: a GPU's counter moves some ten times a second


def bench(
    model: options.ModelArgument,
    prefill: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of prompt to read.")] = 512,
    decode: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens to write.")] = 128,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Streams at once; may be given again.  [default: 1, 8, 32]"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each; the median is shown.")] = 3,
    json: options.JsonOption = False,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    kv_cache: options.KvCacheOption = None,
    format: options.FormatOption = None,
    tune_kernels: Annotated[
        bool,
        typer.Option("--tune-kernels", help="First find the best kernel tiles for MODEL on this GPU, and keep them."),
    ] = False,
) -> None:
    """Measure speed here.

    Reading a prompt, and writing with several streams at once, through the real engine, in interleaved rounds. `of
    bandwidth` is what decoding reads a second over the bandwidth measured just before: of reading on a CPU, of a large
    copy on a GPU. Memory is on a CPU the peak of a fresh process which reads the prompt, on a GPU what is taken at the
    end. On a GPU, energy is the whole board's (NVML).
    """
    from hasten.backends import choose_device
    from hasten.engine.llm import LLM

    chosen = choose_device(device)
    if tune_kernels and chosen != "cuda":
        raise RequestError(f"--tune-kernels is for an NVIDIA GPU, the device is {chosen}: leave it out")
    start = time.perf_counter()
    llm = LLM(model, device=device, format=format, threads=threads, kv_cache=kv_cache)
    load_seconds = time.perf_counter() - start
    works = workloads(llm, prefill, decode, batch or [1, 8, 32])
    tuned = tune(llm) if tune_kernels else None
    report = measure(llm, chosen, works, rounds, format)
    report["load_seconds"] = load_seconds
    if tuned is not None:
        report["tuned_kernels"] = tuned
    report |= memory_of(llm, chosen, list(works[f"prefill {prefill}"].prompts[0]))
    if json:
        write_json(report)
    else:
        _write_report(report)


def tune(llm: "LLM") -> dict[str, Any]:
    """Have a GPU's backend measure its kernels, and keep what it finds."""
    note("trying kernel tiles ...")
    found: dict[str, Any] = llm.backend.tune_kernels(note)  # type: ignore[attr-defined]
    note(f"kept in {found['file']}")
    return found


def measure(
    llm: "LLM", device: str, works: dict[str, "Workload"], rounds: int, format: str | None = None
) -> dict[str, Any]:
    """Speed, and on a GPU energy, of every workload, with the conditions, as plain data. format: as LLM's."""
    from hasten.measure.speed import notes_on_format

    engine = engine_for(llm, works)
    limits, machine = probe_device(llm, device)
    note(f"{len(works)} measurements, {rounds} rounds ...")
    energy, notes = measure_energy(engine, works) if device == "cuda" else ({}, [])
    conditions = {
        "model": str(llm.path),
        "device": device,
        **machine,
        "kv_cache": llm.kv_cache,
        "format": format or "as stored",
        "rounds": rounds,
        "read_bandwidth": limits.bandwidth,
    }
    results = summarize(llm, works, time_all(engine, works, rounds), energy, limits, format)
    return {"results": results, "conditions": conditions, "notes": [*notes, *notes_on_format(llm.backend, device)]}


def engine_for(llm: "LLM", works: dict[str, "Workload"]) -> "Engine":
    """An engine over the loaded model with room for the largest workload; its KV cache takes the place of LLM's."""
    from hasten.measure.speed import make_engine
    from hasten.recipe import Run

    streams = max(len(work.prompts) for work in works.values())
    longest = max(len(work.prompts[0]) + work.num_tokens for work in works.values())
    return make_engine(llm.spec, llm.backend, Run(kv_cache=llm.kv_cache), streams, longest)


def probe_device(llm: "LLM", device: str) -> tuple["Limits", dict[str, Any]]:
    """What the device can do, measured now, and what it is."""
    if device == "cuda":
        from hasten.backends.cuda.probe import probe_gpu

        gpu = probe_gpu()
        return gpu, {"gpu": gpu.name, "capability": gpu.capability, "cuda": gpu.cuda}
    from hasten.hardware import probe

    threads: int = llm.backend.threads  # type: ignore[attr-defined]
    hardware = probe(threads=threads)
    return hardware, {"isa": hardware.isa, "cpu": hardware.cpu, "threads": threads}


def memory_of(llm: "LLM", device: str, prompt: list[int]) -> dict[str, Any]:
    """Bytes: on a CPU the peak of a fresh process, on a GPU what is taken of it now, by others too."""
    if device == "cuda":
        found = llm.backend.memory(llm.backend.usual)
        return {"device_memory": {"taken": found.total - found.free, "total": found.total}}
    from hasten.measure.memory import peak_memory

    threads: int = llm.backend.threads  # type: ignore[attr-defined]
    return {"peak_memory": peak_memory(llm.path, prompt, threads, llm.kv_cache)}


def measure_energy(engine: "Engine", works: dict[str, "Workload"]) -> tuple[dict[str, "Energy"], list[str]]:
    """What each workload takes of the GPU's energy; where that cannot be read, nothing, and a note with the reason."""
    from hasten.measure.energy import open_meter
    from hasten.measure.speed import energy_of

    try:
        meter = open_meter("cuda")
    except ResourceError as error:
        return {}, [f"no energy: {error}"]
    return {name: energy_of(engine, work, meter, _ENERGY_SECONDS) for name, work in works.items()}, []


def time_all(engine: "Engine", works: dict[str, "Workload"], rounds: int) -> dict[str, list["Timing"]]:
    """Every workload on the loaded model, in interleaved rounds."""
    from hasten.measure.speed import interleave, time_workload

    return interleave({name: partial(time_workload, engine, work) for name, work in works.items()}, rounds)


def workloads(llm: "LLM", prefill: int, decode: int, batches: list[int]) -> dict[str, "Workload"]:
    """What is timed, by name. Prompts are tokens drawn evenly from the vocabulary, the same every time: speed does not
    depend on which. Raises RequestError where the model's longest text is too short for it."""
    import numpy as np

    from hasten.measure.speed import Workload, prompts_from

    longest = llm.spec.max_position
    if prefill + 1 > longest or START + decode > longest:
        raise RequestError(
            f"--prefill {prefill} and --decode {decode} (after {START}) do not fit the {longest} tokens of this model: "
            f"use --prefill {min(prefill, longest - 1)} --decode {min(decode, longest - START)}"
        )
    tokens = np.random.default_rng(0).integers(0, llm.spec.vocab_size, prefill + START * max(batches)).tolist()
    works = {f"prefill {prefill}": Workload((tuple(tokens[:prefill]),), 1)}
    for streams in batches:
        name = f"decode {decode}, {streams} stream{'s' * (streams > 1)}"
        works[name] = Workload(prompts_from(tokens, streams, START), decode)
    return works


def summarize(
    llm: "LLM",
    works: dict[str, "Workload"],
    timings: dict[str, list["Timing"]],
    energy: dict[str, "Energy"],
    limits: "Limits",
    format: str | None = None,
) -> list[dict[str, Any]]:
    """Medians with their spread as plain data; tokens/s, seconds, shares of the bandwidth, joules a token, watts."""
    from dataclasses import asdict

    from hasten.measure.statistics import spread

    results = []
    for name, work in works.items():
        streams, reading = len(work.prompts), work.num_tokens == 1
        rates = spread([t.prefill if reading else t.decode for t in timings[name]], "tokens/s")
        row: dict[str, Any] = {"test": name, "streams": streams, "speed": asdict(rates)}
        if reading:
            row["ttft"] = asdict(spread([t.ttft for t in timings[name]], "s"))
        else:
            context = START + work.num_tokens // 2
            num_bytes = step_bytes(llm, streams, context, limits.takes, format)
            row["of_bandwidth"] = rates.median / streams * num_bytes / limits.bandwidth
        if name in energy:
            row["energy"] = asdict(energy[name])
        results.append(row)
    return results


def step_bytes(llm: "LLM", streams: int, context: int, takes: tuple[str, ...], format: str | None = None) -> int:
    """Bytes that one decoding step reads: its weights once, and every stream's keys and values. takes: formats that the
    device multiplies as they are (Limits). format "fp8": what the layers have in 16 or 32 bits was rounded when it was
    loaded."""
    from hasten.model.checkpoint import open_checkpoint
    from hasten.model.formats import DENSE_BYTES, Format
    from hasten.tune.predict import as_run, kv_bytes_per_token, weights_read

    formats = {name: fmt for name, _, fmt in open_checkpoint(llm.path).matrices()}
    if format == "fp8":
        rounded = [name for name, fmt in formats.items() if name.startswith("layers.") and fmt.kind in DENSE_BYTES]
        formats |= dict.fromkeys(rounded, Format("fp8"))
    formats = {name: as_run(fmt, name, llm.spec, takes) for name, fmt in formats.items()}
    kv_read = streams * context * kv_bytes_per_token(llm.spec, llm.kv_cache)
    return int(weights_read(llm.spec, formats, streams) + kv_read)


def _write_report(report: dict[str, Any]) -> None:
    conditions = report["conditions"]
    reads = f"{conditions['read_bandwidth'] / 1e9:,.1f} GB/s, measured just before"
    if conditions["device"] == "cuda":
        memory = report["device_memory"]
        machine = [
            ("machine", f"{conditions['gpu']}, compute capability {conditions['capability']}"),
            ("copies", reads),
        ]
        taken = ("GPU memory", f"{bytes_in_words(memory['taken'])} taken of {bytes_in_words(memory['total'])}")
    else:
        machine = [
            ("machine", f"{conditions['cpu']}, {conditions['isa']}, {conditions['threads']} threads"),
            ("reads", reads),
        ]
        taken = ("peak memory", bytes_in_words(report["peak_memory"]))
    write_facts([("model", conditions["model"]), *machine, ("loading", f"{report['load_seconds']:.2f} s"), taken])
    with_energy = any("energy" in row for row in report["results"])
    columns = ["test", "tokens/s", "lowest to highest", "first token", "of bandwidth"]
    columns += ["W", "J/token"] if with_energy else []
    write_table(columns, [_cells(row, with_energy) for row in report["results"]])
    for line in report["notes"]:
        note(f"note: {line}")


def _cells(row: dict[str, Any], with_energy: bool) -> list[str]:
    speed = row["speed"]
    cells = [
        row["test"],
        f"{speed['median']:,.1f}",
        f"{speed['low']:,.1f} to {speed['high']:,.1f}",
        f"{1000 * row['ttft']['median']:,.0f} ms" if "ttft" in row else "",
        f"{row['of_bandwidth']:.0%}" if "of_bandwidth" in row else "",
    ]
    if with_energy:
        cells += [f"{row['energy']['watts']:,.0f}", f"{row['energy']['joules_per_token']:.3g}"]
    return cells
