"""The page in a real browser: opened from disk, touched, driven by keyboard, and fed with hostile text."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kalman_rl.instruments.foreign import inspect_file
from kalman_rl.instruments.report import write_report
from tests.instruments.foreign_lines import exported, write_lines
from tests.instruments.report_runs import (
    HOSTILE,
    hostile_payloads,
    write_beliefs,
    write_large_run,
    write_run,
    write_trace,
)

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path")

SWITCHES = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --no-first-run "
    "--disable-sync --disable-default-apps --disable-extensions --mute-audio"
).split()
WORDS = ["The", " answer", " is", " 4", "2", ",", "\n", "because", " 6", " ×", " 7", " =", " ", "42", "."]


class Opened:
    """A page and everything suspicious that happened on it."""

    def __init__(self, context: Any, path: Path) -> None:
        self.trouble: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(8_000)
        self.page.on("console", lambda m: self.trouble.append(f"console {m.type}: {m.text}"))
        self.page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.trouble.append("dialog"), dialog.dismiss()))
        self.page.on("popup", lambda page: self.trouble.append("popup"))
        self.url = path.resolve().as_uri()
        self.page.route("**/*", self._route)
        self.page.goto(self.url)

    def _route(self, route: Any) -> None:
        if route.request.url == self.url:
            route.continue_()
        else:
            self.trouble.append(f"request: {route.request.url[:100]}")
            route.abort()

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("page") / "run", {"method": "kpo_diffuse"}, updates=12)
    for step in (4, 8, 12):
        write_trace(run, WORDS, step=step, prompt="What is 6 × 7?")
    write_beliefs(run, prompts=30, batches=40)
    return write_report([run])


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Opened]:
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    opened = Opened(context, written)
    yield opened
    context.close()
    assert not opened.trouble


def test_everything_is_there(opened: Opened) -> None:
    page = opened.page
    assert opened.texts("h2") == ["The run", "Beliefs and budget", "Token by token", "Completions", "Details"]
    assert page.locator("#inspector").is_visible() and not page.locator("#inspector-off").is_visible()
    assert page.locator("#completions li").count() == 6
    assert "".join(opened.texts("#tokens span")) == "".join(WORDS).replace("\n", "↵\n")
    assert page.locator("#strips .uplot").count() == 3  # the traces hold no gain
    assert page.locator("table.prompts .chart canvas").count() == 12
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow == 0


def test_colours_follow_the_toggle(opened: Opened) -> None:
    page = opened.page

    def classes() -> list[str]:
        return page.eval_on_selector_all("#tokens span", "nodes => nodes.map(node => node.className)")

    raw = classes()
    page.locator("label[for=mode-filtered]").click()
    filtered = classes()
    page.keyboard.press("ArrowRight")  # radio buttons move by arrow keys
    assert page.locator("#mode-difference").is_checked()
    difference = classes()
    page.keyboard.press("ArrowRight")
    coefficient = classes()
    assert len({tuple(each) for each in (raw, filtered, difference, coefficient)}) == 4
    assert sum("dropped" in kind for kind in coefficient) == 5 and not any("dropped" in kind for kind in raw)
    assert page.locator("#scale-clipped").is_visible()
    strength = [sum(int(kind[-1]) for kind in each if kind[-1].isdigit()) for each in (raw, filtered)]
    assert strength[1] < strength[0]


def test_hovering_and_clicking_show_a_token(opened: Opened) -> None:
    page = opened.page
    data = json.loads(page.locator("#inspector-data").text_content())
    page.locator("#completions li").nth(2).click()
    chosen = data["completions"][int(page.locator("#completions li").nth(2).get_attribute("data-item"))]
    page.locator("#tokens span").nth(4).hover()
    panel = page.locator("#token").inner_text()
    assert panel.startswith("2\n") and "token 5 of 15" in panel
    size = abs(chosen["raw"][4])
    said = page.locator("#token dl div", has_text="log-ratio").inner_text().split("\n")[1]
    assert abs(float(said.replace("−", "-"))) == pytest.approx(size, rel=6e-3)
    assert f"{100 * math.exp(chosen['old'][4]):.1f}% → " in panel
    assert ("clipped" in page.locator("#token .fate").inner_text()) == (chosen["by"][0][2][4] != "1")
    page.locator("#tokens span").nth(9).click()
    page.mouse.move(5, 5)  # away: the chosen token stays
    assert "token 10 of 15" in page.locator("#token").inner_text()
    page.locator("#strips .u-over").first.hover(position={"x": 8, "y": 60})
    assert "token 1 of 15" in page.locator("#token").inner_text()
    page.locator("#strips .u-over").nth(1).click(position={"x": 8, "y": 20})
    page.mouse.move(5, 5)
    assert "token 1 of 15" in page.locator("#token").inner_text()


def test_other_methods_on_the_same_tokens(opened: Opened) -> None:
    page = opened.page
    assert opened.texts("#method option") == ["kpo_diffuse (as recorded)", "grpo", "gspo", "kpo", "dppo_tv"]
    page.select_option("#method", "1")
    data = json.loads(page.locator("#inspector-data").text_content())
    place = int(page.locator("#completions [aria-selected=true]").get_attribute("data-item"))
    page.locator("label[for=mode-coefficient]").click()
    lost = page.locator("#tokens .dropped").count()
    raw, advantage = data["completions"][place]["raw"], data["completions"][place]["advantage"]
    by_hand = [ratio > math.log(1.2) if advantage > 0 else ratio < math.log(0.8) for ratio in raw]
    assert lost == sum(by_hand)
    assert page.locator("#token tr.here td").first.inner_text() == "grpo"


def test_lists_are_sorted(opened: Opened) -> None:
    page = opened.page
    changes = [float(row.split("mean change ")[1]) for row in opened.texts("#completions li")]
    assert changes == sorted(changes, reverse=True)
    page.select_option("#order", "step")
    assert ["step 12" in row for row in opened.texts("#completions li")] == [True, True] + [False] * 4

    def column(place: int) -> list[float]:
        cells = page.locator(f"#changed tbody tr td:nth-child({place})").all_inner_texts()
        return [abs(float(cell.replace("−", "-").replace("–", "0"))) for cell in cells]

    assert column(5) == sorted(column(5), reverse=True) and len(column(5)) == 20
    page.locator("#changed th[data-rank=ratio] button").click()
    assert column(3) == sorted(column(3), reverse=True)
    page.locator("#changed .jump").nth(3).click()
    assert page.evaluate("document.activeElement.parentElement.id") == "tokens"
    spent = page.locator("table.prompts th[data-sort]").nth(1)
    for direction, reverse in (("descending", True), ("ascending", False)):
        spent.locator("button").click()
        assert spent.get_attribute("aria-sort") == direction
        values = [int(cell.split("\n")[0]) for cell in opened.texts("table.prompts td:nth-child(5)")]
        assert values == sorted(values, reverse=reverse)


def test_completions_are_searched_and_sorted(opened: Opened) -> None:
    page = opened.page
    rows = page.locator("#listed-table tbody tr")
    assert rows.count() == 6 and page.locator("#listed-count").inner_text() == "6 of 6"
    assert opened.texts("#listed-table th") == [
        "step",
        "prompt",
        "completion",
        "reward",
        "advantage",
        "tokens",
    ]

    def column(place: int) -> list[float]:
        cells = opened.texts(f"#listed-table tbody td:nth-child({place})")
        return [float(cell.replace("−", "-")) for cell in cells]

    page.locator("#listed-table th button", has_text="advantage").click()
    assert column(5) == [1.2] * 3 + [-0.8] * 3
    page.locator("#listed-table th button", has_text="advantage").click()
    assert column(5) == [-0.8] * 3 + [1.2] * 3 and column(6) == [15] * 6
    page.locator("#listed-search").fill("BECAUSE 6")
    assert rows.count() == 6
    page.locator("#listed-search").fill("because nothing")
    assert rows.count() == 0 and page.locator("#listed-count").inner_text() == "0 of 6"
    page.locator("#listed-search").fill("")
    step = rows.nth(4).locator("td").first.inner_text()
    rows.nth(4).locator("button").click()
    assert f"step {step} · " in page.locator("#earned").inner_text()
    assert "advantage +1.2" in page.locator("#earned").inner_text()


def test_the_inspector_shows_the_expected_answer(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"method": "kpo_diffuse"}, updates=12)
    write_trace(run, WORDS, prompt="What is 6 × 7?", answer="42")
    context = browser.new_context()
    opened = Opened(context, write_report([run]))
    assert opened.page.locator("#expected").inner_text() == "42"
    assert opened.texts("#listed-table td:nth-child(4)") == ["42", "42"]
    assert not opened.trouble
    context.close()


def test_keyboard_alone_is_enough(opened: Opened) -> None:
    page = opened.page
    seen: list[str] = []
    for _ in range(400):
        page.keyboard.press("Tab")
        name = "e => e.closest('#tokens, #completions, #method, #order, #changed, #theme, .segments')?.id"
        seen.append(page.evaluate(f"({name} || '')(document.activeElement)") or "")
        if "tokens" in seen:
            break
    assert {"theme", "method", "order", "completions", "tokens"} <= set(seen)

    def focused() -> int:
        return int(page.evaluate("document.activeElement.dataset.item"))

    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert focused() == 1 and "token 2 of 15" in page.locator("#token").inner_text()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("ArrowDown")
    assert focused() >= 7  # behind the line break
    page.keyboard.press("End")
    assert focused() == 14
    page.keyboard.press("ArrowLeft")
    assert focused() == 13
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("End")
    last = page.locator("#completions li").last
    assert last.get_attribute("aria-selected") == "true" and focused() == int(last.get_attribute("data-item"))


def test_what_was_open_can_be_opened_again(opened: Opened) -> None:
    page = opened.page
    page.locator("#completions li").nth(4).click()
    page.locator("#tokens span").nth(6).click()
    chosen = page.locator("#chosen").input_value()
    page.reload()
    set_it = "(field, value) => { field.value = value; field.dispatchEvent(new Event('change')); }"
    for value, token in ((chosen, 7), ('["no such run", 1, "0", 2]', 7), ("{", 7)):
        page.locator("#chosen").evaluate(set_it, value)
        assert f"token {token} of 15" in page.locator("#token").inner_text()
        assert page.locator("#completions li").nth(4).get_attribute("aria-selected") == "true"


def test_light_and_dark(opened: Opened) -> None:
    page = opened.page

    def darkness() -> list[float]:
        colours = "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])"
        return [sum(map(float, text[4:-1].split(","))) / 765 for text in page.evaluate(colours)]

    assert darkness()[0] > 0.9 > 0.2 > darkness()[1]
    page.emulate_media(color_scheme="dark")
    assert darkness()[0] < 0.2 and darkness()[1] > 0.8
    button = page.locator("#theme")
    button.click()
    assert button.inner_text() == "Theme: light" and darkness()[0] > 0.9
    page.emulate_media(color_scheme="light")
    button.click()
    assert button.inner_text() == "Theme: dark" and darkness()[0] < 0.2
    page.reload()
    assert button.inner_text() == "Theme: dark" and darkness()[0] < 0.2
    button.click()
    assert button.inner_text() == "Theme: auto" and darkness()[0] > 0.9


def test_small_screens_and_no_scripts(browser: Any, written: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, java_script_enabled=True)
    opened = Opened(context, written)
    overflow = opened.page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert overflow == 0 and not opened.trouble
    context.close()
    context = browser.new_context(java_script_enabled=False)
    page = Opened(context, written).page
    assert page.locator("#inspector-off").is_visible() and page.locator("#scripts-off").is_visible()
    context.close()


def test_the_policy_stops_foreign_scripts(browser: Any, written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    intruder = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'></main>"
    broken = written.with_name("broken.html")
    broken.write_text(text.replace("</main>", intruder, 1), encoding="utf-8")
    context = browser.new_context()
    opened = Opened(context, broken)
    assert opened.page.evaluate("window.pwned") is None
    assert sum("Content Security Policy" in each for each in opened.trouble) >= 3
    assert opened.page.locator("#inspector").is_visible()  # the page's own scripts still count
    context.close()


def test_hostile_text_never_runs(browser: Any, tmp_path: Path) -> None:
    payloads = hostile_payloads()
    assert len(set(payloads)) >= 300
    tokens = [text.encode("utf-8", "replace").decode() for text in payloads]
    runs = []
    for index in range(3):
        part = tokens[index::3]
        text = payloads[index]
        labels = {"method": text, "model": text, "task": text, text[:50]: text}
        run = write_run(
            tmp_path / f"r{index}", labels, updates=3, evaluations=2, config=json.dumps(text), status=text
        )
        write_trace(run, part, prompt=" ".join(part)[:5_000], answer=tokens[index])
        write_beliefs(run, prompts=12, batches=6, texts=payloads[index * 12 :])
        runs.append(run)
    context = browser.new_context()
    opened = Opened(context, write_report(runs, tmp_path / "hostile.html"))
    page = opened.page
    shown = ""
    for place in range(page.locator("#completions li").count()):
        page.locator("#completions li").nth(place).click()
        shown += page.locator("#tokens").text_content()
        for mode in ("filtered", "coefficient"):
            page.locator(f"label[for=mode-{mode}]").click()
        page.locator("#tokens span").nth(place).hover()
    page.locator("#changed .jump").first.click()
    page.locator("#listed-search").fill("<script>")
    page.locator("#listed-table th button").first.click()
    for box in page.locator(".names input").all()[:6]:
        box.uncheck()
    for text in HOSTILE[:8]:
        assert text[:190] in shown
    assert "\\u{202e}gnp.exe" in shown and "\\u{1b}[31mred" in shown and "\\u{0}" in shown
    assert page.evaluate("window.pwned") is None
    data = "script[type='application/json']"
    foreign = f"main script:not({data}), main img, main iframe, main object, main a:not([href^='#'])"
    assert page.locator(foreign).count() == 0
    assert page.locator(f"main {data}").count() == page.locator(f"main [data-chart] > {data}").count()
    assert not opened.trouble
    context.close()


def test_hostile_files_of_other_trainers_never_run(browser: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [text.encode("utf-8", "replace").decode() for text in hostile_payloads()]
    rows = [exported(token_ids=texts[i : i + 9], env_name=texts[i]) for i in range(0, len(texts) - 9, 9)]
    table = {"prompt": texts, "completion": texts, "answer": texts, texts[2]: [1.0] * len(texts)}
    parquet.write_table(pyarrow.table(table), tmp_path / "c.parquet")
    for path in (write_lines(tmp_path / "r.jsonl", rows), tmp_path / "c.parquet"):
        context = browser.new_context()
        opened = Opened(context, inspect_file(path))
        page = opened.page
        page.locator("#listed-search").fill("script")
        page.locator("#listed-table th button").first.click()
        assert page.locator("#listed-table tbody tr").count() > 10
        for place in range(min(3, page.locator("#completions li").count())):
            page.locator("#completions li").nth(place).click()
            page.locator("#tokens span").nth(place).hover()
        assert page.evaluate("window.pwned") is None and page.title() != "pwned"
        assert page.locator("main img, main iframe, main object, main a:not([href^='#'])").count() == 0
        assert not opened.trouble
        context.close()


def test_a_large_run_opens_quickly_and_stays_small(
    browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_large_run(tmp_path / "large", steps=1_000, completions=64, tokens=96)
    start = time.perf_counter()
    path = write_report([run])
    wrote = time.perf_counter() - start
    context = browser.new_context()
    start = time.perf_counter()
    opened = Opened(context, path)
    opened.page.locator("#token .fate").wait_for()
    seconds = time.perf_counter() - start
    size = path.stat().st_size
    with capsys.disabled():
        print(
            f"\n1000 steps x 64 completions: {size / 1e6:.2f} MB, written {wrote:.1f} s, open {seconds:.2f} s"
        )
    assert size < 5_000_000
    assert seconds < 10  # 2 s on an idle core; the rest is for a busy machine
    said = opened.page.locator("#tokens-section").inner_text()
    assert "of 1000 traced steps" in said and "those that moved most" in said
    assert not opened.trouble
    context.close()
