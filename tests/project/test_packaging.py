"""The package as a whole: what an import costs, which way imports point, what ships, what is not written."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

import kalman_rl

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "kalman_rl"

# From the ground up: a module imports from its own row and the rows before it, never from a later one.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "checks", "registry"),
    ("kernels",),
    ("numerics",),
    ("objectives", "beliefs"),
    ("sampling",),
    ("methods",),
    ("hosts",),
    ("engine",),
    ("instruments",),
    ("cli", "__main__"),
)
NUMERIC = {name for row in LAYERS[:6] for name in row} - {"kernels"}  # they compile with numba and Triton
HEAVY = ("accelerate", "datasets", "gguf", "matplotlib", "numba", "pandas", "peft", "pyarrow", "ray")
HEAVY += (
    "reasoning_gym",
    "rich",
    "scipy",
    "starlette",
    "transformers",
    "triton",
    "trl",
    "tyro",
    "uvicorn",
    "verl",
)


def modules() -> dict[str, Path]:
    """Dotted name inside the package ("ratio", "tasks.sorting") to file; not the package itself."""
    files = {path: path.relative_to(SOURCE).with_suffix("").parts for path in SOURCE.rglob("*.py")}
    names = {path: parts[:-1] if parts[-1] == "__init__" else parts for path, parts in files.items()}
    return {".".join(parts): path for path, parts in names.items() if parts}


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted targets of every import in a file, inside functions too."""
    package = ("kalman_rl", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{start}.{alias.name}" for alias in node.names)


def own_targets(path: Path) -> set[str]:
    """Modules of this package that a file imports, by dotted name inside the package."""
    known = modules()
    found = set()
    for target in imports(path):
        root, _, rest = target.partition(".")
        if root != "kalman_rl":
            continue
        while rest and rest not in known:
            rest = rest.rpartition(".")[0]  # a name out of a module
        found.add(rest)
    return found - {""}


def level(name: str) -> int:
    """Row of a module in LAYERS; the first part of the dotted name decides."""
    first = name.partition(".")[0]
    return next((row for row, names in enumerate(LAYERS) if first in names), -1)


def test_every_module_has_a_layer() -> None:
    homeless = sorted(name for name in modules() if level(name) < 0)
    assert not homeless, f"add to LAYERS in {Path(__file__).name}: {homeless}"


def test_imports_point_one_way() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in modules().items()
        for target in own_targets(path)
        if level(target) > level(name)
    ]
    assert not wrong


def test_no_import_cycles() -> None:
    graph = {name: own_targets(path) - {name} for name, path in modules().items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError and names the cycle


def test_numeric_core_imports_torch_only() -> None:
    allowed = {"torch", "kalman_rl"} | sys.stdlib_module_names
    wrong = [
        f"{name} imports {target}"
        for name, path in modules().items()
        if name.partition(".")[0] in NUMERIC
        for target in imports(path)
        if target.partition(".")[0] not in allowed
    ]
    assert not wrong


def test_base_import_is_light() -> None:
    code = (
        "import json, sys, torch; before = set(sys.modules); "  # torch may pull in what it likes
        "import kalman_rl, kalman_rl.numerics.kalman, kalman_rl.objectives.loss, kalman_rl.methods; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = {name.partition(".")[0] for name in json.loads(run.stdout)}
    assert "kalman_rl" in roots
    assert not roots & set(HEAVY)


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_version_has_one_source() -> None:
    version = pyproject()["project"]["version"]
    assert kalman_rl.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(version)}$", citation, re.MULTILINE)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_base_dependency_is_torch_only() -> None:
    assert [re.match(r"[\w-]+", line)[0] for line in pyproject()["project"]["dependencies"]] == ["torch"]


def test_wheel_ships_types_licence_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        names = wheel.namelist()
    assert {"kalman_rl/py.typed", "kalman_rl/__init__.py", "kalman_rl/numerics/kalman.py"} <= set(names)
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    outside = {name for name in names if not name.startswith(("kalman_rl/", "kalman_rl-"))}
    assert not outside
    data = {
        str(path.relative_to(SOURCE.parent))
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert data <= set(names), f"in src but not in the wheel: {sorted(data - set(names))}"


def written_files() -> list[Path]:
    """Files that are in version control or could be added to it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listing.splitlines() if (ROOT / line).is_file()]


def test_no_paths_of_one_machine() -> None:
    here = re.compile(r"(?<![\w.-])/wo" r"rk/|(?<![\w-])sha" r"red/")  # in two parts, to not find itself
    hits = []
    for path in written_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        hits += [f"{path.relative_to(ROOT)}: {match[0]}" for match in here.finditer(text)]
    assert not hits


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "check_environment", ROOT / "tools" / "check_environment.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_constraints_pin_every_declared_dependency(checker: ModuleType) -> None:
    pins = checker.read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    extras = pyproject()["project"]["optional-dependencies"]
    assert not checker.required_names("kalman-rl", extras) - set(pins)


def test_environment_check_finds_what_is_wrong(checker: ModuleType) -> None:
    pins = checker.read_pins("# tested\ntorch==2.13.0\ntrl==1.16.0  # hooks\n")
    good = {"torch": Version("2.13.0+cpu"), "trl": Version("1.16.0")}
    assert checker.version_problems(pins, good, {"torch", "trl"}) == []
    (other,) = checker.version_problems(pins, good | {"trl": Version("1.17.0")}, {"torch"})
    assert other.startswith("trl: got 1.17.0, expected 1.16.0")
    (missing,) = checker.version_problems(pins, good, {"peft"})
    assert missing.startswith("peft: got nothing")


@pytest.mark.parametrize(
    ("cuda", "gpu", "count"), [(None, False, 0), (None, True, 0), ("13.0", True, 0), ("13.0", False, 1)]
)
def test_cuda_build_needs_a_gpu(checker: ModuleType, cuda: str | None, gpu: bool, count: int) -> None:
    assert len(checker.build_problems(cuda, gpu)) == count
