"""The doctor on this environment, and on broken ones made of stub packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from kalman_rl.hosts.trl import hooks as trl_hooks
from kalman_rl.instruments.doctor import Finding, Plan, doctor, examine, hosts, machine, reward, versions

ROWS = [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in range(1, 9)]
GOOD_TRAINER = "\n".join(
    f"    def {name}(self, {', '.join((*hook.leading, *hook.names, '*more'))}): ..."
    for name, hook in trl_hooks.HOOKS.items()
)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Every library as an empty module of the installed version; ``stub(name, code)`` writes another one."""
    folder = tmp_path / "stubs"
    folder.mkdir()

    def write(name: str, code: str = "") -> None:
        version = metadata.version(name) if name in versions.LIBRARIES else "0"
        (folder / f"{name}.py").write_text(f"__version__ = {version!r}\n{code}\n")

    for name in versions.LIBRARIES:
        write(name)
    write("trl", f"class GRPOTrainer:\n{GOOD_TRAINER}")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return write


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    """The worst finding of each check."""
    order = ["ok", "warning", "problem"]
    return {f.check: f for f in sorted(findings, key=lambda f: order.index(f.status))}


def rewards(tmp_path: Path, name: str, code: str) -> str:
    """Write a reward module; its name for --reward."""
    (tmp_path / f"{name}.py").write_text(
        f"import os, time\ndef score(completions, answer, **columns):\n    {code}\n"
    )
    return f"{name}:score"


# ---- this environment


def test_this_environment_is_sound(data: Path, tmp_path: Path) -> None:
    """The whole thing as a user starts it: no problem, exit code 0, every library found in its range."""
    command = [
        sys.executable,
        "-m",
        "kalman_rl.instruments.doctor",
        "--json",
        "--data",
        str(data),
        "--run",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    table = json.loads(run.stdout)
    assert run.returncode == 0 and table["problems"] == 0, run.stdout + run.stderr
    found = by_check([Finding(**item) for item in table["findings"]])
    expected = {
        "python",
        *versions.LIBRARIES,
        "trl hooks",
        "verl plugin",
        "gpu build",
        "cpu",
        "memory",
        "reward",
    }
    assert set(found) >= expected | {"disk", "time"}
    assert metadata.version("trl") in found["trl"].found and "==1.16.*" in found["trl"].found
    assert next(f["found"] for f in table["findings"] if f["check"] == "reward").endswith(
        "-> 1.0; empty reply -> 0.0"
    )
    assert "lower bound" in found["time"].found


def test_a_problem_is_exit_code_one(stub: Any, data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    bad = Plan(data=data, reward=rewards(tmp_path, "raising", "raise KeyError('gold')"))
    assert doctor(bad, show=lines.append) == 1
    (line,) = [line for line in lines if line.startswith("problem  reward")]
    assert "KeyError: 'gold'" in line and "raising.py:3" in line and "\n" + " " * 23 + "do: correct" in line
    assert lines[-1].startswith("problems: ")


# ---- broken libraries


def test_broken_imports_are_findings(stub: Any) -> None:
    stub("numba", "import sys; print('noise on stdout'); sys.exit('numba wants to stop')")
    stub("triton", "raise ImportError('libcuda.so.1: \\x1b[31mcannot open')")
    stub("accelerate", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    stub("verl", "import os; os.write(2, b'Fatal: no device\\n'); os._exit(3)")
    found = by_check(list(examine(Plan())))
    assert found["torch"].status == found["transformers"].status == "ok"
    assert "SystemExit: numba wants to stop" in found["numba"].found
    assert "libcuda.so.1:  [31mcannot open" in found["triton"].found
    assert found["accelerate"].found == "the process was killed by SIGSEGV"
    assert found["verl"].found == "the process ended with exit code 3: Fatal: no device"
    assert all(found[name].status == "problem" for name in ("numba", "triton", "accelerate", "verl"))
    assert found["trl"].found == "not looked at, because accelerate does not import"
    assert found["trl hooks"].found == "not looked at, because trl does not import"
    assert found["disk"].status == "ok", "the rest goes on"


def test_without_torch_the_rest_is_still_looked_at(stub: Any) -> None:
    stub("torch", "raise OSError('libtorch_cpu.so: undefined symbol')")
    found = by_check(list(examine(Plan())))
    assert found["torch"].status == "problem" and "undefined symbol" in found["torch"].found
    assert "--force-reinstall 'torch>=2.7'" in found["torch"].advice
    for name in ("transformers", "trl", "verl", "device", "trl hooks"):
        assert "torch does not import" in found[name].found or "trl does not import" in found[name].found
    assert found["numba"].status == found["memory"].status == "ok"


def test_a_hanging_import_is_ended(stub: Any) -> None:
    stub("triton", "import time; time.sleep(600)")
    found = by_check(list(examine(Plan(), patience=0.05)))
    assert found["triton"].found == "no answer within 3 s" and found["triton"].status == "problem"
    assert found["accelerate"].status == "ok"


def test_two_copies_and_wrong_versions(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("verl", "__version__ = '0.1'")
    assert "but what imports is 0.1 from" in by_check(list(examine(Plan())))["verl"].found
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: {"numba": "0.60.0"}.get(name) or real(name))
    monkeypatch.setitem(sys.modules, "numba", types.ModuleType("numba"))
    (old,) = versions.library("numba", Plan())
    assert old.status == "problem" and old.found.startswith("0.60.0, expected >=0.61")
    assert old.advice == "pip install 'numba>=0.61'"


def test_absent_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {name: next(iter(versions.library(name, Plan()))) for name in versions.LIBRARIES}
    assert found["torch"].status == "problem" and found["trl"].status == "warning"
    assert found["trl"].advice == "pip install 'kalman-rl[train]'"
    assert found["numba"].status == found["verl"].status == "ok" and "kalman-rl[fast]" in found["numba"].found


# ---- hosts


def test_a_moved_hook_is_named(stub: Any) -> None:
    moved = GOOD_TRAINER.replace("_compute_loss(self, model, inputs", "_compute_loss(self, batch")
    moved = moved.replace("def _tokenize_prompts", "def tokenize")
    stub("trl", f"class GRPOTrainer:\n{moved}")
    texts = [f for f in examine(Plan()) if f.check == "trl hooks"]
    assert [f.status for f in texts] == ["problem", "problem"]
    assert texts[0].found.startswith("GRPOTrainer._compute_loss: got (batch, more), expected (model, inputs")
    assert texts[1].found.startswith("GRPOTrainer._tokenize_prompts: got no such method")
    assert "trl==1.16.*" in texts[0].advice


def test_the_table_of_hooks_is_complete() -> None:
    """Whatever the trainer overrides of TRL's own stands in the table, and TRL has it as the table says."""
    trl = pytest.importorskip("trl")
    from kalman_rl.hosts.trl import KalmanGRPOTrainer

    overridden = {
        n for n, v in vars(KalmanGRPOTrainer).items() if callable(v) and hasattr(trl.GRPOTrainer, n)
    }
    assert overridden and overridden <= set(trl_hooks.HOOKS)
    assert trl_hooks.moved(trl.GRPOTrainer) == []


def plugin_finding(monkeypatch: pytest.MonkeyPatch, registered: Any, known: dict[str, Any]) -> Finding:
    """The plugin check with a stub of verl, and of our plugin if there is one."""
    core = types.ModuleType("verl.trainer.ppo.core_algos")
    core.POLICY_LOSS_REGISTRY = known  # type: ignore[attr-defined]
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        package = types.ModuleType(name)
        package.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, core.__name__, core)
    ours = types.ModuleType("kalman_rl.hosts.verl")
    ours.registered = registered  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, ours.__name__, ours)
    (finding,) = hosts.plugin(Plan())
    return finding


def test_verl_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"losses": ["kalman_rl/kpo"], "estimators": ["kalman_rl/grpo"]}
    entries: list[Any] = []
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries if group == "verl.plugins" else [])
    monkeypatch.delenv("VERL_USE_EXTERNAL_PLUGINS", raising=False)
    check = lambda known: plugin_finding(monkeypatch, lambda: names, known)  # noqa: E731
    assert check({}).found.startswith("plugin not installed")
    entries.append(types.SimpleNamespace(name="kalman_rl", value="kalman_rl.hosts.verl", load=lambda: None))
    good = check({"kalman_rl/kpo": len})
    assert good.status == "ok" and good.found.startswith("1 losses and 1 advantage estimators")
    lost = check({"vanilla": len})
    assert lost.status == "problem" and "does not know kalman_rl/kpo" in lost.found
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    off = check({})
    assert off.status == "warning" and "VERL_USE_EXTERNAL_PLUGINS=none" in off.found
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other,kalman_rl")
    assert check({"kalman_rl/kpo": len}).status == "ok"

    def failing() -> None:
        raise ImportError("ray is not there")

    entries[0].load = failing
    assert "ray is not there" in check({}).found and check({}).status == "problem"


# ---- rewards and settings


@pytest.mark.parametrize(
    ("name", "code", "status", "words"),
    [
        ("good", "return [float(c.strip() == a) for c, a in zip(completions, answer)]", "ok", "s per reward"),
        (
            "nan",
            "return [float('nan') if c == '' else 1.0 for c in completions]",
            "warning",
            "empty reply -> None",
        ),
        ("all_nan", "return [float('nan')] * len(completions)", "warning", "-> None; empty reply -> None"),
        ("short", "return [1.0]", "problem", "returned 1 values, expected a list of 3 numbers"),
        ("words", "return ['right'] * len(completions)", "problem", "returned 'right' (str)"),
        (
            "constant",
            "return [0.0] * len(completions)",
            "warning",
            "0.0 for every right answer and every empty",
        ),
        ("raises", "return [1 / len(c) for c in completions]", "problem", "ZeroDivisionError"),
        (
            "slow",
            "time.sleep(0.3); return [1.0 * bool(c) for c in completions]",
            "warning",
            "0.1 s per reward",
        ),
    ],
)
def test_rewards(
    name: str, code: str, status: str, words: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward, "SLOW", 0.05)
    plan = Plan(data=data, reward=rewards(tmp_path, f"r_{name}", code))
    found = list(reward.dry_run(plan))
    assert by_check(found)["reward"].status == status, found
    assert any(words in finding.found for finding in found), found


def test_a_reward_that_ends_or_blocks_the_process(stub: Any, data: Path, tmp_path: Path) -> None:
    ends = rewards(tmp_path, "ending", "os._exit(7)")
    found = by_check(list(examine(Plan(data=data, reward=ends))))
    assert found["reward"].found == "the process ended with exit code 7" and found["time"].status == "ok"
    blocks = rewards(tmp_path, "blocking", "10**10**9")
    found = by_check(list(examine(Plan(data=data, reward=blocks), patience=0.05)))
    assert found["reward"].found == "no answer within 1.5 s" and found["reward"].status == "problem"


def test_rewards_that_cannot_be_tried(data: Path) -> None:
    (nothing,) = reward.dry_run(Plan())
    assert nothing.status == "ok" and nothing.found.startswith("not asked for")
    (rowless,) = reward.dry_run(Plan(reward="mine:score"))
    assert rowless.status == "warning" and "needs rows" in rowless.found
    (absent,) = reward.dry_run(Plan(data=data, reward="no_such_module:score"))
    assert absent.status == "problem" and "found no module 'no_such_module'" in absent.found
    (unknown,) = reward.dry_run(Plan(task="prodcts"))
    assert unknown.status == "problem" and "'prodcts'" in unknown.found


def test_settings_are_checked_and_used(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'method = "kpo"\nsteps = 40\nupdates_per_generation = 4\ndata = "{data}"\n')
    plan = Plan(config=config)
    (fine,) = reward.settings(plan)
    assert fine.status == "ok" and plan.data == data and plan.task is None
    plan.seconds_per_reward = 0.5
    (time,) = machine.duration(plan)
    assert time.found.startswith("640 rewards * 0.5 s = 5 min"), (
        "40 steps / 4 per generation * 64 completions"
    )
    config.write_text('method = "kpoo"\n')
    (wrong,) = reward.settings(Plan(config=config))
    assert wrong.status == "problem" and "did you mean 'kpo'" in wrong.found
    assert list(reward.settings(Plan())) == []


# ---- machine


@pytest.mark.parametrize(
    ("platform", "available", "present", "status"),
    [
        (None, False, False, "ok"),
        (None, False, True, "problem"),
        ("13.0", True, True, "ok"),
        ("13.0", False, True, "problem"),
        ("13.0", False, False, "warning"),
    ],
)
def test_build_against_devices(platform: str | None, available: bool, present: bool, status: str) -> None:
    finding = machine.build(platform, available, present)
    assert finding.status == status and (finding.advice != "") == (status != "ok")


def test_a_device_that_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.product(torch, "cpu").status == "ok"
    broken = types.SimpleNamespace(
        **{n: getattr(torch, n) for n in ("Generator", "randn", "float64", "bfloat16")}
    )
    broken.float32 = torch.float8_e5m2  # a number format too coarse stands in for wrong arithmetic
    broken.get_num_threads = torch.get_num_threads
    assert machine.product(broken, "cpu").status == "problem"
    absent = machine.product(torch, "cuda:77")
    assert absent.status == "problem" and "a small product failed" in absent.found


def test_memory_respects_the_container(tmp_path: Path) -> None:
    proc = tmp_path / "meminfo"
    proc.write_text("MemTotal: 9 kB\nMemAvailable:    4000000 kB\n")
    assert machine.available_memory(proc, tmp_path) == 4_096_000_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert machine.available_memory(proc, tmp_path) == 4_096_000_000
    (tmp_path / "memory.max").write_text("3000\n")
    assert machine.available_memory(proc, tmp_path) == 2000
    assert machine.available_memory(tmp_path / "none", tmp_path / "none") is None


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (blocked,) = machine.disk(Plan(run=tmp_path / "file" / "run"))
    assert blocked.status == "problem" and "cannot be written to" in blocked.found
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"0" * 1000)
    full = types.SimpleNamespace(lora_rank=0, save_every=10, model=str(model))
    assert machine.checkpoint_bytes(full) == 21_000
    assert (
        machine.checkpoint_bytes(types.SimpleNamespace(lora_rank=8, save_every=10, model=str(model))) is None
    )
    for free, status in ((1e8, "problem"), (1e9, "warning"), (1e10, "ok")):
        monkeypatch.setattr(
            machine.shutil, "disk_usage", lambda folder, free=free: types.SimpleNamespace(free=free)
        )
        (finding,) = machine.disk(Plan(run=tmp_path / "new" / "run"))
        assert finding.status == status


def test_time_from_an_earlier_run(tmp_path: Path) -> None:
    folder = tmp_path / "earlier"
    folder.mkdir()
    rows = [{"kind": "train", "step": i, "time": 2.5 * i + (30 if i > 3 else 0)} for i in range(1, 9)]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"kind": "eval", "step": 8, "time": 99}])
    (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "st')
    assert machine.measured_steps(tmp_path) == (folder, 2.5, 7)
    (finding,) = machine.duration(Plan(run=tmp_path))
    assert finding.found.startswith("20 steps * 2.5 s = 50 s: estimate, the median of 7 steps of")
    assert machine.measured_steps(tmp_path / "nothing") is None
