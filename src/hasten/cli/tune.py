"""`hasten tune`: the main job. The search is hasten.tune's; this turns flags into its arguments and shows its table."""

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options
from hasten.cli.terminal import note, progress_bar, show
from hasten.errors import RequestError
from hasten.goals import Goal

OutOption = Annotated[
    str | None,
    typer.Option(
        "--out", "-o", metavar="FOLDER", help="A new folder; by default MODEL-tuned, here.", show_default=False
    ),
]
MaxLossOption = Annotated[
    str, typer.Option(metavar="SHARE", help="Most that bits per byte may rise, at the upper end of the interval.")
]
GoalOption = Annotated[Goal, typer.Option(help="What to make best: one stream, eight streams (64 on a GPU), or bytes.")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Held-out text to judge on; by default text that comes with hasten.", show_default=False
    ),
]
MinutesOption = Annotated[
    float, typer.Option(min=0.1, metavar="N", help="Time to fit the search to; slow models may take longer.")
]
RoundsOption = Annotated[int, typer.Option(min=1, metavar="N", help="Most interleaved rounds of timing in the search.")]
TransformersOption = Annotated[
    bool, typer.Option(help="Measure the original through Transformers too, where it is installed.")
]


def parse_share(text: str) -> float:
    """1% or 0.01 -> 0.01. Raises RequestError for what is not a share of 0 up to 1."""
    number = text.strip()
    try:
        share = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise RequestError(f"--max-loss is '{text}', expected a share such as 1% or 0.01, from 0 to below 100%")
    return share


def tune(
    model: options.ModelArgument,
    out: OutOption = None,
    max_loss: MaxLossOption = "1%",
    goal: GoalOption = "latency",
    data: DataOption = None,
    minutes: MinutesOption = 5,
    rounds: RoundsOption = 5,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    transformers: TransformersOption = True,
    json: options.JsonOption = False,
) -> None:
    """Make a model faster here, and prove it.

    Measures the original, predicts and measures ways to make it faster, rejects what may lose more quality than
    allowed, judges and times the best anew as it is written, and leaves a folder with recipe.yaml and receipt.json.
    Ctrl-C keeps what is finished; the same command goes on from there.
    """
    share = parse_share(max_loss)
    from hasten.tune.run import default_out
    from hasten.tune.run import tune as run

    out = str(default_out(model)) if out is None else out
    try:
        with progress_bar() as progress:
            receipt = run(
                model,
                out,
                max_loss=share,
                goal=goal,
                data=data,
                minutes=minutes,
                rounds=rounds,
                threads=threads,
                device=device,
                transformers=transformers,
                progress=progress,
            )
    except KeyboardInterrupt:
        note("Stopped. What is finished is kept: the same command goes on from there.")
        raise
    if json:
        print(receipt.to_json(), end="")
        return
    from hasten.tune.report import report

    show(report(receipt))
    print(f'\nWritten to {out}. Run it: hasten generate {out} "Once upon a time"')
