"""The Triton kernels without a GPU: their numbers in the interpreter, their machine code for an H100 or H200."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIMITS = {  # registers a thread (of 255): a spill, or a jump above these, is a change to look at
    "means, table": 96,
    "means, holes": 168,
    "adjoint, table": 96,
    "adjoint, holes": 96,
    "fused, table": 168,
    "fused, holes": 255,
    "fused, token": 144,
}


@pytest.mark.timeout(900)
def test_numbers_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "KALMAN_RL_NO_NUMBA": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--rootdir", str(ROOT), str(HERE / "triton_interpreted.py")]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout


@pytest.mark.timeout(600)
def test_machine_code_neither_spills_nor_grows(tmp_path: Path) -> None:
    """Compiled ahead for compute capability 9.0 with the assembler that Triton brings, in a process where
    Triton is not the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, str(HERE / "triton_compiled.py")],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode == 3:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stderr[-4000:]
    found = {
        name: (int(registers), int(spilled))
        for name, registers, spilled in re.findall(
            r"^(.+): (\d+) registers, (\d+) bytes spilled", run.stdout, re.M
        )
    }
    assert set(found) == set(LIMITS)
    for name, (registers, spilled) in found.items():
        assert spilled == 0, (name, spilled)
        assert registers <= LIMITS[name], (name, registers)
