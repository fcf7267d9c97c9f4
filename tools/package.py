"""Build the sdist, the wheel from it, check both as PyPI does, and start the wheel in empty environments.

Run by ``make package``. An empty environment has the wheel and nothing else. For this Python, torch and what torch
needs are linked into it from here, so nothing is downloaded; for the newest Python on this machine there is no torch
to link, and what needs none is started.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MISSING = r"kalman-rl: got no package '\w+', expected it to be installed; pip install 'kalman-rl\[app\]'\n"
WITHOUT_TORCH = """
import kalman_rl, kalman_rl.errors, kalman_rl.registry
assert kalman_rl.__version__ == {version!r}, kalman_rl.__version__
assert "policy_loss" in dir(kalman_rl)
"""
WITH_TORCH = (
    WITHOUT_TORCH
    + """
import torch
for name in kalman_rl.__all__: getattr(kalman_rl, name)
one = torch.ones(2, 3)
batch = kalman_rl.Rollouts(-one, reward=one[0, :2], group=torch.zeros(2).long())
assert kalman_rl.policy_loss(kalman_rl.make_method("kpo"), batch, -one).value.isfinite()
try:
    from kalman_rl.hosts.trl import KalmanGRPOTrainer
except kalman_rl.KalmanRLError as error:
    assert "pip install 'kalman-rl[trl]'" in str(error), error
else:
    raise SystemExit("kalman_rl.hosts.trl was loaded without TRL")
"""
)


def call(*command: str | Path, folder: Path = ROOT, code: int = 0) -> str:
    """Output of a command, which must end with ``code``."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != code:
        raise SystemExit(
            f"package: {command[0]} ended with {done.returncode}, expected {code}\n{done.stdout}"
        )
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that its content gives."""
    call(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, folder=source)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def newest_python() -> Path | None:
    """The newest Python above this one, on the path or of pyenv, or None."""
    names = [shutil.which(f"python3.{minor}") for minor in range(30, sys.version_info[1], -1)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for path in [*filter(None, names), *map(str, pyenv.glob("3.*/bin/python3"))]:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        if version := re.fullmatch(r"Python 3\.(\d+)\.(\d+)\n", shown):
            found[int(version[1]), int(version[2])] = Path(path)
    newest = max(found, default=(0, 0))
    return found[newest] if newest > sys.version_info[1:3] and newest[0] > sys.version_info[1] else None


def needed(name: str, seen: dict[str, Distribution]) -> dict[str, Distribution]:
    """A package and all that it needs, as installed here."""
    try:
        found = distribution(name)
    except PackageNotFoundError:  # of another platform
        return seen
    if name.lower() not in seen:
        seen[name.lower()] = found
        for requirement in map(Requirement, found.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed(requirement.name, seen)
    return seen


def link(site: Path, name: str) -> None:
    """Put a package of this environment, and what it needs, into another one of the same Python."""
    for found in needed(name, {}).values():
        for top in {Path(str(file)).parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            target = Path(str(found.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target.resolve())


def start(python: Path, wheel: Path, folder: Path, version: str, *, torch: bool) -> None:
    """Install the wheel into an empty environment of a Python and use what a base install has."""
    call(python, "-m", "venv", "--without-pip", folder)
    inside = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python3.*/site-packages")
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    call(sys.executable, "-m", "pip", "--python", inside, "install", *options, wheel)
    if torch:
        link(site, "torch")
    code = (WITH_TORCH if torch else WITHOUT_TORCH).format(version=version)
    call(inside, "-W", "error:::kalman_rl", "-c", code, folder=folder)
    call(inside, "-m", "compileall", "-q", site / "kalman_rl", folder=folder)
    for command in ([folder / "bin" / "kalman-rl"], [inside, "-m", "kalman_rl"]):
        said = call(*command, folder=folder, code=1)
        if not re.fullmatch(MISSING, said):
            raise SystemExit(f"package: {command} said {said!r}, expected {MISSING!r}")
    if torch:
        said = call(inside, "-W", "ignore", "-m", "kalman_rl.instruments.doctor", folder=folder)
        if "problems: 0" not in said or "unknown" in said:
            raise SystemExit(f"package: the doctor of a base install said\n{said}")


def main() -> None:
    """Everything in a temporary folder; the first thing that is wrong ends it."""
    tools = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sdist, wheel = build(folder)
        call(tools / "bin" / "twine", "check", "--strict", sdist, wheel)
        version = wheel.name.split("-")[1]
        start(Path(sys.executable), wheel, folder / "this", version, torch=True)
        print(f"package: {wheel.name} starts with torch alone on Python {sys.version.split()[0]}")
        if newest := newest_python():
            start(newest, wheel, folder / "newest", version, torch=False)
            print(f"package: {wheel.name} starts on {call(newest, '--version').strip()}")
        else:
            print("package: no newer Python here")


if __name__ == "__main__":
    main()
