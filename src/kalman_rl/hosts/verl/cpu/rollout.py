"""Sampling without an engine: a transformers model in a Ray actor, in verl's roles of replica, server and adapter.

In float32, one request after another. A draw depends on the seed, the step of the weights, the prompt and how often
this prompt was drawn with these weights; so a resumed run samples what the uninterrupted one samples.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from kalman_rl.errors import ConfigError


def server_name(rank: int) -> str:
    """Name of the Ray actor that samples for rank ``rank``."""
    return f"kalman_rl_cpu_server_{rank}"


class Sampler:
    """A model that answers one prompt at a time.

    Args:
        path: folder or name of a model. trust: run code that comes with it.
        length: >= 1, tokens of a completion where a request does not say. seed: of the draws.
    """

    def __init__(self, path: str, trust: bool, length: int, seed: int) -> None:
        load = AutoModelForCausalLM.from_pretrained
        self.model = load(path, dtype=torch.float32, trust_remote_code=trust).eval()
        own = self.model.generation_config  # its temperature and penalties are for chatting, not for training
        self.model.generation_config = GenerationConfig(
            eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, bos_token_id=own.bos_token_id
        )
        self.length, self.seed, self.step = length, seed, 0
        self.drawn: Counter[tuple[int, ...]] = Counter()

    async def load(self, weights: Mapping[str, Tensor], step: int | None) -> None:
        """Take the actor's weights, under transformers' names."""
        self.model.load_state_dict(weights)
        self.step = self.step + 1 if step is None else step
        self.drawn.clear()

    async def sleep(self, **options: Any) -> None:
        """verl empties a cache between steps; there is none."""

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        image_data: Any = None,
        video_data: Any = None,
        **others: Any,
    ) -> TokenOutput:
        """A completion, with the log-probability of each token where ``logprobs`` is asked for."""
        if image_data is not None or video_data is not None:
            raise ConfigError("data: got images or videos with VERL_PLATFORM=cpu, expected prompts of text")
        key, prompt = tuple(prompt_ids), torch.tensor([list(prompt_ids)])
        self.drawn[key] += 1
        torch.manual_seed(zlib.crc32(repr((self.seed, self.step, key, self.drawn[key])).encode()))
        given = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, **sampling_params}
        draw: dict[str, Any] = {"do_sample": False}
        if given["temperature"] > 0:
            draw = {
                "do_sample": True,
                "temperature": float(given["temperature"]),
                "top_p": float(given["top_p"]),
            }
            draw["top_k"] = max(int(given["top_k"]), 0)
        with torch.no_grad():
            found = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=given.get("max_tokens") or given.get("max_new_tokens") or self.length,
                repetition_penalty=float(given.get("repetition_penalty", 1.0)),
                output_scores=True,
                return_dict_in_generate=True,
                **draw,
            )
        tokens = found.sequences[0, prompt.shape[1] :]
        logp = None
        if given.get("logprobs"):
            scores = torch.cat(found.scores).log_softmax(dim=-1)
            logp = scores.gather(1, tokens[:, None])[:, 0].tolist()
        return TokenOutput(
            token_ids=tokens.tolist(),
            log_probs=logp,
            stop_reason="completed",
            extra_fields={"global_steps": self.step},
        )


class Replica(RolloutReplica):
    """verl's replica: starts the actor that samples."""

    async def launch_servers(self) -> None:
        name = server_name(self.replica_rank)
        start = ray.remote(Sampler).options(name=name, num_cpus=0, max_concurrency=self.max_concurrency)
        model = self.model_config
        trust = bool(model.get("trust_remote_code", False))
        server = start.remote(model.path, trust, self.config.response_length, self.config.seed)
        self.servers, self._server_handle, self._server_address = [server], server, name


class Weights(BaseRollout):
    """verl's adapter: hands the weights of the actor in this process to the server of its rank."""

    async def resume(self, tags: list[str]) -> None:
        """The server keeps its memory."""

    async def release(self) -> None:
        """The server keeps its memory."""

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        **others: Any,
    ) -> None:
        """Every rank walks through the weights, because that gathers their shards."""
        full = {name: tensor.detach().float().clone() for name, tensor in weights}
        server = ray.get_actor(server_name(torch.distributed.get_rank()))
        await server.load.remote(full, global_steps)
