"""Train with the lowest and with the newest versions that pyproject.toml allows, each in an environment of its own.

    python tools/versions.py FOLDER --torch torch==2.13.0 [lowest] [newest]

Run by ``make test-versions``. The lowest take this Python, and the lower end of every range in the extras; torch comes
as ``--torch`` says. The newest are what a user's pip finds today for the newest Python on this machine. In each: the
doctor, a run of ``kalman-rl train``, and the tests of the adapter for TRL.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from package import newest_python
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("trl", "app", "board", "fast")
TESTS = ("tests/hosts/test_trl.py", "tests/hosts/test_trl_beliefs.py")
NEEDED_BY_TESTS = ("hypothesis", "pytest", "pytest-timeout")
SHOWN = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy")
OFFLINE = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def lower_ends(requirements: Iterable[str]) -> list[str]:
    """A pin at the lower end of every range that has one.

    >>> lower_ends(["numpy>=2.0", "transformers>=5.5.3,<6", "trl==1.16.*", "kalman-rl[trl]"])
    ['numpy==2.0', 'transformers==5.5.3']
    """
    ranges = [(range_.name, part) for range_ in map(Requirement, requirements) for part in range_.specifier]
    return sorted({f"{name}=={part.version}" for name, part in ranges if part.operator == ">="})


def install(name: str, folder: Path, torch: str) -> Path:
    """The Python of an environment with these versions."""
    newest = newest_python() if name == "newest" else None
    subprocess.run([str(newest or sys.executable), "-m", "venv", str(folder)], check=True)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = lower_ends(line for extra in EXTRAS for line in extras[extra]) if name == "lowest" else []
    (folder / "pins.txt").write_text("\n".join(pins) + "\n")
    inside = folder / "bin" / "python"
    pip = [str(inside), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if name == "lowest":
        subprocess.run([*pip, torch], check=True)
    how = ["-c", str(folder / "pins.txt")] if pins else ["--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run([*pip, *how, "-e", f"{ROOT}[{','.join(EXTRAS)}]", *NEEDED_BY_TESTS], check=True)
    return inside


def trial(python: Path, folder: Path) -> None:
    """What a user does first, and the tests. Raises: CalledProcessError."""
    run = f"--model tiny --task sort12 --steps 4 --overwrite --run {folder / 'run'}"
    for line in (
        "-W ignore -m kalman_rl doctor",
        f"-W ignore -m kalman_rl train {run}",
        f"-m pytest -q -p no:cacheprovider {' '.join(TESTS)}",
    ):
        subprocess.run([str(python), *line.split()], check=True, cwd=ROOT, env=os.environ | OFFLINE)


def versions(python: Path) -> str:
    """Python and the packages that matter, as installed there."""
    code = (
        f"from importlib.metadata import version as v; print(*(f'{{n}} {{v(n)}}' for n in {SHOWN}), sep=', ')"
    )
    shown = subprocess.run(
        [str(python), "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()
    name = subprocess.run(
        [str(python), "--version"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return f"{name}, {shown}"


def main() -> int:
    """One line for each environment; 1 if something does not train there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=["lowest", "newest"])
    parser.add_argument(
        "--torch", default="torch", help="what pip installs as torch beside the lowest versions"
    )
    options = parser.parse_args()
    failed = 0
    for name in options.names:
        folder = options.folder.resolve() / name
        try:
            python = install(name, folder, options.torch)
            print(f"{name}: {versions(python)}", flush=True)
            trial(python, folder)
        except subprocess.CalledProcessError as error:
            failed = 1
            print(f"{name}: {' '.join(map(str, error.cmd))} ended with {error.returncode}")
        else:
            print(f"{name}: trains, and passes {', '.join(TESTS)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
