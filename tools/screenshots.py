"""Make the two pictures of the report in docs/: the token inspector, and beliefs with their budget.

    python tools/screenshots.py [--runs runs/screenshots]

Trains what is missing (SmolLM2-135M writing sentences, the tiny model sorting digits; a few minutes on two cores),
writes the report, opens it in Chromium through playwright and photographs two parts of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from kalman_rl.engine.config import TrainConfig, labels, to_toml, validate
from kalman_rl.instruments.report import write_report

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = (
    "the sea, rain, a bridge, bread, winter, a violin, the moon, trains, salt, a garden, glass, maps".split(
        ", "
    )
)
WORDS = 12
MARGIN = 28


def about_twelve_words(completions: list[str], **columns: Any) -> list[float]:
    """1 for a reply of twelve words, less for every word too many or too few."""
    return [max(0.0, 1 - abs(len(text.split()) - WORDS) / WORDS) for text in completions]


def text_run(folder: Path) -> TrainConfig:
    """A real model that writes a sentence; the filter's noise is set so that its band is worth looking at."""
    rows = folder.with_name("sentences.jsonl")
    rows.parent.mkdir(parents=True, exist_ok=True)
    questions = [f"Write one sentence of {WORDS} words about {subject}.\n" for subject in SUBJECTS]
    rows.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    return TrainConfig(
        run=folder, model="smollm2", data=rows, reward=("screenshots:about_twelve_words",), method="kpo_diffuse",
        method_options={"process_noise": 1e-3, "observation_noise": 0.02, "low": 0.03, "high": 0.04},
        steps=16, prompts_per_generation=4, completions_per_prompt=4, updates_per_generation=2, iterations=2,
        learning_rate=1e-3, warmup_steps=2, max_completion_tokens=36, eval_every=0, eval_prompts=1, eval_samples=1,
        save_every=0, traces_per_step=4,
    )  # fmt: skip


def beliefs_run(folder: Path) -> TrainConfig:
    """The tiny model, with a belief about each of forty prompts that decides who is sampled how often."""
    return TrainConfig(
        run=folder, model="tiny", task="sort16", train_size=40, method="kpo_diffuse",
        method_options={"process_noise": 1e-4, "observation_noise": 0.01, "low": 0.03, "high": 0.04},
        advantage="tracked", allocation="rounds", steps=300, prompts_per_generation=10, completions_per_prompt=8,
        updates_per_generation=2, learning_rate=2e-4, lora_rank=0, eval_every=60, eval_prompts=64, eval_samples=2,
        save_every=0, traces_per_step=2, threads=1,
    )  # fmt: skip


def trained(config: TrainConfig) -> Path:
    """The run directory, trained now unless it is finished."""
    from kalman_rl.engine.runs.run import Run, read_manifest
    from kalman_rl.engine.train import train

    assert config.run is not None
    there = config.run / "manifest.json"
    if not there.is_file() or read_manifest(config.run)["status"] != "finished":
        validate(config)
        with Run.create(config.run, to_toml(config), labels(config), overwrite=there.is_file()) as run:
            train(config, run)
    return config.run


def photograph(page_of: dict[str, Path]) -> list[Path]:
    """Both pictures, from the two pages."""
    from playwright.sync_api import sync_playwright

    docs = ROOT / "docs"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000}, color_scheme="light")
        page.goto(page_of["text"].as_uri())
        page.locator("label[for=mode-raw]").click()
        page.locator("#tokens").hover()
        page.mouse.move(2, 2)
        inspector = clip(page, "#tokens-section h2", "#strips", MARGIN)
        page.screenshot(path=docs / "report_inspector.png", clip=inspector, full_page=True)
        page.goto(page_of["beliefs"].as_uri())
        beliefs = clip(page, "#beliefs h2", "table.prompts tbody tr:nth-child(6)", 0)
        page.screenshot(path=docs / "report_beliefs.png", clip=beliefs, full_page=True)
        browser.close()
    return [docs / "report_inspector.png", docs / "report_beliefs.png"]


def clip(page: Any, first: str, last: str, below: float) -> dict[str, float]:
    """The strip of the page from one element to ``below`` px under the end of another."""
    top = page.locator(first).bounding_box()["y"] + page.evaluate("scrollY") - MARGIN
    box = page.locator(last).last.bounding_box()
    bottom = box["y"] + box["height"] + page.evaluate("scrollY") + below
    return {"x": 32 - MARGIN, "y": top, "width": 1200 - 2 * (32 - MARGIN), "height": bottom - top}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "screenshots", help="where the two runs are"
    )
    folder = parser.parse_args().runs.resolve()
    sys.path.insert(0, str(Path(__file__).parent))  # for the reward above, by its name
    runs = {"text": trained(text_run(folder / "text")), "beliefs": trained(beliefs_run(folder / "beliefs"))}
    pages = {name: write_report([run], folder / f"{name}.html") for name, run in runs.items()}
    for path in photograph(pages):
        print(path)


if __name__ == "__main__":
    main()
