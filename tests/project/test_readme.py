"""The README says what the code does: its table is current, its example runs, its files exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from kalman_rl.methods import METHODS
from kalman_rl.methods.cards import CHANGES, changes

pytest.importorskip("tyro")
ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_of_methods_is_current(tool: ModuleType) -> None:
    assert tool.filled(README) == README, "run `make readme`"
    assert tool.table() in README


def test_page_of_methods_is_current(tool: ModuleType) -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert tool.page() == page, "run `make readme`"
    assert re.findall(r"^## (\w+)$", page, re.M) == [
        name for module in CHANGES for name in METHODS if changes(name) == module
    ]


def test_first_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = next(
        block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "policy_loss" in block
    )
    exec(compile(example, "README.md", "exec"), {})
    raw, filtered = map(float, re.findall(r"tensor\(([^)]+)\)", capsys.readouterr().out))
    assert 0 < filtered < raw


@pytest.mark.parametrize("page", ["README.md", "docs/trl.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def names_in(text: str) -> set[str]:
    """Dotted names of this package that a page writes, and what its examples import."""
    found = set(re.findall(r"(?<![\w./@-])kalman_rl(?:\.(?!yaml|toml|py\b)\w+)+(?![\w/])", text))
    for module, names in re.findall(r"from (kalman_rl[\w.]*) import (\([^)]*\)|[^\n;]+)", text):
        names = re.sub(r"#.*", "", names).strip("()")
        found |= {f"{module}.{name.split()[0]}" for name in names.split(",") if name.strip()}
    return found


def importable(name: str) -> bool:
    """Whether a dotted name is a module, or something inside one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]


@pytest.mark.parametrize("page", PAGES)
def test_names_can_be_imported_as_written(page: str) -> None:
    for package in ("trl", "verl"):
        pytest.importorskip(package)
    wrong = sorted(n for n in names_in((ROOT / page).read_text(encoding="utf-8")) if not importable(n))
    assert not wrong, f"{page} writes names that do not exist"


def test_wrong_names_are_found() -> None:
    text = "`kalman_rl.beliefs.nothing`, `algorithm.kalman_rl.allocation`\nfrom kalman_rl import Rollouts, Rolouts\n"
    names = names_in(text)
    assert names == {"kalman_rl.beliefs.nothing", "kalman_rl.Rollouts", "kalman_rl.Rolouts"}
    assert {name for name in names if importable(name)} == {"kalman_rl.Rollouts"}
