"""Arguments and flags that several verbs share, declared once so that they read the same everywhere."""

from typing import Annotated, Literal

import typer

USUAL_TOKENS = 256  # of an answer

Device = Literal["auto", "cpu", "cuda"]
Format = Literal["fp8"]
KvCache = Literal["fp32", "bf16", "int8", "fp8"]
Speculation = Literal["none", "ngram"]

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a name on the Hugging Face hub, or demo.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write the result as JSON.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to run; auto is a GPU where there is one, else the CPU.")]
FormatOption = Annotated[
    Format | None, typer.Option(help="Round the weights as they are loaded; on a GPU.", show_default=False)
]
DeterministicOption = Annotated[
    bool, typer.Option("--deterministic", help="On a GPU too, the same bits whatever runs beside a request.")
]
MemoryOption = Annotated[
    float | None,
    typer.Option(min=0.01, max=1.0, metavar="SHARE", help="Of the device's memory; by default 0.9 of a GPU's."),
]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="A smaller model that drafts tokens; the answer stays the same.", show_default=False
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Worker threads; by default one a physical core.")
]
KvCacheOption = Annotated[
    KvCache | None,
    typer.Option(
        help="How keys and values are stored; by default as the folder says, else bf16 (fp32 for fp32 weights)."
    ),
]
SpeculationOption = Annotated[
    Speculation | None, typer.Option(help="ngram drafts tokens by looking back in the text; the answer stays the same.")
]
MaxLenOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Longest prompt and answer together, in tokens.")
]
MaxTokensOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Most tokens of an answer; fewer where no more fit.")
]
TemperatureOption = Annotated[
    float | None, typer.Option(min=0.0, metavar="T", help="0 is greedy; by default as the model's folder says.")
]
TopKOption = Annotated[
    int | None, typer.Option(min=0, metavar="K", help="Choose among the K likeliest tokens; 0 is all.")
]
TopPOption = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, metavar="P", help="Choose among the likeliest tokens that sum to P.")
]
MinPOption = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, metavar="P", help="Leave out tokens below P times the likeliest.")
]
RepetitionOption = Annotated[
    float | None, typer.Option("--repetition-penalty", min=0.01, metavar="X", help="Above 1 avoids what was said.")
]
PresenceOption = Annotated[
    float,
    typer.Option("--presence-penalty", min=-2.0, max=2.0, metavar="X", help="Taken off tokens already in the answer."),
]
FrequencyOption = Annotated[
    float,
    typer.Option("--frequency-penalty", min=-2.0, max=2.0, metavar="X", help="The same, for each time they occurred."),
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="The same seed gives the same text, whatever runs beside it.")
]
StopOption = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text; may be given again.")
]
SystemOption = Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")]
