"""The user's own questions: rows of a file that are checked, merged and split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kalman_rl.engine.tasks.files import read_rows
from kalman_rl.engine.tasks.scoring import reply_text
from kalman_rl.engine.tasks.task import (
    Prompt,
    Reward,
    Row,
    Task,
    first_line,
    make_prompt_id,
    prompt_text,
    spell,
)
from kalman_rl.errors import ConfigError, quote

# Names under which TRL passes its own arguments to a reward function, and a method its object; a column of that name
# would collide.
RESERVED = {
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
    "self",
}
SPLITS = {"train": "train", "test": "test", "validation": "test", "val": "test", "eval": "test"}


def rows(
    path: str | Path,
    *,
    reward: Reward | None = None,
    test_share: float = 0.1,
    max_completion_tokens: int = 64,
    stop: tuple[str, ...] = (),
) -> Task:
    """Task made of the rows of a ``.jsonl``, ``.parquet`` or ``.csv`` file.

    Args:
        path: file with a ``prompt`` column of texts, or of chats (lists of messages with ``role`` and
            ``content``, as in TRL's and verl's own files); optional columns are ``answer``, ``prompt_id`` (else a
            hash of the row's content) and ``split`` ("train" or "test"). All other columns are passed to the
            reward.
        reward: TRL-style reward function; when None a reply earns 1 if its first line, stripped, equals the
            stripped ``answer``, else 0.
        test_share: part of the different prompts kept aside when there is no ``split`` column, 0 to below 1.
            Which ones depends on their content, not on their order.
        max_completion_tokens: longest reply to sample, in tokens.
        stop: texts at which a reply ends; the newline when the default reward is used.

    Raises:
        ConfigError: the file is missing, empty, not UTF-8, not JSON, lacks a column, or gives one
            ``prompt_id`` to two different rows. The message names file and line.
    """
    file = Path(path).expanduser()
    if not 0 <= test_share < 1:
        raise ConfigError(f"test_share: got {test_share}, expected 0 <= share < 1; {file}")
    located = read_rows(file)
    if not located:
        raise ConfigError(
            f"rows: got an empty file, expected at least one row with a 'prompt' column; {file}"
        )
    columns = list(dict.fromkeys(name for _, row in located for name in row))
    _check_columns(columns, file, needs_answer=reward is None)
    name = file.stem
    cleaned = [(where, _clean(name, where, row, columns, reward is None)) for where, row in located]
    _check_one_kind(cleaned)
    merged, notes = _merge(cleaned)
    train, test, more = _by_column(merged) if "split" in columns else _by_share(merged, test_share, file)
    if not train:
        raise ConfigError(f"split: got no row to train on, expected some with split 'train'; {file}")
    return Task(
        name=name,
        train=train,
        test=test,
        reward=reward or first_line_reward,
        max_completion_tokens=max_completion_tokens,
        stop=("\n",) if reward is None and not stop else stop,
        notes=(*notes, *more),
    )


def first_line_reward(completions: list[Any], answer: list[str], **columns: Any) -> list[float | None]:
    """Reward 1 when the first line of the reply, stripped, equals the stripped answer, else 0.

    >>> first_line_reward([" 45\\n", "54"], answer=["45", "45"])
    [1.0, 0.0]
    """
    return [
        float(first_line(reply_text(reply)) == right.strip())
        for reply, right in zip(completions, answer, strict=True)
    ]


def _check_columns(columns: list[str], file: Path, *, needs_answer: bool) -> None:
    if "prompt" not in columns:
        raise ConfigError(
            f"prompt: got only the columns {', '.join(columns)}, expected one named 'prompt'; {file}"
        )
    if needs_answer and "answer" not in columns:
        raise ConfigError(
            f"answer: got only the columns {', '.join(columns)}, expected one named 'answer'; {file}; add "
            "it, or give your own reward with --reward module:function"
        )
    taken = RESERVED.intersection(columns)
    if taken:
        raise ConfigError(
            f"columns: got {', '.join(sorted(taken))}, names the trainer itself uses; {file}; rename"
        )


def _clean(name: str, where: str, row: Row, columns: list[str], needs_answer: bool) -> Row:
    """One row with every column, a checked prompt and answer, and a prompt_id."""
    row = {column: row.get(column) for column in columns}
    _check_prompt(row["prompt"], where)
    _check_spelling(row, where)
    answer = row.setdefault("answer", "")
    if needs_answer:
        if isinstance(answer, bool) or not isinstance(answer, str | int):
            why = "; a reply is compared with its text: write '3.0' or 3" if isinstance(answer, float) else ""
            raise ConfigError(f"answer: got {quote(answer)}, expected a text or a whole number{why}; {where}")
        row["answer"] = str(answer)
        if "\n" in row["answer"].strip() or not row["answer"].strip():
            raise ConfigError(
                f"answer: got {quote(answer)}, expected one line of text, as only the first line of a reply is "
                f"compared; {where}; shorten it, or give your own reward with --reward module:function"
            )
    content = {key: value for key, value in row.items() if key not in ("split", "prompt_id")}
    given = row.get("prompt_id")
    row["prompt_id"] = make_prompt_id(name, spell(content)) if given is None else given
    return row


def _check_prompt(prompt: Any, where: str) -> None:
    """A text, or a chat of messages that have a role and a content, both texts."""
    expected = 'expected a text that is not empty, or a list of {"role": TEXT, "content": TEXT}'
    if not prompt or not isinstance(prompt, str | list):
        raise ConfigError(f"prompt: got {quote(prompt)}, {expected}; {where}")
    for message in prompt if isinstance(prompt, list) else ():
        given = message if isinstance(message, dict) else {}
        parts = {name: part for name, part in given.items() if part is not None}  # None: a table filled it in
        if parts.keys() != {"role", "content"} or not all(isinstance(part, str) for part in parts.values()):
            raise ConfigError(f"prompt: got the message {quote(message, 200)}, {expected}; {where}")


def _check_spelling(row: Row, where: str) -> None:
    for name, value in row.items():
        try:
            spell(value).encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{name}: got half of a character ({error.object[error.start]!a}, a surrogate on its own), expected "
                f"text that UTF-8 can hold; {where}; write the character whole"
            ) from None


def _check_one_kind(located: list[tuple[str, Row]]) -> None:
    first_where, first = located[0]
    for where, row in located:
        if isinstance(row["prompt"], str) is not isinstance(first["prompt"], str):
            kinds = [("a list", "a text")[isinstance(one["prompt"], str)] for one in (row, first)]
            raise ConfigError(
                f"prompt: got {kinds[0]} at {where} and {kinds[1]} at {first_where}, expected one kind in a file: "
                "texts, or lists of messages"
            )


def _merge(located: list[tuple[str, Row]]) -> tuple[list[Row], list[str]]:
    """Drops exact repetitions; two different rows under one prompt_id are an error."""
    kept: dict[str, tuple[str, Row]] = {}
    for where, row in located:
        first_where, first = kept.setdefault(str(row["prompt_id"]), (where, row))
        differ = [column for column in row if spell(first[column]) != spell(row[column])]
        if differ:
            raise ConfigError(
                f"prompt_id: got {quote(str(row['prompt_id']))} for two different rows, expected one row per "
                "prompt_id; "
                f"{where} and {first_where} differ in {', '.join(differ)}; make the ids unique, or leave the "
                "column out"
            )
    dropped = len(located) - len(kept)
    return [row for _, row in kept.values()], [f"{dropped} repeated rows were dropped"] if dropped else []


def _by_column(merged: list[Row]) -> tuple[list[Row], list[Row], list[str]]:
    sides: dict[str, list[Row]] = {"train": [], "test": []}
    for row in merged:
        split = row.pop("split")
        if split not in SPLITS:
            raise ConfigError(
                f"split: got {quote(split)}, expected 'train' or 'test'; prompt {quote(prompt_text(row['prompt']), 60)}"
            )
        sides[SPLITS[split]].append(row)
    seen = {_key(row["prompt"]) for row in sides["test"]}
    train = [row for row in sides["train"] if _key(row["prompt"]) not in seen]
    leaked = len(sides["train"]) - len(train)
    notes = [f"{leaked} training rows were dropped: their prompt is also in the test split"] if leaked else []
    return (
        train,
        sides["test"],
        notes + ([] if sides["test"] else ["no test rows: there is nothing to evaluate on"]),
    )


def _by_share(merged: list[Row], share: float, file: Path) -> tuple[list[Row], list[Row], list[str]]:
    prompts = sorted(
        {_key(row["prompt"]) for row in merged}, key=lambda prompt: make_prompt_id("held out", prompt)
    )
    count = max(1, round(share * len(prompts))) if share else 0
    if count >= len(prompts):
        raise ConfigError(
            f"rows: got {len(prompts)} different prompts, expected at least 2 to keep one aside for testing; "
            f"{file}; add rows, or set test_share = 0"
        )
    kept = set(prompts[:count])
    train = [row for row in merged if _key(row["prompt"]) not in kept]
    test = [row for row in merged if _key(row["prompt"]) in kept]
    return train, test, [] if test else ["no test rows: there is nothing to evaluate on"]


def _key(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else spell(prompt)
