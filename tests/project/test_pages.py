"""Pages say what the code does: the table of methods is current, examples run, links and names lead somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kalman_rl.instruments.contract.reward import MADE_UP, promises
from kalman_rl.methods import METHODS
from kalman_rl.methods.cards import CHANGES, changes

pytest.importorskip("tyro")
ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
RUN = ["start", "how", "reward", "reppo", "kinematic"]
"""Pages whose ``python`` blocks run one after another; ``py`` marks a block that needs what a page cannot have."""


def loaded(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_of_methods_is_current() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert loaded("methods_page").page() == page, "run `make methods`"
    assert re.findall(r"^## (\w+)$", page, re.M) == [
        name for module in CHANGES for name in METHODS if changes(name) == module
    ]


@pytest.mark.parametrize("name", RUN)
def test_examples_of_a_page_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    assert examples
    space: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, f"{name}.md", "exec"), space)
    if name == "start":
        raw, filtered = map(float, re.findall(r"tensor\(([^)]+)\)", capsys.readouterr().out))
        assert 0 < filtered < raw and space["k_taken"] > 0
    if name == "reward":
        rewards = promises(space["score"], MADE_UP)
        assert [each.name for each in rewards if each.kept] == re.findall(r"^kept    (.*)$", text, re.M)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?\)", text):
        if "://" in target:
            continue
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page} links to {target}#{anchor}"


def anchors(text: str) -> set[str]:
    """What headings of a page can be linked by."""
    heads = (re.sub(r"\]\([^)]*\)", "", head) for head in re.findall(r"^#+ (.*)$", text, re.M))
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_the_readme_of_a_package_index_needs_no_file_beside_it() -> None:
    """Without a public address of the repository no link is made up; with one every link has it."""
    text, tool = (ROOT / "README.md").read_text(encoding="utf-8"), loaded("pypi_readme")
    plain = tool.absolute(text, None)
    assert not re.search(r"\]\((?!https?://|#)", plain) and "Accuracy against completions" not in plain
    for target in re.findall(r"\]\(([^)\s]+)\)", tool.absolute(text, "https://example.org/it")):
        path = re.sub(r"^https://example.org/it/(blob|raw)/main/", "", target).partition("#")[0]
        assert "://" in path or (ROOT / path).exists()


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
