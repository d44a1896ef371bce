"""Runs the command line as a user does: a process of its own, and what it wrote."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

COMMAND = [sys.executable, "-m", "hasten"]


def hasten(*arguments: object, stdin: str | bytes = b"", env: dict[str, str] | None = None, **more: Any) -> "Finished":
    """Run `hasten ARGUMENTS`; stdin is text or bytes in a pipe, never the terminal."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        env={**os.environ, **(env or {})},
        timeout=300,
        **more,
    )
    return Finished(done.returncode, done.stdout.decode(), done.stderr.decode(), arguments)


class Finished:
    """Exit code, stdout and stderr of one run."""

    def __init__(self, code: int, stdout: str, stderr: str, arguments: Sequence[object]) -> None:
        self.code, self.stdout, self.stderr, self.arguments = code, stdout, stderr, arguments

    @property
    def good(self) -> "Finished":
        """Itself, if it ended well."""
        assert self.code == 0, f"hasten {self.arguments} -> {self.code}\n{self.stderr}"
        assert "Traceback" not in self.stderr
        return self

    @property
    def complaint(self) -> str:
        """The one line that it ended with, without the program's name. Notes may come before it."""
        assert self.code == 2, f"hasten {self.arguments} -> {self.code}, expected 2\n{self.stdout}\n{self.stderr}"
        assert "Traceback" not in self.stderr
        complaints = [line for line in self.stderr.splitlines() if line.startswith("hasten: ")]
        assert len(complaints) == 1, self.stderr
        assert self.stderr.splitlines()[-1] == complaints[0]
        return complaints[0].removeprefix("hasten: ")
