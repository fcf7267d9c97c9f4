"""A prompt of a language model as an environment: sample completions, score them, describe the prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kalman_rl.errors import ConfigError, RewardError, quote

RewardFunction = Callable[..., Sequence[float | None]]
"""``reward(prompts=[...], completions=[...])``: a number per completion, None or NaN = missing, as in TRL."""


class LanguageModelEnvironment:
    """One prompt of a transformers model.

    ``features`` is the mean over the prompt's tokens of the last hidden layer: known before sampling, so a
    baseline made of it cannot leak a completion's own reward. ``sample(k)`` generates k completions in one
    batch from the model's own distribution (temperature only, no top-k or top-p) and scores them.

    Args:
        model: a causal language model of transformers (anything with its ``generate`` and ``forward``).
        tokenizer: of the model.
        prompt: text, as the model should read it; chat templates are applied by the caller.
        reward: see :data:`RewardFunction`.
        max_new_tokens: >= 1. temperature: > 0.
        seed: of sampling; torch's global generators are left as they were.

    Raises: ConfigError for an option out of range or a prompt without tokens. RewardError from ``sample`` if
    the reward function returns something else than a number per completion; what it raises itself comes
    through.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: str,
        reward: RewardFunction,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ConfigError(f"temperature: got {quote(temperature)}, expected a finite number > 0")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: got {quote(max_new_tokens)}, expected an integer >= 1")
        self.model, self.tokenizer, self.prompt, self.reward = model, tokenizer, prompt, reward
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self._encoded = tokenizer([prompt], return_tensors="pt").to(model.device)
        if not self._encoded["input_ids"].shape[1]:
            raise ConfigError(f"prompt: got {quote(prompt)}, which has no tokens, expected at least one")
        self._seeds = torch.Generator().manual_seed(seed)
        self._features: Tensor | None = None
        self.completions: list[str] = []
        """Every completion so far, in order."""

    def features(self) -> Tensor:
        """(hidden size,) float32; computed once, with the weights at the first call."""
        if self._features is None:
            with torch.no_grad(), _Evaluating(self.model):
                out = self.model(
                    input_ids=self._encoded["input_ids"],
                    attention_mask=self._encoded["attention_mask"],
                    output_hidden_states=True,
                )
            self._features = out.hidden_states[-1][0].float().mean(0).cpu()
        return self._features.clone()

    def sample(self, k: int) -> Tensor:
        """(k,) float64 rewards of k new completions."""
        seed = int(torch.randint(2**62, (), generator=self._seeds))
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.no_grad(), _Evaluating(self.model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            output = self.model.generate(
                input_ids=self._encoded["input_ids"],
                attention_mask=self._encoded["attention_mask"],
                num_return_sequences=k,
                max_new_tokens=self.max_new_tokens,
                do_sample=True,
                temperature=self.temperature,
                top_k=0,
                top_p=1.0,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        replies = output[:, self._encoded["input_ids"].shape[1] :]
        texts = [str(text) for text in self.tokenizer.batch_decode(replies, skip_special_tokens=True)]
        self.completions += texts
        return self._scored(texts)

    def _scored(self, texts: list[str]) -> Tensor:
        scores = self.reward(prompts=[self.prompt] * len(texts), completions=texts)
        try:
            values = [math.nan if score is None else float(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward: got {quote(scores)}, expected a number per completion, None for missing"
            ) from error
        if len(values) != len(texts):
            raise RewardError(f"reward: got {len(values)} numbers, expected {len(texts)}, one per completion")
        return torch.tensor(values, dtype=torch.float64)


class _Evaluating:
    """Dropout off inside, the former mode back afterwards."""

    def __init__(self, model: Any) -> None:
        self._model, self._training = model, bool(model.training)

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        self._model.train(self._training)
