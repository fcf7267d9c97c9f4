"""The main job end to end on a random character model: files, resume, Ctrl-C, bad rewards."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
import pyarrow.parquet as parquet
from safetensors.torch import load_file

from kalman_rl.engine.callbacks import Progress
from kalman_rl.engine.config import TrainConfig, build, to_toml, validate
from kalman_rl.engine.models.load import load_model
from kalman_rl.engine.runs.reading import read_metrics
from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.train import train
from kalman_rl.errors import ConfigError, NumericError, RewardError
from kalman_rl.kernels.memory import keep_freed_memory

SMALL: dict[str, Any] = {
    "dtype": "float32",  # not what this CPU happens to be fast at
    "task": "sort12",
    "method": "kpo_diffuse",
    "steps": 4,
    "prompts_per_generation": 4,
    "completions_per_prompt": 4,
    "updates_per_generation": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "lora_rank": 0,
    "eval_every": 2,
    "eval_prompts": 8,
    "save_every": 2,
    "traces_per_step": 2,
    "train_size": 32,
    "test_size": 16,
    "max_completion_tokens": 5,
    "quiet": True,
}


@pytest.fixture
def rewards_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(
        "calls = 0\n"
        "def digits(completions, **columns):\n"
        "    return [sum(c.isdigit() for c in text) / 5 for text in completions]\n"
        "def late_failure(completions, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls > 5:\n"
        "        raise ZeroDivisionError('the grader broke')\n"
        "    return digits(completions)\n"
        "def noisy(completions, data_source, **columns):\n"
        "    import torch\n"
        "    return [float(torch.randn(())) * {'maths': 0.1, 'code': 2.0}[name] for name in data_source]\n"
        "def too_few(completions, **columns):\n"
        "    return [0.0]\n"
        "def nan(completions, **columns):\n"
        "    return [float('nan')] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_rewards", None)
    return tmp_path


def start(model_path: str, path: Path, **changes: Any) -> tuple[TrainConfig, int]:
    config = build(TrainConfig, SMALL | {"model": model_path, "run": path} | changes)
    validate(config)
    labels = {"method": config.method, "seed": config.seed}
    with Run.create(path, to_toml(config), labels) as run:
        return config, train(config, run)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model" / "model.safetensors")


def test_a_run_leaves_everything_behind(model_path: str, rewards_module: Path) -> None:
    path = rewards_module / "run"
    _, code = start(model_path, path, reward="my_rewards:digits")
    assert code == 0
    manifest = json.loads((path / "manifest.json").read_text())
    assert (
        manifest["status"] == "finished" and manifest["dtype"] == "float32" and manifest["versions"]["torch"]
    )
    rows = read_metrics(path)
    assert [r["step"] for r in rows if r["kind"] == "train"] == [1, 2, 3, 4]
    assert [r["step"] for r in rows if r["kind"] == "eval"] == [0, 2, 4]
    assert {"loss", "ratio/raw_log_variance", "trust/kept", "policy/kl_old"} <= rows[-2].keys()
    if sys.platform == "linux":  # in GB: torch alone takes a tenth
        assert (
            0.1
            < rows[-2]["memory/process_most"]
            < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
        )
    assert len(Run.open(path).checkpoints()) == 2
    assert (path / "model" / "model.safetensors").is_file() and (path / "model" / "tokenizer.json").is_file()

    traces = [parquet.read_table(file).to_pylist() for file in sorted((path / "traces").glob("*.parquet"))]
    assert len(traces) == 4
    second = traces[1]  # off-policy: the second update of the first generation batch
    assert {row["sequence"] for row in second} == {0, 1}
    assert any(row["log_ratio"] != 0 for row in second)
    for row in second:
        assert row["log_ratio"] == pytest.approx(row["logp"] - row["logp_old"], abs=1e-6)
        assert row["coefficient"] == (
            pytest.approx(torch.tensor(row["filtered_log_ratio"]).exp().item(), rel=1e-5)
            if row["kept"]
            else 0
        )
    first = [row for row in second if row["sequence"] == 0]
    assert first[0]["gain"] == pytest.approx(1.0), "diffuse start: the first token is believed"
    assert "".join(row["token"] for row in first) == first[0]["completion"]
    asked = first[0]["prompt"].strip().rstrip(">").splitlines()[-1]
    assert first[0]["answer"] == "".join(sorted(asked))  # what the task expects: the digits in order


def test_resume_gives_the_weights_of_the_uninterrupted_run(model_path: str, rewards_module: Path) -> None:
    whole, cut = rewards_module / "whole", rewards_module / "cut"
    start(model_path, whole, reward="my_rewards:digits")
    config, _ = start(model_path, cut, reward="my_rewards:digits")
    # As a crash after step 2 would leave it: no later checkpoint, torn last line.
    with Run.open(cut) as run:
        last = run.checkpoints()[-1]
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink()
    last.rmdir()
    (cut / "model" / "model.safetensors").unlink()
    with (cut / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 5, "lo')
    with Run.open(cut) as run:
        assert train(config, run, resume=True) == 0
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(cut)[name]), name
    strip = lambda rows: [  # noqa: E731
        {k: v for k, v in r.items() if k not in {"time", "step_time", "memory/process_most"}}
        for r in rows
        if r["kind"] == "train"
    ]
    assert strip(read_metrics(whole)) == strip(read_metrics(cut))


def break_gradient(monkeypatch: pytest.MonkeyPatch, *passes: int) -> None:
    """NaN in one gradient of these backward passes, counted from 1."""

    def load(*args: Any, **kwargs: Any) -> Any:
        loaded, done = load_model(*args, **kwargs), []

        def change(gradient: torch.Tensor) -> torch.Tensor:
            done.append(0)
            return gradient * math.nan if len(done) in passes else gradient

        loaded.model.model.norm.weight.register_hook(change)
        return loaded

    monkeypatch.setattr("kalman_rl.engine.train.load_model", load)


def test_a_gradient_of_nan_stops_the_run_which_resumes(
    model_path: str, rewards_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rewards_module / "run"
    with monkeypatch.context() as patch:
        break_gradient(patch, 3)
        with pytest.raises(
            NumericError, match=r"^step 3: got a gradient .*last good checkpoint is .*checkpoint-2"
        ):
            start(model_path, path, reward="my_rewards:digits")
    assert json.loads((path / "manifest.json").read_text())["status"] == "failed"
    with Run.open(path) as run:
        assert [folder.name for folder in run.checkpoints()] == ["checkpoint-2"]
        config = build(TrainConfig, SMALL | {"model": model_path, "run": path, "reward": "my_rewards:digits"})
        assert train(config, run, resume=True) == 0
    whole = rewards_module / "whole"
    start(model_path, whole, reward="my_rewards:digits")
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(path)[name]), name


def test_a_step_with_a_gradient_of_nan_may_be_skipped(
    model_path: str, rewards_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_gradient(monkeypatch, 3)
    path = rewards_module / "run"
    _, code = start(model_path, path, reward="my_rewards:digits", nonfinite="skip")
    assert code == 0 and all(value.isfinite().all() for value in weights(path).values())
    rows = [row for row in read_metrics(path) if row["kind"] == "train"]
    assert [row["step/skipped"] for row in rows] == [0.0, 0.0, 1.0, 0.0]


def test_dropout_of_a_model_is_switched_off(model_path: str, rewards_module: Path) -> None:
    """At learning rate 0 no ratio moves, whatever the model's settings say, with LoRA as well."""
    noisy = rewards_module / "noisy"
    shutil.copytree(model_path, noisy)
    settings = json.loads((noisy / "config.json").read_text()) | {"attention_dropout": 0.1}
    (noisy / "config.json").write_text(json.dumps(settings))
    path = rewards_module / "run"
    start(str(noisy), path, reward="my_rewards:digits", learning_rate=0.0, lora_rank=2)
    rows = [row for row in read_metrics(path) if row["kind"] == "train"]
    assert max(row["ratio/max_abs_log_ratio"] for row in rows) < 1e-5
    assert all(row["trust/kept"] == 1 for row in rows)


@pytest.mark.timeout(240)
def test_ctrl_c_finishes_saves_and_exits_130(model_path: str, rewards_module: Path) -> None:
    path = rewards_module / "run"
    flags = {k.replace("_", "-"): v for k, v in SMALL.items() if k != "quiet"} | {
        "model": model_path,
        "run": path,
        "steps": 4000,
        "save-every": 0,
        "eval-every": 0,
        "reward": "my_rewards:digits",
    }
    command = [sys.executable, "-m", "kalman_rl.cli.main", "train"]
    command += [word for k, v in flags.items() for word in (f"--{k}", str(v))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (path / "metrics.jsonl").is_file() and '"step": 3' in (path / "metrics.jsonl").read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, stderr
    assert f"kalman-rl resume {path}" in stderr and "Traceback" not in stderr
    with Run.open(path) as run:
        assert run.manifest["status"] == "interrupted"
        checkpoint = run.latest_checkpoint()
    step = int(checkpoint.name.rpartition("-")[2])
    assert step % 2 == 0 and step == [r for r in read_metrics(path) if r["kind"] == "train"][-1]["step"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("late_failure", "ZeroDivisionError.*the grader broke"),
        ("too_few", "got 1.*expected 16"),
        ("nan", "missing"),
    ],
)
def test_a_bad_reward_stops_with_its_name_and_loses_nothing(
    function: str, message: str, model_path: str, rewards_module: Path
) -> None:
    path = rewards_module / "run"
    with pytest.raises(RewardError, match=rf"(?s)my_rewards|{function}") as caught:
        start(model_path, path, reward=f"my_rewards:{function}", steps=6)
    assert function in str(caught.value)
    assert json.loads((path / "manifest.json").read_text())["status"] == "failed"
    if function == "late_failure":  # in the second generation batch; the third is one too many
        assert "grader broke" in str(caught.value)
        assert [r["step"] for r in read_metrics(path) if r["kind"] == "train"] == [1, 2, 3, 4]
        assert len(Run.open(path).checkpoints()) == 2


def test_own_rows_in_jsonl(model_path: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}>", "answer": str(i)}) + "\n" for i in range(40)))
    _, code = start(model_path, tmp_path / "run", data=rows, steps=2)
    assert code == 0
    last = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "eval"][-1]
    assert 0 <= last["eval/sampled_accuracy"] <= 1 and last["eval/count"] > 0


def test_a_tracked_run_writes_its_beliefs_down(model_path: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    changes = {"advantage": "tracked", "allocation": "rounds", "completions_max": 8, "task": "sort12"}
    _, code = start(model_path, path, **changes)
    assert code == 0
    rows = [json.loads(line) for line in (path / "beliefs.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2] and all(row["used"] == 16 == row["rows"] for row in rows)
    logged = [row["budget/used"] for row in read_metrics(path) if "budget/used" in row]
    assert logged == [16.0, 16.0]
    asked = {text for row in rows for text in row["texts"].values()}
    assert len(asked) == len({name for row in rows for name in row["id"]}) and all(
        len(text) > 5 for text in asked
    )
    assert all(len(row["next"]) == len(row["id"]) == 16 and sum(row["next"]) == 16 for row in rows)


def test_each_source_of_a_file_learns_its_own_noise(model_path: str, rewards_module: Path) -> None:
    rows = rewards_module / "rows.jsonl"
    content = [
        {"prompt": f"{i}>", "prompt_id": i, "data_source": ("maths", "code")[i % 2]} for i in range(16)
    ]
    rows.write_text("".join(json.dumps(row | {"split": "train"}) + "\n" for row in content))
    changes = {
        "data": rows,
        "reward": "my_rewards:noisy",
        "advantage": "tracked",
        "steps": 24,
        "save_every": 0,
    }
    changes |= {"reward_range": "real", "eval_every": 0, "eval_prompts": 1, "learning_rate": 0.0}
    message = "^source_column: got 'source', expected a column of the dataset, which has prompt, prompt_id, data_source"
    with pytest.raises(ConfigError, match=message):
        start(model_path, rewards_module / "none", source_column="source", **changes)
    holes = rewards_module / "holes.jsonl"
    holes.write_text("".join(json.dumps({"split": "train", "topic": 1} | row) + "\n" for row in content[:4]))
    with holes.open("a") as file:
        file.write(json.dumps(content[5] | {"split": "train", "topic": None}))
    with pytest.raises(
        ConfigError, match="^source_column: got None for prompt 5, expected a text or integer in every"
    ):
        start(model_path, rewards_module / "holes", source_column="topic", **changes | {"data": holes})
    path = rewards_module / "run"
    _, code = start(model_path, path, source_column="data_source", **changes)
    assert code == 0
    noise = {}  # as last written
    for batch in map(json.loads, (path / "beliefs.jsonl").read_text().splitlines()):
        noise |= {content[int(name)]["data_source"]: sd for name, sd in zip(batch["id"], batch["noise"])}
    assert noise == {"maths": pytest.approx(0.1, rel=0.3), "code": pytest.approx(2.0, rel=0.3)}


def test_too_few_rows_for_a_generation_batch(model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts_per_generation: got 64.*32 training rows"):
        start(model_path, tmp_path / "run", prompts_per_generation=64)


def test_short_completions_under_a_zero_start_are_announced(
    model_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(model_path, tmp_path / "run", method="kpo", steps=2, quiet=False)
    assert "time constants" in caplog.text


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(2)
    progress(1, {"reward": 0.5, "ratio/raw_log_variance": 0.25})
    progress(2, {})
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2 and "step 1/2" in lines[0] and "reward 0.500" in lines[0] and "\x1b" not in lines[0]
    )


def test_freed_memory_is_kept_on_glibc_only() -> None:
    glibc = sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
    assert keep_freed_memory() is glibc
