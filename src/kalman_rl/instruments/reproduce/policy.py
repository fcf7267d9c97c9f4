"""What an experiment trains: a policy that samples replies, scores them, and knows how often it is right.

Success is not sampled but computed: a question has one right reply, so its probability is the product of that reply's
token probabilities. Accuracies carry no noise of evaluation, and an allocator that knows every p is possible.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kalman_rl.engine.models.weights import load_weights, trained_weights
from kalman_rl.engine.tasks.task import Row


class Replies(NamedTuple):
    """One sampled reply per question, in the order asked; N replies of at most T tokens after at most P of a prompt.

    ``ids`` (N, P + T) tokens, prompts padded on the left; ``seen`` (N, P + T) bool, what attention may read; ``mask``
    (N, T) bool, tokens of the reply with its end; ``logp`` (N, T) under the sampling policy, detached; ``right`` (N,)
    float 1 or 0.
    """

    ids: Tensor
    seen: Tensor
    mask: Tensor
    logp: Tensor
    right: Tensor

    def rows(self, places: Tensor) -> Replies:
        """The replies at these places."""
        return Replies(*(part[places] for part in self))


def joined(parts: list[Replies]) -> Replies:
    """Several batches as one: prompts padded on the left, replies on the right."""
    width = max(part.mask.shape[1] for part in parts)
    lead = max(part.ids.shape[1] - part.mask.shape[1] for part in parts)
    ids, seen, mask, logp = [], [], [], []
    for part in parts:
        right = width - part.mask.shape[1]
        left = lead - (part.ids.shape[1] - part.mask.shape[1])
        ids.append(torch.nn.functional.pad(part.ids, (left, right)))
        seen.append(torch.nn.functional.pad(part.seen, (left, right)))
        mask.append(torch.nn.functional.pad(part.mask, (0, right)))
        logp.append(torch.nn.functional.pad(part.logp, (0, right)))
    return Replies(
        torch.cat(ids), torch.cat(seen), torch.cat(mask), torch.cat(logp), torch.cat([p.right for p in parts])
    )


class Policy(Protocol):
    """A model with its task; every experiment goes through these methods, whatever the model."""

    def sample(self, rows: Sequence[Row], generator: torch.Generator) -> Replies:
        """One reply for each row, at temperature 1."""
        ...

    def answers(self, rows: Sequence[Row]) -> Replies:
        """The right reply of each row, as if it had been sampled; ``logp`` is 0."""
        ...

    def logp(self, replies: Replies) -> Tensor:
        """(N, T) log-probabilities of the replies' tokens now, float32, with gradient; anything outside the mask."""
        ...

    def success(self, rows: Sequence[Row]) -> Tensor:
        """(N,) float64 exact probability of the right reply, by teacher forcing; detached."""
        ...

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """What is trained."""
        ...

    def state(self) -> dict[str, Tensor]:
        """A copy of the trained weights."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Become the policy with these weights."""
        ...


class TrainedWeights:
    """The weights of a :class:`Policy` whose ``model`` says by ``requires_grad`` which of them are trained."""

    model: Any

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def state(self) -> dict[str, Tensor]:
        return trained_weights(self.model)

    def load(self, state: dict[str, Tensor]) -> None:
        load_weights(self.model, state)


class CausalPolicy(TrainedWeights):
    """A :class:`Policy` from a causal language model of transformers.

    Args:
        model: in evaluation mode, without dropout; all its parameters that require a gradient are trained.
        tokenizer: with a pad token.
        end: token that ends a reply.
        longest: most tokens of a reply, its end included.

    A row's reply is right when its tokens are those of ``row["answer"]``, then ``end``.
    """

    def __init__(self, model: Any, tokenizer: Any, *, end: int, longest: int) -> None:
        self.model, self.tokenizer, self.end, self.longest = model, tokenizer, end, longest
        self._codes: dict[str, list[int]] = {}

    def sample(self, rows: Sequence[Row], generator: torch.Generator) -> Replies:
        ids, seen = self._prompts(rows)
        tokens, logps, mask = [], [], []
        alive = torch.ones(len(rows), dtype=torch.bool)
        cache, last, attention = None, ids, seen
        with torch.no_grad():
            for _ in range(self.longest):
                out = self.model(
                    input_ids=last,
                    attention_mask=attention.long(),
                    position_ids=_positions(attention)[:, -last.shape[1] :],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = out.past_key_values
                every = out.logits[:, -1].float().log_softmax(-1)
                token = torch.multinomial(every.exp(), 1, generator=generator)
                tokens.append(token[:, 0])
                logps.append(every.gather(1, token)[:, 0])
                mask.append(alive)
                alive = alive & (token[:, 0] != self.end)
                last, attention = token, torch.cat((attention, torch.ones_like(attention[:, :1])), 1)
                if not alive.any():
                    break
        reply, mask_ = torch.stack(tokens, 1), torch.stack(mask, 1)
        right = torch.tensor(
            [
                float(text[:length] == self._reply(row))
                for text, length, row in zip(reply.tolist(), mask_.sum(1).tolist(), rows)
            ]
        )
        logp = torch.where(mask_, torch.stack(logps, 1), 0.0)
        return Replies(torch.cat((ids, reply), 1), torch.cat((seen, mask_), 1), mask_, logp, right)

    def logp(self, replies: Replies) -> Tensor:
        width = replies.mask.shape[1]
        out = self.model(
            input_ids=replies.ids,
            attention_mask=replies.seen.long(),
            position_ids=_positions(replies.seen),
            logits_to_keep=width + 1,
            use_cache=False,
        )
        every = out.logits[:, :-1].float().log_softmax(-1)
        return every.gather(2, replies.ids[:, -width:, None])[..., 0]

    def answers(self, rows: Sequence[Row]) -> Replies:
        ids, seen = self._prompts(rows)
        answers = [self._reply(row) for row in rows]
        width = max(map(len, answers))
        reply = torch.tensor([answer + [self.end] * (width - len(answer)) for answer in answers])
        mask = torch.arange(width) < torch.tensor([len(answer) for answer in answers])[:, None]
        both, read = torch.cat((ids, reply), 1), torch.cat((seen, mask), 1)
        return Replies(both, read, mask, torch.zeros(mask.shape), torch.ones(len(rows)))

    def success(self, rows: Sequence[Row]) -> Tensor:
        replies = self.answers(rows)
        with torch.no_grad():
            return torch.where(replies.mask, self.logp(replies).double(), 0.0).sum(1).exp()

    def _prompts(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Prompts padded on the left, and where they are."""
        codes = [self._code(row["prompt"]) for row in rows]
        width = max(map(len, codes))
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (width - len(code)) + code for code in codes])
        seen = torch.arange(width) >= width - torch.tensor([len(code) for code in codes])[:, None]
        return ids, seen

    def _reply(self, row: Row) -> list[int]:
        return [*self._code(row["answer"]), self.end]

    def _code(self, text: str) -> list[int]:
        if text not in self._codes:
            self._codes[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._codes[text]


def _positions(seen: Tensor) -> Tensor:
    return (seen.long().cumsum(1) - 1).clamp(min=0)
