"""Runs that somebody else made: nothing outside of them is shown, nothing hangs, sizes and depths are bounded."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kalman_rl.engine.config import settings_of
from kalman_rl.engine.runs import received, traces
from kalman_rl.engine.runs.beliefs import read_beliefs
from kalman_rl.engine.runs.reading import find_runs, read_manifest, read_metrics, read_run
from kalman_rl.engine.runs.received import names_in, opened, parse_json, parse_toml, read_bytes, read_lines
from kalman_rl.errors import ConfigError, KalmanRLError, PlaceError, RunError
from kalman_rl.instruments.report import write_report
from tests.instruments.report_runs import write_run

SOURCE = Path(received.__file__).parents[2]
SECRET = "the-secret-of-another-place"
FILES = (
    "manifest.json",
    "config.toml",
    "metrics.jsonl",
    "alarms.jsonl",
    "beliefs.jsonl",
    "traces/step-000001.parquet",
)


def link(path: Path) -> None:
    path.symlink_to(os.environ["RECEIVED_SECRET"])


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10_000_000_000)


def deep(path: Path) -> None:
    path.write_text('{"kind":' + "[" * 10_000 + "]" * 10_000 + "}\n")


def bound(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name may have 107 characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


HOSTILE = {
    "link": link,
    "pipe": os.mkfifo,
    "zero": zero,
    "folder": Path.mkdir,
    "socket": bound,
    "sparse": sparse,
    "deep": deep,
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    secret = tmp_path / "secret"
    secret.write_text(f'method = "{SECRET}"\n{{"kind": "train", "step": 1, "{SECRET}": 1}}\n')
    monkeypatch.setenv("RECEIVED_SECRET", str(secret))
    path = write_run(tmp_path / "run", {"method": "kpo", "task": "products", "seed": 0})
    (path / "traces").mkdir(exist_ok=True)
    return path


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file(run: Path, name: str, kind: str) -> None:
    (run / name).unlink(missing_ok=True)
    HOSTILE[kind](run / name)
    notes: list[str] = []
    shown = [repr(read_run(run)), repr(read_beliefs(run, notes)), repr(notes)]
    for read in (read_manifest, read_metrics, settings_of):
        try:
            shown.append(repr(read(run)))
        except KalmanRLError as error:
            shown.append(str(error))
    shown.append(repr(traces.read(run / FILES[-1], ["step"], problems := [])) + repr(problems))
    assert SECRET not in "".join(shown) and len("".join(shown)) < 200_000
    if kind != "deep":
        with pytest.raises(
            RunError, match=r"got (a link|a pipe|a folder|a socket|10,000,000,000 bytes), expected"
        ):
            read_bytes(run, name, 1000)


@pytest.mark.parametrize("kind", ["link", "pipe", "zero", "sparse"])
def test_a_page_of_hostile_files(run: Path, tmp_path: Path, kind: str) -> None:
    for name in FILES[1:]:
        (run / name).unlink(missing_ok=True)
        HOSTILE[kind](run / name)
    page = write_report([run], tmp_path / "page.html").read_text(encoding="utf-8")
    assert SECRET not in page and "config.toml could not be read" in page


@pytest.mark.parametrize("name", ["traces", "traces/inner"])
def test_a_linked_folder_is_not_entered(run: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "step-000001.parquet").write_text(SECRET)
    if name == "traces":
        (run / "traces").rmdir()
    (run / name).symlink_to(outside)
    with pytest.raises(RunError, match="cannot read"):
        read_bytes(run, f"{name}/step-000001.parquet", 1000)
    assert traces.steps(run) == {} and names_in(run, "nothing") == []


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "traces/../../secret"])
def test_names_stay_inside(run: Path, name: str) -> None:
    with pytest.raises(RunError, match="expected one inside the run"):
        read_bytes(run, name, 1000)


def test_hard_links_and_a_linked_run_are_read(run: Path, tmp_path: Path) -> None:
    (run / "config.toml").write_text("steps = 3\n")
    os.link(run / "config.toml", run / "twin.toml")
    (tmp_path / "latest").symlink_to(run)
    assert read_bytes(tmp_path / "latest", "twin.toml", 10) == b"steps = 3\n"
    with pytest.raises(RunError, match="expected no more than 9 bytes"):
        read_bytes(run, "twin.toml", 9)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_file_that_is_exchanged_meanwhile(run: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    real, place = os.stat, run / "config.toml"
    words = {"link": "cannot read", "pipe": "got a pipe", "folder": "got a folder"}

    def slow(path: Any, **rest: Any) -> os.stat_result:
        state = real(path, **rest)
        if path == "config.toml":
            place.unlink()
            HOSTILE[kind](place)
        return state

    place.write_text("")
    with monkeypatch.context() as patch, pytest.raises(RunError, match=words[kind]):
        patch.setattr(os, "stat", slow)
        read_bytes(run, "config.toml", 1000)


def test_a_growing_file_is_bounded(run: Path) -> None:
    with opened(run, "metrics.jsonl", 10**6) as file:
        before = len(file.read())
    with pytest.raises(RunError, match="no more than"):
        read_bytes(run, "metrics.jsonl", before - 1)
    assert len(list(read_lines(run, "metrics.jsonl", before))) == len(
        (run / "metrics.jsonl").read_bytes().splitlines()
    )


def test_a_line_without_end_is_one_bad_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "MAX_LINE", 64)
    row = b'{"kind": "train", "step": 1}'
    for filler in (0, 1, 63, 64, 65, 128, 500):
        long = b"x" * filler + row * 9
        (run / "metrics.jsonl").write_bytes(row + b"\n" + long + b"\n" + row + b"\n" + b"y" * filler)
        assert [line for line in read_lines(run, "metrics.jsonl") if line.strip() == row] == [row + b"\n"] * 2
        assert len(list(read_lines(run, "metrics.jsonl"))) == 3 + bool(filler)


@pytest.mark.parametrize("levels", [1, 31, 32, 33, 500, 5_000, 200_000])
def test_depth(levels: int) -> None:
    texts = [
        (parse_json, "[" * levels + "]" * levels),
        (parse_json, '{"a":' * levels + "1" + "}" * levels),
        (parse_toml, "a = " + "[" * (levels - 1) + "]" * (levels - 1) if levels > 1 else "a = 1"),
        (parse_toml, ".".join("a" * min(levels, 5_000)) + " = 1"),
    ]
    for parse, text in texts:
        if levels <= received.MAX_DEPTH:
            parse(text)
        else:
            with pytest.raises(ValueError, match="levels|digits"):
                parse(text)


def test_dotted_keys_do_not_end_a_report(run: Path, tmp_path: Path) -> None:
    (run / "config.toml").write_text(".".join("a" * 5_000) + " = 1\n")
    write_report([run], tmp_path / "page.html")
    with pytest.raises(ConfigError, match="not valid TOML"):
        settings_of(run)


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["d" * 200] * 30), "a\0b"])
def test_names_that_no_file_has(name: str) -> None:
    for read in (read_manifest, lambda path: find_runs([path])):
        with pytest.raises(RunError, match="cannot read: File name too long|no such run|nothing there"):
            read(Path(name))


def test_deep_folders_are_left(run: Path, tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1_500):  # deeper than Python recurses, and longer than a path may be
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    (tmp_path / "again").symlink_to(tmp_path)
    try:
        assert [record.path for record in find_runs([tmp_path])] == [run]
    finally:  # what pytest and Python's own shutil cannot remove
        subprocess.run(["rm", "-rf", "--", str(tmp_path / "d")], check=True)


@pytest.mark.parametrize("kind", ["link", "pipe", "zero", "folder", "socket", "loop"])
def test_a_report_replaces_files_only(run: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "page.html"
    HOSTILE[kind](target)
    before = target.lstat()
    with pytest.raises(PlaceError, match="got a link, folder or device there, expected a file or nothing"):
        write_report([run], target)
    assert target.lstat() == before and SECRET in Path(os.environ["RECEIVED_SECRET"]).read_text()
    HOSTILE[kind](run / "report.html")
    with pytest.raises(RunError, match="choose another output"):
        write_report([run])


def test_parquet_that_unpacks_to_more_than_it_may(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    path = run / "traces" / "step-000001.parquet"
    parquet.write_table(pyarrow.table({"token": ["x" * 1000] * 20_000}), path)
    for name, bound in (("MAX_TOKENS", 19_999), ("MAX_FILE", path.stat().st_size)):
        with monkeypatch.context() as patch:
            patch.setattr(traces, name, bound)
            problems: list[str] = []
            assert (traces.read(path, ["token"], problems) is None) == bool(problems)
            assert name == "MAX_FILE" or "20,000 rows" in problems[0]


OPENERS = {
    "open",
    "read_text",
    "read_bytes",
    "load",
    "fdopen",
    "glob",
    "rglob",
    "walk",
    "scandir",
    "listdir",
    "iterdir",
}
NOT_OF_A_RUN = {
    "engine/config.py": "a file of settings that the user names",
    "engine/models/load.py": "the model's folder that the user names, and our cache of it",
    "engine/runs/checkpoints.py": "hashes what lstat calls a file; only one's own checkpoints are loaded",
    "engine/runs/files.py": "writes",
    "engine/runs/journals.py": "writes a temporary file anew",
    "engine/runs/manifest.py": "the machine",
    "engine/runs/received.py": "the reader",
    "engine/runs/run.py": "one's own run, opened for writing",
    "engine/tasks/files.py": "rows that the user names",
    "engine/export.py": "looks at the folder that the user names, and writes it",
    "instruments/board/serve.py": "the browser",
    "instruments/board/source.py": "the page that it has just made",
    "instruments/doctor": "the machine",
    "instruments/report/page.py": "templates of the package",
    "instruments/reproduce": "results of one's own experiments",
    "instruments/verify": "a file of the package",
    "cli/main.py": "the null device",
    "cli/resume.py": "a run, by its own ``open``",
}


def test_nothing_else_opens_files() -> None:
    """A file of a run is read through ``received`` alone: no other module above the objectives opens one."""
    found = set()
    for folder in ("engine", "instruments", "cli"):
        for path in sorted((SOURCE / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = node.func if isinstance(node, ast.Call) else None
                method = isinstance(called, ast.Attribute) and called.attr in OPENERS
                if method or (isinstance(called, ast.Name) and called.id == "open"):
                    found.add(path.relative_to(SOURCE).as_posix())
    places = {place: [name for name in found if name.startswith(place)] for place in NOT_OF_A_RUN}
    assert found == {name for names in places.values() for name in names}
    assert all(places.values()), (
        f"opens nothing any more: {[place for place, names in places.items() if not names]}"
    )
