"""The board: who may ask for what, and that the page follows the run. Real server, real browser at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from kalman_rl.engine.runs.run import Run  # noqa: E402
from kalman_rl.errors import ConfigError, RunError  # noqa: E402
from kalman_rl.instruments.board import BoardApp, door  # noqa: E402
from kalman_rl.instruments.board.app import MAX_LISTENERS  # noqa: E402
from kalman_rl.instruments.board.page import POLICY, SCRIPT, WAITING, shell  # noqa: E402
from kalman_rl.instruments.board.progress import progress_of  # noqa: E402
from kalman_rl.instruments.board.serve import accepted_hosts, listen, serve, server_of  # noqa: E402
from kalman_rl.instruments.board.source import Source  # noqa: E402
from tests.instruments.report_runs import write_run  # noqa: E402

TOKEN = "a-token"
ROW = {"kind": "train", "loss": 0.0, "reward": 0.5, "entropy": 0.3, "ratio/noop": 0.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", {"method": "kpo", "task": "products", "seed": 0}, status="running")


def ask(app: BoardApp, path: str, method: str = "GET", host: str = "127.0.0.1:8000") -> Any:
    """One request to the application without a server."""
    import anyio

    async def go() -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, headers={"Host": host})

    return anyio.run(go)


@pytest.fixture
def app(run: Path) -> BoardApp:
    return BoardApp(Source(run, least=0.0), TOKEN, accepted_hosts(8000), every=0.1)


def grow(run: Path, step: int, **values: Any) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(ROW | {"step": step, "time": float(step), **values}) + "\n")


# ---------------------------------------------------------------- who may ask for what


def test_frame_and_report(app: BoardApp) -> None:
    frame = ask(app, f"/{TOKEN}/")
    assert frame.status_code == 200 and "<iframe" in frame.text
    assert frame.headers["content-security-policy"] == POLICY and "unsafe" not in POLICY
    page = ask(app, f"/{TOKEN}/page")
    assert page.status_code == 200 and "products" in page.text
    assert page.headers["content-security-policy"] == "frame-ancestors 'self'"
    for answer in (frame, page):
        assert (
            answer.headers["cache-control"] == "no-store"
            and answer.headers["referrer-policy"] == "no-referrer"
        )
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "path", ["/", "/page", f"/{TOKEN}", "/a-tokem/", "/a-tokem/page", f"/{TOKEN}x/page", "//", f"/x/{TOKEN}/"]
)
def test_wrong_token_is_not_found(app: BoardApp, path: str) -> None:
    assert ask(app, path).status_code == 404


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1", "127.0.0.1:8001", "localhost.evil.example:8000", "127.0.0.1:8000.evil", ""],
)
def test_wrong_host_is_refused_before_the_token(app: BoardApp, host: str) -> None:
    for path in (f"/{TOKEN}/", "/nothing"):
        assert ask(app, path, host=host).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST:8000", "[::1]:8000"])
def test_own_hosts(app: BoardApp, host: str) -> None:
    assert ask(app, f"/{TOKEN}/", host=host).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"])
def test_get_only(app: BoardApp, method: str) -> None:
    answer = ask(app, f"/{TOKEN}/page", method)
    assert answer.status_code == 405 and answer.headers["allow"] == "GET"


@pytest.mark.parametrize(
    "path",
    """
    ../manifest.json ..%2fmanifest.json %2e%2e/%2e%2e/etc/passwd ..%252f..%252fetc%252fpasswd /etc/passwd
    file?path=/etc/passwd manifest.json metrics.jsonl page/../../manifest.json page/ ....//etc/passwd
    ..\\..\\etc\\passwd page%00 events/../page/x static/ get-artifact?path=../../etc/passwd .%00./etc/passwd
    """.split(),
)
def test_no_file_is_served(app: BoardApp, path: str) -> None:
    answer = ask(app, f"/{TOKEN}/x/{path}")
    assert answer.status_code == 404 and answer.text == "not found\n"
    direct = ask(app, f"/{TOKEN}/{path}")
    assert direct.status_code == 404 and direct.text == "not found\n"


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.0.1", "example.org", "127.0.0.2", "127.0.0.1 "]
)
def test_other_addresses_are_refused(run: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="host: got"):
        serve(run, host=host)


def test_bad_settings(run: Path, tmp_path: Path) -> None:
    for bad in ({"port": -1}, {"port": 65536}, {"every": 0.0}, {"every": float("nan")}):
        with pytest.raises(ConfigError, match="got"):
            serve(run, **bad)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="no manifest.json"):
        serve(tmp_path / "nothing")
    with listen("127.0.0.1", 0) as taken:
        with pytest.raises(ConfigError, match="cannot listen"):
            serve(run, port=taken.getsockname()[1])


def test_a_name_cannot_break_the_frame() -> None:
    frame = shell("</title><script>alert(1)</script>", '"><script>', "<script>alert(1)</script>")
    assert frame.count("<script>") == 1 and "alert(1)</script>" not in frame.replace(SCRIPT, "")


# ---------------------------------------------------------------- how far the run is


def test_step_share_and_time_left(run: Path) -> None:
    (run / "config.toml").write_text("steps = 200\n")
    found = progress_of(run)  # 40 steps of 1.5 s
    assert found and (found.step, found.steps, found.share, found.seconds) == (40, 200, 0.2, 60.0)
    assert found.pace == pytest.approx(1.5)
    said = found.text(going=True)
    assert "step 40 of 200 (20%)" in said and "1 min 0 s so far, 1.5 s a step, about 4 min 0 s left" in said
    assert "left" not in found.text(going=False)
    with (run / "metrics.jsonl").open("a") as file:  # what a kill leaves behind
        file.write('{"kind": "train", "step": 41, "time": 70')
    assert progress_of(run) == found


def test_the_time_is_the_runs_own_after_a_resume(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", "steps = 4\n", {}) as first:
        first.log("train", 1, reward=0.5)
        first.log("train", 2, reward=0.5)
    for place in (0, 1):  # as if the first process had trained for a hundred seconds, days ago
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        rows[place]["time"] = 50.0 * (place + 1)
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Run.open(tmp_path / "run") as second:
        second.log("train", 3, reward=0.75)
        found = progress_of(second.path)
    assert found and found.step == 3 and found.reward == 0.75
    assert 100.0 <= found.seconds < 130.0 and found.pace == pytest.approx((found.seconds - 50.0) / 2)


def test_the_first_answer_needs_no_report(run: Path, app: BoardApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the report may take a minute on a busy machine; how far the run is stands there at once."""
    monkeypatch.setattr(app.source, "page", lambda: pytest.fail("made a report"))
    (run / "config.toml").write_text("steps = 80\n")
    frame = ask(app, f"/{TOKEN}/").text
    assert "step 40 of 80 (50%)" in frame and 'value="0.5000"' in frame and WAITING in frame


def test_progress_of_odd_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {}, updates=0, evaluations=1)
    assert progress_of(folder) is None
    (folder / "metrics.jsonl").write_text(
        '{"kind": "train", "step": -3, "time": 1}\n[1]\n{"kind": "train", "step": 1e400, "time": 1}\nx\n'
        '{"kind": "train", "step": "<b>", "time": 2}\n{"kind": "train", "step": 7, "time": 3, "reward": NaN}\n'
    )
    (folder / "config.toml").write_text('steps = "<script>"\n')
    found = progress_of(folder)
    assert found and (found.step, found.steps, found.share, found.reward) == (7, 0, 0.0, None)
    assert found.text(going=True) == "step 7, 3.0 s so far"
    assert progress_of(tmp_path / "nothing") is None


def test_progress_of_a_study(tmp_path: Path) -> None:
    for name, steps in (("a", 40), ("b", 80)):
        (write_run(tmp_path / "study" / name, {}) / "config.toml").write_text(f"steps = {steps}\n")
    seen = Source(tmp_path / "study").look()
    assert "2 runs, 1 through all steps, 0 going on" in seen.text and seen.share == 0.75


# ---------------------------------------------------------------- following the run


def test_the_page_is_made_anew_when_the_runs_process_ends(tmp_path: Path) -> None:
    """A killed process changes no file; that its lock is free again shows on the page."""
    with Run.create(tmp_path / "run", "", {}) as writer:
        source = Source(writer.path, least=0.0)
        written = source.look().version
        assert b"<td>running</td>" in source.page()[1] and source.look().version == written
        writer.close()
        assert source.look().version != written and b"<td>killed</td>" in source.page()[1]


def test_page_follows_the_run_and_is_made_once_per_change(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kalman_rl.instruments.board import source as module

    made = []
    real = module.write_report
    monkeypatch.setattr(module, "write_report", lambda *args: (made.append(1), real(*args))[1])
    source = Source(run, least=0.0)
    first, again = source.page()[1], source.page()[1]
    assert first == again and len(made) == 1
    before = source.look().version
    grow(run, 41, reward=0.987)
    assert source.look().version != before
    assert source.page()[1] != first and len(made) == 2


def test_reading_leaves_no_trace(run: Path) -> None:
    def state() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in [run, *run.rglob("*")])

    before = state()
    Source(run).page()
    assert state() == before


def test_half_written_last_line(run: Path) -> None:
    whole = (run / "metrics.jsonl").read_bytes()
    grow(run, 41)
    line = (run / "metrics.jsonl").read_bytes()[len(whole) :]
    for cut in (1, len(line) // 2, len(line) - 2):
        (run / "metrics.jsonl").write_bytes(whole + line[:cut])
        assert Source(run).page()[0] == 200


def test_deleted_run_is_said(run: Path, app: BoardApp) -> None:
    assert ask(app, f"/{TOKEN}/page").status_code == 200
    shutil.rmtree(run)
    answer = ask(app, f"/{TOKEN}/page")
    assert answer.status_code == 410 and "the run folder is gone" in answer.text
    stream = ask(app, f"/{TOKEN}/events")  # ends by itself
    assert "event: gone" in stream.text and "the run folder is gone" in stream.text


def test_listeners_are_counted_before_they_are_let_in(app: BoardApp) -> None:
    """Twenty at once, of whom each would find a free place if the ones before were counted late."""
    import anyio

    begun: list[int] = []

    async def listen_once() -> None:
        sent = anyio.Event()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                begun.append(message["status"])
                sent.set()

        async def receive() -> Any:
            await anyio.sleep_forever()

        scope = {"type": "http", "method": "GET", "path": f"/{TOKEN}/events", "client": None}
        await app(scope | {"headers": [(b"host", b"127.0.0.1:8000")]}, receive, send)

    async def all_at_once() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(listen_once)
            while len(begun) < 20:
                await anyio.sleep(0.01)
            assert app._listeners == MAX_LISTENERS
            group.cancel_scope.cancel()

    anyio.run(all_at_once)
    assert sorted(begun) == [200] * 16 + [503] * 4
    assert app._listeners == 0


def test_a_failure_is_one_answer(app: BoardApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(app.source, "page", fail)
    answer = ask(app, f"/{TOKEN}/page")
    assert answer.status_code == 500 and "secret" not in answer.text


# ---------------------------------------------------------------- a real server


@pytest.fixture
def served(run: Path) -> Iterator[str]:
    """Address of a board on an ephemeral port, in a thread."""
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    app = BoardApp(Source(run, least=0.0), TOKEN, accepted_hosts(port), every=0.1)
    server = server_of(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    yield f"http://127.0.0.1:{port}/{TOKEN}/"
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()
    sock.close()


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, str]]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def test_stream_tells_changes_and_the_end(run: Path, served: str) -> None:
    with httpx.stream("GET", served + "events", timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = events(answer.iter_lines())
        first = next(told)
        grow(run, 41)
        second = next(told)
        assert first[0] == second[0] == "changed" and first[1]["version"] != second[1]["version"]
        shutil.rmtree(run)
        assert next(told)[0] == "gone"
        assert next(told, None) is None


def raw(served: str, text: bytes) -> socket.socket:
    """A connection on which a text was sent, with HOST for the right header."""
    port = int(served.split(":")[2].partition("/")[0])
    made = socket.create_connection(("127.0.0.1", port), timeout=10)
    made.sendall(text.replace(b"HOST", f"Host: 127.0.0.1:{port}".encode()))
    return made


def answered(connection: socket.socket) -> bytes:
    """Everything that came back until the other end closed."""
    with connection, contextlib.suppress(ConnectionError):
        return b"".join(iter(lambda: connection.recv(65536), b""))
    return b""


@pytest.mark.parametrize(("text", "count"), [(b"", 300), (b"GET / HTTP/1.1\r\nHOST\r\n", 80)])
def test_nobody_is_locked_out(served: str, text: bytes, count: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            with contextlib.suppress(ConnectionError):  # made room for another
                stack.enter_context(raw(served, text))
        assert httpx.get(served + "page", timeout=60).status_code == 200


def test_a_request_has_time_limits(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "REQUEST_SECONDS", 0.2)
    assert answered(raw(served, b"GET / HTTP/1.1\r\nHOST\r\n")) == b""
    answer = answered(raw(served, f"GET /{TOKEN}/page HTTP/1.1\r\nHOST\r\n\r\n".encode()))
    assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer.lower()
    monkeypatch.setattr(door, "REQUEST_SECONDS", 5.0)
    monkeypatch.setattr(door, "ANSWER_SECONDS", 0.0)
    cut = answered(raw(served, f"GET /{TOKEN}/page HTTP/1.1\r\nHOST\r\n\r\n".encode()))
    assert len(cut) < len(answer)
    with httpx.stream("GET", served + "events", timeout=60) as stream:  # has no end of its own
        time.sleep(0.1)
        assert next(events(stream.iter_lines()))[0] == "changed"


JUNK = [
    b"\0" * 100,
    b"GET",
    b"get / HTTP/1.1\r\nHOST\r\n\r\n",
    b"GET / HTTP/9.9\r\nHOST\r\n\r\n",
    b"GET / HTTP/1.1\r\nHOST\r\n\r\nJUNK\r\n\r\n",
    b"GET / HTTP/1.1\r\nHOST\r\n\r\n" * 50,
    b"GET /%ff%00%ed%a0%80/page HTTP/1.1\r\nHOST\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nHOST\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHOST\r\n\r\n",
    b"GET / HTTP/1.1\r\nHOST\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET / HTTP/1.1\r\nHOST\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"POST / HTTP/1.1\r\nHOST\r\nContent-Length: 10\r\n\r\nabc",
    b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
]


def test_junk_says_nothing(
    served: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for junk in JUNK:
        with contextlib.suppress(ConnectionError):
            connection = raw(served, junk)
            connection.shutdown(socket.SHUT_WR)
            assert b" 200 " not in answered(connection)
    assert httpx.get(served + "page", timeout=60).status_code == 200
    assert capfd.readouterr().err == "" and caplog.text == ""


def test_command_prints_the_address_and_ctrl_c_ends_it(run: Path) -> None:
    command = [sys.executable, "-m", "kalman_rl.cli.main", "board", str(run), "--port", "0", "--every", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            address = process.stdout.readline().split()[0]
            assert len(address.rstrip("/").rpartition("/")[2]) == 32  # 24 random bytes
            for attempt in range(50):
                try:
                    assert httpx.get(address + "page", timeout=60).status_code == 200
                    break
                except httpx.ConnectError:
                    time.sleep(0.1 if attempt < 49 else 0)
            with httpx.stream("GET", address + "events", timeout=60) as answer:
                next(events(answer.iter_lines()))
                os.kill(process.pid, signal.SIGINT)
                assert process.wait(60) == 0
            assert process.stderr.read() == "board closed\n"
        finally:
            process.kill()


def wait_until(page: Any, condition: str, seconds: float = 20.0) -> None:
    """Playwright's own waiting evaluates text inside the page, which the board's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


@pytest.mark.skipif(not os.path.exists("/usr/bin/chromium"), reason="no chromium")
def test_browser_keeps_place_and_open_sections(run: Path, served: str) -> None:
    sync = pytest.importorskip("playwright.sync_api")
    problems: list[str] = []
    asked: list[str] = []
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 400})
        page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served, wait_until="load")
        wait_until(page, "!!document.querySelector('iframe').contentDocument.querySelector('details')")
        page.evaluate(
            """() => {
              const inside = document.querySelector("iframe").contentDocument;
              inside.querySelectorAll("details").forEach(part => { part.open = true; });
              inside.defaultView.scrollTo(0, 300);
              document.querySelector("iframe").dataset.old = "";
            }"""
        )
        grow(run, 41, reward=0.9)
        wait_until(
            page,
            "document.querySelectorAll('iframe').length === 1 && !document.querySelector('iframe[data-old]')",
        )
        state = page.evaluate(
            """() => {
              const inside = document.querySelector("iframe").contentDocument;
              return [inside.defaultView.scrollY, [...inside.querySelectorAll("details")].every(part => part.open)];
            }"""
        )
        assert state == [300, True]
        shutil.rmtree(run)
        wait_until(page, "document.querySelector('p').textContent.includes('gone')")
        browser.close()
    assert problems == []
    assert all(url.startswith(served) for url in asked)
