"""A model's name or path -> a local folder: what is there already, the bundled demo, or a download from the hub.

Only configuration, tokenizer and safetensors files are fetched; nothing that could run code.
"""

import difflib
import re
from pathlib import Path

from hasten.errors import ModelError, ResourceError

DEMO = "demo"
PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|[A-Za-z0-9][\w.-]*")


def resolve(name: str | Path) -> Path:
    """The folder of a model: a local one, "demo" (it comes with the package), or a name on the Hugging Face hub.

    A local folder goes first. Raises ModelError where there is no such model, ResourceError where the hub cannot be
    reached; both say what was tried.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"{name} is a file, expected a model folder (with config.json and .safetensors files)")
    if str(name) == DEMO:
        return _demo()
    if not _looks_like_hub_name(str(name)):
        raise ModelError(f"{name}: no such folder{_suggest(path)}")
    return _download(str(name), path)


def folder_beside(model: str | Path, suffix: str) -> Path:
    """The usual name of a folder that is made of a model: its own name and the suffix, in the current folder."""
    return Path(f"{name_of(model)}-{suffix}")


def name_of(path: str | Path) -> str:
    """The last part of a folder's name, of "." too, or of a name on the hub."""
    folder = Path(path).expanduser()
    return (folder.resolve() if folder.is_dir() else folder).name or "model"


def _demo() -> Path:
    folder = Path(__file__).resolve().parent.parent / "demo"
    if not (folder / "config.json").is_file():
        raise ModelError("the bundled model 'demo' is not in this installation: install hasten again")
    return folder


def _looks_like_hub_name(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and _HUB_NAME.fullmatch(name) is not None


def _download(name: str, path: Path) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ModelError(f"{name}: no such folder{_suggest(path)}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except errors.GatedRepoError:
        raise ModelError(
            f"{name}: access on the hub must be granted first: accept its terms and run `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(f"{name}: neither a local folder nor a model on the hub{_suggest(path)}") from None
    except errors.LocalEntryNotFoundError:
        tried = f"{name}: no such folder{_suggest(path)}, and the hub cannot be reached"
        raise ResourceError(f"{tried}: download it where there is a network") from None
    except OSError as error:
        raise ResourceError(f"{name}: cannot be downloaded: {str(error).splitlines()[0]}") from None


def _suggest(path: Path) -> str:
    """Names of folders nearby that look like what was typed."""
    try:
        folders = [entry.name for entry in path.parent.iterdir() if (entry / "config.json").is_file()]
    except OSError:
        return f" ({path.parent} does not exist either)"
    close = difflib.get_close_matches(path.name, [*folders, DEMO], n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
