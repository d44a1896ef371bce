"""`hasten compress`: carry out a recipe on a model. The work is hasten.compress's."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.terminal import bytes_in_words, note, progress_bar, write_facts

if TYPE_CHECKING:
    from hasten.recipe import Recipe


def _show(name: str | None) -> None:
    if name is not None:
        from hasten.recipe import Recipe

        print(Recipe.load(name).to_yaml(), end="")
        raise typer.Exit


def compress(
    model: options.ModelArgument,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A preset (int8, int4-g32-head8, w4a16-gptq, ...: see below), a YAML file, or a tuned folder.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="A new folder; by default MODEL-RECIPE, here.", show_default=False
        ),
    ] = None,
    device: options.DeviceOption = "auto",
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Calibration text in place of the recipe's: a file, a folder, or a data set's name; by default the "
            "model writes it itself.",
            show_default=False,
        ),
    ] = None,
    json: options.JsonOption = False,
    show: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET",
            help="Print a preset as a YAML file, to be changed, and exit.",
            callback=_show,
            is_eager=True,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Quantise, prune, factorise or distil a model as a recipe says.

    The result is a Hugging Face folder that Transformers loads as well where it knows the format, with recipe.yaml and
    receipt.json. What is interrupted goes on with the same command.

    \b
    Presets that round, without text:
      bf16, int8, int8-g32|64|128   one format for every matrix
      int4-g32|64|128[-asym]        4 bits in groups; -head8: head and embedding in int8
      fp8-dynamic                   8-bit floats, activations too as they come
    Presets that look at calibration text:
      w4a16-gptq, w4a16-awq         4-bit weights in groups of 128
      w4a8-rotate-gptq              rotated (QuaRot), 4-bit weights, 8-bit activations
      w8a8-smoothquant, w8a8-gptq   8-bit weights and activations
      fp8-static                    8-bit floats, scales of activations from text
      2of4-sparsegpt[-int8]         two of four weights are zero; -int8: and the rest 8 bits
      lowrank-svd-llm               products of two thin matrices, 80 % of the numbers
      prune-width-distill           half of the neurons go, then 1,000 steps of distillation
    docs/recipes.md has every step and its numbers.
    """
    from hasten.model.hub import folder_beside, name_of
    from hasten.train.run import compress as carry_out

    if out is None:
        out = str(folder_beside(model, name_of(recipe) if Path(recipe).is_dir() else Path(recipe).stem))
    try:
        with progress_bar() as progress:
            receipt = carry_out(model, _with_text(recipe, text), out, device=device, progress=progress)
    except KeyboardInterrupt:
        if (work := Path(out).with_name(Path(out).name + ".work")).is_dir():
            note(f"Stopped. What is finished is kept in {work}: the same command goes on from there.")
        raise
    for line in receipt.notes:
        note(f"note: {line}")
    if json:
        print(receipt.to_json(), end="")
        return
    before, after = receipt.settings["bytes_before"], receipt.settings["bytes_after"]
    write_facts(
        [
            ("folder", str(Path(out))),
            ("matrices", f"{bytes_in_words(before)} -> {bytes_in_words(after)} ({after / before:.0%})"),
            *_facts(receipt.settings),
        ]
    )


def _with_text(name: str, text: str | None) -> "str | Recipe":
    if text is None:
        return name
    from hasten.compress.plan import reads_text
    from hasten.errors import RecipeError
    from hasten.recipe import Recipe

    recipe = Recipe.load(name)
    if not reads_text(recipe.steps):  # else it would count as used
        raise RecipeError(f"{name} reads no calibration text: remove --text")
    return replace(recipe, calibration=replace(recipe.calibration, text=text))


def _facts(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """What a method found out, in a few words; nothing where weights were only rounded."""
    facts = []
    if errors := settings.get("errors"):
        name = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        facts.append(("error of outputs", f"{mean:.2%} on average, at most {errors[name]:.2%} ({name})"))
    for name, found in settings.items():
        if isinstance(found, dict) and (curve := found.get("loss")):
            speed = f"{found['tokens_per_second']:,} tokens/s"
            first, last = found.get("ends") or (curve[0][1], curve[-1][1])
            facts.append((name, f"loss {first:.3f} -> {last:.3f}, {speed}"))
    if "seconds" in settings:
        peak = ", ".join(f"{kind} {bytes_in_words(size)}" for kind, size in settings["peak_memory"].items())
        facts.append(("time, peak memory", f"{settings['seconds']:.0f} s, {peak}"))
    return facts
