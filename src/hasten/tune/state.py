"""What a search has finished, on disk beside its result, so that an interrupted run goes on where it was."""

import hashlib
import json
from pathlib import Path
from typing import Any

from hasten.errors import ResourceError
from hasten.receipt import plain, write_text


class State:
    """Finished parts by section and name, saved whole after each. A file of other inputs or machine is not used.

    Values are plain data or receipt dataclasses; what comes back is plain data.
    """

    def __init__(self, path: Path, inputs: object) -> None:
        self.path = path
        self._key = hashlib.sha256(json.dumps(plain(inputs), sort_keys=True).encode()).hexdigest()
        self._parts: dict[str, dict[str, Any]] = self._read()
        self.num_found = sum(len(section) for section in self._parts.values())

    def get(self, section: str, name: str) -> Any:
        """What was put there, or None."""
        return self._parts.get(section, {}).get(name)

    def section(self, section: str) -> dict[str, Any]:
        """All of a section."""
        return dict(self._parts.get(section, {}))

    def put(self, section: str, name: str, value: object) -> None:
        """Keep a finished part. ResourceError where it cannot be written."""
        self._parts.setdefault(section, {})[name] = plain(value)
        try:
            write_text(self.path, json.dumps({"key": self._key, "parts": self._parts}))
        except OSError as error:
            raise ResourceError(f"cannot write {self.path}: {error.strerror}") from None

    def remove(self) -> None:
        """The search is done and its result written."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            return {}
        if not isinstance(data, dict) or data.get("key") != self._key or not isinstance(data.get("parts"), dict):
            return {}
        parts: dict[str, dict[str, Any]] = data["parts"]
        return parts
