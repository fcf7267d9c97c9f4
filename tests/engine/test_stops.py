"""Stop texts of several characters: generation ends at them, and completions are cut there, not at the padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("trl")
import pyarrow.parquet as parquet

from kalman_rl.engine.evaluation import generate
from kalman_rl.engine.models.load import load_model
from kalman_rl.engine.models.stops import StopTexts
from kalman_rl.engine.models.tiny import character_tokenizer
from kalman_rl.engine.runs.reading import read_metrics
from kalman_rl.engine.tasks import load_task
from tests.engine.test_train import start


def test_a_reply_is_cut_at_the_token_that_completes_a_stop() -> None:
    tokenizer = character_tokenizer()
    stops = StopTexts(("ab", "xyz"), tokenizer)
    for text, kept in {"12ab3ab": "12ab", "xyxyzab": "xyxyz", "a b": "a b", "": ""}.items():
        assert tokenizer.decode(stops.cut(tokenizer(text)["input_ids"])) == kept
    long = "12" * 40
    assert tokenizer.decode(stops.cut(tokenizer(f"{long}ab{long}")["input_ids"])) == f"{long}ab"


def test_generation_ends_there_and_prompts_do_not_count(model_path: str, tmp_path: Path) -> None:
    task = load_task("sort12", train_size=1, test_size=1)
    free = load_model(model_path, cache=tmp_path, dtype="float32")
    (text,), _ = generate(free.model, free.tokenizer, ["12>"], max_completion_tokens=12, temperature=None)
    assert len(text) == 12
    stop = text[4:6]
    loaded = load_model(model_path, cache=tmp_path, dtype="float32", task=replace(task, stop=(stop,)))
    assert loaded.stop_token_ids == [] and loaded.stop_texts is not None
    calls: list[int] = []
    loaded.model.register_forward_hook(lambda *_: calls.append(1))
    ended = text[: text.index(stop) + 2]
    found, _ = generate(
        loaded.model, loaded.tokenizer, ["12>", f"{stop}>"], max_completion_tokens=12, temperature=None,
        stops=loaded.stop_texts,
    )  # fmt: skip
    assert found[0] == ended and found[1] and len(calls) <= 12


def test_training_cuts_completions_and_counts_them_as_ended(model_path: str, tmp_path: Path) -> None:
    """Every pair of digits is a stop, so most completions end early; what is trained on has none behind it."""
    pairs = tuple(f"{a}{b}" for a in "0123456789abcdefghijklmnopqrstuvwxyz" for b in "0123456789")
    path = tmp_path / "run"
    _, code = start(model_path, path, stop=pairs, steps=2, max_completion_tokens=16, traces_per_step=16)
    assert code == 0
    table = parquet.read_table(sorted((path / "traces").glob("*.parquet"))[0]).to_pylist()
    texts = {row["sequence"]: row["completion"] for row in table}
    held = {n: [text.find(pair) for pair in pairs if pair in text] for n, text in texts.items()}
    assert sum(map(bool, held.values())) > 2
    for n, found in held.items():
        assert not found or found == [len(texts[n]) - 2]
    first = next(row for row in read_metrics(path) if "completions/clipped_ratio" in row)
    assert first["completions/clipped_ratio"] < 1 and first["completions/mean_terminated_length"] > 0
