"""Train on several GPUs with beliefs and budgets; the launcher decides how the model is divided.

    accelerate launch --config_file examples/scale/fsdp2.yaml examples/scale/train.py \\
        --model Qwen/Qwen2.5-0.5B --data rows.jsonl --reward my_rewards:score --vllm colocate

``--vllm server`` expects a server that was started first, on GPUs that do not train:

    CUDA_VISIBLE_DEVICES=4,5,6,7 vllm serve ...     (TRL's documentation has its flags)

What was run: on one CPU, without vLLM, in the tests. GPUs, FSDP, DeepSpeed and vLLM: not run, none was at hand.
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import Dataset

from kalman_rl.engine.tasks import by_row, guard_reward, load_reward, rows, trainer_rows
from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer, last_good_checkpoint

VLLM: dict[str, dict[str, Any]] = {
    "none": {},
    "colocate": {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_enable_sleep_mode": True,
    },
    "server": {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": "http://127.0.0.1:8000",
        "vllm_server_timeout": 600.0,
    },
}
"""Settings of the inference engine. TRL's own correction of the difference between behaviour policy and trainer is off:
ours is on."""


def arguments(output: str, vllm: str = "none", **changes: Any) -> dict[str, Any]:
    """Settings of the trainer; ``changes`` replace some."""
    given: dict[str, Any] = {
        "output_dir": output,
        "method": "kpo_diffuse",
        "method_options": {"process_noise": 1e-4},
        "belief": "auto",
        "allocation": "predictive",  # one generation call a batch; "rounds" takes max_rounds calls
        "per_device_train_batch_size": 8,
        "steps_per_generation": 4,
        "num_generations": 8,
        "max_completion_length": 2048,
        "learning_rate": 1e-6,
        "bf16": True,
        "gradient_checkpointing": True,
        "save_strategy": "steps",
        "save_steps": 20,  # a multiple of steps_per_generation * num_iterations: resume starts a new batch
        "save_total_limit": 3,
        "ddp_timeout": 900,  # longer than the longest wait for a generation; a hung rank ends all after it
        "report_to": "none",
    }
    if vllm != "none":
        given |= {"correction": "truncated", "vllm_importance_sampling_correction": False}
    return given | VLLM[vllm] | changes


def main(words: list[str] | None = None, **changes: Any) -> KalmanGRPOTrainer:
    """Build the trainer, train, and go on from the last good checkpoint if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--output", default="runs/scale")
    parser.add_argument("--vllm", choices=tuple(VLLM), default="none")
    given = parser.parse_args(words)
    task = rows(given.data, reward=load_reward(given.reward))
    trainer = KalmanGRPOTrainer(
        model=given.model,
        reward_funcs=by_row(guard_reward(task.reward), task.train),
        args=KalmanGRPOConfig(**arguments(given.output, given.vllm, **changes)),
        train_dataset=Dataset.from_list(trainer_rows(task.train)),
    )
    checkpoint = last_good_checkpoint(given.output)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


if __name__ == "__main__":
    main()
