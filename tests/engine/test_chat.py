"""Prompts and the chat template: what is chosen, what the model is asked, and that the reward sees the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
import pyarrow.parquet as parquet

from kalman_rl.engine.evaluation import prompt_tokens
from kalman_rl.engine.models.tiny import character_tokenizer
from kalman_rl.engine.runs.reading import read_metrics
from kalman_rl.engine.tasks import Task
from kalman_rl.engine.tasks.chat import AsChat, put_to_model
from kalman_rl.errors import ConfigError
from tests.engine.test_scoring import write
from tests.engine.test_train import start

INSTRUCTIONS = ["Name a colour", "What is 5 * 9?", "Say a number."]
OPEN = ["5 * 9 =", "Q: 5 * 9?\nA: ", "sort 312>"]
MESSAGES = [[{"role": "user", "content": text}] for text in INSTRUCTIONS]


def asked(
    prompts: list[Any], *, template: bool = True, chat: Any = "auto", system: str | None = None, **more: Any
) -> Any:
    """What the model is asked for each prompt, and what is said of it."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{{ messages }}" if template else None
    rows = [{"prompt": prompt, "prompt_id": str(i)} for i, prompt in enumerate(prompts)]
    task = Task("mine", rows, [], lambda completions, **_: [0.0] * len(completions), 4)
    task, said = put_to_model(task, tokenizer, chat, system, **{"own_rows": True} | more)
    return [task.ask(prompt) for prompt in prompts], said


def test_instructions_go_through_the_template_and_open_texts_do_not() -> None:
    found, said = asked(INSTRUCTIONS)
    assert found == MESSAGES and "chat template" in said and "never" in said
    found, said = asked(OPEN)
    assert found == OPEN and "as they are: 3 of 3 ask to be continued" in said
    assert asked(OPEN[:1] + INSTRUCTIONS)[0] == [[{"role": "user", "content": OPEN[0]}], *MESSAGES]
    found, said = asked(INSTRUCTIONS, template=False)
    assert found == INSTRUCTIONS and "the model has no chat template" in said
    assert asked(INSTRUCTIONS, own_rows=False) == (INSTRUCTIONS, "")


def test_always_and_never() -> None:
    assert asked(OPEN, chat="always")[0] == [[{"role": "user", "content": text}] for text in OPEN]
    assert asked(INSTRUCTIONS, chat="never")[0] == INSTRUCTIONS
    assert asked(MESSAGES, chat="always")[0] == asked(MESSAGES)[0] == MESSAGES


def test_a_system_message_goes_first_where_there_is_none() -> None:
    own = [{"role": "system", "content": "mine"}, *MESSAGES[0]]
    found, _ = asked([MESSAGES[0], own], system="Be brief.")
    assert found == [[{"role": "system", "content": "Be brief."}, *MESSAGES[0]], own]
    assert AsChat("Be brief.")("hello")[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("prompts", "more", "message"),
    [
        (MESSAGES, {"chat": "never"}, "^chat: got 'never', but the prompts of 'mine' are lists of messages"),
        (
            OPEN,
            {"chat": "always", "template": False},
            "^chat: got 'always' with a model that has no chat template",
        ),
        (OPEN, {"system": "Be brief."}, "^system: got a message, but .*3 of 3 ask to be continued"),
        (OPEN, {"system": "Be brief.", "chat": "never"}, "^system: .*chat is 'never'"),
        (INSTRUCTIONS, {"system": "x", "template": False}, "^system: .*no chat template"),
    ],
)
def test_what_cannot_be_asked_is_refused(prompts: list[Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(prompts, **more)


def test_texts_are_asked_as_chats_and_scored_as_texts(
    chat_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts_only.py").write_text(
        "def score(completions, prompts, **columns):\n"
        "    assert all(prompt.startswith('add ') for prompt in prompts)\n"
        "    return [float(isinstance(text, str)) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = write(tmp_path / "own.jsonl", [{"prompt": f"add {i}"} for i in range(10)])
    path = tmp_path / "run"
    more = {"advantage": "tracked", "measure_prior": 1, "system": "1", "reward": ("texts_only:score",)}
    _, code = start(chat_model, path, data=data, steps=2, **more)
    assert code == 0
    rows = read_metrics(path)
    measured = ("prior/reward", "eval/sampled_reward", "eval/sampled_accuracy", "reward")
    assert all(row[name] == 1.0 for row in rows for name in measured if name in row)
    assert {row["kind"] for row in rows} == {"prior", "eval", "train"}
    table = parquet.read_table(next((path / "traces").glob("*.parquet")))
    assert table["prompt"][0].as_py().startswith("system: 1\nuser: add ")


def test_the_model_is_asked_what_the_template_makes(chat_model: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    (tokens,) = prompt_tokens(tokenizer, [AsChat("1")("2 +")])
    assert tokenizer.decode(tokens) == "12 +>"
