"""Files of prime-rl and of TRL as pages: what they hold is shown, what they lack is said, what they say is text."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from kalman_rl.cli.main import main
from kalman_rl.errors import PlaceError, RunError
from kalman_rl.instruments.foreign import inspect_file
from kalman_rl.instruments.report.page import SCRIPTS
from kalman_rl.instruments.report.sections.tokens import MAX_TOKENS
from tests.instruments.foreign_lines import exported, write_lines
from tests.instruments.report_runs import hostile_payloads

pandas = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")


def data_of(page: Path, name: str) -> Any:
    found = re.search(f'<script type="application/json" id="{name}">(.*?)</script>', page.read_text())
    return json.loads(found[1]) if found else None


def test_a_token_export_of_prime_rl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [exported(), exported(advantage=-1.0, tokens=4)]
    path = write_lines(tmp_path / "rank_0.jsonl", rows)
    assert main(["inspect", str(path)]) == 0
    page = tmp_path / "rank_0.html"
    assert capsys.readouterr().out.strip() == str(page)
    data = data_of(page, "inspector-data")
    one = next(c for c in data["completions"] if len(c["token"]) == 6)
    ratio = rows[0]["log_importance_ratio"][3:]
    assert one["raw"] == pytest.approx(ratio, rel=1e-3) and one["id"] == list(range(103, 109))
    assert one["old"] == pytest.approx(rows[0]["inference_logprobs"][3:], rel=1e-3)
    assert one["now"] == pytest.approx(rows[0]["trainer_logprobs"][3:], rel=1e-3)
    assert one["prompt"] == "⟨100⟩⟨101⟩⟨102⟩" and one["step"] == 5 and one["advantage"] == 1.0
    assert [mark == "1" for mark in one["by"][0][2]] == [not masked for masked in rows[0]["is_masked"][3:]]
    names = [method["name"] for method in data["runs"][0]["methods"]]
    assert names == ["recorded", "grpo", "gspo", "kpo", "kpo_diffuse", "dppo_tv"]
    grpo = one["by"][1]
    inside = [0.8 <= math.exp(value) <= 1.2 for value in ratio]
    assert [mark == "1" for mark in grpo[2]] == inside
    assert grpo[1] == pytest.approx([math.exp(value) for value in ratio], rel=1e-3)
    text = page.read_text()
    for missing in ("the text of tokens", "rewards and expected answers", "own weights and coefficients"):
        assert missing in text.split("</header>")[0]
    listed = data_of(page, "completions-data")
    assert listed["numbers"] == ["advantage", "tokens"] and [row[6] for row in listed["rows"]] == [
        [1, 6],
        [-1, 4],
    ]


def test_without_ratios_it_says_so(tmp_path: Path) -> None:
    nothing = {name: [None] * 9 for name in ("log_importance_ratio", "is_masked", "importance_ratio")}
    page = inspect_file(write_lines(tmp_path / "rank_0.jsonl", [exported(**nothing)]))
    assert "ratios, which need the log-probabilities of two policies" in page.read_text()
    assert data_of(page, "inspector-data")["completions"][0]["old"] is not None


def test_completions_of_trl(tmp_path: Path) -> None:
    """Columns as GRPOTrainer.log writes them in TRL 1.16: step, prompt, completion, rewards, extras, advantage."""
    chats = [[{"role": "user", "content": f"What is {i} + {i}?"}] for i in range(4)]
    replies = [[{"role": "assistant", "content": [{"type": "text", "text": f"{2 * i}"}]}] for i in range(4)]
    table = {
        "step": [10] * 4, "prompt": chats, "completion": replies, "exact": [1.0, 0.0, None, 1.0],
        "short": [0.5] * 4, "solution": list("0246"), "advantage": [1.0, -1.0, float("nan"), 1.0],
    }  # fmt: skip
    path = tmp_path / "completions_00010.parquet"
    pandas.DataFrame(table).to_parquet(path)
    page = inspect_file(path, tmp_path / "page.html")
    listed = data_of(page, "completions-data")
    assert listed["numbers"] == ["exact", "short", "advantage"]
    assert listed["prompts"] == [f"user: What is {i} + {i}?" for i in range(4)]
    assert [row[4:] for row in listed["rows"]] == [
        ["0", "assistant: 0", [1, 0.5, 1]], ["2", "assistant: 2", [0, 0.5, -1]],
        ["4", "assistant: 4", [None, 0.5, None]], ["6", "assistant: 6", [1, 0.5, 1]],
    ]  # fmt: skip
    text = page.read_text()
    assert data_of(page, "inspector-data") is None and "there is no token to inspect" in text
    assert "Not in this file: tokens, log-probabilities and ratios" in text


def test_other_and_damaged_files_are_named(tmp_path: Path) -> None:
    bad = {
        "empty.jsonl": b"", "text.jsonl": b"not JSON\n", "list.jsonl": b"[1]\n", "metrics.jsonl": b'{"step": 1}\n',
        "ragged.jsonl": json.dumps(exported(trainer_logprobs=[0.0])).encode(), "other.parquet": b"PAR1 not really",
        "deep.jsonl": b"[" * 100_000, "untrained.jsonl": json.dumps(exported(loss_mask=[False] * 9)).encode(),
    }  # fmt: skip
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunError, match=name):
            inspect_file(tmp_path / name)
    pandas.DataFrame({"a": [1]}).to_parquet(tmp_path / "columns.parquet")
    with pytest.raises(RunError, match="got a, expected rows with prompt and completion"):
        inspect_file(tmp_path / "columns.parquet")
    os.symlink(write_lines(tmp_path / "real.jsonl", [exported()]), tmp_path / "link.jsonl")
    with pytest.raises(RunError, match="a link"):
        inspect_file(tmp_path / "link.jsonl")
    with pytest.raises(PlaceError, match="got no file there"):
        inspect_file(tmp_path / "absent.jsonl")
    assert main(["inspect", str(tmp_path / "absent.jsonl")]) == 2
    assert main(["inspect", str(tmp_path / "text.jsonl")]) == 2
    assert main(["inspect", "x" * 300]) == 2
    assert not list(tmp_path.glob("*.html"))


def test_a_file_may_say_anything(tmp_path: Path) -> None:
    """Values of other types and sizes, and hostile text in every place that takes one, stay data."""
    payloads = hostile_payloads()
    odd: list[Any] = [payloads[0], None, True, 10**400, -1, [1], {"a": 1}, 1e308, 2**70]
    rows: list[Any] = [exported()]
    rows += [exported(**{name: odd}) for name in exported() if isinstance(exported()[name], list)]
    rows += [exported(step=step, env_name=payloads[1]) for step in odd]
    rows += [exported(token_ids=payloads[i : i + 9]) for i in range(0, len(payloads) - 9, 9)]
    page = inspect_file(write_lines(tmp_path / "rank_0.jsonl", rows))
    text = page.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "onerror=alert(1)>" not in text and len(text) < 3_000_000
    assert text.count("<script>") == 1 + len(SCRIPTS)  # uPlot and the page's own
    texts = [text.encode("utf-8", "replace").decode() for text in payloads]
    table = {"prompt": texts, "completion": texts, texts[2]: [1.0] * len(texts)}
    pandas.DataFrame(table).to_parquet(tmp_path / "c.parquet")
    page = inspect_file(tmp_path / "c.parquet")
    text = page.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "onerror=alert(1)>" not in text and len(text) < 3_000_000
    assert len(data_of(page, "completions-data")["rows"]) == len(payloads)


def test_long_files_are_cut(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rank_0.jsonl", [exported(tokens=300) for _ in range(60)])
    data = data_of(inspect_file(path), "inspector-data")
    assert 30 < len(data["completions"]) < 60
    assert sum(len(c["token"]) for c in data["completions"]) <= MAX_TOKENS


def test_a_tokenizer_gives_the_text(tmp_path: Path) -> None:
    from kalman_rl.engine.models.tiny import character_tokenizer

    character_tokenizer().save_pretrained(tmp_path / "tokenizer")
    ids = character_tokenizer()("1234567", add_special_tokens=False)["input_ids"]
    row = exported(prompt=3, tokens=len(ids) - 3, token_ids=ids)
    path = write_lines(tmp_path / "rank_0.jsonl", [row])
    shown = data_of(inspect_file(path, tokenizer=str(tmp_path / "tokenizer")), "inspector-data")[
        "completions"
    ][0]
    assert (shown["prompt"], "".join(shown["token"])) == ("123", "4567")
    assert "the text of tokens" not in (tmp_path / "rank_0.html").read_text().split("</header>")[0]
    with pytest.raises(RunError, match="tokenizer: got"):
        inspect_file(path, tokenizer=str(tmp_path / "nothing"))
