"""`hasten bench`: how fast a model runs here, through the real engine. The timing itself is measure/speed.py's."""

import time
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.terminal import bytes_in_words, note, write_facts, write_json, write_table
from hasten.errors import RequestError

if TYPE_CHECKING:
    from hasten.engine.llm import LLM
    from hasten.hardware import Hardware
    from hasten.measure.speed import Timing, Workload

START = 16  # tokens of prompt before decoding


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
    threads: options.ThreadsOption = None,
    kv_cache: options.KvCacheOption = None,
) -> None:
    """Measure speed here.

    Reading a prompt, and writing with several streams at once, through the real engine, in interleaved rounds. `of
    bandwidth` is what decoding reads a second over the read bandwidth measured just before. Peak memory is that of a
    fresh process which reads the prompt.
    """
    from hasten.engine.llm import LLM
    from hasten.hardware import probe
    from hasten.measure.memory import peak_memory

    batches = batch or [1, 8, 32]
    start = time.perf_counter()
    llm = LLM(model, device="cpu", threads=threads, kv_cache=kv_cache)
    load_seconds = time.perf_counter() - start
    used: int = llm.backend.threads  # type: ignore[attr-defined]
    works = workloads(llm, prefill, decode, batches)
    hardware = probe(threads=used)
    note(f"{len(works)} measurements, {rounds} rounds ...")
    report = summarize(llm, works, time_all(llm, works, rounds), hardware)
    report["conditions"] = {
        "model": str(llm.path),
        "isa": hardware.isa,
        "cpu": hardware.cpu,
        "threads": used,
        "kv_cache": llm.kv_cache,
        "rounds": rounds,
        "read_bandwidth": hardware.bandwidth,
    }
    report["load_seconds"] = load_seconds
    report["peak_memory"] = peak_memory(llm.path, list(works[f"prefill {prefill}"].prompts[0]), used, llm.kv_cache)
    if json:
        write_json(report)
    else:
        _write_report(report)


def time_all(llm: "LLM", works: dict[str, "Workload"], rounds: int) -> dict[str, list["Timing"]]:
    """Every workload on the loaded model, in interleaved rounds."""
    from hasten.measure.speed import interleave, make_engine, time_workload
    from hasten.recipe import Run

    streams = max(len(work.prompts) for work in works.values())
    longest = max(len(work.prompts[0]) + work.num_tokens for work in works.values())
    engine = make_engine(llm.spec, llm.backend, Run(kv_cache=llm.kv_cache), streams, longest)
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
    llm: "LLM", works: dict[str, "Workload"], timings: dict[str, list["Timing"]], hardware: "Hardware"
) -> dict[str, Any]:
    """Medians with their spread as plain data; tokens/s, seconds, and shares of the read bandwidth."""
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
            row["of_bandwidth"] = (
                rates.median / streams * step_bytes(llm, hardware, streams, context) / hardware.bandwidth
            )
        results.append(row)
    return {"results": results}


def step_bytes(llm: "LLM", hardware: "Hardware", streams: int, context: int) -> int:
    """Bytes that one decoding step reads: the weights once, and every stream's keys and values."""
    from hasten.model.checkpoint import open_checkpoint
    from hasten.tune.predict import predict

    formats = {name: fmt for name, _, fmt in open_checkpoint(llm.path).matrices()}
    return predict(llm.spec, formats, hardware, llm.kv_cache, streams * context).token_bytes


def _write_report(report: dict[str, Any]) -> None:
    conditions = report["conditions"]
    write_facts(
        [
            ("model", conditions["model"]),
            ("machine", f"{conditions['cpu']}, {conditions['isa']}, {conditions['threads']} threads"),
            ("reads", f"{conditions['read_bandwidth'] / 1e9:.1f} GB/s, measured just before"),
            ("loading", f"{report['load_seconds']:.2f} s"),
            ("peak memory", bytes_in_words(report["peak_memory"])),
        ]
    )
    rows = []
    for row in report["results"]:
        speed = row["speed"]
        rows.append(
            [
                row["test"],
                f"{speed['median']:,.1f}",
                f"{speed['low']:,.1f} to {speed['high']:,.1f}",
                f"{1000 * row['ttft']['median']:,.0f} ms" if "ttft" in row else "",
                f"{row['of_bandwidth']:.0%}" if "of_bandwidth" in row else "",
            ]
        )
    write_table(["test", "tokens/s", "lowest to highest", "first token", "of bandwidth"], rows)
