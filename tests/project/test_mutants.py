"""tools/mutants.py and tools/cover.py: what is counted, and that a fault reaches whoever holds the function."""

from __future__ import annotations

import doctest
import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "mutants.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants", module)
    monkeypatch.syspath_prepend(str(TOOL.parent))  # it imports its neighbour
    spec.loader.exec_module(module)
    return module


def test_its_examples(tool: ModuleType) -> None:
    for module in (tool, sys.modules["cover"]):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


def test_its_name_is_what_changes(tool: ModuleType) -> None:
    one = tool.Mutant(
        "src/kalman_rl/beliefs/beta.py", "A.a", range(1), range(1), "if a:\n  b = 1", "if a:\n  b = 2"
    )
    assert one.name == "beliefs/beta.py A.a | b = 1 | b = 2" and one.room == "beliefs"


def test_a_mutant_is_put_into_the_live_function(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    was = "class A:\n    @classmethod\n    def a(cls, by=2): return by + 1\ndef b(*, by=2): return by + 1\n"
    module = ModuleType("kalman_rl.made")
    module.__package__ = "kalman_rl"
    exec(was, vars(module))
    monkeypatch.setitem(sys.modules, "kalman_rl.made", module)
    held, other = module.A.a, module.b
    for function, now in (("A.a", was.replace("by=2): return by + 1\ndef", "by=5): return by - 1\ndef")),
                          ("b", was.replace("*, by=2", "*, by=7"))):  # fmt: skip
        tool.Mutant("src/kalman_rl/made.py", function, range(1), range(1), was, now).put()
    assert (held(), other()) == (4, 8)


def test_the_page_counts_the_dead(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = [
        tool.Mutant(f"src/kalman_rl/{room}/a.py", "f", range(1), range(1), "a = 1", f"a = {number}")
        for room in ("beliefs", "sampling") for number in (2, 3, 4)
    ]  # fmt: skip
    verdicts = dict(
        zip((one.name for one in made), (*tool.DEAD, "survived", "killed", "not reached", "survived"))
    )
    known = tmp_path / "equivalent.toml"
    known.write_text(f'[[mutant]]\nname = "{made[-1].name}"\nreason = "nobody reads it"\n')
    monkeypatch.setattr(tool, "EQUIVALENT", known)
    page = tool.page("seed 1", 10, 4, made, verdicts)
    assert "**Score 50.0%**; 60.0% without the 1 survivors" in page
    assert "| beliefs | 3 | 1 | 1 | 1 | 0 |" in page and "| together | 6 | 2 | 1 | 2 | 1 |" in page
    assert "sampling/a.py f: equivalent: nobody reads it" in page and page.count("```diff") == 3


def test_what_no_test_can_kill_is_named_once_with_its_reason(tool: ModuleType) -> None:
    known = tomllib.loads(tool.EQUIVALENT.read_text())["mutant"]
    assert len({one["name"] for one in known}) == len(known)
    for one in known:
        assert set(one) == {"name", "reason"} and one["reason"]
        assert (TOOL.parents[1] / "src" / "kalman_rl" / one["name"].split(" ")[0]).is_file()
