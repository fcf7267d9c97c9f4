"""The campaign of faults itself: a small share of it, and that it would see a loss."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
from benchmarks.chaos.__main__ import KINDS, page
from benchmarks.chaos.corruption import damage
from benchmarks.chaos.kills import unlike
from benchmarks.chaos.memory import per_thousand
from benchmarks.chaos.trial import Outcome, Plan

ROOT = Path(__file__).parents[2]
SHARES = {"kills": 0.005, "corruption": 0.02, "received": 0.01, "fuzz": 0.003}
"""Of a whole campaign; the other kinds have tests of their own, or take too long here."""


@pytest.mark.timeout(1800)
def test_a_small_share_of_the_campaign() -> None:
    code = (
        "import sys; from benchmarks.chaos.__main__ import one\n"
        f"for kind, size in {SHARES}.items():\n"
        "    outcome = one(kind, 1, size)\n"
        "    print(outcome.line(), *outcome.lost, sep='\\n', flush=True)\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = re.findall(r"^\| [^|]+ \| (\d+) \| (\d+) \| (\d+) \|", done.stdout, re.MULTILINE)
    assert len(lines) == len(SHARES), done.stdout
    assert all(int(tried) > 0 and tried == survived and lost == "0" for tried, survived, lost in lines), (
        done.stdout
    )


def test_a_loss_is_seen_and_told() -> None:
    outcome = Outcome("kind")
    with outcome.trial("the first"):
        pass
    with outcome.trial("the second"):
        raise AssertionError("not the same")
    assert (outcome.tried, outcome.lost) == (2, ["the second: AssertionError: not the same"])
    text = page([outcome], "kind --seed=3")
    assert (
        "| kind | 2 | 1 | 1 |" in text
        and "- the second: " in text
        and "`python -m benchmarks.chaos kind --seed=3`" in text
    )
    assert unlike({"model": b"1", "rows": [1]}, {"model": b"2", "rows": [1]}) == "model"


def test_choices_follow_from_the_seed(tmp_path: Path) -> None:
    same = [Plan(tmp_path, seed).random("kills").random() for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]
    assert len(set(KINDS)) == len(KINDS) and all(
        (ROOT / "benchmarks" / "chaos" / f"{kind}.py").is_file() for kind in KINDS
    )


def test_damage_always_changes_a_file_and_can_be_undone(tmp_path: Path) -> None:
    choose, file = Plan(tmp_path, 0).random("damage"), tmp_path / "file"
    for data in (b"", b"\0", b"\0" * 300, bytes(range(256))):
        file.write_bytes(data)
        kinds = set()
        for _ in range(200):
            undo, kind = damage(file, choose)
            kinds.add(kind)
            assert not file.exists() or file.read_bytes() != data
            undo()
            assert file.read_bytes() == data
        assert len(kinds) > 1


def test_slope_of_memory() -> None:
    assert per_thousand([(step, 500 + 0.002 * step) for step in range(100)]) == pytest.approx(2.0)
    assert per_thousand([(1, 5.0), (1, 6.0)]) == 0.0
