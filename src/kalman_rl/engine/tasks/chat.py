"""Whether prompts go through the model's chat template.

An instruction-tuned model that gets an instruction as plain text often ends its reply at once: every reward is 0.
A text that asks to be continued, such as ``5 * 9 =``, is no instruction; through a template it is answered in
sentences. So both kinds are told apart, and what was chosen is said.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from kalman_rl.engine.tasks.task import Prompt, Task, plain_prompt
from kalman_rl.errors import ConfigError, quote

OPEN_ENDS = tuple("=:>([{,|")
"""Last signs of a text that asks to be continued."""
SWITCH = "chat = 'never' gives them as they are"


@dataclasses.dataclass(frozen=True)
class AsChat:
    """A prompt as messages: a text becomes the user's, and ``system`` goes first where the row has none of its own."""

    system: str | None = None

    def __call__(self, prompt: Prompt) -> Prompt:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else plain_prompt(prompt)
        assert isinstance(messages, list)
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]


def put_to_model(
    task: Task,
    tokenizer: Any,
    chat: Literal["auto", "always", "never"],
    system: str | None = None,
    *,
    own_rows: bool,
) -> tuple[Task, str]:
    """The task with its ``ask``, and a sentence on what was chosen; "" where there was nothing to choose.

    Args:
        tokenizer: of the model.
        chat: auto puts messages through the template, and texts of ``own_rows`` unless most of them are open.
        system: message of the system in front of each chat.
        own_rows: the rows are the user's; those of built-in tasks are to be continued.

    Raises: ConfigError for messages that may not or cannot go through a template, ``always`` without a template, and
        ``system`` without a chat.
    """
    messages = isinstance(task.train[0]["prompt"], list)
    template = getattr(tokenizer, "chat_template", None) is not None
    if chat == "never" and messages:
        raise ConfigError(
            f"chat: got 'never', but the prompts of {quote(task.name)} are lists of messages, expected auto or always; "
            "or write the prompts as texts"
        )
    if chat == "always" and not template:
        raise ConfigError(
            "chat: got 'always' with a model that has no chat template, expected auto or never; or choose an "
            "instruction-tuned model"
        )
    count = 0 if messages else sum(is_open(row["prompt"]) for row in task.train)
    instructions = own_rows and 2 * count <= len(task.train)
    if messages or chat == "always" or (chat == "auto" and template and instructions):
        known = messages or chat == "always"
        said = "chat: prompts go through the model's chat template"
        return dataclasses.replace(task, ask=AsChat(system)), said if known else f"{said}; {SWITCH}"
    if chat == "never":
        why = "chat is 'never'"
    elif not template:
        why = "the model has no chat template"
    else:
        why = f"{count} of {len(task.train)} ask to be continued, as they end in = : > or the like"
    if system is not None:
        raise ConfigError(
            f"system: got a message, but prompts are given to the model as they are ({why}), expected none; set "
            "chat = 'always' with a model that has a chat template, or leave system out"
        )
    return task, f"chat: prompts are given to the model as they are: {why}" if own_rows else ""


def is_open(prompt: str) -> bool:
    """Whether a text asks to be continued.

    >>> [is_open(text) for text in ("5 * 9 =", "Q: What is 5 * 9?\\nA: ", "What is 5 * 9?", "Name a colour")]
    [True, True, False, False]
    """
    return prompt.rstrip().endswith(OPEN_ENDS)
