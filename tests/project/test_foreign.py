"""Somebody else's method and belief: from an installed package or a module, through every door."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("tyro")

from kalman_rl.beliefs import BELIEFS, make_belief
from kalman_rl.cli.main import main
from kalman_rl.engine.config import TrainConfig, validate
from kalman_rl.engine.runs.reading import read_metrics
from kalman_rl.engine.runs.run import Run
from kalman_rl.errors import ConfigError
from kalman_rl.instruments.contract import contract
from kalman_rl.methods import METHODS, cards, make_method

DOCS = Path(__file__).resolve().parents[2] / "docs"
PACKAGE = '''
from dataclasses import dataclass

import torch
from kalman_rl.beliefs import Advantages, Observed
from kalman_rl.numerics.kalman import Gaussian
from kalman_rl.objectives.aggregate import token_mean
from kalman_rl.objectives import Method
from kalman_rl.objectives.advantage import leave_one_out
from kalman_rl.objectives.ratio import token
from kalman_rl.objectives.trust import Trust, everything, weight_of


@dataclass(frozen=True)
class Tempered:
    power: float

    def __call__(self, ratio, advantage, current, rollouts):
        weight = weight_of(self.power * ratio.log_weight)
        return Trust(everything(weight), weight, -advantage * weight)


def tempered(*, power: float = 0.5) -> Method:
    """Ratios to a power.

    w_t = exp(power * l_t)
    """
    return Method("whatever", leave_one_out, token, Tempered(power), token_mean)


class Counts:
    """Value of a prompt from all of its rewards; it never drifts."""

    def __init__(self):
        self.rows = {}

    def _of(self, ids):
        found = torch.tensor([self.rows.get(name, [0.0, 0.0]) for name in ids], dtype=torch.float64)
        return found[:, 0], found[:, 1]

    def predict(self, ids, *, step, features=None):
        total, n = self._of(ids)
        return Gaussian((0.5 + total) / (1 + n), 0.25 / (1 + n))

    def predictive(self, ids, *, step, features=None):
        value = self.predict(ids, step=step)
        return Gaussian(value.mean, value.variance + 0.25)

    def advantages(self, ids, reward, *, step, features=None):
        total, n = self._of(ids)
        same = torch.tensor([[a == b for b in ids] for a in ids]) & ~torch.eye(len(ids), dtype=torch.bool)
        known = reward.double().nan_to_num()
        baseline = (0.5 + total + same.double() @ known) / (1 + n + same.sum(1))
        advantage = torch.where(reward.isnan(), 0.0, known - baseline)
        return Advantages(advantage, baseline, torch.ones((), dtype=torch.float64))

    def update(self, ids, reward, *, step, features=None, part=0):
        for name, value in zip(ids, reward.tolist()):
            total, n = self.rows.get(name, [0.0, 0.0])
            self.rows[name] = [total + value, n + 1]
        seen = list(dict.fromkeys(ids))
        empty = torch.zeros(len(seen), dtype=torch.float64)
        return Observed(seen, empty, empty, empty, empty)

    def state_dict(self):
        return {"rows": [[name, *row] for name, row in self.rows.items()]}

    def load_state_dict(self, state):
        self.rows = {name: [total, n] for name, total, n in state["rows"]}


not_a_method = Counts
number = 3.0


def broken():
    raise ZeroDivisionError("no method today")
'''
ENTRIES = {
    "kalman_rl.methods": {"tempered": "tiny_foreign:tempered"},
    "kalman_rl.beliefs": {"counts": "tiny_foreign:Counts"},
}
SMALL = (
    "--task sort12 --steps 4 --prompts-per-generation 4 --completions-per-prompt 4 --updates-per-generation 2 "
    "--learning-rate 1e-2 --warmup-steps 0 --lora-rank 0 --eval-every 0 --eval-prompts 4 --save-every 2 "
    "--traces-per-step 2 --train-size 8 --test-size 8 --max-completion-tokens 5 --dtype float32 --quiet"
).split()


def install(site: Path, package: str, entries: dict[str, dict[str, str]]) -> None:
    """What pip leaves behind: metadata and entry points beside the module."""
    info = site / f"{package.replace('-', '_')}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    lines = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in entries.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (info / "RECORD").write_text("")


def blocks(page: str, language: str) -> list[str]:
    """Blocks of code of a page of the documentation."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)


def run(command: list[str], folder: Path, *paths: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python process in a folder, with more places to import from."""
    python_path = os.pathsep.join([*map(str, paths), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": python_path, "PYTHONDONTWRITEBYTECODE": "1"} | variables
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def kalman_rl(folder: Path, site: Path, *words: object) -> str:
    done = run(["-m", "kalman_rl.cli.main", *map(str, words)], folder, site)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "tiny_foreign.py").write_text(PACKAGE)
    install(folder, "tiny-foreign", ENTRIES)
    return folder


@pytest.fixture(scope="module")
def trained(site: Path, model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the package's method with advantages from its belief."""
    folder = tmp_path_factory.mktemp("work")
    choice = "--method tempered --method-options power=0.7 --advantage tracked --belief counts".split()
    kalman_rl(folder, site, "train", "--model", model_path, "--run", "run", *SMALL, *choice)
    return folder / "run"


# ---- with the package installed


def test_the_run_says_what_it_was_trained_with(trained: Path) -> None:
    settings = (trained / "config.toml").read_text()
    assert 'method = "tempered"' in settings and 'belief = "counts"' in settings
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["labels"]["method"] == "tempered+counts"


def test_resume_continues_method_and_belief(trained: Path, site: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut)
    with Run.open(cut) as half:  # as a crash after step 2 would leave it
        shutil.rmtree(half.checkpoints()[-1])
        half.update_manifest(status="running")
    kalman_rl(tmp_path, site, "resume", cut, "--quiet")
    columns = ("step", "loss", "reward", "budget/used", "belief/coverage_90")
    again, whole = ([[row.get(c) for c in columns] for row in read_metrics(path)] for path in (cut, trained))
    assert again == whole
    records = [(path / "beliefs.jsonl").read_text().splitlines()[-1] for path in (cut, trained)]
    assert json.loads(records[0]) == json.loads(records[1]) and json.loads(records[0])["after"]


def test_replay_recomputes_it(trained: Path, site: Path) -> None:
    text = kalman_rl(trained.parent, site, "replay", trained, "--method", "tempered", "--json")
    shown = json.loads(text)
    assert shown["method"] == "tempered" and shown["self_check"]["method"] == "tempered"
    assert shown["self_check"]["passed"] is True
    assert shown["overall"]["cosine"] < 1, "the default power is not the run's"


def test_the_report_shows_it(trained: Path, site: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    kalman_rl(tmp_path, site, "report", trained, "--output", page)
    text = page.read_text()
    assert "tempered+counts" in text and "Tempered(power=0.7)" in text
    assert "not recomputed" not in text


def test_it_is_listed_with_its_package(site: Path, tmp_path: Path) -> None:
    table = kalman_rl(tmp_path, site, "methods")
    assert "Methods of installed packages" in table and "[package tiny-foreign 0.1]" in " ".join(
        table.split()
    )
    card = kalman_rl(tmp_path, site, "methods", "tempered")
    assert "Ratios to a power." in card and "w_t = exp(power * l_t)" in card
    assert "Tempered(power=0.5)" in card and "tiny-foreign 0.1" in card


VERL = """
import sys
import torch
import verl
from verl.trainer.ppo import core_algos
from kalman_rl.hosts.verl import KalmanPolicyLossConfig, register, registered
from verl.workers.config import FSDPActorConfig

assert "kalman_rl/tempered" in registered()["losses"] and "kalman_rl/tempered" in registered()["estimators"]
assert "kalman_rl/my_methods:soft" in registered()["losses"], "the module of VERL_USE_EXTERNAL_MODULES"
assert "tiny_foreign" not in sys.modules, "listing imports nobody's code"


def loss(name, power):
    policy = KalmanPolicyLossConfig(loss_mode=name, options={"power": power})
    config = FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy
    )
    logp, mask = torch.full((2, 3), -1.0, requires_grad=True), torch.ones(2, 3)
    value, _ = core_algos.get_policy_loss_fn(name)(
        old_log_prob=torch.full((2, 3), -1.5),
        log_prob=logp,
        advantages=mask,
        response_mask=mask,
        loss_agg_mode="token-mean",
        config=config,
    )
    value.backward()
    return logp.grad.sum().item()


register("tiny_foreign:tempered")
print(loss("kalman_rl/tempered", 0.5), loss("kalman_rl/tiny_foreign:tempered", 1.0))
estimate = core_algos.get_adv_estimator_fn("kalman_rl/tiny_foreign:tempered")
rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
assert core_algos.get_adv_estimator_fn("kalman_rl/my_methods:soft")(
    token_level_rewards=rewards, response_mask=torch.ones(2, 2), index=["a", "a"]
)[0].any()
print(estimate(token_level_rewards=rewards, response_mask=torch.ones(2, 2), index=["a", "a"])[0][:, 0].tolist())
"""


def test_verl_finds_it(site: Path, tmp_path: Path) -> None:
    pytest.importorskip("verl", exc_type=ImportError)
    (tmp_path / "my_methods.py").write_text(blocks("extending.md", "python")[0])
    (tmp_path / "my_setup.py").write_text(blocks("verl.md", "python")[0])
    done = run(["-c", VERL], tmp_path, site, VERL_USE_EXTERNAL_MODULES="my_setup")
    assert done.returncode == 0, done.stderr[-2000:]
    gradients, advantages = done.stdout.splitlines()[-2:]
    half, whole = map(float, gradients.split())
    assert half == pytest.approx(-(2.718281828**0.25), rel=1e-5)
    assert whole == pytest.approx(-(2.718281828**0.5), rel=1e-5)
    assert json.loads(advantages) == [1.0, -1.0]


def test_the_documented_example_runs_as_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_methods.py").write_text(blocks("extending.md", "python")[0])
    commands = blocks("extending.md", "bash")[0].replace("\\\n", " ").splitlines()
    said = [kalman_rl(tmp_path, tmp_path / "nowhere", *shlex.split(line)[1:]) for line in commands]
    assert "GRPO without a clip" in said[1] and "self-check: pass: my_methods:soft" in said[2]
    page = (tmp_path / "runs" / "soft" / "report.html").read_text()
    assert "imports nothing that its files name" in page, "reading a run runs no code that the run names"


def test_the_documented_example_keeps_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_methods.py").write_text(blocks("extending.md", "python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    lines = [shlex.split(line, comments=True) for line in blocks("extending.md", "bash")[1].splitlines()]
    found = [contract(name) for *command, name in lines if command == ["kalman-rl", "contract"]]
    assert [each.kind for each in found] == ["method", "belief", "trust region"]
    assert all(promise.kept for each in found for promise in each.promises)
    monkeypatch.delitem(sys.modules, "my_methods")


# ---- where the package is missing


def test_without_the_package_a_run_is_read_all_the_same(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(trained), "--method", "grpo", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["self_check"]["method"] is None
    assert any("got 'tempered', expected one that is installed here" in note for note in shown["notes"])
    page = tmp_path / "page.html"
    assert main(["report", str(trained), "--output", str(page)]) == 0
    assert "expected one that is installed here; install its package" in page.read_text().replace(
        "&#39;", "'"
    )


def test_without_the_package_a_run_is_not_resumed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut)
    with Run.open(cut) as half:
        half.update_manifest(status="interrupted")
    assert main(["resume", str(cut)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kalman-rl: method: got 'tempered', expected one of") and error.count("\n") == 1


def test_a_module_named_by_a_run_is_not_imported(trained: Path, tmp_path: Path, capsys: Any) -> None:
    received = tmp_path / "received"
    shutil.copytree(trained, received)
    settings = received / "config.toml"
    settings.write_text(settings.read_text().replace('method = "tempered"', 'method = "this:d"'))
    assert main(["replay", str(received), "--method", "grpo"]) == 0
    assert main(["report", str(received), "--output", str(tmp_path / "page.html")]) == 0
    assert "reading a run imports nothing that its files name" in capsys.readouterr().out
    assert "this" not in sys.modules


# ---- bad packages


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs packages into this process, as if it had started with them."""

    def forget() -> None:
        for registry in (METHODS, BELIEFS):
            vars(registry).pop("_claims", None)

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tiny_foreign.py").write_text(PACKAGE)
    monkeypatch.setitem(sys.modules, "tiny_foreign", None)
    monkeypatch.delitem(sys.modules, "tiny_foreign")
    forget()

    def add(package: str, group: str = "kalman_rl.methods", **names: str) -> None:
        install(tmp_path, package, {group: names})

    yield add
    forget()


def said(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tiny_foreign:not_a_method", "got Counts from 'mine' of package tiny-bad 0.1, expected a Method"),
        (
            "tiny_foreign:broken",
            "got ZeroDivisionError (no method today) from 'mine' of package tiny-bad 0.1",
        ),
        (
            "tiny_foreign:number",
            "got float from the entry point mine = tiny_foreign:number of package 'tiny-bad'",
        ),
        ("tiny_foreign:absent", "of package 'tiny-bad'; expected one that imports; repair or uninstall"),
        ("no_such_module:f", "got ModuleNotFoundError (No module named 'no_such_module') while importing"),
    ],
)
def test_a_bad_method(value: str, message: str, installed: Callable[..., None], capsys: Any) -> None:
    installed("tiny-bad", mine=value)
    assert message in said(lambda: make_method("mine"))
    assert main(["methods", "mine"]) == 2
    assert message in capsys.readouterr().err
    row = next(row for row in cards.table() if row["name"] == "mine")
    assert message in row["error"], "the others are listed all the same"
    assert make_method("grpo").name == "grpo"


def test_a_bad_belief(installed: Callable[..., None]) -> None:
    installed("tiny-bad", group="kalman_rl.beliefs", mine="tiny_foreign:tempered")
    assert "got Method from 'mine' of package tiny-bad 0.1, expected a Belief" in said(
        lambda: make_belief("mine")
    )
    assert "expected a TableBelief" in said(
        lambda: make_belief("tiny_foreign:Counts", source=lambda name: name)
    )


def test_two_packages_with_one_name(installed: Callable[..., None]) -> None:
    installed("tiny-one", mine="tiny_foreign:tempered", alone="tiny_foreign:tempered")
    installed("tiny-two", mine="tiny_foreign:tempered")
    message = said(lambda: make_method("mine"))
    assert "claimed by package 'tiny-one' and by package 'tiny-two'" in message
    assert list(METHODS).count("mine") == 1 and make_method("alone").name == "alone"


def test_a_package_that_takes_one_of_our_names(installed: Callable[..., None]) -> None:
    installed("tiny-thief", grpo="tiny_foreign:tempered")
    assert "claimed by package 'tiny-thief' and by kalman_rl itself" in said(lambda: make_method("grpo"))
    assert list(METHODS) == list(METHODS.table) and make_method("kpo").name == "kpo"


def test_other_names_go_on_working(installed: Callable[..., None], capsys: Any) -> None:
    installed("tiny-thief", grpo="tiny_foreign:tempered")
    installed("tiny-robber", group="kalman_rl.beliefs", auto="tiny_foreign:Counts")
    assert main(["methods"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "claimed by package 'tiny-thief'" in shown and "claimed by package 'tiny-robber'" in shown
    assert "grpo" in {row["name"] for row in cards.table() if "error" in row}
    assert main(["methods", "kpo"]) == 0 and main(["methods", "dapo", "--cite"]) == 0
    validate(TrainConfig(model="tiny"))
    assert "claimed by package 'tiny-robber'" in said(
        lambda: validate(TrainConfig(model="tiny", advantage="tracked"))
    )


def test_checks_run_whatever_a_package_claims(installed: Callable[..., None], capsys: Any) -> None:
    installed("tiny-thief", grpo="tiny_foreign:tempered")
    assert main(["methods", "kpo", "--verify"]) == 0
    assert "Q = inf is GRPO with the same clip" in capsys.readouterr().out
    assert main(["methods", "grpo", "--verify"]) == 2
    assert "claimed by package 'tiny-thief'" in capsys.readouterr().err


def test_a_module_that_exits_is_a_sentence(installed: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys\n\nsys.exit('no licence')\n")
    installed("tiny-bad", mine="leaves:anything")
    assert "got SystemExit (no licence) while importing the entry point mine" in said(
        lambda: make_method("mine")
    )
    assert "got SystemExit (no licence) while importing 'leaves'" in said(lambda: make_belief("leaves:any"))


def test_a_close_name_is_suggested(installed: Callable[..., None]) -> None:
    installed("tiny-foreign", **ENTRIES["kalman_rl.methods"])
    assert said(lambda: make_method("temperd")).endswith("did you mean 'tempered'?")
    assert "did you mean 'power'?" in said(lambda: make_method("tempered", powr=1.0))
    assert "tiny_foreign" in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_module:f",
            "method: got 'no_such_module:f', found no module 'no_such_module'; expected it in",
        ),
        ("tiny_foreign:", "method: got 'tiny_foreign:', expected module:function, e.g. my_methods:mine"),
        ("tiny_foreign:number", "expected a function of 'tiny_foreign'"),
        ("tiny_foreign:not_a_method", "got Counts from 'tiny_foreign:not_a_method' of module tiny_foreign"),
    ],
)
def test_a_bad_module(name: str, message: str, installed: Callable[..., None]) -> None:
    assert message in said(lambda: make_method(name))
