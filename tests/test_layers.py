"""Reads every import in src with ast and holds the arrows of docs/architecture.md: they point down only.

Imports under TYPE_CHECKING count as well: knowing a layer's types is knowing the layer.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "hasten"

# A package may import those of a lower number only; within one number, only itself.
LEVELS = {
    "cli": 8,
    "tune": 7,
    "measure": 6,
    "train": 5,
    "compress": 4,
    "engine": 3,
    "backends": 2,
    "model": 1,
    "recipe": 0,
    "steps": 0,
    "checks": 0,
    "receipt": 0,
    "hardware": 0,
    "config": 0,
    "goals": 0,
    "errors": -1,
    "_core": -1,
}
# What each heavy or foreign package is allowed in. Elsewhere not at all.
FOREIGN = {
    "torch": {"backends", "compress", "train", "measure"},
    "triton": {"backends"},
    "pynvml": {"measure"},
    "transformers": {"backends", "compress", "train", "measure"},
    "compressed_tensors": {"compress"},
    "accelerate": {"train"},
    "datasets": {"compress", "train"},
    "typer": {"cli"},
    "rich": {"cli", "tune"},
    "click": set(),
    "jax": set(),
    "ray": set(),
    "fastapi": set(),
}
LATE_ONLY = (
    "torch", "triton", "transformers", "compressed_tensors", "accelerate", "datasets", "huggingface_hub", "pynvml"
)  # fmt: skip
# What is itself imported only when it is used: may import what it needs as it loads.
LATE_PACKAGES = (("backends", "cuda"), ("backends", "torch"), ("train",), ("compress",))
# Of these packages, what is imported early all the same: rounding to nearest and calibration text need no torch.
EARLY = {
    ("compress", "__init__"), ("compress", "apply"), ("compress", "calibration"), ("compress", "folder"),
    ("compress", "plan"), ("compress", "refusals"), ("compress", "rtn"), ("compress", "targets"),
    ("train", "__init__"), ("train", "run"),
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Full names imported by a file, with whether the import happens when the module loads."""
    tree = ast.parse(path.read_text())
    package = ("hasten", *path.relative_to(SOURCE).with_suffix("").parts)[:-1]

    def walk(node: ast.AST, at_load: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", at_load) for alias in node.names)
        else:
            inside = at_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                inside = False
            for child in ast.iter_child_nodes(node):
                yield from walk(child, inside)

    yield from walk(tree, True)


def is_late(*parts: str) -> bool:
    """Whether a module of hasten, by the parts of its name below it, is imported only when it is used."""
    early = (*parts[:1], *(parts[1:2] or ("__init__",))) in EARLY
    return not early and any(parts[: len(package)] == package for package in LATE_PACKAGES)


def layer_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def test_every_module_has_a_layer():
    unknown = {layer_of(path) for path in modules()} - set(LEVELS) - {"__init__", "__main__"}
    assert not unknown, f"give these a place in the order: {sorted(unknown)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_arrows_point_down(path):
    layer = layer_of(path)
    if layer in ("__init__", "__main__"):
        return
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] != "hasten" or len(parts) < 2 or parts[1] == layer:
            continue
        other = parts[1]
        if other == "__version__":
            continue
        assert other in LEVELS, f"{path.name} imports {name}: import from the module, not from the package's front"
        assert LEVELS[other] < LEVELS[layer] or (LEVELS[other], LEVELS[layer]) == (0, 0), (
            f"{layer} imports {name}: arrows point down only"
        )


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_foreign_packages_stay_where_they_belong(path):
    layer = layer_of(path)
    for name, at_load in imports(path):
        top = name.split(".")[0]
        if top in FOREIGN:
            assert layer in FOREIGN[top], f"{path.relative_to(SOURCE)} imports {name}"
        if not is_late(*path.relative_to(SOURCE).with_suffix("").parts):
            assert not (at_load and top in LATE_ONLY), f"{path.relative_to(SOURCE)} imports {name} as it loads"
            late = top == "hasten" and is_late(*name.split(".")[1:])
            assert not (at_load and late), f"{path.relative_to(SOURCE)} imports {name} as it loads"


def test_the_engine_knows_the_protocol_and_no_backend():
    for path in sorted((SOURCE / "engine").rglob("*.py")):
        for name, at_load in imports(path):
            if name.startswith("hasten.backends") and not name.startswith("hasten.backends.base"):
                assert not at_load, f"{path.name} imports {name} as it loads"


def test_the_reader_of_imports_sees_what_it_should(tmp_path, monkeypatch):
    package = tmp_path / "engine"
    package.mkdir()
    file = package / "x.py"
    file.write_text("import torch\nfrom ..model import spec\ndef f():\n    from hasten.tune.search import go\n")
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    assert list(imports(file)) == [("torch", True), ("hasten.model.spec", True), ("hasten.tune.search.go", False)]
