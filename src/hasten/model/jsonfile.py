"""JSON objects in files, with errors that a user can act on."""

import json
from pathlib import Path
from typing import Any, TypeVar

from hasten.errors import ModelError

T = TypeVar("T")


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a file; None where the file is missing. Raises ModelError for anything but a JSON object."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def read_kept(file: Path, kind: type[T]) -> T | None:
    """What interrupted work left in a file; None where it is missing, or not the whole of it: a power cut may leave an
    empty one."""
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, kind) else None
