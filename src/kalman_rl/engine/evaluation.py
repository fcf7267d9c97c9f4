"""Held-out evaluation: greedy and sampled accuracy, without touching the training's random stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from kalman_rl.engine.models.stops import StopTexts
from kalman_rl.engine.tasks import Prompt, Task, WeightedReward, parts_of, plain_prompt, score_replies

Ask = Callable[[Prompt], Prompt]


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    reward: Callable[..., list[float | None]],
    *,
    max_completion_tokens: int,
    temperature: float = 1.0,
    samples: int = 1,
    batch_size: int = 128,
    seed: int = 0,
    ask: Ask = plain_prompt,
    stops: StopTexts | None = None,
) -> dict[str, float]:
    """Score one greedy reply and ``samples`` sampled replies per row.

    Args:
        model: a causal language model of transformers; its mode and torch's random state stay as they were.
        tokenizer: of the model.
        rows: held-out rows of a task.
        reward: TRL's signature; a reply is correct when its reward is 1 (missing rewards count as 0). Of a weighted
            sum the first function decides.
        max_completion_tokens: longest reply, in tokens.
        temperature: > 0, of the sampled replies.
        samples: sampled replies per row.
        batch_size: replies generated at a time.
        seed: of the sampled replies, the same at every evaluation, so that changes come from the policy.
        ask: how the model is asked. stops: longer texts that end a reply.

    Returns: ``eval/{greedy,sampled}_{accuracy,reward}`` in [0, 1] or reward units, ``eval/count`` (rows),
        ``eval/samples`` (sampled replies per row), and of several rewards each one's mean over sampled replies,
        ``eval/rewards/NAME``.
    """
    result = {"eval/count": float(len(rows)), "eval/samples": float(samples)}
    parts = parts_of(reward)
    total = WeightedReward(parts).total
    for kind, sampled in (("greedy", False), ("sampled", True)):
        found = scores_of(
            model,
            tokenizer,
            list(rows) * (samples if sampled else 1),
            WeightedReward(parts).each,
            max_completion_tokens=max_completion_tokens,
            temperature=temperature if sampled else None,
            batch_size=batch_size,
            seed=seed,
            ask=ask,
            stops=stops,
        )
        count = max(len(found), 1)
        result[f"eval/{kind}_accuracy"] = sum(Task.correct(scores[0]) for scores in found) / count
        result[f"eval/{kind}_reward"] = sum(total(scores) or 0.0 for scores in found) / count
        if sampled and len(parts) > 1:
            for place, part in enumerate(parts):
                result[f"eval/rewards/{part.name}"] = sum(scores[place] or 0.0 for scores in found) / count
    return result


def scores_of(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    reward: Callable[..., list[Any]],
    *,
    max_completion_tokens: int,
    temperature: float | None,
    batch_size: int = 128,
    seed: int = 0,
    ask: Ask = plain_prompt,
    stops: StopTexts | None = None,
) -> list[Any]:
    """What ``reward`` says of one reply to each row; arguments as of :func:`evaluate`."""
    scores: list[Any] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        with torch.random.fork_rng():
            torch.manual_seed(seed + start)
            replies = generate(
                model,
                tokenizer,
                [ask(row["prompt"]) for row in batch],
                max_completion_tokens=max_completion_tokens,
                temperature=temperature,
                stops=stops,
            )
            scores += score_replies(reward, batch, *replies)
    return scores


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_completion_tokens: int,
    temperature: float | None,
    stops: StopTexts | None = None,
) -> tuple[list[str], list[list[int]]]:
    """Replies to prompts as texts and as tokens, cut where they end; ``temperature=None`` is greedy."""
    tokens = {"input_ids": prompt_tokens(tokenizer, prompts)}
    encoded = tokenizer.pad(tokens, return_tensors="pt", padding_side="left").to(model.device)
    config = GenerationConfig(
        max_new_tokens=max_completion_tokens,
        do_sample=temperature is not None,
        temperature=temperature,
        top_k=0 if temperature is not None else None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id,
    )
    was_training = model.training
    model.eval()
    try:
        output = model.generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], generation_config=config
        )
    finally:
        model.train(was_training)
    replies = output[:, encoded["input_ids"].shape[1] :].tolist()
    ends = set(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])
    cut = [reply[: _length(reply, ends)] for reply in replies]
    if stops is not None:
        cut = [stops.cut(reply) for reply in cut]
    return [str(text) for text in tokenizer.batch_decode(cut, skip_special_tokens=True)], cut


def _length(reply: list[int], ends: set[int | None]) -> int:
    """Tokens up to and with the first that ends a reply; what follows is padding."""
    return next((place for place, token in enumerate(reply, start=1) if token in ends), len(reply))


def prompt_tokens(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts as TRL's trainer makes them: chats go through the model's template."""
    if isinstance(prompts[0], str):
        encoded = tokenizer(list(prompts))
    else:
        encoded = tokenizer.apply_chat_template(
            [plain_prompt(prompt) for prompt in prompts],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
    tokens: list[list[int]] = encoded["input_ids"]
    return tokens
