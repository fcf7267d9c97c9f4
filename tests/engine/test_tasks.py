"""Tasks: exact splits, the host library's scorer, users' rows and users' reward functions."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalman_rl.engine.tasks import TASKS, Task, from_verl, guard_reward, load_reward, load_task, rows
from kalman_rl.engine.tasks.gym import GYM
from kalman_rl.engine.tasks.task import held_out
from kalman_rl.errors import AdapterError, ConfigError, RewardError


def score(task: Task, replies: list[str], data: list[dict[str, Any]]) -> list[float | None]:
    """Rewards as TRL asks for them: columns as lists, and arguments of its own."""
    columns = {name: [row[name] for row in data] for name in data[0]}
    prompts = columns.pop("prompt")
    extra = {
        "completion_ids": [[]] * len(data),
        "trainer_state": None,
        "log_metric": print,
        "log_extra": print,
    }
    return task.reward(completions=replies, prompts=prompts, **columns, **extra)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: load_task(name) for name in TASKS}


def reply(task: Task, row: dict[str, Any]) -> str:
    """A perfect reply as a tokenizer decodes it, and more text behind it where a stop text ends it."""
    return task.target(row) + ("99 is more" if task.stop else "")


@pytest.mark.parametrize("name", TASKS)
def test_perfect_replies_are_correct_and_others_are_not(tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]
    sample = task.test[:20]
    assert all(task.correct(reward) for reward in score(task, [reply(task, row) for row in sample], sample))
    for wrong in ("", " \n", " no idea\n", "\n" + task.target(sample[0])):
        assert not any(task.correct(reward) for reward in score(task, [wrong] * len(sample), sample))


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_distinct_and_reproducible(tasks: dict[str, Task], name: str) -> None:
    task, again, other = tasks[name], load_task(name), load_task(name, seed=1)
    assert task.train == again.train and task.test == again.test
    assert task.train != other.train
    prompts = [row["prompt"] for row in [*task.train, *task.test]]
    ids = [row["prompt_id"] for row in [*task.train, *task.test]]
    assert len(set(prompts)) == len(prompts) and len(set(ids)) == len(ids)
    # No seed trains on what another seed tests.
    assert not {row["prompt"] for row in task.test} & {row["prompt"] for row in other.train}
    shared = {row["prompt"]: row["prompt_id"] for row in other.train}
    assert all(shared.get(row["prompt"], row["prompt_id"]) == row["prompt_id"] for row in task.train)


def test_products_have_the_published_form_and_no_twin_across_the_split(tasks: dict[str, Task]) -> None:
    task = tasks["products"]

    def pair(row: dict[str, Any]) -> frozenset[str]:
        question = row["prompt"].rpartition("\n")[2]
        return frozenset(re.fullmatch(r"(\d) \* (\d) =", question).groups())  # type: ignore[union-attr]

    assert all(row["prompt"].startswith("5 * 9 = 45\n1 * 6 = 6\n") for row in task.train + task.test)
    train, test = {pair(row) for row in task.train}, {pair(row) for row in task.test}
    shots = {frozenset("59"), frozenset("16")}
    assert not train & test and not shots & (train | test)
    # All 100 products are used: 40 tested, 56 trained, 4 in the two shots and their twins.
    assert (len(task.train), len(task.test), len(train), len(test)) == (56, 40, 31, 22)
    easy = {side: sum(bool(pair & set("01")) for pair in pairs) for side, pairs in ((0, train), (1, test))}
    assert easy[1] == 8 and easy[0] == 10  # of 19; one is a shot


@pytest.mark.parametrize(
    "name", ["chain_sum", "chain_sum_2x2", "chain_sum_3", "gcd", "leg_counting", "word_sorting"]
)
def test_reordered_questions_stay_on_one_side(tasks: dict[str, Task], name: str) -> None:
    spec, task = GYM[name], tasks[name]
    sides = [
        {spec.twin(row["prompt"].rpartition("\n")[2].removesuffix(" =")) for row in side}
        for side in (task.train, task.test)
    ]
    assert not sides[0] & sides[1]
    assert not {spec.twin(question) for question, _ in spec.shots} & (sides[0] | sides[1])


def test_twins_are_twins() -> None:
    assert (
        GYM["chain_sum"].twin("3 + 5 - 2")
        == GYM["chain_sum"].twin("5 - 2 + 3")
        != GYM["chain_sum"].twin("2 - 5")
    )
    assert GYM["leg_counting"].twin("legs of 2 ants, 1 cow") == GYM["leg_counting"].twin(
        "legs of 1 cow, 2 ants"
    )
    assert GYM["word_sorting"].twin("ascending: a b") == GYM["word_sorting"].twin("descending: b a")


@pytest.mark.parametrize("name", ["products", "chain_sum", "chain_sum_2x2", "chain_sum_3"])
def test_worked_examples_are_right(name: str) -> None:
    for question, answer in GYM[name].shots:
        assert eval(question) == int(answer)


@pytest.mark.parametrize("digits", [12, 16])
def test_sorting(digits: int) -> None:
    task = load_task(f"sort{digits}", train_size=5, test_size=3)
    assert (len(task.train), len(task.test), task.max_completion_tokens, task.stop) == (
        5,
        3,
        digits + 1,
        (),
    )
    assert task.fresh is not None
    tested = {row["prompt"] for row in load_task(f"sort{digits}", seed=3, test_size=64).test}
    for row in [*task.train, *task.test, *task.fresh(500, 7)]:
        assert re.fullmatch(rf"\d{{{digits}}}>", row["prompt"])
        assert row["answer"] == "".join(sorted(row["prompt"][:-1]))
    assert not tested & {row["prompt"] for row in task.fresh(500, 7)}
    row = task.test[0]
    near = [row["answer"], row["answer"] + "9", " " + row["answer"], row["answer"][:-1], row["answer"] + "\n"]
    assert score(task, near, [row] * len(near)) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_spread_pool_asks_all_lengths_and_its_warm_start_knows_short_ones() -> None:
    task = load_task("sort_spread", train_size=1024, test_size=64)
    assert task.fresh is not None
    lengths = [len(row["answer"]) for row in task.train]
    assert set(lengths) == set(range(4, 15)) and min(map(lengths.count, range(4, 15))) > 1024 / 11 / 2
    warm = [len(row["answer"]) for row in task.fresh(4096, 7)]
    assert (
        sum(digits <= 7 for digits in warm) > 0.95 * 4096
        and 0 < sum(digits == 8 for digits in warm) < 0.05 * 4096
    )
    assert all(row["answer"] == "".join(sorted(row["prompt"][:-1])) for row in task.train + task.test)


def test_sizes_are_checked() -> None:
    assert len(load_task("products", train_size=7, test_size=3).train) == 7
    with pytest.raises(ConfigError, match="train_size: got 57, expected 1 to 56"):
        load_task("products", train_size=57)
    for name in ("products", "sort12"):
        with pytest.raises(ConfigError, match="test_size: got -1"):
            load_task(name, test_size=-1)
    with pytest.raises(ConfigError, match=r"task: got 'product'.*did you mean 'products'"):
        load_task("product")


def test_missing_reasoning_gym_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(AdapterError, match="pip install reasoning-gym"):
        load_task("products")


@given(st.floats(0, 1))
def test_held_out_share_is_met(share: float) -> None:
    kept = sum(held_out(str(key), share) for key in range(400)) / 400
    assert abs(kept - share) < 0.12
    assert not held_out("x", 0.0) and held_out("x", 1.0)


# --- the user's own rows


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_rows_from_json_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl", [{"prompt": f"{i}?", "answer": i, "level": i % 3} for i in range(20)] + [""]
    )
    task = rows(path)
    assert (task.name, len(task.train), len(task.test), task.stop) == ("mine", 18, 2, ("\n",))
    assert all(set(row) == {"prompt", "answer", "level", "prompt_id"} for row in task.train)
    assert score(task, [" 7 \nand so on", "7.0", "17", ""], [{**task.train[0], "answer": "7"}] * 4) == [
        1,
        0,
        0,
        0,
    ]
    write(path, [{"prompt": f"{i}?", "answer": i, "level": i % 3} for i in reversed(range(20))])
    assert {row["prompt_id"] for row in rows(path).test} == {row["prompt_id"] for row in task.test}


def test_rows_from_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"prompt": ["a", "b"], "answer": ["1", "2"], "split": ["train", "test"]})
    parquet.write_table(table, tmp_path / "mine.parquet")
    task = rows(tmp_path / "mine.parquet")
    assert [row["prompt"] for row in task.train] == ["a"] and [row["answer"] for row in task.test] == ["2"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match=r"Parquet cannot read.*bad.parquet"):
        rows(tmp_path / "bad.parquet")


def test_rows_from_csv(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    text = '\ufeffprompt,answer,hint\r\n"What is 1, 2?",007,\r\n\r\n"two\nlines",1,[2]\r\n'
    path.write_bytes(text.encode())
    task = rows(path, test_share=0)
    assert [(row["prompt"], row["answer"], row["hint"]) for row in task.train] == [
        ("What is 1, 2?", "007", None),
        ("two\nlines", "1", "[2]"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,answer\na,1\nb,2,3\n", r"rows: got 3 cells, expected 2, .*mine\.csv:3"),
        (
            "prompt,prompt\na,1\n",
            r"got the header 'prompt, prompt', expected one name .* each once.*mine\.csv:1",
        ),
        ("prompt,\na,1\n", r"got the header 'prompt, ', expected one name for each column"),
        ('prompt,answer\n"a"b,1\n', r"invalid CSV .*mine\.csv"),
        ("prompt,answer\n,1\n", r"prompt: got None.*mine\.csv:2"),
        ("prompt,answer\n", "empty file"),
        ("", "empty file"),
        (b"prompt,answer\n\xe9,1\n", r"not UTF-8 .*mine\.csv"),
    ],
)
def test_bad_csv_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / "mine.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=message):
        rows(tmp_path / "mine.csv")


def test_rows_pass_every_column_to_the_users_reward(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl", [{"prompt": "a", "want": [1]}, {"prompt": "b", "want": [2], "hint": "h"}]
    )
    task = rows(path, reward=lambda completions, want, hint, **_: [float(w[0]) for w in want], test_share=0)
    assert score(task, ["", ""], task.train) == [1.0, 2.0]
    assert task.stop == () and task.test == [] and "no test rows" in task.notes[0]


def test_one_prompt_with_two_answers_is_two_prompts(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "answer": answer, "split": "train"} for answer in "12"]
    task = rows(write(tmp_path / "x.jsonl", lines))
    assert [row["answer"] for row in task.train] == ["1", "2"]
    assert len({row["prompt_id"] for row in task.train}) == 2


def test_repeated_rows_are_merged_and_leaks_dropped(tmp_path: Path) -> None:
    row = {"prompt": "a", "answer": "1"}
    task = rows(write(tmp_path / "x.jsonl", [row, row, {"prompt": "b", "answer": "2"}]))
    assert len(task.train) + len(task.test) == 2 and task.notes == ("1 repeated rows were dropped",)
    split = [
        {**row, "split": "train"},
        {**row, "split": "test", "n": 1},
        {"prompt": "c", "answer": "3", "split": "train"},
    ]
    task = rows(write(tmp_path / "y.jsonl", split))
    assert [row["prompt"] for row in task.train] == ["c"] and "also in the test split" in task.notes[0]


BAD_ROWS: dict[str, tuple[list[Any], str]] = {
    "empty": ([], "empty file"),
    "blank": (["", " "], "empty file"),
    "broken": (['{"prompt": "a", "answer": "b"}', '{"prompt": '], r"invalid JSON .*x\.jsonl:2"),
    "list": (["[1, 2]"], r"got a list, expected an object.*x\.jsonl:1"),
    "no prompt": ([{"question": "a"}], "prompt: got only the columns question"),
    "prompt missing once": (
        [{"prompt": "a", "answer": "1"}, {"answer": "2"}],
        r"prompt: got None.*x\.jsonl:2",
    ),
    "prompt is a chat": ([{"prompt": [{"role": "user"}], "answer": "1"}], "expected a text"),
    "no answer": ([{"prompt": "a"}], "answer: got only the columns prompt.*--reward"),
    "answer missing once": (
        [{"prompt": "a", "answer": "1"}, {"prompt": "b"}],
        r"answer: got None.*x\.jsonl:2",
    ),
    "two lines": ([{"prompt": "a", "answer": "1\n2"}], "expected one line"),
    "reserved": ([{"prompt": "a", "answer": "1", "prompts": 1}], "names the trainer itself uses"),
    "self": ([{"prompt": "a", "answer": "1", "self": 1}], "names the trainer itself uses"),
    "same id": (
        [{"prompt": p, "answer": "1", "prompt_id": 4} for p in "ab"],
        "'4' for two different rows.*:2 and .*:1 differ in prompt;",
    ),
    "same id, two answers": (
        [{"prompt": "a", "answer": a, "prompt_id": "a"} for a in "12"],
        "'a' for two different rows.*:2 and .*:1 differ in answer;",
    ),
    "chat of other parts": (
        [{"prompt": [{"role": "user", "content": ["a"]}], "answer": "1"}],
        r"prompt: got the message .*x\.jsonl:1",
    ),
    "text and chat": (
        [{"prompt": p, "answer": "1"} for p in ("a", [{"role": "user", "content": "a"}])],
        r"prompt: got a list at .*:2 and a text at .*:1, expected one kind",
    ),
    "half a character": (
        [{"prompt": "a", "answer": "1"}, '{"prompt": "b", "answer": "1", "more": {"x": "\\ud83d"}}'],
        r"more: got half of a character \('\\ud83d', .*x\.jsonl:2",
    ),
    "decimal answer": (
        [{"prompt": "a", "answer": 3.0}],
        r"answer: got 3.0, expected a text or a whole number; .* write '3.0' or 3; .*:1",
    ),
    "number without end": (['{"prompt": "a", "answer": ' + "9" * 5000 + "}"], r"invalid JSON .*x\.jsonl:1"),
    "split": ([{"prompt": "a", "answer": "1", "split": "dev"}], "split: got 'dev'"),
    "nothing to train": ([{"prompt": "a", "answer": "1", "split": "test"}], "no row to train on"),
    "one prompt": ([{"prompt": "a", "answer": "1"}], "expected at least 2"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(tmp_path: Path, case: str) -> None:
    lines, message = BAD_ROWS[case]
    with pytest.raises(ConfigError, match=message):
        rows(write(tmp_path / "x.jsonl", lines))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*none\.jsonl"):
        rows(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"expected one ending in \.jsonl"):
        rows(tmp_path / "x.tsv")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "a", "answer": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"not UTF-8.*latin\.jsonl:1"):
        rows(tmp_path / "latin.jsonl")


# --- reward functions


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_load_reward_finds_a_function_in_the_current_directory(here: Path) -> None:
    (here / "my_rewards.py").write_text(
        "def length(completions, **columns): return [len(c) for c in completions]\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': float(solution_str == ground_truth)}\n"
        "number = 3\n"
    )
    assert load_reward("my_rewards:length")(["ab", ""]) == [2, 0]
    assert load_reward("my_rewards:compute_score")(["4", "5"], answer=["4", "4"]) == [1.0, 0.0]
    for name in ("my_rewards:missing", "my_rewards:number"):
        with pytest.raises(ConfigError, match="it has compute_score, length"):
            load_reward(name)


def test_load_reward_says_what_failed(here: Path) -> None:
    (here / "needy.py").write_text("import not_installed_anywhere")
    (here / "broken.py").write_text("1 / 0")
    for name in ("my_rewards", "my_rewards.py:f", "a/b:f", ":f", "m:"):
        with pytest.raises(ConfigError, match="expected module:function"):
            load_reward(name)
    with pytest.raises(ConfigError, match="found no module 'no_such_module'; expected it in"):
        load_reward("no_such_module:f")
    with pytest.raises(ConfigError, match=r"found no module 'not_installed_anywhere'.*as 'needy' imports it"):
        load_reward("needy:f")
    with pytest.raises(ConfigError, match=r"ZeroDivisionError \(division by zero\) while importing 'broken'"):
        load_reward("broken:f")


def test_from_verl_finds_the_ground_truth() -> None:
    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> float:
        assert data_source == "mine" and extra_info == {"level": 1}
        return float(solution_str == ground_truth)

    reward = from_verl(compute_score)
    columns = {"data_source": ["mine"], "extra_info": [{"level": 1}]}
    assert reward(["4"], reward_model=[{"ground_truth": "4"}], **columns) == [1.0]
    assert reward(["4"], ground_truth=["5"], prompts=["x"], **columns) == [0.0]
    assert reward.__name__ == "compute_score"  # type: ignore[attr-defined]


GOOD = {
    "numbers": ([1, 0.5, True], [1.0, 0.5, 1.0]),
    "numpy": (np.array([1, 0, 2], dtype=np.int64), [1.0, 0.0, 2.0]),
    "numpy items": ([np.float32(0.5), np.bool_(True), np.array(3)], [0.5, 1.0, 3.0]),
    "tensor": (torch.tensor([1.0, 0.0, 0.5], requires_grad=True), [1.0, 0.0, 0.5]),
    "tensor items": ([torch.tensor(1), torch.tensor(0.5), torch.tensor(True)], [1.0, 0.5, 1.0]),
    "missing": ([None, float("nan"), 1], [None, None, 1.0]),
    "all missing": ([None, float("nan"), None], [None, None, None]),
    "infinite": ([float("inf"), -float("inf"), 0], [None, None, 0.0]),
    "too big": ([10**400, 1, 2], [None, 1.0, 2.0]),
    "tuple": ((1, 2, 3), [1.0, 2.0, 3.0]),
    "generator": ((i for i in range(3)), [0.0, 1.0, 2.0]),
}


@pytest.mark.parametrize("case", GOOD)
def test_guard_casts(case: str) -> None:
    returned, expected = GOOD[case]
    guarded = guard_reward(lambda completions, **columns: returned)
    result = guarded(["a", "b", "c"], prompts=["p"] * 3)
    assert result == expected and all(type(value) in (float, type(None)) for value in result)
    assert (guarded.missing, guarded.scored) == (expected.count(None), 3 - expected.count(None))


BAD = {
    "short": ([1.0, 2.0], r"returned 2 values, expected a list of 3 numbers"),
    "text": ([1.0, "2", 3.0], r"returned '2' \(str\) for completion 1"),
    "nested": ([1.0, [2.0], 3.0], r"returned \[2.0\] \(list\) for completion 1"),
    "matrix": (np.ones((3, 1)), r"returned shape \(3, 1\)"),
    "vector items": ([torch.ones(1)] * 3, r"\(Tensor\) for completion 0"),
    "number": (1.0, "returned a float"),
    "nothing": (None, "returned a NoneType"),
    "mapping": ({"a": 1, "b": 2, "c": 3}, "returned a dict"),
    "string": ("abc", "returned a str"),
    "complex": ([1j, 1, 1], r"\(complex\) for completion 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_guard_refuses(case: str) -> None:
    def my_reward(completions: list[str], **columns: Any) -> Any:
        return BAD[case][0]

    with pytest.raises(RewardError, match=f"reward: my_reward .*{BAD[case][1]}"):
        guard_reward(my_reward)(["a", "b", "c"])


def test_guard_chains_the_users_error_and_keeps_the_name() -> None:
    def my_reward(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        raise KeyError("gold")

    guarded = guard_reward(my_reward)
    assert guarded.__name__ == "my_reward"
    with pytest.raises(
        RewardError, match="my_reward raised KeyError: 'gold'; called with 1 completions"
    ) as info:
        guarded(["a"], answer=["b"])
    assert isinstance(info.value.__cause__, KeyError)
    with pytest.raises(RewardError, match=r"TypeError.*unexpected keyword argument 'level'"):
        guard_reward(lambda completions: [1.0])(["a"], level=[1])


def test_guard_does_not_swallow_ctrl_c_and_refuses_async() -> None:
    def interrupted(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    async def later(completions: list[str]) -> list[float]:
        return [1.0]

    with pytest.raises(KeyboardInterrupt):
        guard_reward(interrupted)(["a"])
    with pytest.raises(ConfigError, match="async"):
        guard_reward(later)


def test_guard_logs_the_missing_share() -> None:
    logged: dict[str, float] = {}
    guard_reward(lambda completions, **columns: [None, 1, 1, 1])(["a"] * 4, log_metric=logged.__setitem__)
    assert logged == {"reward/missing": 0.25}
