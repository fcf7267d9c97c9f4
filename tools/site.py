"""Hooks of mkdocs: the pages of the site that are written from the code, and links that leave docs/.

Generated: the front page from README.md, a page a method from its card, the reference from docstrings. A link to a file
outside docs/ is its words, a picture there becomes part of the site.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from kalman_rl.methods import METHODS, cards

sys.path.insert(0, str(Path(__file__).parent))
from methods_page import INTRODUCTION, SYMBOLS, table
from pypi_readme import LINK

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
REFERENCE = {
    "Losses": "objectives.loss objectives.rollouts objectives.aggregate objectives.inputs objectives.fused",
    "Advantages": "objectives.advantage.group objectives.advantage.filtered beliefs.advantage",
    "Ratios": "objectives.ratio.transforms objectives.ratio.learned objectives.ratio.token_noise "
    "objectives.ratio.robust",
    "Trust regions": "objectives.trust.clip objectives.trust.balance objectives.trust.gamma "
    "objectives.trust.divergence objectives.trust.curvature",
    "Penalty and correction": "objectives.penalty objectives.correction",
    "Filters": "numerics.kalman numerics.feature_filter numerics.likelihood numerics.hadamard numerics.smoother "
    "numerics.state_space numerics.wiener numerics.curve",
    "Kinematic tokens": "kinematic.tokenizer",
    "Methods": "methods methods.by_advantage methods.by_ratio methods.by_filter methods.by_trust",
    "Beliefs": "beliefs beliefs.protocol beliefs.regression beliefs.gaussian beliefs.beta beliefs.spo "
    "beliefs.by_source",
    "Sampling": "sampling.allocate sampling.budget sampling.rounds sampling.sage sampling.stream sampling.tracking "
    "sampling.one_prompt.loop sampling.one_prompt.environment sampling.one_prompt.language_model",
    "TRL": "hosts.trl.config hosts.trl.trainer",
    "verl": "hosts.verl.config hosts.verl.plugin hosts.verl.trainer",
    "Contract": "instruments.contract",
    "REPPO": "reppo.learner reppo.networks reppo.settings reppo.environments reppo.training",
    "Plots": "plot",
    "Errors and names": "errors registry",
}
"""Page of the reference -> its modules."""
MOST_FIGURES = 2
"""Of experiments on a method's page."""
ROLE = re.compile(r":(?:func|class|mod|meth|attr|data):<code>~?([\w.]+)</code>")


def on_config(config: Any) -> Any:
    """Methods and the reference join the navigation."""
    methods: list[Any] = ["methods.md"]
    for module, what in cards.CHANGES.items():
        names = [name for name in METHODS.table if cards.changes(name) == module]
        methods.append({f"By {what.partition(':')[0]}": [f"methods/{name}.md" for name in names]})
    reference = [{title: f"reference/{_slug(title)}.md"} for title in REFERENCE]
    config.nav[4:4] = [{"Methods": methods}]
    config.nav.append({"Reference": reference})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what is generated, and the pictures outside docs/ that a page shows."""
    pages = {"index.md": _front()}
    for name in METHODS.table:
        pages[f"methods/{name}.md"] = f"# {cards.as_markdown(name)[3:]}\n{SYMBOLS}{_measured(name)}"
    for title, modules in REFERENCE.items():
        body = "\n\n".join(f"::: kalman_rl.{module}" for module in modules.split())
        pages[f"reference/{_slug(title)}.md"] = f"# {title}\n\n{body}\n"
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for page in sorted(DOCS.glob("*.md")):
        for _, _, target in LINK.findall(page.read_text(encoding="utf-8")):
            if target.startswith("../") and target.endswith(".png"):
                files.append(File.generated(config, _inside(target), abs_src_path=str(ROOT / target[3:])))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as the site has them."""
    if page.file.src_uri.startswith("methods/"):
        return markdown
    if page.file.src_uri == "methods.md":
        return f"{INTRODUCTION}\n{table('methods/{}.md')}"

    def one(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if target.startswith("methods.md#"):
            return f"[{words}](methods/{target.partition('#')[2]}.md)"
        if not target.startswith("../"):
            return match[0]
        return f"![{words}]({_inside(target)})" if picture else words

    return LINK.sub(one, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Roles of docstrings are words in the page's own type."""
    html = ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)
    return html.replace("::</p>", ":</p>") if page.file.src_uri.startswith("reference/") else html


def _measured(name: str) -> str:
    """Figures of the experiments in which a method was trained, those with the fewest arms first."""
    arm = re.compile(rf"(method|advantage)='{re.escape(name)}'")
    found = []
    for path in sorted((DOCS / "evidence").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        arms = {title: of for title, of in result["arms"].items() if "accuracy" in of}
        mine = [title for title, of in arms.items() if arm.search(of["trial"])]
        if mine and path.with_suffix(".png").exists():
            found.append((len(arms), path.stem, mine, result["question"]))
    if not found:
        return ""
    parts = ["\n## Measured\n"]
    for _, stem, mine, question in sorted(found)[:MOST_FIGURES]:
        curves = ", ".join(f"*{title}*" for title in mine)
        parts.append(f"{question} Here: {curves}. [All claims](../evidence.md#{stem})\n")
        parts.append(f"![Curves of the experiment {stem}](../evidence/{stem}.png)\n")
    return "\n".join(parts)


def _front() -> str:
    """README.md, whose links start from the root of the repository."""

    def one(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        inside = os.path.relpath(ROOT / target, DOCS) if "://" not in target else target
        return f"{picture}[{words}]({inside})"

    return LINK.sub(one, (ROOT / "README.md").read_text(encoding="utf-8"))


def _inside(target: str) -> str:
    return "pictures/" + target.removeprefix("../").replace("/", "-")


def _slug(title: str) -> str:
    return title.lower().replace(" ", "_")
