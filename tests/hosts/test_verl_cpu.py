"""What ``VERL_PLATFORM=cpu`` changes, without a run: settings, sampler, order of imports; ``test_verl_main_ppo.py``
trains."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", exc_type=ImportError)
from omegaconf import OmegaConf

from kalman_rl.errors import ConfigError
from kalman_rl.hosts.verl.cpu.rollout import Sampler
from kalman_rl.hosts.verl.cpu.settings import CPU, fit
from kalman_rl.hosts.verl.preflight import HOMES, MODULES
from tests.hosts import tiny_llama
from tests.hosts.test_verl_preflight import composed


def test_what_needs_an_accelerator_is_replaced_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    config = composed("trainer.n_gpus_per_node=4", "actor_rollout_ref.rollout.name=vllm")
    fit(config)
    assert all(OmegaConf.select(config, place) == value for place, value in CPU.items())
    printed = capsys.readouterr().out
    assert (
        "trainer.n_gpus_per_node=1 (was 4)" in printed and "rollout.name=transformers (was vllm)" in printed
    )
    fit(config)
    assert capsys.readouterr().out == "", "nothing is left to replace"


def test_adapters_are_merged() -> None:
    config = composed("actor_rollout_ref.model.lora_rank=8")
    fit(config)
    assert config.actor_rollout_ref.model.lora.merge is True
    plain = composed()
    fit(plain)
    assert plain.actor_rollout_ref.model.lora.merge is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor_rollout_ref.actor.strategy=megatron", "strategy: got 'megatron' .* expected fsdp or fsdp2"),
        ("reward.reward_model.enable=true", "a reward model needs a rollout engine"),
        ("trainer.v1.trainer_mode=separate_async", "expected sync or kalman_rl"),
    ],
)
def test_what_a_cpu_cannot_do(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(composed(override))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = tiny_llama.model()
    model.generation_config.repetition_penalty = 1.5  # of a chat model; a trainer's policy has none
    model.save_pretrained(path)
    return path


def draw(sampler: Sampler, prompt: list[int], **given: Any) -> Any:
    return asyncio.run(sampler.generate("id", prompt, {"temperature": 1.0, "logprobs": True, **given}))


def test_log_probabilities_are_the_models(folder: Path) -> None:
    sampler, prompt = Sampler(str(folder), False, 12, 7), [3, 4, 5]
    for given in ({}, {"temperature": 0.5}):
        found = draw(sampler, prompt, **given)
        row = torch.tensor([prompt + found.token_ids])
        with torch.no_grad():
            logits = tiny_llama.model().eval()(row).logits[0, 2:-1] / given.get("temperature", 1.0)
        expected = logits.log_softmax(-1).gather(1, row[0, 3:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found.log_probs), expected, rtol=1e-4, atol=1e-5)
        assert 0 < len(found.token_ids) <= 12
    assert draw(sampler, prompt, temperature=0).token_ids == draw(sampler, prompt, temperature=0).token_ids
    assert len(draw(sampler, prompt, max_tokens=1).token_ids) == 1


def test_draws_depend_on_weights_prompt_and_count_alone(folder: Path) -> None:
    """So a resumed run samples what the uninterrupted one samples, in whatever order requests come."""
    first, second = (Sampler(str(folder), False, 12, 7) for _ in range(2))
    weights = {name: 1.5 * tensor for name, tensor in tiny_llama.model().state_dict().items()}
    for sampler in (first, second):
        asyncio.run(sampler.load(weights, 3))
    forward = {i: [draw(first, [3, i]).token_ids for _ in range(3)] for i in (4, 5, 6)}
    backward = {i: [draw(second, [3, i]).token_ids for _ in range(3)] for i in (6, 5, 4)}
    assert forward == backward
    assert len({tuple(tokens) for draws in forward.values() for tokens in draws}) > 5
    asyncio.run(second.load(weights, 4))
    assert {i: [draw(second, [3, i]).token_ids for _ in range(3)] for i in (4, 5, 6)} != forward
    assert draw(second, [3, 4]).extra_fields["global_steps"] == 4


def test_pictures_are_refused(folder: Path) -> None:
    sampler = Sampler(str(folder), False, 4, 7)
    with pytest.raises(ConfigError, match="expected prompts of text"):
        asyncio.run(sampler.generate("id", [3], {}, image_data=[object()]))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("first", ["verl", "kalman_rl.hosts.verl.cpu.rollout"])
def test_the_platform_is_there_whatever_is_imported_first(first: str) -> None:
    """Ray's workers import verl first, and the server's process our rollout."""
    code = (
        f"import {first}, verl\n"
        "from kalman_rl.hosts.verl import registered\n"
        "from verl.trainer.ppo.v1 import get_trainer_cls\n"
        "from verl.utils.device import get_device_name, get_nccl_backend\n"
        "from verl.workers.rollout.base import get_rollout_class\n"
        "from verl.workers.rollout.replica import get_rollout_replica_class\n"
        "name = 'transformers'\n"
        "print(get_device_name(), get_nccl_backend(), len(registered()['losses']) > 30)\n"
        "print(*(each.__name__ for each in (get_trainer_cls('kalman_rl'), get_rollout_class(name), "
        "get_rollout_replica_class(name))))\n"
    )
    environment = os.environ | {"VERL_PLATFORM": "cpu", MODULES: ",".join(HOMES)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, timeout=390,
        check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-2:] == ["cpu gloo True", "KalmanPPOTrainer Weights Replica"], done.stderr
