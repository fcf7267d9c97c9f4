"""Reports on synthetic runs: opposite outcomes, broken files, hostile text."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalman_rl.engine.runs.reading import clean, find_runs, read_run
from kalman_rl.errors import ConfigError, PlaceError, RunError
from kalman_rl.instruments.report import page as page_module
from kalman_rl.instruments.report import sections, write_figure, write_report
from kalman_rl.instruments.report.page import SCRIPTS, uplot
from kalman_rl.instruments.report.sections.summary import Summary, summarise
from kalman_rl.instruments.report.stats.study import arm, split
from tests.instruments.report_runs import (
    EVERY_METHOD_WORKS,
    HOSTILE,
    PUBLISHED_FAILS,
    charts_of,
    write_demo,
    write_run,
    write_study,
    write_trace,
)

# ---------------------------------------------------------------- what a page may hold

TAGS = set(
    """
    html head meta title style body main header section p h1 h2 h3 b dl dt dd div figure figcaption span
    ul li table thead tbody tr th td small i details summary pre footer svg circle
    script noscript button nav a fieldset legend input label select
    """.split()
)
ATTRIBUTES = set(
    """
    lang charset name content http-equiv class title colspan role aria-label aria-hidden viewbox
    cx cy r open
    id type hidden href for value checked aria-orientation aria-live data-sortable data-sort data-value data-rank
    data-chart placeholder
    """.split()
)


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.data: list[str] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(text)
        self.close()

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value or "" for name, value in attrs if name == "href"}
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data.append(data)
        elif not self.open or self.open[-1] != "style":
            self.pieces.append(data)


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def summary_of(*folders: Path) -> Summary:
    main, study = split(find_runs(folders))
    return summarise(main, [arm(run.labels.get("method", run.name), "", [run]) for run in main], study)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("report") / "demo")


def test_the_page_is_one_closed_file(demo: Path) -> None:
    path = write_report([demo])
    assert path == demo / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(text.encode()) < 1_000_000
    assert not page.open
    assert page.tags <= TAGS, page.tags - TAGS
    assert page.attributes <= ATTRIBUTES, page.attributes - ATTRIBUTES
    assert not re.search(
        r"https?:(?!//www\.w3\.org/2000/svg)|url\(|@import|<link|javascript:|innerHTML",
        text.replace(uplot(), ""),
    )
    assert text.count(uplot()) == 1
    assert page.links and all(link.startswith("#") for link in page.links)
    charts = charts_of(text)
    data = len(re.findall(r'<script type="application/json" id="', text))  # tokens, completions
    assert data == 2 and text.count("</script>") == 1 + len(SCRIPTS) + len(charts) + data
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    one = r"'sha256-[\w+/=]{44}'"
    assert policy and re.fullmatch(
        rf"default-src 'none'; script-src {' '.join([one] * (1 + len(SCRIPTS)))}; style-src {one}; "
        "base-uri 'none'; form-action 'none'",
        policy[1],
    )
    assert text.index("Content-Security-Policy") < text.index("<style>")
    assert "prefers-color-scheme: dark" in text
    assert "nan" not in re.sub(r"<(style|script)\b.*?</\1>", "", text, flags=re.S).lower()
    for words in (
        "Held-out accuracy", "Effective sample size", "Effective sample size of sequences", "clipped",
        "Variance of the filtered log-ratio",
        "Where each method ends", "condition B", "trainer.learning_rate", "2.13.0", "0123abc",
    ):  # fmt: skip
        assert words in page.text
    assert len(charts) == 1 + (4 + 5 + 1 + 1) + 3 * 5


def test_the_library_of_the_charts_is_the_released_file_under_its_licence() -> None:
    """uPlot 1.6.32 as on npm; another version is a new checksum here."""
    released = {
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    }
    for name, checksum in released.items():
        assert hashlib.sha256((page_module.UPLOT / name).read_bytes()).hexdigest() == checksum
    assert "The MIT License" in uplot() and "Leon Sorokin" in uplot()


def test_the_same_runs_give_the_same_page(demo: Path, tmp_path: Path) -> None:
    one, two = (write_report([demo], tmp_path / name / "page.html").read_bytes() for name in "ab")
    assert one == two
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["page.html"]


def test_a_new_section_is_a_module_a_template_and_a_line_in_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = tmp_path / "templates"
    shutil.copytree(page_module.TEMPLATES, templates)
    (templates / "toy.html").write_text('<section id="toy"><h2>Toy</h2><p>{{ section }}</p></section>')
    monkeypatch.setattr(page_module, "TEMPLATES", templates)

    def build(context: sections.Context) -> str | None:
        finished = [run for run in context.shown if run.finished]
        return f"<b> {len(finished)} finished" if finished else None

    toy = sections.Section("A toy", "toy", "toy.html", build, "There is nothing to play with.")
    monkeypatch.setattr(sections, "SECTIONS", [toy, *sections.SECTIONS])
    run = write_run(tmp_path / "done", {"method": "grpo"}, updates=4)
    shown = page_module.page([run])
    assert '<a href="#toy">A toy</a><a href="#runs">Runs</a>' in shown
    assert shown.count('<section id="toy"><h2>Toy</h2><p>&lt;b&gt; 1 finished</p></section>') == 1
    assert "nothing to play with" not in shown
    running = write_run(tmp_path / "running", {"method": "grpo"}, updates=4, status="running")
    left_out = page_module.page([running])
    assert "#toy" not in left_out and 'id="toy"' not in left_out
    assert "There is nothing to play with." in left_out


def test_several_plain_runs_are_compared(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / name, {"method": name}, end=(end, end))
        for name, end in (("kpo", 0.3), ("grpo", 0.6))
    ]
    page = page_of(write_report(folders, tmp_path / "report.html"))
    assert "2 runs compared" in page.text
    assert "Run grpo learned" in page.text and "Highest at the end: grpo; kpo ends below it" in page.text
    assert "No stress study was given" in page.text and "No token traces were recorded" in page.text


# ---------------------------------------------------------------- sentences follow the numbers


def test_summary_when_the_published_method_fails(demo: Path) -> None:
    summary = summary_of(demo)
    lead, findings = " ".join(summary.lead), " ".join(summary.findings)
    assert "learned: sampled held-out accuracy rose from 0.47 to 0.91 over 40 updates (128 answers" in lead
    assert "In 50% of the updates every log-ratio was zero" in lead
    assert "kpo and ratio_one collapsed" in lead
    assert "KPO as published (kpo) ends below the diffuse start (kpo_diffuse) under A, B and C" in findings
    assert (
        "KPO as published (kpo) cannot be told apart from the control ratio_one under A, B and C" in findings
    )
    assert re.search(r"variance about [\d,]+ times smaller than that of kpo_diffuse", findings)
    assert "Highest at the end: grpo; " in findings and "tie with it (overlapping intervals)" in findings
    assert "With three seeds the t factor is 4.3" in findings


def test_summary_when_everything_works(tmp_path: Path) -> None:
    findings = " ".join(summary_of(write_study(tmp_path, EVERY_METHOD_WORKS, seeds=1, noise=0.0)).findings)
    assert "collapsed" not in findings and "below" not in findings
    assert findings.count("All 5 are a tie") == 3
    assert "ties with the diffuse start" in findings and "cannot be told apart from the control" in findings
    assert "even kpo_diffuse ties with ratio_one" in findings
    assert "One seed cannot separate methods beyond that" in findings


def test_summary_when_the_published_method_wins(tmp_path: Path) -> None:
    table = {
        "kpo": (0.8, 0.9, 1e-3, 0.1),
        "kpo_diffuse": (0.02, 0.1, 1e-3, 0.1),
        "ratio_one": (0.16, 0.5, 0.0, 0.0),
    }
    summary = summary_of(write_study(tmp_path, table, seeds=2, noise=0.001))
    findings = " ".join(summary.findings)
    assert "KPO as published (kpo) ends above the diffuse start (kpo_diffuse) under A, B and C" in findings
    assert "ends above the control ratio_one under A, B and C" in findings
    assert "Under every condition, kpo learned and kpo_diffuse collapsed." in " ".join(summary.lead)
    assert "ratio_one (0.16) lost accuracy" in findings or "ratio_one (0.16) did not change" in findings
    assert "variance" not in findings


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [
        ((0.5, 0.5), (0.9, 0.9), "learned: sampled held-out accuracy rose from 0.50 to 0.90"),
        ((0.5, 0.5), (0.1, 0.1), "collapsed: sampled held-out accuracy fell from 0.50 to 0.10"),
        ((0.8, 0.8), (0.6, 0.6), "lost accuracy: sampled held-out accuracy fell from 0.80 to 0.60"),
        ((0.5, 0.5), (0.51, 0.5), "did not change measurably"),
        ((0.2, 0.6), (0.7, 0.65), "part of the change is sharpening"),
    ],
)
def test_main_verdicts(
    tmp_path: Path, start: tuple[float, float], end: tuple[float, float], words: str
) -> None:
    assert words in summary_of(write_run(tmp_path / "run", {}, start=start, end=end)).lead[0]


def test_summary_names_a_clip_that_drops_most_tokens(tmp_path: Path) -> None:
    config = 'method = "gspo"\n[method_options]\nlow = 0.01\n'
    few, most, unknown = (
        " ".join(summary_of(write_run(tmp_path / name, {}, clipped=clipped, config=text)).lead)
        for name, clipped, text in (
            ("few", 1.2, config),
            ("most", 0.1, config),
            ("unknown", 1.2, 'method = "from_elsewhere"\n'),
        )
    )
    assert re.search(r"gspo: got \d\d % of tokens kept.*\(low 0.01, high 0.0004 now\)", few)
    assert "tokens kept" not in most and "tokens kept" not in unknown


def test_summary_admits_what_is_missing(tmp_path: Path) -> None:
    lead = {
        name: summary_of(write_run(tmp_path / name, {"model": "tiny"}, **more)).lead[0]
        for name, more in {
            "none": {"evaluations": 0},
            "once": {"evaluations": 1},
            "uncounted": {"count": None},
            "open": {"status": "failed"},
        }.items()
    }
    assert "no held-out evaluation, so whether it learned cannot be said; its training reward" in lead["none"]
    assert "was evaluated once" in lead["once"]
    assert "the number of answers is not known" in lead["uncounted"]
    assert "marked failed" in lead["open"]
    study = write_study(tmp_path / "study", PUBLISHED_FAILS, seeds=1, evaluations=0)
    assert "no method of it can be judged" in " ".join(summary_of(study).findings)
    assert "Training reward, moving mean" in page_of(write_report([study])).text


def test_unfinished_and_repeated_runs_stay_out_of_the_averages(tmp_path: Path) -> None:
    write_study(tmp_path, {"kpo": (0.5, 0.5, 1e-3, 0.1)}, seeds=2, noise=0.0)
    write_run(
        tmp_path / "runs" / "A-kpo-seed2",
        {"condition": "A", "method": "kpo", "seed": 2},
        end=(0.0, 0.0),
        status="failed",
    )
    write_run(tmp_path / "runs" / "A-again", {"condition": "A", "method": "kpo", "seed": 0}, end=(0.5, 0.5))
    page = page_of(write_report([tmp_path]))
    assert "kpo (0.50) learned" in page.text
    assert "Not finished, and left out of every average: kpo under A (1 of 3)" in page.text
    assert "repeats" in page.text


# ---------------------------------------------------------------- broken and hostile input


def test_notes_of_a_run_that_is_not_counted_are_shown(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "stress", {"grpo": PUBLISHED_FAILS["grpo"]}, seeds=1)
    again = folder / "runs" / "A-grpo-again"
    write_run(again, {"condition": "A", "method": "grpo", "seed": 0}, updates=4)
    for run in (folder / "runs" / "A-grpo-seed0", again):
        with (run / "metrics.jsonl").open("a") as file:
            file.write("{cut\n")
    text = page_of(write_report([folder])).text
    assert text.count("could not be read") == 2 and "repeats" in text


def test_hostile_text_is_only_ever_text(tmp_path: Path) -> None:
    for index, text in enumerate(HOSTILE):
        labels = {"method": text, "model": text, "task": text, text[:50]: text}
        if index % 2:
            labels |= {"condition": text, "seed": text}
        run = write_run(
            tmp_path / f"{index:02d}", labels, updates=3, evaluations=2, status=text, config=json.dumps(text)
        )
        manifest = json.loads((run / "manifest.json").read_text())
        manifest |= {"created": text, "versions": {text: text}, "git": {"commit": text}}
        (run / "manifest.json").write_text(json.dumps(manifest))
    tokens = [text.encode("utf-8", "replace").decode() for text in HOSTILE]
    write_trace(tmp_path / "00", tokens, prompt=" ".join(text[:200] for text in tokens))
    path = write_report([tmp_path])
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(text) < 5_000_000
    assert not page.open
    assert page.tags <= TAGS, page.tags - TAGS
    assert page.attributes <= ATTRIBUTES, page.attributes - ATTRIBUTES
    assert "Of 21 runs, <script>alert(1)</script>, " in page.text and "{{ 7*7 }}" in page.text
    carried = next(json.loads(data) for data in page.data if '"completions"' in data)
    shown = {token for completion in carried["completions"] for token in completion["token"]}
    assert {"<script>alert(1)</script>", "{{ 7*7 }}", "\\u{202e}gnp.exe"} <= shown
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", text
    )


@given(st.text(st.characters(codec=None)))
def test_clean_leaves_nothing_invisible(text: str) -> None:
    shown = clean(text, 10_000)
    shown.encode("utf-8")
    assert shown.isprintable() or all(char.isprintable() or char.isspace() for char in shown)


def test_a_damaged_run_still_gives_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"method": "kpo"}, updates=20)
    lines = [
        '{"kind": "train", "step": 21, "reward": NaN, "entropy": null, "ratio/noop": true}',
        "[1, 2]",
        "7",
        '{"kind": "train"}',
        '{"kind": 3, "step": 4}',
        '{"kind": "eval", "step": 1e400}',
        '{"kind": "other", "step": 5, "x": 1}',
        '{"kind": "train", "step": 22, "entropy": 1e308, "loss": -1e308, "policy/kl_old": 1e-320}',
        '{"kind": "train", "step": 1e99, "entropy": 1e99, "ratio/noop": 1e-320, "trust/kept": -1e99}',
        '{"kind": "gap", "step": 5, "rows_lost": 3}',
        '{"kind": "gap", "step": 6, "rows_lost": null}',
        '{"kind": "train", "step": 22, "reward": ' + "9" * 400 + "}",
        "[" * 100_000,
        '{"kind": "train", "step": 23, "rew',
    ]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write("\n".join(lines).encode() + b"\xff\xfe")
    (run / "config.toml").unlink()
    (run / "traces").mkdir()
    (run / "traces" / "step-000001.parquet").write_bytes(b"PAR1 not really")
    text = page_of(write_report([tmp_path])).text
    assert "8 lines of metrics.jsonl could not be read and were left out" in text
    assert "3 rows of metrics could not be written during the run" in text
    assert "values of metrics.jsonl were not finite" in text
    assert "config.toml is missing" in text
    assert "step-000001.parquet could not be read" in text


@pytest.mark.parametrize(
    "manifest", ["", "{", "[]", "null", '{"labels": 3, "versions": [], "seconds": "x", "git": null}']
)
def test_an_almost_empty_run_still_gives_a_page(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(manifest)
    text = page_of(write_report([tmp_path])).text
    assert "The run run has no metrics, so there is nothing to say about it." in text
    assert "metrics.jsonl is missing" in text and "No held-out evaluation was recorded" in text


def test_a_step_logged_twice_keeps_the_later_values(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    rows = [
        {"kind": "train", "step": 10**21, "reward": 0.5},  # damage: beyond 2^52 steps cannot be told apart
        {"kind": "train", "step": 2, "reward": 0.1, "loss": 1},
        {"kind": "train", "step": 1},
        {"kind": "train", "step": 2, "reward": 0.9},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = read_run(tmp_path)
    assert run.train == [{"step": 1.0}, {"step": 2.0, "reward": 0.9, "loss": 1.0}]
    assert "1 line of metrics.jsonl could not be read and was left out" in run.notes


def test_bad_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected at least one"):
        write_report([])
    with pytest.raises(RunError, match="nothing there, expected a directory"):
        write_report([tmp_path / "absent"])
    with pytest.raises(RunError, match=r"no manifest\.json"):
        write_report([tmp_path])
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(RunError, match="a file, expected a directory"):
        write_report([file])
    run = write_run(tmp_path / "run", {}, updates=2)
    for output in (tmp_path, file / "page.html"):
        with pytest.raises(PlaceError, match="cannot write|expected a file or nothing"):
            write_report([run], output)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, updates=20_000, evaluations=200)
    assert write_report([run]).stat().st_size < 500_000


def test_the_picture_for_documents(demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_figure([demo], tmp_path / "docs" / "curves.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(RunError, match="without held-out accuracy"):
        write_figure([write_run(tmp_path / "run", {}, evaluations=0)], tmp_path / "none.png")
