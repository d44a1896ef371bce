"""Write docs/cli.md: the help text of the program and of each verb. tests/test_cli_docs.py holds it current.

python scripts/write_cli_docs.py
"""

from pathlib import Path

from typer.testing import CliRunner

from hasten.cli import app

TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# The command line

Written by `python scripts/write_cli_docs.py` from the program itself; a test holds that it is current.

Results go to stdout, progress and notes to stderr. `--json` gives machines the same results. Exit codes: 0; 2 with a
line on stderr for something you can mend, a full disk under stdout included; 130 after Ctrl-C; 141 where the reader of
a pipe has gone. `HASTEN_DEBUG=1` shows where an error came from, `NO_COLOR=1` turns colours off, `HASTEN_ISA=NAME`
forces an instruction set, `HASTEN_THREADS=N` is what `--threads` is where it is not given.
"""


def help_of(*verb: str) -> str:
    """The text of `hasten VERB --help` at a width of 100 columns."""
    result = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"}).invoke(app, [*verb, "--help"], prog_name="hasten")
    lines = (line.rstrip() for line in result.output.strip("\n").splitlines())
    return "\n".join(lines)


def page() -> str:
    """The whole of docs/cli.md."""
    parts = [HEAD, f"\n```text\n{help_of()}\n```\n"]
    verbs = [command.name for command in app.registered_commands if command.name]
    parts += [f"\n## hasten {verb}\n\n```text\n{help_of(verb)}\n```\n" for verb in verbs]
    return "".join(parts)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET.name}")
