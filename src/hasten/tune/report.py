"""A receipt of `tune` as a table for people. Knows receipts and rich; measures nothing."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hasten.receipt import Candidate, Measurement, Receipt

_STYLES = {"chosen": "bold green", "rejected": "red", "slower": "yellow", "reference": "dim", "not tried": "dim"}
_SAMPLE_WIDTH = 160


def report(receipt: Receipt) -> RenderableType:
    """The table of candidates, what was chosen and why, and what both models say."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    sizes = _sizes(receipt)
    streams = [column for size in sizes for column in (f"{size} stream{'s' * (size != '1')}", "predicted")]
    columns = ["tokens/s", *streams, "prompt", "weights", "loss .. at most", "verdict"]
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in (0, len(columns) - 1) else "right", no_wrap=index == 0)
    for candidate in (receipt.reference, receipt.original, *receipt.candidates):
        if candidate is not None:
            table.add_row(*row(candidate, sizes), style=_STYLES.get(candidate.verdict, ""))
    return Group(table, Text(), *(Text(line) for line in lines(receipt)))


def _sizes(receipt: Receipt) -> list[str]:
    """Numbers of streams that were timed."""
    return [] if receipt.original is None else list(receipt.original.decode)


def row(candidate: Candidate, sizes: Sequence[str] = ("1", "8")) -> tuple[str, ...]:
    """One line of the table; in brackets, times the original in the same rounds; the chosen one with its interval."""
    speeds: list[str] = []
    for size in sizes:
        speeds.append(speed(candidate.decode.get(size), candidate.ratio.get(size), candidate.verdict == "chosen"))
        speeds.append("" if candidate.predicted is None else f"{candidate.predicted.decode[size]:,.0f}")
    prefill = speed(candidate.prefill, candidate.ratio.get("prefill"))
    quality = candidate.final or candidate.search
    loss = ""
    if quality is not None and quality.loss is not None and candidate.verdict != "reference":
        loss = f"{quality.loss.median:+.2%} .. {quality.loss.high:+.2%}"
    weights = f"{candidate.weight_bytes / 1e6:,.1f} MB" if candidate.weight_bytes else ""
    return candidate.name, *speeds, prefill, weights, loss, candidate.verdict


def speed(value: Measurement | None, ratio: Measurement | None, interval: bool = False) -> str:
    """Tokens/s and how many times the original's that is, with the interval's ends."""
    if value is None or ratio is None:
        return ""
    times = f"{ratio.median:.2f}" if ratio.median >= 0.1 else f"{ratio.median:.2g}"
    ends = f", {ratio.low:.2f}-{ratio.high:.2f}" if interval else ""
    return f"{value.median:,.0f} ({times}x{ends})"


def lines(receipt: Receipt) -> list[str]:
    """The choice, its reason, what it means beside Transformers, why others were not taken, how it was measured, notes,
    samples."""
    found = [f"Chosen: {receipt.choice}. {receipt.reason}."]
    chosen = receipt.chosen
    if chosen is not None and receipt.reference is not None:
        # Both were measured beside the original, at different moments: the original cancels what changed between.
        parts = [
            f"{chosen.ratio[size].median / receipt.reference.ratio[size].median:.1f}x with {size}"
            for size in _sizes(receipt)
        ]
        found.append(f"Against Transformers as users run it today: {', '.join(parts)} streams.")
    peaks = [(c.name, c.memory["peak"]) for c in (receipt.original, chosen) if c is not None and "peak" in c.memory]
    on_gpu = receipt.settings.get("device") == "cuda"
    if peaks:
        named = ", ".join(f"{name} {peak / 1e6:,.0f} MB" for name, peak in dict(peaks).items())
        found.append(f"Peak memory in a fresh process{' (of the GPU)' * on_gpu}: {named}.")
    if "passages" in receipt.settings:
        found.append(how(receipt))
    found.append("")
    judged = [c for c in receipt.candidates if c.verdict in ("rejected", "slower", "not tried")]
    found += [f"  {candidate.name}: {candidate.verdict}, {candidate.reason}" for candidate in judged]
    found += [f"Note: {note}." for note in receipt.notes]
    if receipt.samples:
        found += ["", f"Both continue, greedily: {_one_line(receipt.samples[0].prompt)}"]
        found += [f"  {sample.model}: {_one_line(sample.text)}" for sample in receipt.samples]
    return found


def how(receipt: Receipt) -> str:
    """A line on what the numbers stand on."""
    settings = receipt.settings
    passages = settings["passages"]
    took = f", in {settings['seconds'] / 60:.1f} of {settings['minutes']:g} minutes" if "seconds" in settings else ""
    return (
        f"Measured here{took}: speed in {settings['rounds']} rounds in turn (in brackets: times the original), "
        f"what was chosen again in {settings['proof']['rounds']} as it was written. "
        "Predicted is the limit that memory and arithmetic set; a model that fits in the processor's cache exceeds it. "
        f"Loss is of bits per byte on {passages['search']} passages; the choice was proven on {passages['proof']} "
        f"others ({settings['text']})."
    )


def _one_line(text: str) -> str:
    """White space made plain, cut to a width."""
    plain = " ".join(text.split())
    return plain if len(plain) <= _SAMPLE_WIDTH else plain[: _SAMPLE_WIDTH - 3] + "..."
