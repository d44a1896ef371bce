"""What is compared: each system's interpreter, driver, model and environment.

Knows nothing of how things are timed (measure.py) or shown (table.py). The environment variable PEERS names the folder
that setup_peers.sh fills, `.peers/` in the repository by default.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEERS = Path(os.environ.get("PEERS", ROOT / ".peers")).resolve()
SHAPES = ("qwen3-0.6b", "llama-15m")


@dataclass(frozen=True)
class SystemUnderTest:
    """One line of the table.

    model: a path below PEERS with {shape} in it. busy: also measured beside a busy neighbour. recipe: hasten's, to make
    the model from the plain folder.
    """

    name: str
    python: Path
    driver: str
    model: str
    busy: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    recipe: str | None = None

    def path(self, shape: str) -> Path:
        return PEERS / self.model.format(shape=shape)

    def missing(self, shape: str) -> Path | None:
        """The first path without which it cannot run."""
        return next((path for path in (self.python, self.path(shape)) if not path.exists()), None)

    def command(self, shape: str) -> list[str]:
        return [str(self.python), str(HERE / self.driver), str(self.path(shape))]


def hasten(width: str, python: Path, recipe: str | None, busy: bool = False) -> SystemUnderTest:
    model = f"hasten/{{shape}}-{width}" if recipe else "models/{shape}"
    environment = {"PYTHONPATH": str(ROOT / "src")}
    return SystemUnderTest(f"hasten {width}", python, "drive_hasten.py", model, busy, environment, recipe)


def llama_cpp(width: str, busy: bool = False) -> SystemUnderTest:
    libraries = str(PEERS / "build-llama_cpp" / "bin")
    environment = {
        "LLAMA_CPP_LIB_PATH": libraries,
        "LD_LIBRARY_PATH": libraries,
        "PYTHONPATH": str(PEERS / "src" / "llama_cpp_python"),
    }
    model = f"gguf/{{shape}}-{width}.gguf"
    return SystemUnderTest(f"llama.cpp {width}", venv("llama_cpp"), "drive_llama_cpp.py", model, busy, environment)


def openvino(width: str, busy: bool = False) -> SystemUnderTest:
    model = f"openvino/{{shape}}-{width}"
    return SystemUnderTest(f"OpenVINO {width}", venv("openvino"), "drive_openvino.py", model, busy)


def venv(name: str) -> Path:
    return PEERS / "venvs" / name / "bin" / "python"


def systems(hasten_python: Path) -> list[SystemUnderTest]:
    """Every system, in the order in which a round runs them: hasten next to the peers it is compared with."""
    ort_model = "onnxruntime/{shape}-int4"
    return [
        hasten("int4", hasten_python, "int4-g32", busy=True),
        llama_cpp("Q4_0", busy=True),
        openvino("int4", busy=True),
        SystemUnderTest("ONNX Runtime int4", venv("onnxruntime"), "drive_onnxruntime.py", ort_model, busy=True),
        hasten("int8", hasten_python, "int8"),
        llama_cpp("Q8_0"),
        openvino("int8"),
        hasten("bf16", hasten_python, None),
        llama_cpp("BF16"),
        SystemUnderTest("Transformers bf16", venv("transformers"), "drive_transformers.py", "models/{shape}"),
    ]
