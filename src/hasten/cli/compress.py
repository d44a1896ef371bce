"""`hasten compress`: carry out a recipe on a model. The work is hasten.compress's."""

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli import options
from hasten.cli.terminal import bytes_in_words, note, progress_bar, write_facts


def compress(
    model: options.ModelArgument,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A preset (int8, int8-g32, int4-g32, int4-g32-head8, bf16, ...), a YAML file, or a tuned folder.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="A new folder; by default MODEL-RECIPE, here.", show_default=False
        ),
    ] = None,
    json: options.JsonOption = False,
) -> None:
    """Quantise a model as a recipe says.

    The result is a Hugging Face folder that Transformers loads as well, with recipe.yaml and receipt.json.
    """
    from hasten.compress.folder import compress as carry_out
    from hasten.model.hub import folder_beside, name_of

    out = out or folder_beside(model, name_of(recipe) if Path(recipe).is_dir() else Path(recipe).stem)
    with progress_bar() as progress:
        receipt = carry_out(model, recipe, out, progress=progress)
    for line in receipt.notes:
        note(f"note: {line}")
    if json:
        print(receipt.to_json(), end="")
        return
    before, after = receipt.settings["bytes_before"], receipt.settings["bytes_after"]
    write_facts(
        [
            ("folder", str(out)),
            ("matrices", f"{bytes_in_words(before)} -> {bytes_in_words(after)} ({after / before:.0%})"),
        ]
    )
