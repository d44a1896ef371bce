"""`hasten evaluate`: quality of a model on held-out text. The measuring is measure/evaluate.py's."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli import options
from hasten.cli.terminal import progress_bar, write_facts

if TYPE_CHECKING:
    from hasten.receipt import Measurement, Quality


def evaluate(
    model: options.ModelArgument,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original to compare with.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Held-out text; by default text that comes with hasten.", show_default=False),
    ] = None,
    max_windows: Annotated[
        int, typer.Option(min=0, metavar="N", help="Windows of text at most, evenly spread; 0 is all.")
    ] = 128,
    window: Annotated[int, typer.Option(min=16, metavar="N", help="Tokens of a window.")] = 512,
    kv_cache: options.KvCacheOption = None,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    json: options.JsonOption = False,
) -> None:
    """Measure the quality of a model.

    Bits per byte and perplexity on held-out text; against another model also the loss, the divergence, and how often
    both have the same likeliest token. Every figure has its 95 % interval over windows of text.
    """
    from hasten.measure.evaluate import evaluate as run

    with progress_bar() as progress:
        receipt = run(
            model,
            against,
            data,
            max_windows=max_windows or None,
            window=window,
            kv_cache=kv_cache,
            device=device,
            threads=threads,
            progress=progress,
        )
    assert receipt.quality is not None
    if json:
        print(receipt.to_json(), end="")
    else:
        write_facts(quality_facts(receipt.quality))


def quality_facts(quality: "Quality") -> list[tuple[str, str]]:
    """Figures with their intervals in words."""
    facts = [
        ("text", f"{quality.num_tokens:,} tokens, {quality.num_bytes:,} bytes, {quality.num_blocks} windows"),
        ("bits per byte", _interval(quality.bits_per_byte, "{:.4f}")),
        ("perplexity", f"{_interval(quality.perplexity, '{:.3f}')}, of a token"),
    ]
    if quality.loss is not None and quality.divergence is not None and quality.top1_agreement is not None:
        facts += [
            ("loss", f"{_interval(quality.loss, '{:+.3%}')} of bits per byte"),
            ("divergence", f"{_interval(quality.divergence, '{:.6f}')} nats a token"),
            ("agreement", f"{_interval(quality.top1_agreement, '{:.3%}')} of likeliest tokens"),
        ]
    return facts


def _interval(value: "Measurement", form: str) -> str:
    return f"{form.format(value.median)} ({form.format(value.low)} to {form.format(value.high)})"
