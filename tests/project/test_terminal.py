"""What is printed cannot move the cursor, turn the reading direction or tell a secret."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest

from kalman_rl.engine.collapse.rule import Alarm, Token
from kalman_rl.errors import one_line, quote, unknown_name
from kalman_rl.terminal import logger, printable, tell

SOURCE = Path(__file__).parents[2] / "src" / "kalman_rl"
NASTY = "a\x1b[2Jb\x07c\u202ed\u2066e\x9bf\u200bg\ud800h\rI\x00"


def printing(path: Path) -> list[int]:
    """Lines that print, or write to a standard stream; a `print` into a file is no terminal."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            files = [ast.unparse(word.value) for word in node.keywords if word.arg == "file"]
            if not files or files[0].startswith("sys."):
                found.append(node.lineno)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "sys.stdout.write",
            "sys.stderr.write",
        ):
            found.append(node.lineno)
    return found


def test_one_function_prints() -> None:
    found = {
        str(path.relative_to(SOURCE)): lines for path in SOURCE.rglob("*.py") if (lines := printing(path))
    }
    assert found == {}, "kalman_rl.terminal.tell prints"


def test_one_logger_logs(caplog: pytest.LogCaptureFixture) -> None:
    places = {path.name for path in SOURCE.rglob("*.py") if "getLogger" in path.read_text(encoding="utf-8")}
    assert places == {"terminal.py"}, "kalman_rl.terminal.logger logs"
    with caplog.at_level(logging.WARNING):
        logger.warning("cannot write %s (%d)", NASTY, 3)
    assert caplog.messages == ["cannot write a [2Jb c d e f g h I  (3)"]


def quoted_bare(path: Path) -> list[int]:
    """Lines with ``!r`` in a text, outside of what Python itself asks for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    spared = {
        node
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef) and outer.name in ("__repr__", "__getattr__")
        for node in ast.walk(outer)
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.FormattedValue) and node.conversion == ord("r") and node not in spared
    ]


def test_one_function_quotes() -> None:
    found = {
        str(path.relative_to(SOURCE)): lines for path in SOURCE.rglob("*.py") if (lines := quoted_bare(path))
    }
    assert found == {}, "kalman_rl.errors.quote writes a value into an error"


def test_any_value_can_be_quoted() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert quote(10**5000) == "an int that cannot be written out"
    assert quote([10**5000]) == "a list that cannot be written out"
    assert quote(Broken()) == "a Broken that cannot be written out"
    assert quote("x" * 1000) == "'" + "x" * 196 + "..." and len(quote("x" * 1000, 20)) == 20
    assert "\x1b" not in quote(NASTY)
    assert "an int that cannot be written out" in str(unknown_name("method", 10**5000, ["kpo"]))


def test_control_and_bidi_characters_become_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    clean = "a [2Jb c d e f g h I "
    assert printable(NASTY) == clean and printable("one\ntwo") == "one\ntwo"
    assert one_line(f"x\n{NASTY}").startswith("x a [2Jb c")
    tell(NASTY)
    tell(NASTY, error=True, wipe=True, end="")
    out, err = capsys.readouterr()
    assert out == clean + "\n" and err == "\r\x1b[2K" + clean


@pytest.mark.parametrize("name", ["MY_API_KEY", "HF_TOKEN", "SOME_SECRET", "db_password"])
def test_secrets_of_the_environment_are_blanked_out(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(name, "sesame-sesame")
    tell("a sesame-sesame")
    tell("a sesame-sesame", error=True)
    logger.warning("a %s", "sesame-sesame")
    printed = capsys.readouterr()
    assert printed.out == "a [redacted]\n" and "sesame" not in printed.err + caplog.text
    assert one_line("a sesame-sesame") == "a [redacted]" and quote("sesame-sesame") == "'[redacted]'"


def test_an_alarm_shows_tokens_as_text() -> None:
    alarm = Alarm(3, 0.1, 0.5, -4.0, (Token("\x1b[31m\u202e", 1.0, "p", 0),))
    assert "\x1b" not in alarm.sentence() and "\u202e" not in alarm.sentence()


def test_an_argument_that_is_refused_is_shown_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kalman_rl.cli.main import main

    monkeypatch.setenv("MY_API_KEY", "sesame-sesame")
    for words in (
        [NASTY],
        ["train", f"--{NASTY}"],
        ["train", "--method", NASTY + "sesame-sesame"],
        ["report", NASTY],
    ):
        assert main(words) in (1, 2)
        err = capsys.readouterr().err
        assert err.endswith("\n") and all(c.isprintable() for c in err[:-1]), words
        assert "sesame" not in err
