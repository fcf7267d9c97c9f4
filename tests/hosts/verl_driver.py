"""Run by test_verl_trainer.py in a process of its own: our trainer inside verl's, with only the model left out.

Real: verl's configuration, trainer, agent-loop worker, replay buffer and padding; Ray; TransferQueue. Writes what
happened as JSON to the path given.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from datasets import Dataset
from hydra import compose, initialize_config_module
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1 import AgentLoopWorkerTQ, get_trainer_cls
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

import kalman_rl.hosts.verl.trainer  # registers it

N, PROMPTS = 4, ("easy", "hard", "mixed")
PREDICTIVE = ("+algorithm.kalman_rl.allocation=predictive", "+algorithm.kalman_rl.completions_min=1")
CANDIDATES = (  # a batch of one prompt and two completions, chosen among three
    "actor_rollout_ref.rollout.n=2",
    "+algorithm.kalman_rl.allocation=predictive",
    "data.train_batch_size=1",
    f"data.gen_batch_size={len(PROMPTS)}",
    f"+algorithm.kalman_rl.candidates={len(PROMPTS)}",
)


def composed(folder: Path, *overrides: str) -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "ppo_trainer",
            [
                "trainer.v1.trainer_mode=kalman_rl",
                "algorithm.adv_estimator=kalman_rl/tracked",
                "algorithm.rollout_correction.bypass_mode=true",  # old log-probabilities need no model then
                f"actor_rollout_ref.rollout.n={N}",
                f"data.train_batch_size={len(PROMPTS)}",
                f"trainer.default_local_dir={folder}",
                "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
                *overrides,
            ],
        )


class Loader(list):
    """A dataloader of one batch, again and again."""

    def __init__(self, index: list[int]) -> None:
        raw = [[{"role": "user", "content": name}] for name in PROMPTS]
        prompts = np.empty(len(raw), dtype=object)
        prompts[:] = raw
        source = np.array(["toy"] * len(raw), dtype=object)
        self.batch = {"raw_prompt": prompts, "index": np.array(index, dtype=object), "data_source": source}
        super().__init__([self.batch])

    def __iter__(self) -> Any:
        return iter([dict(self.batch)])

    def state_dict(self) -> dict[str, int]:
        return {"position": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loaded = state


class Actor:
    """The worker group as far as checkpoints go; ``broken`` dies while saving."""

    broken = False

    def save_checkpoint(self, path: str, *args: Any, **options: Any) -> None:
        if self.broken:
            raise RuntimeError("the machine went away")
        Path(path).mkdir(parents=True, exist_ok=True)

    def load_checkpoint(self, **options: Any) -> None:
        pass


def worker(config: Any, seen: list[tuple[str, int]]) -> Any:
    """verl's agent-loop worker with a made-up completion in the place of a language model."""
    made = object.__new__(AgentLoopWorkerTQ.__ray_metadata__.modified_class)
    made.config, made.background_tasks = config, set()

    async def run_agent_loop(sampling: Any, *, session_id: int, uid: str, index: int, **rest: Any) -> None:
        name = PROMPTS[index]
        seen.append((name, session_id))
        length = 2 + session_id % 3
        reward = {"easy": 1.0, "hard": 0.0, "mixed": float(session_id % 2)}[name]
        scores = torch.zeros(length)
        scores[-1] = reward
        row = {
            "uid": uid,
            "index": index,
            "data_source": rest["data_source"],
            "prompts": torch.ones(3, dtype=torch.long),
            "responses": torch.ones(length, dtype=torch.long),
            "response_mask": torch.ones(length, dtype=torch.long),
            "rm_scores": scores,
            "rollout_log_probs": -torch.ones(length),
        }
        tag = {"status": "success", "seq_len": 3 + length, "global_steps": 1}
        tag |= {"min_global_steps": 1, "max_global_steps": 1}
        key, table = f"{uid}_{session_id}_0", list_of_dict_to_tensordict([row])
        await tq.async_kv_batch_put(keys=[key], fields=table, tags=[tag], partition_id="train")

    made._run_agent_loop = run_agent_loop
    return made


def sample(batch: Any, config: Any) -> list[tuple[str, int]]:
    """Let verl's worker run a prompt batch to its end; which prompt was sampled in which session."""
    seen: list[tuple[str, int]] = []

    async def go() -> None:
        made = worker(config, seen)
        await made.generate_sequences(batch)
        await asyncio.gather(*made.background_tasks)

    asyncio.run(go())
    return seen


def make_trainer(config: Any, step: int = 1, index: tuple[int, ...] = (0, 1, 2)) -> Any:
    trainer = get_trainer_cls("kalman_rl")(config)
    trainer.global_steps = step
    trainer.train_dataset = range(len(PROMPTS))
    trainer.train_dataloader, trainer.train_dataloader_it = Loader(list(index)), None
    trainer.actor_rollout_wg = Actor()
    trainer.replay_buffer.poll_interval = 0.05
    return trainer


def one_step(trainer: Any, multiple: int) -> dict[str, Any]:
    """verl's step as far as the advantages."""
    seen: list[tuple[str, int]] = []
    trainer.agent_loop_manager = SimpleNamespace(
        generate_sequences=lambda batch: seen.extend(sample(batch, trainer.config))
    )
    metrics: dict[str, Any] = {}
    trainer.prepare_step()
    batch, _ = trainer.replay_buffer.sample(
        global_steps=trainer.global_steps, partition_id="train", batch_size=trainer.chosen or len(PROMPTS)
    )
    batch = upsample_batch_to_divisible_size(batch, multiple, eos_token_id=0)
    batch = trainer._compute_old_log_prob(batch, metrics)
    keys, tags = list(batch.keys), list(batch.tags)
    trainer._compute_advantage(batch, metrics)
    fields = ["index", "advantages", "rm_scores"]
    data = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=fields)
    kalman = kalman_rl.hosts.verl.trainer.plain(data["index"])
    out = {
        "mode": [trainer.trainer_mode, type(trainer.replay_buffer).__name__],
        "name": [PROMPTS[i] for i in kalman],
        "padding": [bool(tag.get("is_padding", False)) for tag in tags],
        "reward": [row.sum().item() for row in data["rm_scores"].unbind()],
        "advantage": [sorted(set(row.tolist())) for row in data["advantages"].unbind()],
        "sessions": seen,
        "metrics": {k: float(v) for k, v in metrics.items()},
    }
    tq.kv_clear(keys=keys, partition_id="train")
    trainer.global_steps += 1
    return out


def drawn(folder: Path, *overrides: str, count: int = 6) -> list[dict[str, Any]]:
    """Steps of a trainer that draws from verl's own dataset, read from a file, and of one that resumes it."""
    folder.mkdir()
    path = folder / "prompts.parquet"
    rows = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": name}],
            "extra_info": {"index": i},
            "prior": {"rate": {"easy": 1.0, "hard": 0.0, "mixed": 0.5}[name], "count": 64},
        }
        for i, name in enumerate(PROMPTS)
    ]
    Dataset.from_list(rows).to_parquet(str(path))
    files = [f"data.train_files={path}", f"data.val_files={path}", "data.seed=5"]
    config = composed(folder, "+algorithm.kalman_rl.select=stream", *files, *overrides)

    def started() -> Any:
        trainer = make_trainer(config)
        trainer.tokenizer = trainer.processor = None
        trainer._init_dataloader()
        trainer.train_dataloader = Loader([0])  # its worker processes are not wanted here
        return trainer

    trainer = started()
    steps = [one_step(trainer, 1) for _ in range(count)]
    trainer.global_steps = count
    trainer._save_checkpoint()
    again = started()
    again._load_checkpoint()
    for one in (trainer, again):
        one.global_steps = count + 1
        steps.append(one_step(one, 1))
    return steps


def plugin_in_a_worker() -> dict[str, Any]:
    """What a Ray worker knows that does nothing but ``import verl``."""

    @ray.remote(num_cpus=0)
    def look() -> dict[str, Any]:
        import verl  # noqa: F401
        from verl.trainer.ppo import core_algos

        tables = core_algos.POLICY_LOSS_REGISTRY, core_algos.ADV_ESTIMATOR_REGISTRY
        losses, estimators = ([name for name in table if "kalman_rl/" in str(name)] for table in tables)
        return {
            "losses": losses,
            "estimators": estimators,
            "trainer": "kalman_rl.hosts.verl.trainer" in sys.modules,
        }

    found: dict[str, Any] = ray.get(look.remote(), timeout=150)
    return found


def checkpoints(folder: Path) -> dict[str, Any]:
    """Save, load, a crash between the two writes, a checkpoint without beliefs."""
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("kalman_rl").addHandler(handler)
    config = composed(folder, *PREDICTIVE)
    first = make_trainer(config)
    for _ in range(2):
        one_step(first, 1)
    first.global_steps = 2
    first._save_checkpoint()
    out: dict[str, Any] = {"files": sorted(p.name for p in (folder / "global_step_2").iterdir())}
    later: list[Any] = []
    for trainer in (first, make_trainer(config)):
        if trainer is not first:
            trainer._load_checkpoint()
            out["loaded_step"] = trainer.global_steps
        trainer.global_steps = 3
        later.append(one_step(trainer, 1))
    for step in later:
        order = sorted(range(len(step["name"])), key=lambda i: (step["name"][i], step["reward"][i]))
        out.setdefault("resumed", []).append([step["advantage"][i] for i in order])
        out.setdefault("counts", []).append(
            {p: sum(name == p for name, _ in step["sessions"]) for p in PROMPTS}
        )

    first.global_steps, first.actor_rollout_wg.broken = 4, True
    try:
        first._save_checkpoint()
    except RuntimeError as error:
        out["crash"] = str(error)
    out["after_crash"] = (folder / "global_step_4" / "kalman_rl.safetensors").is_file()
    third = make_trainer(config)
    third._load_checkpoint()
    out["resumed_at"], out["known"], out["warned"] = (
        third.global_steps,
        len(third.tracking.belief),
        list(warned),
    )
    (folder / "global_step_2" / "kalman_rl.safetensors").unlink()
    fourth = make_trainer(config)
    fourth._load_checkpoint()
    out["fresh"], out["warned_fresh"] = len(fourth.tracking.belief), warned
    return out


def refusals(folder: Path) -> dict[str, str]:
    """Messages of settings that do not go together."""
    cases = {
        "estimator": ("algorithm.adv_estimator=grpo",),
        "filter": ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=reward"),
        "unknown": ("+algorithm.kalman_rl.allocaton=fixed",),
        "rounds": ("+algorithm.kalman_rl.allocation=rounds",),
        "belief": ("algorithm.adv_estimator=kalman_rl/spo", "+algorithm.kalman_rl.belief=gaussian"),
        "kl": ("algorithm.use_kl_in_reward=true",),
        "clip": (
            "actor_rollout_ref.actor.policy_loss.loss_mode=kalman_rl/kpo",
            "actor_rollout_ref.actor.clip_ratio_low=0.1",
        ),
        "norm": ("algorithm.norm_adv_by_std_in_grpo=false",),
        "bypass": (
            "actor_rollout_ref.actor.policy_loss.loss_mode=kalman_rl/kpo",
            "algorithm.rollout_correction.bypass_mode=true",
            "algorithm.rollout_correction.rollout_is=token",
        ),
    }
    found = {}
    for name, overrides in cases.items():
        try:
            get_trainer_cls("kalman_rl")(composed(folder, *overrides))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    trainer = make_trainer(composed(folder), index=(0, 0, 0))
    try:
        trainer._next_train_batch()
    except Exception as error:
        found["same index"] = f"{type(error).__name__}: {error}"
    trainer = make_trainer(composed(folder, "+algorithm.kalman_rl.prompt_key=[question_id]"))
    try:
        trainer._next_train_batch()
    except Exception as error:
        found["no column"] = f"{type(error).__name__}: {error}"
    return found


def start_ray() -> bool:
    """A local Ray; False where it does not come up. TransferQueue places actors, which takes logical CPUs. The raylet
    gives its agents 15 s: a busy machine may need a second try, which finds compiled bytecode."""
    for _ in range(3):
        try:
            ray.init(num_cpus=16, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
            return True
        except Exception:
            traceback.print_exc()
            ray.shutdown()
    return False


def main(path: Path) -> None:
    folder = path.parent
    out: dict[str, Any] = {}

    def attempt(name: str, do: Any) -> None:
        try:
            out[name] = do()
        except Exception:
            out[name] = {"error": traceback.format_exc()}
        path.write_text(json.dumps(out), encoding="utf-8")

    def in_ray() -> dict[str, Any]:
        return plugin_in_a_worker() if start_ray() else {"ray": "did not start"}

    def steps(count: int, multiple: int, *overrides: str) -> list[dict[str, Any]]:
        trainer = make_trainer(composed(folder, *overrides))
        return [one_step(trainer, multiple) for _ in range(count)]

    attempt("plugin", in_ray)
    if out["plugin"].get("ray"):  # the queue lives in it
        return
    tq.init(composed(folder).transfer_queue)
    attempt("steps", lambda: steps(6, 8, *PREDICTIVE))
    attempt("candidates", lambda: steps(8, 1, *CANDIDATES))
    attempt("fixed", lambda: steps(2, 1, "algorithm.adv_estimator=kalman_rl/k_grpo"))
    attempt("drawn", lambda: drawn(folder / "drawn", "+algorithm.kalman_rl.select_weights=unbiased"))
    attempt("prior", lambda: drawn(folder / "prior", "+algorithm.kalman_rl.prior_key=prior", count=1))
    attempt("checkpoints", lambda: checkpoints(folder / "run"))
    attempt("refusals", lambda: refusals(folder))
    tq.close()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
