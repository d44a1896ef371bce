"""What a search has finished, on disk beside its result, so that an interrupted run goes on where it was."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from hasten.errors import ResourceError
from hasten.receipt import plain, write_text


class State:
    """Finished parts by section and name, saved whole after each. A file of other inputs or machine is not used, which
    `ignored` says.

    Values are plain data or receipt dataclasses; what comes back is plain data. seconds_before: that were spent on what
    was found.
    """

    def __init__(self, path: Path, inputs: object) -> None:
        self.path = path
        self._key = hashlib.sha256(json.dumps(plain(inputs), sort_keys=True).encode()).hexdigest()
        self._start = time.monotonic()
        self.ignored = ""
        self.seconds_before, self._parts = self._read()

    def get(self, section: str, name: str) -> Any:
        """What was put there, or None."""
        return self._parts.get(section, {}).get(name)

    def section(self, prefix: str) -> dict[str, Any]:
        """All of the sections whose names begin so."""
        return {
            name: value
            for section, parts in self._parts.items()
            if section.startswith(prefix)
            for name, value in parts.items()
        }

    def put(self, section: str, name: str, value: object) -> None:
        """Keep a finished part. ResourceError where it cannot be written."""
        self._parts.setdefault(section, {})[name] = plain(value)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            seconds = self.seconds_before + time.monotonic() - self._start
            write_text(self.path, json.dumps({"key": self._key, "seconds": seconds, "parts": self._parts}))
        except OSError as error:
            raise ResourceError(f"cannot write {self.path}: {error.strerror}") from None

    def remove(self) -> None:
        """The search is done and its result written."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> tuple[float, dict[str, dict[str, Any]]]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return 0.0, {}
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            data = None
        if not isinstance(data, dict) or data.get("key") != self._key or not isinstance(data.get("parts"), dict):
            self.ignored = (
                f"{self.path.name} was not gone on with: it is of another model, text, machine, version or setting"
            )
            return 0.0, {}
        return float(data.get("seconds", 0.0)), data["parts"]
