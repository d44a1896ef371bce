"""What verbs write: results to stdout, notes to stderr, tables for people, JSON for machines. Knows no models."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


def note(text: str) -> None:
    """A line for the person at the terminal; never part of the result."""
    print(text, file=sys.stderr, flush=True)


def write_json(value: Any, *, lines: bool = False) -> None:
    """One JSON value on stdout; `lines` puts it on a single line, one of several. NaN and infinities become null."""
    print(json.dumps(_finite(value), indent=None if lines else 2, ensure_ascii=False), flush=lines)


def write_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on stdout: the first column to the left, the others to the right. In a pipe it is not cut to a width."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title=title or None,
        title_justify="left",
        title_style="bold",
        show_edge=False,
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    show(table)


def show(renderable: "RenderableType") -> None:
    """Something of rich's on stdout; in a pipe it has a fixed width and no colours."""
    from rich.console import Console

    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(renderable)


def write_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values on stdout, a line each."""
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        print(f"{name:<{width}}  {value}")


def bytes_in_words(count: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A function progress(done, total, what) that shows a bar with the time left on a terminal, and elsewhere a line,
    at most one a second. It is drawn only as work is done: a thread that draws would disturb what is measured."""
    if not sys.stderr.isatty():
        began, last = time.monotonic(), -math.inf

        def tell(done: int, total: int, what: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= 1:
                last = now
                left = f", {(now - began) / done * (total - done):.0f} s left" if 0 < done < total else ""
                note(f"[{done}/{total}{left}] {what}")

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)

        def draw(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what, refresh=True)

        yield draw
