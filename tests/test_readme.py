"""What the README shows works: its Python example, its commands, its links, its file tree."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs(tmp_path):
    (example,) = blocks("python")
    assert 5 <= len([line for line in example.splitlines() if line.strip()]) <= 12
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 30


def test_the_two_commands_are_single_lines_that_start_from_nothing():
    tune, tests = (block.strip() for block in blocks("sh")[:2])
    for command in (tune, tests):
        assert "\n" not in command
        assert command.startswith("python3 -m venv ")
    assert tune.endswith("hasten tune demo")
    assert tests.endswith("python -m pytest")


def test_ci_installs_as_the_readme_says():
    install = re.search(r"pip (install [^&]*\[dev\]')", README).group(1)
    ci = re.sub(r"--quiet ", "", (ROOT / ".ci" / "run").read_text())
    assert install in ci


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


def test_the_file_tree_is_the_tree():
    """Every file that the README's tree names is there, and every module of the package is named."""
    (tree,) = [block for block in blocks("text") if "src/hasten/" in block]
    named = set(re.findall(r"[\w/]+\.(?:py|cpp|h)\b", tree))
    modules = {path.name for path in (ROOT / "src" / "hasten").glob("*.py")}
    assert modules <= {Path(name).name for name in named}
    packages = {path.name for path in (ROOT / "src" / "hasten").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert packages <= set(re.findall(r"(\w+)/", tree))
