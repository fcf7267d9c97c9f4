"""Charts in a real browser: what the axes say, values under the pointer, switches, zoom, downloads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kalman_rl.instruments.report import write_report
from tests.instruments.report_runs import charts_of, write_run, write_study
from tests.instruments.test_report_page import Opened, browser, pytestmark  # noqa: F401

RECORD = """
window.written = [];
const write = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, ...more) {
  window.written.push([this.canvas.closest("figure")?.querySelector("b")?.textContent, text]);
  return write.call(this, text, ...more);
};
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("charts")
    runs = [
        write_run(folder / name, {"method": method, "seed": seed}, start=(0.61, 0.62), end=(0.64, 0.66), seed=seed,
                  updates=30, config=f'method = "{method}"\nseed = {seed}\n')
        for name, method, seed in (("a", "=HYPERLINK(1)", 0), ("b", "=HYPERLINK(1)", 1), ("c", "x" * 200, 0))
    ]  # fmt: skip
    study = write_study(folder / "study", {"kpo": (0.01, 0.02, 0.0, 0.0), "y" * 90: (0.3, 0.4, 1e-3, 0.1)})
    return write_report([*runs, study], folder / "page.html")


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Opened]:  # noqa: F811
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    context.add_init_script(RECORD)
    opened = Opened(context, written)
    yield opened
    context.close()
    assert not opened.trouble


def figure(opened: Opened, title: str) -> Any:
    return opened.page.locator("figure", has=opened.page.locator("b", has_text=title)).first


def picture(place: Any) -> str:
    return str(place.locator("canvas").evaluate("canvas => canvas.toDataURL()"))


def over(opened: Opened, place: Any, share: float, down: float = 0.5) -> tuple[float, float]:
    """A place on the plotting area of a chart, in the window."""
    place.locator(".u-over").scroll_into_view_if_needed()
    box = place.locator(".u-over").bounding_box()
    return box["x"] + share * box["width"], box["y"] + down * box["height"]


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_axes_fit_the_data_and_their_ticks_are_round(opened: Opened) -> None:
    written = opened.page.evaluate("window.written")
    ticks = {number(text) for name, text in written if name == "Held-out accuracy" and text[:2] == "0."}
    assert len(ticks) >= 3 and min(ticks) > 0.55 and max(ticks) < 0.75  # the values lie in 0.61 to 0.66
    step = min(b - a for a, b in zip(sorted(ticks), sorted(ticks)[1:]))
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert round(mantissa, 6) in (1, 2, 5)
    assert all(abs(tick / step - round(tick / step)) < 1e-6 for tick in ticks)
    decades = {text for name, text in written if name and "10" in text and "⁻" in text}
    assert decades and all(text.removeprefix("10").strip("⁻⁰¹²³⁴⁵⁶⁷⁸⁹") == "" for text in decades)


def test_the_pointer_shows_values_and_a_switch_hides_a_line(opened: Opened) -> None:
    page, place = opened.page, figure(opened, "Held-out accuracy")
    chart = charts_of(Path(opened.url.removeprefix("file://")).read_text())[0]
    lines = {line["name"]: dict(zip(*line["points"])) for line in chart["lines"]}
    shown = place.locator(".names label")
    assert [row.split("\n")[0] for row in shown.all_inner_texts()] == list(lines)
    page.mouse.move(*over(opened, place, 0.001))
    assert place.locator(".said").inner_text() == "step 0"
    values = [number(text) for text in place.locator(".names output").all_inner_texts()]
    assert values == pytest.approx([line[0] for line in lines.values()], rel=1e-3)
    page.mouse.move(2, 2)
    last = [number(text) for text in place.locator(".names output").all_inner_texts()]
    assert last == pytest.approx([line[30] for line in lines.values()], rel=1e-3)
    before = picture(place)
    shown.first.locator("input").uncheck()
    without = picture(place)
    shown.first.locator("input").check()
    assert without != before == picture(place)


def test_zoom_and_back(opened: Opened) -> None:
    page, place = opened.page, figure(opened, "Training reward")
    back = place.locator("button", has_text="whole range")
    before = picture(place)
    assert not back.is_visible()
    page.mouse.move(*over(opened, place, 0.3))
    page.mouse.down()
    page.mouse.move(*over(opened, place, 0.6), steps=4)
    page.mouse.up()
    page.mouse.move(2, 2)
    assert back.is_visible() and picture(place) != before
    first, last = map(float, place.locator("input[type=hidden]").input_value().split())
    assert 8 < first < 11 and 17 < last < 20
    back.click()
    assert not back.is_visible() and picture(place) == before
    set_it = "(field) => { field.value = '5 9'; field.dispatchEvent(new Event('change')); }"
    place.locator("input[type=hidden]").evaluate(set_it)  # as a board does with a newer page
    assert back.is_visible()


def test_a_log_scale_of_any_chart(opened: Opened) -> None:
    place = figure(opened, "Training reward")
    before = picture(place)
    place.locator(".tools input[type=checkbox]").check()
    assert picture(place) != before
    place.locator(".tools input[type=checkbox]").uncheck()
    assert picture(place) == before


def test_every_curve_can_be_downloaded(opened: Opened, tmp_path: Path) -> None:
    place = figure(opened, "Entropy")
    assert opened.page.locator("button", has_text="CSV").count() == len(
        charts_of(Path(opened.url.removeprefix("file://")).read_text())
    )
    with opened.page.expect_download() as waited:
        place.locator("button", has_text="JSON").click()
    assert waited.value.suggested_filename == "entropy.json"
    waited.value.save_as(tmp_path / "entropy.json")
    chart = json.loads((tmp_path / "entropy.json").read_text())
    with opened.page.expect_download() as waited:
        place.locator("button", has_text="CSV").click()
    waited.value.save_as(tmp_path / "entropy.csv")
    rows = [row.split(",") for row in (tmp_path / "entropy.csv").read_text().splitlines()]
    first = chart["lines"][0]
    assert rows[0][:2] == ["step", "'=HYPERLINK(1)"]  # text in a spreadsheet, not a formula
    assert [float(row[1]) for row in rows[1:] if row[1]] == [y for y in first["points"][1] if y is not None]
    assert len(rows) - 1 == len({x for line in chart["lines"] for x in line["points"][0]})


def test_colours_follow_the_theme_and_long_names_fit(opened: Opened) -> None:
    page, place = opened.page, figure(opened, "Held-out accuracy")
    before = picture(place)
    page.emulate_media(color_scheme="dark")
    for _ in range(200):  # the browser tells the page when it has a moment
        if picture(place) != before:
            break
        page.wait_for_timeout(20)
    assert picture(place) != before
    for width in (1200, 390):
        page.set_viewport_size({"width": width, "height": 800})
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(overflow) == 0
        inside = "node => node.scrollWidth <= node.clientWidth + 1"
        assert all(each.evaluate(inside) for each in page.locator("figure .chart").all())
