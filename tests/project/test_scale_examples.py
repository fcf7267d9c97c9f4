"""Files for more than one GPU: read by the classes of accelerate and TRL that would read them there."""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("trl")
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from kalman_rl.errors import ConfigError
from kalman_rl.hosts.trl import KalmanGRPOConfig
from kalman_rl.hosts.trl.config import check_combination, resolve_method
from kalman_rl.objectives.correction import Truncated
from kalman_rl.sampling.budget import Budget
from tests.hosts.test_trl import model_path

__all__ = ["model_path"]  # a fixture

FOLDER = Path(__file__).parents[2] / "examples" / "scale"
FILES = ("fsdp2.yaml", "zero2.yaml", "zero3.yaml")
ON_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_train", FOLDER / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launched(name: str) -> tuple[Any, dict[str, str]]:
    """Arguments and environment that ``accelerate launch --config_file`` makes of a file."""
    args = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "train.py"])
    config = load_config_from_file(str(FOLDER / name))
    assert isinstance(config, ClusterConfig)
    sections = [*(config.fsdp_config or {}), *(config.deepspeed_config or {})]
    unknown = set(sections) - set(vars(args))
    assert sections and not unknown, f"{name}: accelerate launch has no such settings: {sorted(unknown)}"
    for key in sections:
        setattr(args, key, None)  # so that only the file can have set it
    args.nondefault = set()
    args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config or {})
    args, _, _ = _validate_launch_command(args)
    environment = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return args, environment


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name: str) -> None:
    args, environment = launched(name)
    assert args.num_processes == 8 and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if name == "fsdp2.yaml":
        assert args.use_fsdp and not args.use_deepspeed
        assert environment["FSDP_VERSION"] == "2" and environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
        assert environment["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
        assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    else:
        assert args.use_deepspeed and not args.use_fsdp
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[4]
        assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == str(name == "zero3.yaml").lower()


def test_fsdp_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class that accelerate builds from that environment in every process."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    _, environment = launched("fsdp2.yaml")
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "SHARDED" in str(plugin.state_dict_type) and plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize("vllm", ["none", "colocate", "server"])
def test_settings_of_the_example(vllm: str, example: ModuleType, tmp_path: Path) -> None:
    args = KalmanGRPOConfig(**example.arguments(str(tmp_path), vllm, **ON_CPU))
    method = resolve_method(None, args)
    check_combination(method, args)
    assert args.use_vllm == (vllm != "none") and Budget.of(args).allocation == "predictive"
    assert args.save_steps % (args.steps_per_generation * args.num_iterations) == 0
    if vllm == "none":
        assert method.correction is None
    else:
        assert args.vllm_mode == vllm and isinstance(method.correction, Truncated)
        twice = example.arguments(str(tmp_path), vllm, vllm_importance_sampling_correction=True, **ON_CPU)
        with pytest.raises(ConfigError, match="would count twice"):
            resolve_method(None, KalmanGRPOConfig(**twice))


def test_example_runs_and_goes_on(
    example: ModuleType, model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"{i}{j}>", "answer": str(j)}) + "\n" for i in range(4) for j in range(4)
        )
    )
    reward = """
    SEEN = []
    def score(completions, **columns):
        SEEN.extend(completions)
        return [float(text[:1] in set("13579")) for text in completions]
    """
    Path("scale_rewards.py").write_text(textwrap.dedent(reward))
    words = [
        "--model",
        model_path,
        "--data",
        "rows.jsonl",
        "--reward",
        "scale_rewards:score",
        "--output",
        "out",
    ]
    small = ON_CPU | {"max_completion_length": 4, "save_steps": 4, "learning_rate": 1e-3}
    first = example.main(words, max_steps=4, **small)
    assert first.state.global_step == 4 and (tmp_path / "out" / "checkpoint-4").is_dir()
    second = example.main(words, max_steps=8, **small)
    assert second.state.global_step == 8
    assert len(sys.modules["scale_rewards"].SEEN) == 64, (
        "two generation batches in all: the second run went on"
    )
