"""The reward sees the row of the file, bit for bit, in training, evaluation and the doctor; prompts may be chats."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
import pyarrow.parquet as parquet

from kalman_rl.engine.evaluation import prompt_tokens
from kalman_rl.engine.models.tiny import character_tokenizer
from kalman_rl.engine.tasks import by_row, from_verl, rows, score_replies, trainer_rows
from kalman_rl.errors import ConfigError
from kalman_rl.instruments.doctor import PlannedRun, reward
from tests.engine.conftest import TEMPLATE
from tests.engine.test_train import start

BIG = 10**25
OWN: list[dict[str, Any]] = [
    {
        "prompt": f"{i}>",
        "prompt_id": i,
        "want": {"low": 7} if i % 2 else {"high": 7.0, "parts": [1, 1.0]},
        "mixed": i if i % 2 else str(i),
        "count": BIG + i,
        "half": None if i % 4 == 3 else i / 2 if i % 2 else i,
        "split": "test" if i >= 8 else "train",
    }
    for i in range(10)
]
EXACT = [{name: value for name, value in row.items() if name not in ("prompt", "split")} for row in OWN]
RECORDING = """
import copy
import pickle
def record(completions, prompts, completion_ids, trainer_state, log_extra, log_metric, **columns):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    with open("calls.pickle", "ab") as file:
        for place, prompt in enumerate(prompts):
            seen = copy.deepcopy({name: column[place] for name, column in columns.items()})
            pickle.dump((trainer_state is not None, prompt, seen), file)
    for column in columns.values():
        for value in column:
            if isinstance(value, dict):
                value.clear()  # its own business: nobody else's row changes
    assert len(completion_ids) == len(texts)
    return [float(len(text) % 2) for text in texts]
"""


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with a reward that notes what it is called with."""
    (tmp_path / "recording.py").write_text(RECORDING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def calls() -> list[tuple[bool, Any, dict[str, Any]]]:
    """What the reward in the current directory was called with, in whatever process."""
    found = []
    with open("calls.pickle", "rb") as file, contextlib.suppress(EOFError):
        while True:
            found.append(pickle.load(file))
    return found


def check_exact(seen: dict[str, Any]) -> None:
    """Equal, and of equal types all the way down, which == alone would not say of 7 and 7.0."""
    known = {name: value for name, value in seen.items() if name != "answer"}  # added where the file has none
    assert repr(known) == repr(EXACT[known["prompt_id"]])


@pytest.mark.parametrize("tracked", [False, True])
def test_training_and_evaluation_see_the_rows_of_the_file(
    tracked: bool, model_path: str, recording: Path
) -> None:
    more = {"advantage": "tracked", "allocation": "rounds", "completions_max": 8} if tracked else {}
    data = write(recording / "own.jsonl", OWN)
    _, code = start(model_path, recording / "run", data=data, reward=("recording:record",), steps=2, **more)
    assert code == 0
    trained = {seen["prompt_id"] for training, _, seen in calls() if training}
    evaluated = {seen["prompt_id"] for training, _, seen in calls() if not training}
    assert len(trained) >= 4 and max(trained) < 8 and evaluated == {8, 9}
    for _, prompt, seen in calls():
        assert prompt == OWN[seen["prompt_id"]]["prompt"]
        check_exact(seen)


def test_the_doctor_sees_the_rows_of_the_file(recording: Path) -> None:
    data = write(recording / "own.jsonl", OWN)
    found = list(reward.dry_run(PlannedRun(data=data, reward=("recording:record",))))
    assert not [f for f in found if f.status == "problem"], found
    assert len(calls()) == 6
    for _, _, seen in calls():
        check_exact(seen)


def test_a_dataset_holds_only_what_no_table_can_change() -> None:
    assert trainer_rows(OWN) == [{"prompt": f"{i}>", "prompt_id": str(i)} for i in range(10)]
    found: list[Any] = []
    scored = by_row(lambda completions, want, **_: found.extend(want) or [0.0] * len(completions), OWN)
    assert scored(["a", "b"], prompt_id=["1", "1"], prompts=["filled", "in"]) == [0.0, 0.0]
    assert found == [{"low": 7}] * 2 and found[0] is not found[1]


# ---- chats


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "1"}, {"role": "user", "content": text}]


def test_chats_go_through_the_models_template(chat_model: str, recording: Path) -> None:
    lines = [row | {"prompt": chat(str(row["prompt_id"]))} for row in OWN]
    data = write(recording / "own.jsonl", lines)
    path = recording / "run"
    _, code = start(chat_model, path, data=data, reward=("recording:record",), steps=2)
    assert code == 0
    kinds = {training for training, _, _ in calls()}
    assert kinds == {True, False}
    for _, prompt, seen in calls():
        assert prompt == chat(str(seen["prompt_id"]))
        check_exact(seen)
    before = len(calls())
    assert not [
        f
        for f in reward.dry_run(PlannedRun(data=data, reward=("recording:record",)))
        if f.status == "problem"
    ]
    assert all(prompt == chat(str(seen["prompt_id"])) for _, prompt, seen in calls()[before:])

    traced = parquet.read_table(sorted((path / "traces").glob("*.parquet"))[0]).to_pylist()
    assert all(row["prompt"].startswith("system: 1\nuser: ") for row in traced)


def test_evaluation_asks_what_training_asks(chat_model: str) -> None:
    spoken = character_tokenizer()
    spoken.chat_template = TEMPLATE
    assert prompt_tokens(spoken, [chat("23"), chat("4")]) == [
        spoken("123>")["input_ids"],
        spoken("14>")["input_ids"],
    ]
    assert prompt_tokens(spoken, ["123>"]) == [spoken("123>")["input_ids"]]


def test_rewards_get_chats_as_the_trainer_gives_them(tmp_path: Path) -> None:
    task = rows(write(tmp_path / "x.jsonl", [{"prompt": chat(str(i)), "answer": i} for i in range(10)]))
    assert len(task.train) == 9
    replies = [f" {row['answer']} \nmore" for row in task.train]
    assert score_replies(task.reward, task.train, replies, [[]] * 9) == [1.0] * 9

    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> float:
        return float(solution_str == ground_truth)

    verl = [{"prompt": chat("2"), "prompt_id": "a", "reward_model": {"style": "rule", "ground_truth": "4"}}]
    assert score_replies(from_verl(compute_score), verl, ["4"], [[]]) == [1.0]


def test_a_model_without_a_template_is_named(model_path: str, tmp_path: Path) -> None:
    data = write(tmp_path / "x.jsonl", [{"prompt": chat(str(i)), "answer": i} for i in range(20)])
    for model in (model_path, "tiny"):
        with pytest.raises(ConfigError, match="has no chat template"):
            start(model, tmp_path / f"run-{len(model)}", data=data)
