"""A :class:`~kalman_rl.instruments.reproduce.policy.Policy` that trains the upper layers of a Llama, fast on one core.

The lower layers are fixed, so the hidden states of a text are computed once and kept. All prompts begin with the same
lead (the solved examples), whose keys and values are computed once per call. Only real tokens pass through the
projections; rows are padded for attention alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kalman_rl.engine.tasks.task import Row
from kalman_rl.errors import ConfigError, quote
from kalman_rl.instruments.reproduce.policy import Replies, TrainedWeights

Tokens = tuple[int, ...]
KeyValue = tuple[Tensor, Tensor]
ADAPTED = ("q_proj", "v_proj", "o_proj")
CHUNK = 64
"""Rows that pass through the model at once where no gradient is needed."""


class UpperPolicy(TrainedWeights):
    """The upper half of a causal Llama of transformers with low-rank adapters in float32.

    Args:
        model: a Llama in evaluation mode; it gets adapters on q, v and o of its upper half, all else is fixed.
        tokenizer: one token per digit.
        lead: text that every prompt begins with.
        longest: most tokens of a reply.
        rank: of the adapters; they are scaled by 2. seed: of their start.

    A reply ends with its first token that is no digit, which is kept, or at ``longest`` tokens. It is right when its
    digits are ``row["answer"]`` and it has ended.

    Raises: ConfigError if the tokenizer writes a digit as more than one token, or joins digits.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, lead: str, longest: int, rank: int = 16, seed: int = 0
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self.tokenizer, self.lead, self.longest = tokenizer, lead, longest
        layers = model.config.num_hidden_layers
        upper = list(range(layers // 2, layers))
        adapters = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(ADAPTED), layers_to_transform=upper
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = inject_adapter_in_model(adapters, model)
        for name, weight in self.model.named_parameters():
            weight.requires_grad_("lora_" in name)
            if weight.requires_grad:
                weight.data = weight.data.float()
        trunk = self.model.model
        self._embed, self._rotary, self._norm = trunk.embed_tokens, trunk.rotary_emb, trunk.norm
        self._lower, self._upper = trunk.layers[: layers // 2], trunk.layers[layers // 2 :]
        self._device = self._embed.weight.device
        self._digits = torch.tensor([self._digit(digit) for digit in "0123456789"], device=self._device)
        self._codes: dict[str, Tokens] = {}
        self._hidden: dict[Tokens, Tensor] = {}
        with torch.no_grad():
            ids = torch.tensor(self._code(lead), device=self._device)
            whole = torch.ones(1, len(ids), dtype=torch.bool, device=self._device)
            self._lead, self._lower_lead = self._through(self._lower, self._embed(ids), whole)

    def sample(self, rows: Sequence[Row], generator: torch.Generator) -> Replies:
        questions = [self._question(row) for row in rows]
        texts, logps, going = list(questions), [], list(range(len(rows)))
        different = list(dict.fromkeys(questions))
        place = torch.tensor([different.index(question) for question in questions], device=self._device)
        with torch.no_grad():
            lead, seen = self._upper_lead(), _seen(different).to(self._device)
            out, new = self._through(self._upper, self._states(different), seen, lead)
            ends = torch.zeros_like(seen)
            ends[:, -1] = True
            out, readable = out[ends[seen]][place], seen[place]
            past = [(k[place], v[place]) for k, v in new]
            while going:
                every = self._logits(out).log_softmax(-1).cpu()
                token = _drawn(every, generator)
                logps.append(torch.zeros(len(rows)))
                logps[-1][going] = every.gather(1, token[:, None])[:, 0]
                for row, one in zip(going, token.tolist()):
                    texts[row] = (*texts[row], one)
                on = torch.isin(token, self._digits.cpu())
                going = [row for row, more in zip(going, on.tolist()) if more]
                if len(logps) == self.longest or not going:
                    break
                on = on.to(self._device)
                past, readable = [(k[on], v[on]) for k, v in past], readable[on]
                states = self._states([texts[row] for row in going], last=True)
                out, new = self._through(
                    self._upper, states, readable.new_ones(len(going), 1), lead, past, readable
                )
                past = [(torch.cat((k, a), 2), torch.cat((v, b), 2)) for (k, v), (a, b) in zip(past, new)]
                readable = torch.cat((readable, readable.new_ones(len(going), 1)), 1)
        right = [
            row not in going and text[len(question) : -1] == self._code(asked["answer"])
            for row, (text, question, asked) in enumerate(zip(texts, questions, rows))
        ]
        return _replies(questions, texts, torch.stack(logps, 1), torch.tensor(right).float())

    def logp(self, replies: Replies) -> Tensor:
        lengths = replies.mask.sum(1).tolist()
        texts = [tuple(ids[seen].tolist()) for ids, seen in zip(replies.ids, replies.seen)]
        every = self._forced(texts, lengths).log_softmax(-1)
        tokens = replies.ids[:, -replies.mask.shape[1] :][replies.mask].to(self._device)
        found = every.gather(1, tokens[:, None])[:, 0].to(replies.logp.device)
        return torch.zeros_like(replies.logp).masked_scatter(replies.mask, found)

    def answers(self, rows: Sequence[Row]) -> Replies:
        """The right digits and a line end, the likeliest of the tokens that may end a reply."""
        questions = [self._question(row) for row in rows]
        texts = [
            question + self._code(row["answer"]) + self._code("\n") for question, row in zip(questions, rows)
        ]
        width = max(len(text) - len(question) for text, question in zip(texts, questions))
        return _replies(questions, texts, torch.zeros(len(rows), width), torch.ones(len(rows)))

    def success(self, rows: Sequence[Row]) -> Tensor:
        found = []
        with torch.no_grad():
            for first in range(0, len(rows), CHUNK):
                part = rows[first : first + CHUNK]
                answers = [self._code(row["answer"]) for row in part]
                texts = [(*self._question(row), *answer, -1) for row, answer in zip(part, answers)]
                lengths = [len(answer) + 1 for answer in answers]
                every = self._forced(texts, lengths).log_softmax(-1).double()
                digits = every[:, self._digits].exp()
                ended = torch.log1p(-digits.sum(1).clamp(max=1.0))
                row = 0
                for answer, length in zip(answers, lengths):
                    own = every[row : row + length - 1]
                    picked = own.gather(1, torch.tensor(answer, device=self._device)[:, None]).sum()
                    found.append((picked + ended[row + length - 1]).exp().cpu())
                    row += length
        return torch.stack(found)

    def features(self, rows: Sequence[Row]) -> Tensor:
        """(N, d) hidden state of the fixed half at the last token of each prompt; it costs nothing more."""
        return self._states([self._question(row) for row in rows], last=True).float().cpu()

    # ---- details

    def _forced(self, texts: Sequence[Tokens], lengths: Sequence[int]) -> Tensor:
        """Logits of the last ``lengths`` tokens of each text, one below the other."""
        read = [text[:-1] for text in texts]
        seen = _seen(read).to(self._device)
        out, _ = self._through(self._upper, self._states(read), seen, self._upper_lead())
        columns = torch.arange(seen.shape[1], device=self._device)
        wanted = columns >= seen.shape[1] - torch.tensor(lengths, device=self._device)[:, None]
        return self._logits(out[wanted[seen]])

    def _states(self, texts: Sequence[Tokens], last: bool = False) -> Tensor:
        """What the lower half says at every token of the texts (or the last), one below the other; kept."""
        missing = list(dict.fromkeys(text for text in texts if text not in self._hidden))
        with torch.no_grad():
            for first in range(0, len(missing), CHUNK):
                part = missing[first : first + CHUNK]
                seen = _seen(part).to(self._device)
                ids = torch.tensor([token for text in part for token in text], device=self._device)
                out, _ = self._through(self._lower, self._embed(ids), seen, self._lower_lead)
                self._hidden.update(zip(part, out.split([len(text) for text in part])))
        return torch.cat([self._hidden[text][-1:] if last else self._hidden[text] for text in texts])

    def _upper_lead(self) -> list[KeyValue]:
        whole = torch.ones(1, len(self._lead), dtype=torch.bool, device=self._device)
        return self._through(self._upper, self._lead, whole)[1]

    def _logits(self, out: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self._norm(out)).float()
        return logits

    def _through(
        self,
        layers: Any,
        x: Tensor,
        seen: Tensor,
        lead: Sequence[KeyValue] = (),
        past: Sequence[KeyValue] = (),
        readable: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Tokens ``x`` (M, d), which stand at the M places of ``seen`` (N, L), through some layers.

        ``lead``: keys and values (1, heads, P, size) of each layer, read by all; ``past``: of each row, (N, heads, K,
        size), read where ``readable`` (N, K) says so.
        Returns: x after the layers, and the new keys and values, (N, heads, L, size).
        """
        count, length = seen.shape
        before = lead[0][0].shape[2] if lead else 0
        readable = seen[:, :0] if readable is None else readable
        readable = torch.cat((readable.new_ones(count, before), readable), 1)
        position = (readable.sum(1, keepdim=True) + seen.cumsum(1) - 1)[seen]
        cos, sin = (part[0][:, None] for part in self._rotary(x, position[None]))
        own = seen.new_ones(length, length).tril() & seen[:, None]
        mask = torch.cat((readable[:, None].expand(-1, length, -1), own), 2)
        made: list[KeyValue] = []
        for place, layer in enumerate(layers):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            size = attention.head_dim
            q = _turned(attention.q_proj(h).unflatten(-1, (-1, size)), cos, sin)
            k = _turned(attention.k_proj(h).unflatten(-1, (-1, size)), cos, sin)
            v = attention.v_proj(h).unflatten(-1, (-1, size))
            made.append((_padded(k, seen), _padded(v, seen)))
            parts = [[part.expand(count, -1, -1, -1) for part in lead[place]]] if lead else []
            parts += [list(past[place])] if past else []
            keys, values = (torch.cat(side, 2) for side in zip(*parts, made[-1]))
            read = _read(_padded(q, seen), keys, values, mask)
            x = x + attention.o_proj(read.transpose(1, 2)[seen].flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x, made

    def _question(self, row: Row) -> Tokens:
        """Tokens of a prompt behind the lead."""
        return self._code(row["prompt"].removeprefix(self.lead))

    def _digit(self, digit: str) -> int:
        once, twice = (self.tokenizer.encode(digit * n, add_special_tokens=False) for n in (1, 2))
        if len(once) != 1 or twice != once * 2:
            raise ConfigError(
                f"tokenizer: got {len(once)} tokens for {quote(digit)} and {len(twice)} for "
                f"{quote(digit * 2)}, expected 1 and 2; choose a model that writes every digit as a token of its own"
            )
        return int(once[0])

    def _code(self, text: str) -> Tokens:
        if text not in self._codes:
            self._codes[text] = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return self._codes[text]


def _seen(texts: Sequence[Tokens]) -> Tensor:
    """(N, L) where the tokens of the texts stand, padded on the left."""
    width = max(map(len, texts))
    return torch.arange(width) >= width - torch.tensor([len(text) for text in texts])[:, None]


def _padded(packed: Tensor, seen: Tensor) -> Tensor:
    """(N, heads, L, size) of (M, heads, size)."""
    full = packed.new_zeros(*seen.shape, *packed.shape[1:])
    full[seen] = packed
    return full.transpose(1, 2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def _read(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention in plain products; for short rows its gradient costs a fraction of the fused one's on a CPU.

    ``q`` (N, H, L, size); ``k`` and ``v`` (N, h, K, size), each for H / h queries; ``mask`` (N, L, K), may be read.
    """
    shared = (*k.shape[:2], -1, q.shape[3])
    score = (q.reshape(shared) @ k.transpose(2, 3)).float().unflatten(2, (-1, q.shape[2]))
    score = (score / q.shape[3] ** 0.5).masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    return (score.softmax(-1).to(v.dtype).flatten(2, 3) @ v).reshape(q.shape)


def _drawn(logp: Tensor, generator: torch.Generator) -> Tensor:
    """One place of each row (N, V), drawn with its probability; one random number a row, where multinomial takes V."""
    upto = logp.double().exp().cumsum(-1)
    at = torch.rand(len(logp), 1, generator=generator, dtype=torch.float64) * upto[:, -1:]
    return torch.searchsorted(upto, at, right=True)[:, 0].clamp(max=logp.shape[1] - 1)


def _replies(questions: Sequence[Tokens], texts: Sequence[Tokens], logp: Tensor, right: Tensor) -> Replies:
    """Questions padded on the left, what follows them on the right; logp (N, T)."""
    lead, width = max(map(len, questions)), logp.shape[1]
    ids = torch.zeros(len(texts), lead + width, dtype=torch.long)
    seen = torch.zeros(len(texts), lead + width, dtype=torch.bool)
    for row, (text, question) in enumerate(zip(texts, questions)):
        first = lead - len(question)
        ids[row, first : first + len(text)] = torch.tensor(text)
        seen[row, first : first + len(text)] = True
    return Replies(ids, seen, seen[:, lead:], logp, right)
