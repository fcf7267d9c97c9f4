"""The package as a whole: what an import costs, which way imports point, what ships, what is not written."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import pydoc
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
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import kalman_rl

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "kalman_rl"

# From the ground up: a module imports from its own row and the rows before it, never from a later one.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "terminal", "checks", "registry", "hooks", "palette"),
    ("kernels",),
    ("numerics",),
    ("kinematic", "reppo"),
    ("objectives", "beliefs"),
    ("sampling",),
    ("methods",),
    ("hosts", "plot"),
    ("engine",),
    ("instruments",),
    ("cli", "__main__"),
)
NUMERIC = {name for row in LAYERS[:7] for name in row} - {"kernels", "reppo"}  # they compile, or play
# Folder to the extras whose packages it may import, inside functions too. Longest match decides; "" is what is left.
EXTRAS: dict[str, tuple[str, ...]] = {
    "": (),
    "kernels": ("fast",),
    "plot.py": ("plot",),
    "hosts/recipes": (),
    "hosts/rewards": (),
    "hosts/trl": ("trl",),
    "hosts/verl": ("verl",),
    "engine": ("app",),
    "instruments": ("app",),
    "instruments/board": ("app", "board"),
    "reppo": (),
    "reppo/environments.py": ("control",),
    "reppo/training.py": ("plot",),
    "cli": ("app",),
}
MODULES = {"pyzmq": "zmq", "TransferQueue": "transfer_queue"}  # packages whose module has another name
# No extra brings them: torch's CUDA build has Triton; a recipe is loaded by its host.
BROUGHT = {
    "kernels": {"triton"},
    "engine": {"pydantic_core"},
    "hosts/recipes": {"prime_rl", "skyrl", "slime"},
}


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


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages(*extras: str) -> set[str]:
    """Modules of what these extras ask for, of the extras they name, and of the base."""
    project = pyproject()["project"]
    found = set()
    for item in map(
        Requirement, sum((project["optional-dependencies"][e] for e in extras), project["dependencies"])
    ):
        found |= packages(*item.extras) if item.name == "kalman-rl" else {MODULES.get(item.name, item.name)}
    return {name.replace("-", "_") for name in found}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_are_in_the_extra_of_their_folder(path: Path) -> None:
    place = path.relative_to(SOURCE).as_posix()
    folder = max((name for name in EXTRAS if place.startswith(name)), key=len)
    allowed = packages(*EXTRAS[folder]) | BROUGHT.get(folder, set()) | {"kalman_rl"} | sys.stdlib_module_names
    if place == "hosts/state.py":  # both adapters write it
        allowed |= packages("trl") & packages("verl")
    assert {target.partition(".")[0] for target in imports(path)} <= allowed


def test_a_user_of_trl_installs_no_application() -> None:
    application = {"gguf", "jinja2", "matplotlib", "pyarrow", "reasoning_gym", "rich", "tomli_w", "tyro"}
    assert not packages("trl") & application and not packages("verl") & application
    assert application <= packages("app") and packages("trl") <= packages("app")
    extras = set(pyproject()["project"]["optional-dependencies"]) - {"all", "dev", "smollm2", "test"}
    assert packages("all") == packages(*extras)


def torch_alone() -> str:
    """Code that imports torch and refuses every package of an extra that torch itself did not load."""
    extras = pyproject()["project"]["optional-dependencies"]
    return (
        "import json, sys, torch\n"
        f"refused = set({sorted(packages(*extras) - {'torch'})}) - set(sys.modules)\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in refused:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )


def run_python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_base_import_is_light() -> None:
    """With torch alone every public name is there and a loss is computed; only our modules and Python's are new."""
    code = torch_alone() + (
        "before = set(sys.modules)\n"
        "import kalman_rl\n"
        "first = sorted(set(sys.modules) - before)\n"
        "for name in kalman_rl.__all__: getattr(kalman_rl, name)\n"
        "print(json.dumps([first, sorted(set(sys.modules) - before)]))\n"
        "one = torch.ones(2, 3)\n"
        "batch = kalman_rl.Rollouts(-one, one.bool(), reward=one[0, :2], group=torch.zeros(2).long())\n"
        "kalman_rl.policy_loss(kalman_rl.make_method('kpo'), batch, -one)\n"
    )
    first, every = json.loads(run_python(code))
    assert {name for name in first if name.startswith("kalman_rl")} == {"kalman_rl"}
    roots = {name.partition(".")[0] for name in every} - sys.stdlib_module_names
    assert roots == {"kalman_rl"}


@pytest.mark.parametrize(
    ("call", "user", "name"),
    [
        ("from kalman_rl.hosts.trl import KalmanGRPOTrainer", "kalman_rl.hosts.trl", "trl"),
        ("from kalman_rl.hosts.verl import KalmanPPOTrainer", "kalman_rl.hosts.verl", "verl"),
        ("from kalman_rl.instruments.board import serve", "kalman-rl board", "board"),
        ("from kalman_rl.instruments.report import write_report", "kalman_rl.instruments.report", "app"),
        ("from kalman_rl.engine.tasks import load_task", "kalman_rl.engine", "app"),
        ("from kalman_rl import plot", "kalman_rl.plot", "plot"),
        ("from kalman_rl.reppo import environments", "kalman_rl.reppo", "control"),
    ],
)
def test_a_missing_extra_is_named(call: str, user: str, name: str) -> None:
    code = torch_alone() + f"try:\n    {call}\nexcept Exception as error:\n    print(error)"
    assert re.search(
        rf"{re.escape(user)}: got no package .*; pip install 'kalman-rl\[{name}\]'", run_python(code)
    )


def test_the_command_without_its_extra_is_one_sentence() -> None:
    script = pyproject()["project"]["scripts"]["kalman-rl"].replace(":", " import ")
    code = torch_alone() + (
        f"import runpy; sys.stderr = sys.stdout\nfrom {script} as main\nprint(main())\n"
        "try:\n    runpy.run_module('kalman_rl', run_name='__main__')\nexcept SystemExit as stop:\n    print(stop.code)"
    )
    sentence, code_, again, other = run_python(code).splitlines()
    assert re.fullmatch(r"kalman-rl: got no package '\w+', .*; pip install 'kalman-rl\[app\]'", sentence)
    assert again == sentence and code_ == other == "1"


def test_the_doctor_of_a_base_install_names_real_extras() -> None:
    """Every check runs with torch alone, and whatever it advises to install exists."""
    code = torch_alone() + (
        "import importlib.util as util; from pathlib import Path\n"
        "there = util.find_spec\n"
        "def find(name, package=None):\n"
        "    return None if name.partition('.')[0] in refused else there(name, package)\n"
        "util.find_spec = find\n"
        "import importlib.metadata as metadata; known = metadata.version\n"
        "def version(name):\n"
        "    if name in refused: raise metadata.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "metadata.version = version\n"
        "from kalman_rl.instruments.doctor.checks import CHECKS\n"
        "from kalman_rl.instruments.doctor import PlannedRun\n"
        "for name, check in CHECKS:\n"
        "    for finding in check(PlannedRun()): print(json.dumps(vars(finding)))\n"
    )
    findings = [json.loads(line) for line in run_python(code).splitlines()]
    assert {"python", "torch", "trl", "disk", "reward"} <= {finding["check"] for finding in findings}
    assert not [finding for finding in findings if finding["status"] == "problem"]
    extras = pyproject()["project"]["optional-dependencies"]
    said = " ".join(finding["advice"] + finding["found"] for finding in findings)
    named = set(re.findall(r"kalman-rl\[(\w+)\]", said))
    assert {"trl", "verl", "fast"} <= named <= set(extras)
    (trl,) = [finding for finding in findings if finding["check"] == "trl"]
    assert (trl["status"], trl["advice"]) == ("warning", "pip install 'kalman-rl[trl]'")


def test_public_names_are_shown() -> None:
    assert set(kalman_rl.__all__) <= set(dir(kalman_rl))
    assert {name for name in dir(kalman_rl) if not name.startswith("__")} == set(kalman_rl.__all__) - {
        "__version__"
    }
    page = pydoc.render_doc(kalman_rl, renderer=pydoc.plaintext)
    assert all(name in page for name in set(kalman_rl.__all__) - {"__version__"})
    mean = kalman_rl.causal_mean(
        torch.tensor([[1.0, 3.0]]), process_noise=0.0, observation_noise=1.0, initial_variance=math.inf
    )
    assert mean.tolist() == [[1.0, 2.0]], "without a mask every token is observed"


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
        recorded = [
            info.compress_size for info in wheel.infolist() if "verify/published_losses" in info.filename
        ]
    assert {"kalman_rl/py.typed", "kalman_rl/__init__.py", "kalman_rl/numerics/kalman.py"} <= set(names)
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert len(recorded) == 1 and recorded[0] <= 65_000
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
