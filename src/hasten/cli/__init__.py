"""The command line: one file a verb, and what all verbs share: how errors, Ctrl-C and a closed pipe end the program.

Knows nothing of what verbs do. A verb imports what it needs when it runs, so that `hasten --help` is quick.
"""

import errno
import io
import os
import sys
from typing import Annotated, Any

import typer

from hasten import __version__
from hasten.cli import bench, chat, compress, evaluate, generate, inspect, tune
from hasten.errors import HastenError

EXIT_USER = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
# What writing to a stream that is open fails with. Files that hasten opens itself have errors of their own.
_WRITING = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What typer raises for a wrong flag is click's or its own copy of it, by version: the base of what it exports.
_UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="hasten",
    help="Makes a language model generate text in seconds on the hardware you own, and proves it.",
    epilog="MODEL is a folder, a name on the Hugging Face hub, or demo, the small model that comes with hasten.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hasten {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command("tune")(tune.tune)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("inspect")(inspect.inspect)
app.command("bench")(bench.bench)
app.command("compress")(compress.compress)
app.command("evaluate")(evaluate.evaluate)


def main() -> None:
    """Run the command line and leave with its exit code: 0, or 2 with one line on stderr for what a user can mend, 130
    after Ctrl-C, 141 where the reader of a pipe has gone. HASTEN_DEBUG=1 shows where an error came from."""
    _open_missing_streams()
    try:
        try:
            code = _run()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except (HastenError, MemoryError) as error:
        if os.environ.get("HASTEN_DEBUG"):
            raise
        code = _complain("not enough memory: " if isinstance(error, MemoryError) else "", error)
    except OSError as error:
        if error.errno not in _WRITING or error.filename is not None:
            raise
        # What is still buffered has nowhere to go; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        gone = isinstance(error, BrokenPipeError)
        code = EXIT_PIPE if gone else _complain("the result cannot be written: ", error.strerror)
    sys.exit(code)


def _run() -> int:
    """Parse and run. Not typer's own way, which ends a program whose stdout is closed with 1 and a full one with a
    traceback."""
    try:
        command = typer.main.get_command(app)
        with command.make_context("hasten", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as end:
        return int(end.exit_code)
    except _UsageError as error:
        error.show()
        return EXIT_USER
    return 0


def _complain(what: str, error: object) -> int:
    print(f"hasten: {what}{' '.join(str(error).split())}", file=sys.stderr)
    return EXIT_USER


def _open_missing_streams() -> None:
    """A program may be started with streams closed: nothing is read then, and what is written is not missed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model says what a terminal's encoding may not have
