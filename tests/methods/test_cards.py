"""Every method has a complete card, and every card a method: a new method cannot escape."""

from __future__ import annotations

import inspect
import re

import pytest

from kalman_rl.errors import ConfigError
from kalman_rl.methods import METHODS, cards

every = pytest.mark.parametrize("name", list(METHODS))


def test_no_card_is_missing_or_orphaned() -> None:
    assert set(cards.texts()) == set(METHODS)
    cited = {key for entry in cards.texts().values() for key in entry["cite"]}
    assert cited == set(cards.references())


@every
def test_card_is_complete(name: str) -> None:
    entry = cards.texts()[name]
    assert set(entry) - {"source"} == {*cards.TEXTS, "names", "cite"}
    for key in cards.TEXTS:
        assert entry[key].strip(), key
        assert key == "equation" or entry[key].endswith("."), key
    assert entry["cite"] or cards.source(name) == "ours"
    options = cards.options(name)
    for text in entry["names"]:
        heads = re.match(r"(\w+(?:, \w+)*) = ", text)
        assert heads and set(heads[1].split(", ")) <= set(options), text
    shown = cards.card(name)
    assert shown["changes"] in cards.CHANGES
    assert {"advantage", "ratio", "trust", "aggregate"} <= set(shown["factors"])


@every
def test_source_agrees_with_the_docstring(name: str) -> None:
    where = cards.source(name)
    text = METHODS[name].__doc__ or ""
    assert where.lower().removeprefix("arxiv ") in text.lower() or (where == "ours" and "control" in text)


@every
@pytest.mark.parametrize("width", [60, 100, 160])
def test_card_fits(name: str, width: int) -> None:
    equation = cards.card(name)["equation"].splitlines()
    for line in cards.as_text(name, width).splitlines():
        assert len(line) <= width or line.strip() in [row.strip() for row in equation]


@every
def test_equations_fit_a_page(name: str) -> None:
    assert all(len(line) <= 96 for line in cards.card(name)["equation"].splitlines())


def test_references_hold_facts_only() -> None:
    for key, entry in cards.references().items():
        assert {"title", "year"} <= set(entry), key
        assert set(entry) <= {"title", "author", "year", "eprint", "journal", "url", "short"}, key
        if "eprint" in entry:
            assert re.fullmatch(r"\d{4}\.\d{5}", entry["eprint"]), key
            assert entry["year"] == 2000 + int(entry["eprint"][:2]), key
        else:
            assert "short" in entry, key


def test_bibtex() -> None:
    text = cards.bibtex("gpg_published")
    assert re.findall(r"^@misc\{(\w+),$", text, re.M) == ["chu2025gpg", "verl"]
    assert text.count("{") == text.count("}") and "short" not in text
    assert "author = {Xiangxiang Chu and" in text
    assert cards.bibtex("ratio_one").startswith("% ratio_one is ours")


def test_other_names_are_translated_not_guessed() -> None:
    """verl's 0.28 and TRL's 5.0 are both legal bounds of CISPO: each name has its own host's meaning."""
    from kalman_rl.methods import make_method

    assert make_method("cispo", epsilon_high=0.28).trust.high == 0.28
    assert make_method("cispo", clip_ratio_high=0.28).trust.high == 1.28
    with pytest.raises(ConfigError, match="method option: got 'cliprange' for cispo"):
        make_method("cispo", cliprange=0.28)
    names = " ".join(cards.card("cispo")["names"])
    assert "TRL epsilon_high" in names and "1 + verl clip_ratio_high" in names


def test_unknown_and_without_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^method: got 'cisp', .*did you mean 'cispo'\?"):
        cards.card("cisp")
    monkeypatch.setitem(METHODS.table, "new", METHODS["kpo"])
    shown = cards.card("new")
    assert shown["equation"] and shown["equation"] in (inspect.getdoc(METHODS["kpo"]) or "")
    assert shown["factors"] == cards.card("kpo")["factors"] and not shown["cite"]
    assert shown["summary"] in cards.as_text("new") and shown["equation"].splitlines()[0] in cards.as_text(
        "new"
    )
