"""`hasten evaluate`: quality of a model on held-out text and on tasks. The measuring is measure/evaluate.py's."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli import options
from hasten.cli.terminal import bytes_in_words, note, progress_bar, write_facts, write_table
from hasten.errors import HastenError

if TYPE_CHECKING:
    from hasten.receipt import Measurement, Quality, Receipt, Speed, TaskScore


def evaluate(
    model: options.ModelArgument,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original to compare with.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Held-out text; may be given again, such as for another domain. By default text that comes along.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE", help="Questions, one JSON object a line; may be given again.", show_default=False
        ),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, metavar="N", help="Questions shown solved before each.")] = 0,
    max_questions: Annotated[
        int, typer.Option(min=0, metavar="N", help="Questions of a task at most, evenly spread; 0 is all.")
    ] = 500,
    speed: Annotated[
        bool, typer.Option("--speed", help="Speed with one stream and eight, and memory, as well.")
    ] = False,
    max_windows: Annotated[
        int, typer.Option(min=0, metavar="N", help="Windows of a text at most, evenly spread; 0 is all.")
    ] = 128,
    window: Annotated[int, typer.Option(min=16, metavar="N", help="Tokens of a window.")] = 512,
    kv_cache: options.KvCacheOption = None,
    format: options.FormatOption = None,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    json: options.JsonOption = False,
) -> None:
    """Measure the quality of a model.

    Bits per byte and perplexity on held-out text, and accuracy on tasks; against another model also the loss, the
    divergence, how often both have the same likeliest token, and flips: how often exactly one of them is right. Every
    figure has its 95 % interval, over windows of text or over questions. Text that the model was calibrated on is
    refused.

    A task is a file of questions: {"prompt": ..., "choices": [...], "answer": 0} for one of several, {"prompt": ...,
    "answer": "word"} or {"text": ...} for the last word, or PIQA's own pair of files.
    """
    from hasten.measure.evaluate import evaluate as run

    with progress_bar() as progress:
        receipt = run(
            model,
            against,
            named("--data", data),
            tasks=named("--task", task),
            num_shots=shots,
            max_questions=max_questions or None,
            speed=speed,
            max_windows=max_windows or None,
            window=window,
            kv_cache=kv_cache,
            format=format,
            device=device,
            threads=threads,
            progress=progress,
        )
    if json:
        print(receipt.to_json(), end="")
    else:
        write_report(receipt)


def named(flag: str, values: Sequence[str] | None) -> dict[str, Path] | None:
    """NAME=FILE or FILE, whose name is its own without the suffix. HastenError where a name comes twice."""
    found: dict[str, Path] = {}
    for value in values or ():
        name, equals, file = value.partition("=")
        alone = not equals or not file or Path(value).is_file()
        name, path = (Path(value).stem, Path(value)) if alone else (name, Path(file))
        if name in found:
            raise HastenError(f"{flag} has two files named {name}: tell them apart with NAME=FILE")
        found[name] = path
    return found or None


def write_report(receipt: "Receipt") -> None:
    """One text as facts, several side by side; then tasks and speed."""
    assert receipt.quality is not None
    if len(receipt.texts) > 1:
        write_texts(receipt.texts)
    else:
        write_facts([(label, f"{value}{words}") for label, value, words in quality_facts(receipt.quality)])
    if receipt.tasks:
        print()
        write_tasks(receipt.tasks)
    if receipt.speed:
        print()
        write_speed(receipt.speed)
    for line in receipt.notes:
        note(line)


def quality_facts(quality: "Quality") -> list[tuple[str, str, str]]:
    """Names, figures with their intervals, and of what they are."""
    facts = [
        ("text", f"{quality.num_tokens:,} tokens, {quality.num_bytes:,} bytes, {quality.num_blocks} windows", ""),
        ("bits per byte", _interval(quality.bits_per_byte, "{:.4f}"), ""),
        ("perplexity", _interval(quality.perplexity, "{:.3f}"), ", of a token"),
    ]
    if quality.loss is not None:
        facts += [
            ("loss", _interval(quality.loss, "{:+.3%}"), " of bits per byte"),
            ("divergence", _interval(quality.divergence, "{:.6f}"), " nats a token"),
            ("agreement", _interval(quality.top1_agreement, "{:.3%}"), " of likeliest tokens"),
            ("flips", _interval(quality.flips, "{:.3%}"), " of likeliest tokens, between right and wrong"),
            ("right to wrong", _interval(quality.broken, "{:.3%}"), ""),
            ("wrong to right", _interval(quality.mended, "{:.3%}"), ""),
        ]
    return facts


def write_texts(texts: "dict[str, Quality]") -> None:
    """A column a text: what holds on one may not on another."""
    facts = {name: quality_facts(quality) for name, quality in texts.items()}
    rows = [[same[0][0], *(value for _, value, _ in same)] for same in zip(*facts.values(), strict=True)]
    write_table(["", *facts], rows)


def write_tasks(tasks: "dict[str, TaskScore]") -> None:
    """A column a task."""
    facts = {name: task_facts(task) for name, task in tasks.items()}
    rows = [[same[0][0], *(value for _, value in same)] for same in zip(*facts.values(), strict=True)]
    write_table(["", *facts], rows)


def task_facts(task: "TaskScore") -> list[tuple[str, str]]:
    facts = [
        ("questions", f"{task.num_questions:,}"),
        ("accuracy", _interval(task.accuracy, "{:.1%}")),
        ("by chance", f"{task.chance:.1%}"),
    ]
    if task.original is not None:
        facts += [
            ("original", _interval(task.original, "{:.1%}")),
            ("change", _interval(task.change, "{:+.1%}")),
            ("answers changed", _interval(task.changed, "{:.1%}")),
            ("flips", _interval(task.flips, "{:.1%}")),
            ("right to wrong", _interval(task.broken, "{:.1%}")),
            ("wrong to right", _interval(task.mended, "{:.1%}")),
        ]
    return facts


def write_speed(speeds: "dict[str, Speed]") -> None:
    """A row a model, a column each number of streams."""
    streams = list(next(iter(speeds.values())).decode)
    memory = list(next(iter(speeds.values())).memory)
    rows = []
    for name, speed in speeds.items():
        decode = [_interval(speed.decode[count], "{:,.0f}") for count in streams]
        ratio = [_interval(speed.ratio[count], "{:.2f}x") if count in speed.ratio else "" for count in streams]
        rows.append([name, *decode, *ratio, *(bytes_in_words(speed.memory[key]) for key in memory)])
    columns = [f"tokens/s, {count} stream{'s' * (count != '1')}" for count in streams]
    write_table(["", *columns, *(f"ratio, {count}" for count in streams), *memory], rows)


def _interval(value: "Measurement | None", form: str) -> str:
    """The figure and its interval, which one window has not."""
    assert value is not None
    if value.n == 1:
        return form.format(value.median)
    return f"{form.format(value.median)} ({form.format(value.low)} to {form.format(value.high)})"
