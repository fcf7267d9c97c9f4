"""``python -m verl.trainer.main_ppo`` from beginning to end with ``VERL_PLATFORM=cpu``: a cluster's command line,
killed and resumed. ``make test-verl`` runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", exc_type=ImportError)
import pyarrow
import pyarrow.parquet
from safetensors.torch import load_file

from kalman_rl.hosts.state import load_state
from kalman_rl.methods import make_method
from tests.hosts import tiny_llama

pytestmark = [
    pytest.mark.skipif(os.environ.get("KALMAN_RL_TEST_VERL") != "1", reason="`make test-verl` runs it"),
    pytest.mark.timeout(1800),
]

N, PROMPTS, KEEP = 4, 4, 2
REWARD = '''
def score(data_source, solution_str, ground_truth, extra_info=None, **more):
    """A quarter of the prompts is always right, a quarter never, and the others ask for a digit."""
    kind = extra_info["index"] % 4
    return float(kind == 0 or (kind > 1 and ground_truth in solution_str))
'''
METRICS = {
    "budget/used", "budget/largest", "groups/informative", "belief/coverage_90", "belief/informative",
    "actor/ratio/noop", "actor/trust/kept", "actor/policy/kl_old", "actor/objective/fused",
    "actor/pg_loss", "actor/kl_loss", "actor/grad_norm",
}  # fmt: skip


def write_inputs(folder: Path) -> None:
    """Model, rows and reward of a user."""
    words = tiny_llama.tokenizer()
    words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}>"
    for part in (tiny_llama.model(), words):
        part.save_pretrained(folder / "model")
    rows = [
        {
            "data_source": "digits",
            "prompt": [{"role": "user", "content": f"{i:02d}"}],
            "reward_model": {"style": "rule", "ground_truth": str(i % 10)},
            "extra_info": {"index": i},
        }
        for i in range(2 * PROMPTS)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "reward.py").write_text(REWARD)


def command(folder: Path, steps: int) -> list[str]:
    """A cluster's command line; the settings that follow the empty line keep the toy small and exact."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return f"""{sys.executable} -W ignore -m verl.trainer.main_ppo
        data.train_files={folder}/rows.parquet data.val_files={folder}/rows.parquet
        actor_rollout_ref.model.path={folder}/model
        reward.custom_reward_function.path={folder}/reward.py reward.custom_reward_function.name=score
        {rollout}.name=vllm {rollout}.tensor_model_parallel_size=2 {rollout}.calculate_log_probs=true
        trainer.n_gpus_per_node=8 trainer.nnodes=2
        trainer.v1.trainer_mode=kalman_rl
        algorithm.adv_estimator=kalman_rl/tracked +algorithm.kalman_rl.allocation=predictive
        +algorithm.kalman_rl.completions_min=1
        {actor}.policy_loss.loss_mode=kalman_rl/kpo_auto +{actor}.policy_loss.options.memory=0.99
        {actor}.policy_loss._target_=kalman_rl.hosts.verl.KalmanPolicyLossConfig
        +{actor}.policy_loss.aggregation=method +{actor}.policy_loss.low=0.1 +{actor}.policy_loss.high=0.1
        {actor}.use_kl_loss=true

        {rollout}.n={N} data.train_batch_size={PROMPTS} data.max_prompt_length=8 data.max_response_length=6
        {actor}.ppo_mini_batch_size={PROMPTS} {actor}.ppo_micro_batch_size_per_gpu=8 {actor}.ppo_epochs=2
        {actor}.optim.lr=1e-2 {rollout}.log_prob_micro_batch_size_per_gpu=16
        actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16
        {actor}.checkpoint.save_contents=[model,optimizer,extra,hf_model]
        trainer.default_local_dir={folder}/run trainer.save_freq={KEEP} trainer.test_freq=-1
        trainer.val_before_train=false trainer.logger=[console]
        trainer.total_epochs=10 trainer.total_training_steps={steps}
        +ray_kwargs.ray_init.object_store_memory=200000000""".split()


def start(folder: Path, steps: int, log: Path) -> subprocess.Popen[bytes]:
    """verl in a process group of its own, Ray's processes with it."""
    # Ray starts workers with niceness 15, which a busy machine does not let through
    environment = os.environ | {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # as one hides a GPU
    with log.open("wb") as out:
        return subprocess.Popen(
            command(folder, steps), env=environment, cwd=folder, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def metrics(log: Path) -> dict[int, dict[str, float]]:
    """Numbers by step, from the lines that verl's console logger writes."""
    found: dict[int, dict[str, float]] = {}
    for line in log.read_text(errors="replace").split("\n")[:-1]:  # the last is being written
        if match := re.search(r"\bstep:(\d+) - (.*)", line):
            pairs = (pair.rsplit(":", 1) for pair in match[2].split(" - "))
            found[int(match[1])] = {name: float(re.sub(r"np\.\w+\(|\)", "", value)) for name, value in pairs}
    return found


def state(place: Path) -> dict[str, Any]:
    """Weights, beliefs and learned noises of a checkpoint."""
    weights = load_file(place / "actor" / "huggingface" / "model.safetensors")
    learned = load_state(place / "actor" / "kalman_rl" / "rank_0")
    return {"weights": weights, "beliefs": load_state(place), "learned": learned}


def same(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether two saved states are equal, up to the order in which rewards were added."""
    if isinstance(expected, torch.Tensor):
        return torch.allclose(
            found.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
        )
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same(found[key], value, tolerance) for key, value in expected.items()
        )
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(
            same(each, value, tolerance) for each, value in zip(found, expected)
        )
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    return found == expected


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Step 5 is killed. What step 4 saved is put aside, as if step 3 had been killed, and the run resumes at 2."""
    folder = tmp_path_factory.mktemp("verl")
    write_inputs(folder)
    logs = [folder / "first.log", folder / "second.log"]
    first = start(folder, 6, logs[0])
    try:
        while 2 * KEEP not in metrics(logs[0]):
            assert first.poll() is None, logs[0].read_text(errors="replace")[-6000:]
            time.sleep(0.2)
    finally:
        kill(first)
    place = folder / "run" / f"global_step_{2 * KEEP}"
    place.rename(folder / "whole")
    latest = folder / "run" / "latest_checkpointed_iteration.txt"
    assert latest.read_text() == str(2 * KEEP)
    latest.write_text(str(KEEP))
    second = start(folder, 2 * KEEP, logs[1])
    try:
        code = second.wait(timeout=900)
    finally:
        if second.poll() is None:
            kill(second)
    assert code == 0, logs[1].read_text(errors="replace")[-6000:]
    text = logs[0].read_text(errors="replace")
    return {
        "start": load_file(folder / "model" / "model.safetensors"),
        "whole": state(folder / "whole"),
        "resumed": state(place),
        "logs": [metrics(log) for log in logs],
        "text": text,
    }


def test_it_trains(runs: dict[str, Any]) -> None:
    steps, _ = runs["logs"]
    assert set(steps) >= {1, 2, 3, 4}
    for step in (1, 2, 3, 4):
        found = steps[step]
        assert found.keys() >= METRICS, json.dumps(sorted(found))
        assert found["budget/used"] == N * PROMPTS and found["actor/grad_norm"] > 0
        assert found["actor/policy/kl_old"] > 0, "the second epoch is off-policy"
        assert found["training/rollout_probs_diff_max"] < 1e-5, "sampler and actor have the same weights"
    largest = [steps[step]["budget/largest"] for step in (1, 2, 3, 4)]
    assert largest[:2] == [N, N] and max(largest[2:]) > N, "on the second visit the belief knows who teaches"
    weights = runs["whole"]["weights"]
    assert max((weights[name] - tensor).abs().max() for name, tensor in runs["start"].items()) > 0.01


def test_every_replaced_setting_is_printed(runs: dict[str, Any]) -> None:
    for line in (
        "trainer.n_gpus_per_node=1 (was 8)",
        "actor_rollout_ref.rollout.name=transformers (was vllm)",
    ):
        assert line in runs["text"]


def test_a_killed_run_goes_on_as_if_it_had_not_been(runs: dict[str, Any]) -> None:
    first, second = runs["logs"]
    assert set(second) == {3, 4}
    for name in ("critic/rewards/mean", "budget/largest", "actor/grad_norm", "belief/informative"):
        for step in (3, 4):
            assert second[step][name] == pytest.approx(first[step][name], rel=1e-5), name
    whole, resumed = runs["whole"], runs["resumed"]
    assert same(resumed["weights"], whole["weights"], 1e-6)
    assert same(resumed["beliefs"], whole["beliefs"], 1e-9)
    part = make_method("kpo_auto", memory=0.99).learns["ratio"]
    assert part.fitted(whole["learned"]["learned"]["ratio"]) != part.start, "nothing was learned"
    assert same(resumed["learned"], whole["learned"], 1e-5)
