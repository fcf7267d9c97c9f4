"""The README says what the code does: its table is current, its example runs, its files exist."""

from __future__ import annotations

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
