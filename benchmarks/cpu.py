"""hasten beside its peers on a CPU: measures in interleaved rounds, prints the table, writes JSON.

    benchmarks/setup_peers.sh          once
    python benchmarks/cpu.py           about 25 minutes on a quiet machine
    python benchmarks/table.py FILE    the table of an earlier run

Each system runs in a fresh process; a round runs every system once (A B C, A B C, ...), so that ratios compare
neighbours in time. Read bandwidth is measured before and after each. How things are timed: peers/measure.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from peers.machine import conditions, wait_until_quiet
from peers.systems import HERE, PEERS, ROOT, SHAPES, SystemUnderTest, systems
from table import render

RESULTS = ROOT / "benchmarks" / "results"
TASKS = ("decode", "batch", "prefill")
TIMEOUT = 600  # seconds
BANDWIDTH_PROBES = 3


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def warm_page_cache(path: Path) -> None:
    """Read a model's files once: a first token then measures the system and not the disk."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass


def process_environment(extra: dict[str, str], cores: int) -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(cores))
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **threads, **quiet, **extra, "BENCHMARK_START": str(time.time())}


def run_driver(system: SystemUnderTest, shape: str, options: list[str], cores: int) -> dict[str, object]:
    """What one process of a driver measured, or {"error": its last lines}; one that hangs costs TIMEOUT."""
    command = [*system.command(shape), "--threads", str(cores), *options]
    environment = process_environment(system.environment, cores)
    try:
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {TIMEOUT} s"}
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    if process.returncode != 0 or not lines:
        return {"error": f"exit {process.returncode}: {(process.stderr or process.stdout)[-600:]}"}
    result: dict[str, object] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def measure_system(system: SystemUnderTest, shape: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """One system's part of a round: short processes for the start, then one that is measured."""
    starts = []
    for _ in range(args.starts):
        wait_until_quiet(args.patience / 6)
        short = run_driver(system, shape, [], args.cores)
        if "error" in short:
            return short
        starts.append((short["first_token_foreign"], short["first_token_s"]))
    tasks = (*TASKS, "busy") if system.busy else TASKS
    options = ["--tasks", ",".join(tasks), "--repetitions", str(args.repetitions), "--seed", str(seed)]
    result = run_driver(system, shape, [*options, "--patience", str(args.patience)], args.cores)
    return {**result, "starts_s": [seconds for _, seconds in starts], "starts_foreign": [load for load, _ in starts]}


def source_version() -> str:
    """The commit that is measured, "-dirty" where files differ from it; "unknown" outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def bandwidth(python: Path) -> list[float]:
    """Bytes a second, several probes: one alone may fall into a neighbour's burst or pause."""
    command = [python, str(HERE / "machine.py")]
    return [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(BANDWIDTH_PROBES)
    ]


def make_hasten_folder(system: SystemUnderTest, shape: str) -> None:
    """Compress the plain folder by the system's recipe, once."""
    if system.recipe and not system.path(shape).exists():
        say(f"making {system.path(shape).name}")
        program = "import sys, hasten; hasten.compress(*sys.argv[1:])"
        source = PEERS / "models" / shape
        command: list[str | Path] = [system.python, "-c", program, source, system.recipe, system.path(shape)]
        system.path(shape).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True, env={**os.environ, **system.environment})


def choose(args: argparse.Namespace) -> list[tuple[str, SystemUnderTest]]:
    """(shape, system) of a round in order; what is absent is named and left out."""
    chosen = []
    for shape in args.shapes:
        for system in systems(args.hasten_python):
            if not re.search(args.systems, system.name):
                continue
            make_hasten_folder(system, shape)
            if missing := system.missing(shape):
                say(f"left out: {system.name} on {shape}: {missing} is not there")
            else:
                chosen.append((shape, system))
    return chosen


def measure_all(args: argparse.Namespace, out: Path) -> dict[str, object]:
    """Every round; the file is rewritten after each system, so that an interrupted run keeps what it has."""
    chosen = choose(args)
    options = {"rounds": args.rounds, "repetitions": args.repetitions, "starts": args.starts, "cores": args.cores}
    runs: list[dict[str, object]] = []
    report: dict[str, object] = {
        "conditions": {**conditions(), "commit": source_version()},
        "options": options,
        "runs": runs,
    }
    for shape, system in chosen:
        warm_page_cache(system.path(shape))
    before = bandwidth(args.hasten_python)
    for number in range(args.rounds):
        for shape, system in chosen:
            result = measure_system(system, shape, number, args)
            after = bandwidth(args.hasten_python)
            run = {"round": number, "shape": shape, "system": system.name, "bandwidth": [*before, *after], **result}
            before = after
            runs.append(run)
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = out.with_suffix(".partial")
            partial.write_text(json.dumps(report, indent=1))
            partial.replace(out)
            say(f"round {number + 1}/{args.rounds} {shape} {system.name}: {result.get('error') or 'measured'}")
    return report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=3, help="samples of each task in a process")
    parser.add_argument("--starts", type=int, default=2, help="processes a round that only make a first token")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--systems", default="", help="regular expression on the systems' names")
    parser.add_argument("--cores", type=int, default=2, help="use the first so many cores")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds a process may wait for a quiet machine")
    parser.add_argument(
        "--hasten-python", type=Path, default=Path(sys.executable), help="an interpreter that has numpy"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cpu-DATE.json")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    out = args.out or RESULTS / f"cpu-{time.strftime('%Y-%m-%d-%H%M', time.gmtime())}.json"
    report = measure_all(args, out)
    print(render(report))
    say(f"written: {out}")


if __name__ == "__main__":
    main()
