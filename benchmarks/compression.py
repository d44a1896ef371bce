"""Every way to compress, on one model, by bits per byte on text it has not seen: the table, and the orders that the
papers let one expect, held or not.

    python benchmarks/compression.py --data DIR                        the bundled model, on a CPU a quarter of an hour
    python benchmarks/compression.py --data DIR --model FOLDER --device cuda --minutes 8 --json FILE

DIR holds the books that examples/demo names, wikitext-2/test.txt (another kind of text) and tinystories-slice/ (for
stories260K). Calibration and training read one part of the text, quality is measured on another. Differences are
paired: of two ways on the same windows, with their 95 % interval. Asserts nothing. The file is written after each row,
so that a run that is cut short loses nothing; --minutes ends it, rows that were not reached are named. Several runs of
different rows (--only) at once, then --join, make use of a GPU that one run leaves idle.

Speed is measured at the end through the engine, all rows in turn; on a CPU it needs the compiled core.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from compression_rows import ORDERS, ORIGINAL, Order, Row, Training, rows
from compression_tools import (
    ROOT,
    Texts,
    middle,
    nll_of,
    plant_outliers,
    slices,
    speeds_of,
    texts_for,
    windows_of,
)

import hasten
from hasten.errors import HastenError
from hasten.hardware import conditions, cpu_model, usable_threads, versions
from hasten.measure.statistics import ratio_interval
from hasten.measure.text import Window
from hasten.model.checkpoint import open_checkpoint
from hasten.receipt import Measurement, plain, write_text
from hasten.recipe import Calibration, Recipe

LOG2 = float(np.log(2))


@dataclass
class Result:
    """What is known of a row. nll: nats of each window of the held-out text, kept for paired differences."""

    name: str
    seconds: float = 0.0
    error: str = ""
    megabytes: float = 0.0
    bits: Measurement | None = None
    rise: Measurement | None = None
    other: Measurement | None = None
    nll: list[float] = field(default_factory=list)
    decode: dict[str, float] = field(default_factory=dict)
    decode_samples: dict[str, list[float]] = field(default_factory=dict)
    no_speed: str = ""


@dataclass(frozen=True)
class Bench:
    """One run: the model, its windows of text, and where things lie."""

    model: Path
    work: Path
    device: str
    texts: Texts
    heldout: tuple[Window, ...]
    other: tuple[Window, ...]
    calibration: Calibration
    say: Callable[[str], None]

    @property
    def num_bytes(self) -> np.ndarray:
        return np.array([window.num_bytes for window in self.heldout], np.float64)


def main() -> None:
    args = arguments()
    if args.join:
        print(render(join(args)))
        return
    started = time.monotonic()
    work = args.work or Path(tempfile.mkdtemp(prefix="hasten-compression-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        report = run(args, work, lambda: args.minutes * 60 - (time.monotonic() - started))
        print(render(report))
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the texts")
    parser.add_argument("--model", default="demo", help="a model folder, or demo")
    parser.add_argument("--train", type=Path, help="text to calibrate and train on; by default see texts_for")
    parser.add_argument("--heldout", type=Path, help="text to measure on")
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where methods, training and quality run")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no row after this")
    parser.add_argument("--windows", type=int, default=96, help="windows of held-out text at most")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window")
    parser.add_argument("--sequences", type=int, default=64, help="calibration sequences of --window tokens")
    parser.add_argument(
        "--train-steps", type=int, default=150, help="optimiser steps of each row with training; 0: none"
    )
    parser.add_argument("--train-batch", type=int, default=8, help="sequences of --window tokens a step")
    parser.add_argument("--only", default="", help="rows whose name holds one of these words, by comma")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of speed; 0: speed is not measured")
    parser.add_argument("--json", type=Path, default=Path("compression.json"), help="file that is written")
    parser.add_argument("--join", type=Path, nargs="+", help="print, and write, what runs of one model found together")
    parser.add_argument("--work", type=Path, help="keep folders here; run again, rows are not made again")
    args = parser.parse_args()
    if args.data is None and not args.join:
        parser.error("--data is needed: the folder with the texts")
    return args


def run(args: argparse.Namespace, work: Path, seconds_left: Callable[[], float]) -> dict[str, Any]:
    bench = prepare(args, work)
    results: dict[str, Result] = {}
    folders: dict[str, Path] = {}
    spec = open_checkpoint(bench.model).spec
    known = earlier(args)
    length = bench.calibration.sequence_len
    training = None
    if args.train_steps:
        training = Training(str(work / "train.txt"), args.train_steps, args.train_batch, length)
    for row in rows(spec, training):
        if not wanted(row, args):
            continue
        if row.name in known:
            results[row.name], folders[row.name] = known[row.name], make(row, bench)
            continue
        if seconds_left() < 0:
            results[row.name] = Result(row.name, error="not reached: out of time")
            continue
        bench.say(f"{row.name} ({seconds_left():.0f} s left)")
        results[row.name] = measure(row, bench, folders, results.get(ORIGINAL))
        save(args, bench, results)
    if args.rounds and seconds_left() > 0:
        add_speed(bench, folders, results, args.rounds)
    return save(args, bench, results)


def earlier(args: argparse.Namespace) -> dict[str, Result]:
    """Rows that a run with the same settings finished, where its folders were kept."""
    if args.work is None or not args.json.is_file():
        return {}
    report = json.loads(args.json.read_text())
    free = ("minutes", "rounds", "only")
    if any(report["settings"].get(key) != value for key, value in settings(args).items() if key not in free):
        return {}
    return {
        name: Result(**{**row, **{key: row[key] and Measurement(**row[key]) for key in ("bits", "rise", "other")}})
        for name, row in report["rows"].items()
        if row["nll"]
    }


def settings(args: argparse.Namespace) -> dict[str, str]:
    """The arguments; of files their names alone, as where they lie is nobody's business."""
    return {
        key: Path(value).name if key == "model" or isinstance(value, Path) else str(value)
        for key, value in vars(args).items()
        if key != "join"
    }


def prepare(args: argparse.Namespace, work: Path) -> Bench:
    model = ROOT / "src" / "hasten" / "demo" if args.model == "demo" else Path(args.model)
    texts = texts_for(model, args.data, args.train, args.heldout)
    (work / "train.txt").write_text(texts.train, encoding="utf-8")
    (work / "calibration.txt").write_text(slices(texts.train), encoding="utf-8")
    length = min(args.window, open_checkpoint(model).spec.max_position)
    return Bench(
        model=model,
        work=work,
        device=args.device,
        texts=texts,
        heldout=windows_of(model, texts.heldout, length, args.windows),
        other=windows_of(model, texts.other, length, args.windows // 3) if texts.other else (),
        calibration=Calibration(str(work / "calibration.txt"), args.sequences, length),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )


def wanted(row: Row, args: argparse.Namespace) -> bool:
    words = [word for word in args.only.split(",") if word]
    return row.name == ORIGINAL or not words or any(word in row.name for word in words)


def measure(row: Row, bench: Bench, folders: dict[str, Path], original: Result | None) -> Result:
    """One row; whatever goes wrong is its own error, and the others go on."""
    result = Result(row.name)
    started = time.monotonic()
    try:
        folder = make(row, bench)
        folders[row.name] = folder
        result.megabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
        nll, *other = nll_of(folder, [bench.heldout, bench.other], bench.device, row.int8_inputs)
        result.nll = nll.tolist()
        result.bits = ratio_interval(nll / LOG2, bench.num_bytes, "bits/byte")
        if bench.other:
            sizes = np.array([window.num_bytes for window in bench.other], np.float64)
            result.other = ratio_interval(other[0] / LOG2, sizes, "bits/byte")
        if original is not None and original.nll:
            base = np.array(original.nll)
            result.rise = ratio_interval(nll - base, base, "relative")
    except Exception as error:
        if not isinstance(error, HastenError):
            traceback.print_exc()
        result.error = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    result.nll = [round(value, 4) for value in result.nll]
    result.seconds = round(time.monotonic() - started, 1)
    return result


def make(row: Row, bench: Bench) -> Path:
    """The folder of a row."""
    out = bench.work / row.name.replace(" ", "-").replace("%", "percent").replace(":", "of").replace(",", "")
    start = starting_point(row, bench)
    if not row.steps:
        return start
    if not out.is_dir():
        hasten.compress(start, Recipe(row.steps, calibration=bench.calibration), out, device=bench.device)
    return out


def starting_point(row: Row, bench: Bench) -> Path:
    if not row.planted:
        return bench.model
    folder = bench.work / "planted"
    if not folder.is_dir():
        plant_outliers(bench.model, folder)
    return folder


def add_speed(bench: Bench, folders: dict[str, Path], results: dict[str, Result], rounds: int) -> None:
    try:
        found, reasons = speeds_of(folders, bench.device, bench.texts.train, rounds, bench.say)
    except Exception as error:  # quality stays, whatever happens to speed
        traceback.print_exc()
        found, reasons = {}, dict.fromkeys(folders, f"{type(error).__name__}: {error}")
    for name, samples in found.items():
        results[name].decode_samples = samples
        results[name].decode = {streams: middle(values) for streams, values in samples.items()}
    for name, reason in reasons.items():
        results[name].no_speed = reason


def save(args: argparse.Namespace, bench: Bench, results: dict[str, Result]) -> dict[str, Any]:
    """Everything so far, as a file and as plain data."""
    report = {
        "model": Path(args.model).name,
        "settings": settings(args),
        "device": device_name(bench.device),
        "cpu": cpu_model(),
        "threads": usable_threads(),
        "versions": versions(),
        "conditions": conditions(),
        "text": {"windows": len(bench.heldout), "bytes": bench.num_bytes.tolist()},
        "rows": {name: plain(asdict(result)) for name, result in results.items()},
    }
    return write(args.json, report)


def write(file: Path, report: dict[str, Any]) -> dict[str, Any]:
    """With what became of the orders."""
    report["orders"] = [verdict(order, report) for order in ORDERS]
    write_text(file, json.dumps(report, indent=1) + "\n")
    return report


def join(args: argparse.Namespace) -> dict[str, Any]:
    """Runs over different rows of one model on one text as one report; of a row in several, the first is taken."""
    first, *others = [json.loads(file.read_text()) for file in args.join]
    for other in others:
        if (other["model"], other["text"]) != (first["model"], first["text"]):
            sys.exit(f"{other['model']} and {first['model']}: not one model on one text")
        first["rows"] |= {name: row for name, row in other["rows"].items() if name not in first["rows"]}
    return write(args.json, first)


def device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name()


def verdict(order: Order, report: dict[str, Any]) -> dict[str, Any]:
    """Whether an expected order held: the difference in bits per byte on the same windows, with its interval."""
    better, worse = (report["rows"].get(name, {}).get("nll") for name in (order.better, order.worse))
    if not better or not worse:
        return {"claim": order.claim, "verdict": "not measured", "difference": None}
    change = (np.array(better) - np.array(worse)) / LOG2
    found = ratio_interval(change, np.array(report["text"]["bytes"], np.float64), "bits/byte")
    return {"claim": order.claim, "verdict": judge(order, found), "difference": plain(found)}


def judge(order: Order, found: Measurement) -> str:
    """held: by more than chance. lost: the other way by more than chance. Between, the sign says which way it leans."""
    if found.high < 0:
        return "held"
    if found.low > 0:
        return "LOST"
    if order.tie_will_do:
        return "held (a tie)"
    return "undecided, leans to it" if found.median < 0 else "undecided, leans against it"


def render(report: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    text = report["text"]
    lines = [
        f"{report['model']}, {report['device']}: {text['windows']} windows of held-out text, "
        f"{sum(text['bytes']):,.0f} bytes",
        "",
        "| | bits per byte | against the original | other text | MB | tokens/s, 1 stream | 8 streams | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [render_row(name, row) for name, row in report["rows"].items()]
    lines += ["", "| expected | difference in bits per byte | |", "|---|---|---|"]
    for order in report["orders"]:
        lines.append(f"| {order['claim']} | {interval(order['difference'], '{:+.4f}')} | {order['verdict']} |")
    for name, row in report["rows"].items():
        if row["no_speed"]:
            lines.append(f"\n{name}: no speed: {row['no_speed']}")
    return "\n".join(lines)


def render_row(name: str, row: dict[str, Any]) -> str:
    if row["error"]:
        return f"| {name} | {row['error']} | | | | | | {row['seconds']} |"
    speed = [f"{row['decode'][streams]:,.0f}" if streams in row["decode"] else "" for streams in ("1", "8")]
    cells = [
        interval(row["bits"], "{:.4f}"),
        interval(row["rise"], "{:+.2%}"),
        interval(row["other"], "{:.3f}"),
        f"{row['megabytes']:.2f}",
        *speed,
        f"{row['seconds']}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def interval(found: dict[str, float] | None, form: str) -> str:
    if found is None:
        return ""
    return f"{form.format(found['median'])} ({form.format(found['low'])} to {form.format(found['high'])})"


if __name__ == "__main__":
    main()
