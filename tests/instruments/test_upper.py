"""The upper-half policy against transformers' own forward pass over whole texts, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kalman_rl.engine.models.tiny import character_tokenizer
from kalman_rl.errors import ConfigError
from kalman_rl.instruments.reproduce.smollm2 import LEAD, questions
from kalman_rl.instruments.reproduce.upper import UpperPolicy

LONGEST = 5
DIGITS = "0123456789"


@pytest.fixture
def policy() -> UpperPolicy:
    """Four random layers with grouped heads; the adapters are away from their start, which adds nothing."""
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    made = UpperPolicy(LlamaForCausalLM(config).eval(), tokenizer, lead=LEAD, longest=LONGEST, rank=3)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(std=0.3)
    return made


def whole(policy: UpperPolicy, ids: list[int]) -> Tensor:
    """(tokens, V) log-probabilities behind the lead and these tokens, by transformers alone."""
    lead = policy.tokenizer.encode(LEAD, add_special_tokens=False)
    logits: Tensor = policy.model(input_ids=torch.tensor([lead + ids])).logits[0, len(lead) :]
    return logits.float().log_softmax(-1)


def text(replies: Any, row: int) -> tuple[list[int], int]:
    """A reply with its question, and how many tokens are its own."""
    return replies.ids[row][replies.seen[row]].tolist(), int(replies.mask[row].sum())


def test_log_probabilities_and_gradient_are_those_of_the_whole_model(policy: UpperPolicy) -> None:
    rows = questions(4)[::60]
    replies = policy.sample(rows + rows[:3], torch.Generator().manual_seed(1))
    assert len(set(replies.mask.sum(1).tolist())) > 1, "replies of one length test no padding"
    own = policy.logp(replies)
    expected = torch.zeros_like(own)
    for row in range(len(own)):
        ids, length = text(replies, row)
        told = whole(policy, ids)[-length - 1 : -1].gather(1, torch.tensor(ids[-length:])[:, None])[:, 0]
        expected = expected.index_put((torch.tensor([row]), torch.arange(length)), told)
    torch.testing.assert_close(own[replies.mask], expected[replies.mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        replies.logp, torch.where(replies.mask, own, 0.0).detach(), rtol=1e-4, atol=1e-5
    )
    weights = list(policy.parameters())
    scale = torch.linspace(-1, 1, own.numel()).reshape(own.shape) * replies.mask
    ours = torch.autograd.grad((own * scale).sum(), weights)
    theirs = torch.autograd.grad((expected * scale).sum(), weights)
    for mine, other in zip(ours, theirs):
        largest = other.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4 * largest)


def test_success_is_the_probability_of_the_digits_and_of_any_end(policy: UpperPolicy) -> None:
    rows = questions(4)[::150]
    digits = policy.tokenizer.convert_tokens_to_ids(list(DIGITS))
    for row, told in zip(rows, policy.success(rows)):
        question = policy.tokenizer.encode(row["prompt"].removeprefix(LEAD), add_special_tokens=False)
        answer = policy.tokenizer.encode(row["answer"], add_special_tokens=False)
        every = whole(policy, question + answer).double().exp()[len(question) - 1 :]
        p = every[range(len(answer)), answer].prod() * (1 - every[-1, digits].sum())
        assert told.item() == pytest.approx(p.item(), rel=1e-4)


def test_success_is_how_often_samples_are_right(policy: UpperPolicy) -> None:
    """4000 samples of the question that this random model solves most often: within four standard errors."""
    rows = questions(4)
    p = policy.success(rows)
    best = int(p.argmax())
    right = policy.sample([rows[best]] * 4000, torch.Generator().manual_seed(2)).right
    assert 0.02 < p[best] < 0.98
    error = (p[best] * (1 - p[best]) / 4000).sqrt().item()
    assert right.mean().item() == pytest.approx(p[best].item(), abs=4 * error)


def test_a_reply_ends_with_its_first_token_that_is_no_digit(policy: UpperPolicy) -> None:
    rows = questions(4)[::100]
    replies = policy.sample(rows, torch.Generator().manual_seed(3))
    for row in range(len(rows)):
        ids, length = text(replies, row)
        reply = policy.tokenizer.convert_ids_to_tokens(ids[-length:])
        assert all(token in DIGITS for token in reply[:-1])
        assert reply[-1] not in DIGITS or length == LONGEST
        right = reply[-1] not in DIGITS and "".join(reply[:-1]) == rows[row]["answer"]
        assert replies.right[row].item() == right


def test_the_right_replies_as_if_sampled(policy: UpperPolicy) -> None:
    rows = questions(4)[::200]
    replies = policy.answers(rows)
    for row, question in enumerate(rows):
        ids, length = text(replies, row)
        assert "".join(policy.tokenizer.convert_ids_to_tokens(ids[-length:])) == question["answer"] + "\n"


def test_only_adapters_are_trained_and_a_state_comes_back(policy: UpperPolicy) -> None:
    rows = questions(4)[::200]
    before, state = policy.success(rows), policy.state()
    assert all("lora_" in name for name in state)
    assert {name.split("layers.")[1][0] for name in state} == {"2", "3"}
    with torch.no_grad():
        for weight in policy.parameters():
            weight.zero_()
    assert not torch.allclose(policy.success(rows), before)
    policy.load(state)
    assert torch.equal(policy.success(rows), before)


def test_a_tokenizer_that_joins_digits_is_refused(policy: UpperPolicy) -> None:
    class Joins:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [1]

    with pytest.raises(ConfigError, match="a token of its own"):
        UpperPolicy(policy.model, Joins(), lead=LEAD, longest=LONGEST)


def test_no_pair_of_numbers_occurs_twice() -> None:
    seen = set()
    for row in questions(10_000):
        a, sign, b, _ = row["prompt"].removeprefix(LEAD).split()
        pair = frozenset((int(a), int(b)))
        assert pair not in seen
        seen.add(pair)
        assert int(row["answer"]) == (int(a) * int(b) if sign == "*" else int(a) + int(b))
