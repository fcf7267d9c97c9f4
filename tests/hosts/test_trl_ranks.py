"""A process of several dies or hangs: the others stop in time and say why, and the last checkpoint is good."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("trl")
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kalman_rl.errors import RewardError, RunError
from kalman_rl.hosts.state import STATE_FILE, load_state, save_state
from kalman_rl.hosts.trl import last_good_checkpoint
from kalman_rl.hosts.trl.ranks import lost_process
from tests.hosts.test_trl import model_path
from tests.hosts.test_trl_beliefs import flat, trained

__all__ = ["model_path"]  # a fixture

PRELUDE = """
import json, os, signal, sys, time, traceback
sys.path.insert(0, {root!r})
from pathlib import Path
from transformers import TrainerCallback
import tests.hosts.test_trl_beliefs as b
out, model_path = Path({out!r}), {model!r}
options = dict(per_device_train_batch_size=4, num_generations=8, max_steps=8, save_strategy="steps", save_steps=2,
               allocation="rounds", rounds=[1, 2], max_rounds=3, budget=3.3)

class End(TrainerCallback):
    def __init__(self, name, sent):
        self.name, self.sent = name, sent
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5 and os.environ["RANK"] == "1":
            (out / ("ended-" + self.name)).write_text(str(time.time()))
            os.kill(os.getpid(), self.sent)

def train(name, sent=None, **changes):
    if sent is not None:
        changes["callbacks"] = [End(name, sent)]
    return b.trained(out / name, model_path, **(options | changes))[0]

def write(name, value):
    (out / ("tmp-" + name)).write_text(json.dumps(value))
    (out / ("tmp-" + name)).rename(out / (name + ".json"))
"""

BARE = """
def forked(name, port, **arguments):
    \"\"\"Process ids of two forked ranks without an agent.\"\"\"
    pids = []
    for rank in ("0", "1"):
        pids.append(os.fork())
        if not pids[-1]:
            os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            log = os.open(out / f"log-{name}-{rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1), os.dup2(log, 2)
            train(name, **arguments)
            sys.exit(0)
    return pids

def code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def bare(name, port, **arguments):
    \"\"\"How rank 0 ended, and how long after rank 1.\"\"\"
    pids = forked(name, port, **arguments)
    ended = code(pids[0])
    seconds = time.time() - float((out / f"ended-{name}").read_text())
    os.kill(pids[1], signal.SIGKILL)
    os.waitpid(pids[1], 0)
    write(name, [ended, seconds])

def away(completions, **columns):
    if os.environ["RANK"] == "1":
        raise ValueError("the grader of rank 1 is away")
    return [float(len(text) % 2) for text in completions]

bare("killed", PORTS[0], sent=signal.SIGKILL)
bare("hanging", PORTS[1], sent=signal.SIGSTOP, ddp_timeout=4)
write("away", [code(pid) for pid in forked("away", PORTS[2], reward=away, reward_timeout=60)])
"""


def ports(count: int) -> list[str]:
    """Free ports of this machine."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def started(body: str, model: str, out: Path, *launch: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process group that runs ``body``, through a launcher if one is named; ended at the latest on leaving."""
    script = out / "script.py"
    prelude = PRELUDE.format(root=str(Path(__file__).parents[2]), out=str(out), model=model)
    script.write_text(prelude + textwrap.dedent(body))
    with (out / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *launch, str(script)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def bare(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of trainings without an agent: rank 1 was killed in the one, stopped in the other.
    In a third its rewards fail."""
    out = tmp_path_factory.mktemp("bare")
    with started(f"PORTS = {ports(3)!r}\n{BARE}", model_path, out) as process:
        process.wait(timeout=250)
    assert process.returncode == 0, (out / "log").read_text()[-3000:]
    return out


@pytest.mark.timeout(300)
def test_killed_rank(bare: Path) -> None:
    """SIGKILL of rank 1 in step 6, saved every 2: rank 0 ends by itself and names step and checkpoint."""
    code, seconds = json.loads((bare / "killed.json").read_text())
    text = (bare / "log-killed-0").read_text()
    assert code == 1 and seconds < 60, text[-2000:]
    assert "RunError: rank 0: got no answer from another process of 2 at step 5" in text
    assert f"resume_from_checkpoint='{bare / 'killed' / 'checkpoint-4'}'" in text
    assert last_good_checkpoint(bare / "killed") == bare / "killed" / "checkpoint-4"


def test_hanging_rank(bare: Path) -> None:
    """A rank that stands still ends the other after ddp_timeout, on CPU as well."""
    code, seconds = json.loads((bare / "hanging.json").read_text())
    text = (bare / "log-hanging-0").read_text()
    assert code == 1 and 4 <= seconds < 60, text[-2000:]
    assert "got no answer from another process of 2 at step 5" in text and "limit ddp_timeout = 4 s" in text


def test_rewards_that_fail_on_one_rank_end_both(bare: Path) -> None:
    """Half of all completions have no reward: that is counted over the ranks, and each of them says so."""
    assert json.loads((bare / "away.json").read_text()) == [1, 1]
    for rank in (0, 1):
        text = (bare / f"log-away-{rank}").read_text()
        found = re.search(
            r"RewardError: reward: got no result of away for (\d+)% of the completions in the last 3", text
        )
        assert found and 40 <= int(found[1]) <= 60
        whose = "those of another process" if rank == 0 else "ValueError: the grader of rank 1 is away"
        assert whose in text
    good = last_good_checkpoint(bare / "away")
    assert good is not None and f"a checkpoint of step {good.name.partition('-')[2]} is there" in text


@pytest.mark.timeout(300)
def test_resume_after_a_kill_and_the_agent(bare: Path, model_path: str, tmp_path: Path) -> None:
    """Two ranks that go on from the checkpoint left behind end as two that were never interrupted. Under torchrun
    the agent ends all ranks when one is killed, and names rank and signal."""
    shutil.copytree(bare / "killed", tmp_path / "resumed")
    body = """
    for name, resume in (("resumed", str(out / "resumed" / "checkpoint-4")), ("whole", None)):
        trainer = train(name, resume=resume)
        weights = [p.double().sum().item() for p in trainer.model.parameters()]
        write(name + os.environ["RANK"], [trainer.state.global_step, b.flat(trainer.tracking.state_dict()), weights])
    train("third", signal.SIGKILL)
    """
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={ports(1)[0]}"]
    with started(body, model_path, tmp_path, *launch, "--master-addr=127.0.0.1") as agent:
        agent.wait(timeout=250)
        now, text = time.time(), (tmp_path / "log").read_text()
    assert (tmp_path / "ended-third").exists(), text[-3000:]
    assert agent.returncode == 1 and now - float((tmp_path / "ended-third").read_text()) < 60
    assert "Signal 9 (SIGKILL) received by PID" in text and "rank      : 1 (local_rank: 1)" in text
    names = [f"{name}{rank}.json" for name in ("resumed", "whole") for rank in (0, 1)]
    results = [json.loads((tmp_path / name).read_text()) for name in names]
    assert all(result == results[0] for result in results)
    assert results[0][0] == 8 and len(results[0][1]) > 50
    assert last_good_checkpoint(tmp_path / "third") == tmp_path / "third" / "checkpoint-4"


def test_torn_checkpoints_are_passed_over(model_path: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer, _, _ = trained(tmp_path, model_path, **options)
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    (tmp_path / "checkpoint-6" / STATE_FILE).unlink()  # killed before the last file of the save
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    with pytest.raises(RunError, match="or the save was cut short"):
        trained(tmp_path, model_path, resume=str(tmp_path / "checkpoint-6"), **options | {"max_steps": 8})
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    good = last_good_checkpoint(tmp_path)
    assert good == tmp_path / "checkpoint-2"
    state = load_state(good)
    assert state is not None and trainer.tracking is not None
    assert len(flat(state["tracking"])) > 20
    with safe_open(str(good / "model.safetensors"), framework="pt") as file:
        assert list(file.keys())
    (good / "trainer_state.json").write_text('{"epoch"')
    (tmp_path / "checkpoint-late").mkdir()
    assert last_good_checkpoint(tmp_path) is None and last_good_checkpoint(tmp_path / "none") is None


def test_only_lost_processes_are_renamed() -> None:
    assert not lost_process(RewardError("reward: score raised TimeoutError: gloo took too long"))
    assert not lost_process(RuntimeError("CUDA out of memory"))
    assert lost_process(
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:1] Timed out waiting 4000ms")
    )


# ---- the file of our state


def test_state_of_either_format_comes_back(tmp_path: Path) -> None:
    state = {
        "method": "kpo",
        "learning": {},
        "tracking": {"ids": ["a", 7, ("b", 1)], "mean": torch.arange(3.0)},
    }
    save_state(tmp_path, state)
    found = load_state(tmp_path)
    assert found is not None and found["tracking"]["ids"] == ["a", 7, ("b", 1)]
    assert torch.equal(found["tracking"]["mean"], state["tracking"]["mean"])
    plain = {"dict": [["method", "kpo"], ["x", {"tensor": "/x"}]]}  # as version 0.1.0 wrote it
    header = {"kalman_rl": json.dumps({"format": 1, "state": plain})}
    save_file({"/x": torch.ones(2)}, str(tmp_path / STATE_FILE), metadata=header)
    old = load_state(tmp_path)
    assert old is not None and old["method"] == "kpo" and torch.equal(old["x"], torch.ones(2))
    for wrong, words in (({"format": 3}, "got format 3"), ({"format": 2}, "cannot be read")):
        save_file(
            {"/x": torch.ones(2)}, str(tmp_path / STATE_FILE), metadata={"kalman_rl": json.dumps(wrong)}
        )
        with pytest.raises(RunError, match=words):
            load_state(tmp_path)


def test_state_of_millions_of_prompts_fits(tmp_path: Path) -> None:
    """More prompt ids than the 100 MB of a safetensors header hold: few long ones stand in for many short ones."""
    save_state(tmp_path, {"ids": [f"{i}-" + "x" * 1_000_000 for i in range(101)]})
    found = load_state(tmp_path)
    assert found is not None and len(found["ids"]) == 101 and found["ids"][100].startswith("100-x")
