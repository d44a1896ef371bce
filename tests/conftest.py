"""Fixtures that many tests share: where the data lies, and tiny models built once a run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Without a GPU, Triton's kernels run in its interpreter, which must be known before anything imports Triton.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Models this small gain nothing by more threads of torch, and lose much where others use the cores. Before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public data beside the repository; the test is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"needs the public data in {DATA}")
    return DATA


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family, **changes)`: a tiny random model folder, built once a session for the same arguments."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import tiny_models

    built: dict[str, Path] = {}

    def get(family: str, **changes: object) -> Path:
        key = repr((family, sorted(changes.items())))
        if key not in built:
            built[key] = tiny_models.build(family, tmp_path_factory.mktemp(family), **changes)
        return built[key]

    return get
