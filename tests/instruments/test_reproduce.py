"""Experiments behind the claims: verdicts, seeds, resuming, the table, and one tiny experiment end to end."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kalman_rl.cli.main import main
from kalman_rl.engine.models.tiny import _model, character_tokenizer
from kalman_rl.engine.models.weights import rounded
from kalman_rl.errors import ConfigError, RunError
from kalman_rl.instruments import reproduce as room
from kalman_rl.instruments.reproduce import figure as picture
from kalman_rl.instruments.reproduce import reproduce
from kalman_rl.instruments.reproduce.claim import Claim, difference, judge, saved, value, verdict
from kalman_rl.instruments.reproduce.collapses import ahead, collapse_of, fallen_mean, false_alarm
from kalman_rl.instruments.reproduce.experiment import Experiment, Ledger
from kalman_rl.instruments.reproduce.gradients import Enumeration
from kalman_rl.instruments.reproduce.loop import Arm, Setting, Training, drawn
from kalman_rl.instruments.reproduce.policy import CausalPolicy, joined
from kalman_rl.instruments.reproduce.pool import LENGTHS, World, draw_pool, questions
from kalman_rl.instruments.reproduce.smollm2 import WATCHED
from kalman_rl.instruments.reproduce.warning import (
    Signalled,
    alarm,
    gradient_norm,
    limit_of,
    lost_size,
    share,
)
from kalman_rl.objectives.correction import FilteredTruncated, Truncated
from kalman_rl.objectives.rollouts import Rollouts

# ---- verdicts


def test_a_verdict_follows_from_the_interval_of_known_numbers() -> None:
    """Five differences with mean 0.05 and t-interval 0.05 +- 2.776 * s / sqrt(5)."""
    records = {"a": {s: {"mean": 0.5 + d} for s, d in enumerate((0.03, 0.04, 0.05, 0.06, 0.07))}}
    records["b"] = {s: {"mean": 0.5} for s in range(5)}
    half = 2.7764451 * math.sqrt(0.00025) / math.sqrt(5)
    for low, expected in (
        (0.05 - half - 1e-4, "reproduced"),
        (0.05, "not decided"),
        (0.05 + half + 1e-4, "refuted"),
    ):
        found = judge(Claim("a beats b", "us", difference("a", "b"), low=low), records)
        assert found.verdict == expected
        assert found.interval == pytest.approx((0.05 - half, 0.05 + half), abs=1e-6)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [((0.0, 0.01, -0.01), "reproduced"), ((0.0, 0.05, -0.05), "not decided"), ((0.2, 0.21, 0.19), "refuted")],
)
def test_a_tie_needs_the_whole_interval_between_two_bounds(numbers: tuple[float, ...], expected: str) -> None:
    records = {"a": {s: {"mean": n} for s, n in enumerate(numbers)}}
    assert judge(Claim("a ties", "us", value("a"), low=-0.03, high=0.03), records).verdict == expected


def test_one_seed_decides_nothing_unless_the_number_is_exact() -> None:
    records = {"a": {1000: {"mean": 5.0}}}
    claim = Claim("a is large", "us", value("a"), low=1.0)
    assert judge(claim, records).verdict == "not decided"
    assert judge(replace(claim, exact=True), records).verdict == "reproduced"
    assert judge(claim, {}).verdict == "not decided"


def test_the_interval_of_a_factor_is_that_of_its_logarithm() -> None:
    records = {"a": {s: {"mean": n} for s, n in enumerate((1.0, 2.0, 4.0))}}
    found = judge(Claim("a", "us", value("a"), low=0.1, factor=True), records)
    assert found.value == pytest.approx(2.0)
    assert found.interval is not None
    assert found.interval[0] * found.interval[1] == pytest.approx(4.0)  # symmetric in the logarithm


def test_saved_completions_of_known_curves() -> None:
    slow = {"spent": [0, 100, 200, 300, 400], "accuracy": [0.1, 0.2, 0.3, 0.4, 0.5]}
    fast = {"spent": [0, 100, 200, 300, 400], "accuracy": [0.1, 0.4, 0.6, 0.7, 0.8]}
    records = {"slow": {0: slow}, "fast": {0: fast}}
    assert saved("fast", "slow")(records) == pytest.approx([400 / 150])  # 0.5 lies half way from 100 to 200
    assert saved("slow", "fast")(records) == pytest.approx([150 / 400])  # never reached: the other way round
    assert saved("slow", "slow")(records) == pytest.approx([1.0])


# ---- the framework, with trials that compute nothing


@dataclass(frozen=True)
class Counted:
    """A trial whose result is its level and its seed; it notes that it ran."""

    notes: Path
    level: float
    levels: tuple[float, ...] = ()

    def run(self, worlds: object, seed: int) -> dict[str, Any]:
        with self.notes.open("a") as file:
            file.write(f"{self.level} {seed}\n")
        if (self.notes.parent / "fail").exists() and seed == 1001:
            raise KeyboardInterrupt
        return {"mean": self.level + 0.001 * (seed % 3), "seconds": 0.0}

    def variants(self) -> dict[str, Counted]:
        return {f"{level:g}": replace(self, level=level, levels=()) for level in self.levels}


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    notes = tmp_path / "notes"
    notes.touch()
    claims = (Claim("a beats b.", "us", difference("a", "b"), low=0.1),)
    arms = {"a": Counted(notes, 0.5, (0.5, 0.7, 0.6)), "b": Counted(notes, 0.3)}
    experiment = Experiment("counted", "Does a beat b?", "a pool", arms, claims, seeds=3)
    twin = Experiment("twin", "The same arms?", "a pool", {"b": Counted(notes, 0.3)}, (), seeds=3)
    monkeypatch.setattr(room, "EXPERIMENTS", {"counted": experiment, "twin": twin})
    return notes


def run(notes: Path, *names: str, **options: Any) -> dict[str, Any]:
    output = notes.parent / "evidence"
    reproduce(names or ("counted",), output=output, jobs=1, say=lambda line: None, **options)
    found: dict[str, Any] = json.loads((output / "counted.json").read_text())
    return found


def test_settings_are_chosen_on_tuning_seeds_and_judged_on_others(counted: Path) -> None:
    found = run(counted)
    assert found["arms"]["a"]["tuning"]["chosen"] == "0.7"
    assert found["arms"]["a"]["numbers"]["mean"] == pytest.approx([0.701, 0.702, 0.7])
    assert found["arms"]["a"]["seeds"] == [1000, 1001, 1002]
    assert found["claims"][0]["verdict"] == "reproduced"
    ran = [line.split() for line in counted.read_text().splitlines()]
    assert {int(seed) for level, seed in ran if level in ("0.5", "0.6")} == {900, 901}


def test_a_quick_run_tunes_nothing(counted: Path) -> None:
    found = run(counted, quick=True)
    assert found["arms"]["a"]["numbers"]["mean"] == pytest.approx([0.501, 0.502])
    assert len(counted.read_text().splitlines()) == 4


def test_a_quick_run_leaves_out_what_has_no_quick_seeds(counted: Path) -> None:
    room.EXPERIMENTS["twin"] = replace(room.EXPERIMENTS["twin"], quick_seeds=0)
    output = counted.parent / "evidence"
    reproduce(output=output, quick=True, jobs=1, say=lambda line: None)
    assert not (output / "twin.json").exists() and (output / "counted.json").exists()
    reproduce(["twin"], output=output, quick=True, jobs=1, say=lambda line: None)
    assert json.loads((output / "twin.json").read_text())["arms"]["b"]["seeds"] == [1000, 1001]


def test_a_second_call_goes_on_with_what_is_left(counted: Path) -> None:
    stop = counted.parent / "fail"
    stop.touch()
    with pytest.raises(KeyboardInterrupt):
        run(counted, quick=True)
    stop.unlink()
    before = counted.read_text().splitlines()
    assert len(before) == 3  # two arms of the first seed, and the one that was interrupted
    run(counted, quick=True)
    assert len(counted.read_text().splitlines()) == len(before) + 2  # the interrupted one, and the last
    run(counted, quick=True)
    assert len(counted.read_text().splitlines()) == len(before) + 2


def test_equal_trials_of_two_experiments_run_once(counted: Path) -> None:
    run(counted, "counted", "twin", quick=True)
    ran = counted.read_text().splitlines()
    assert len(ran) == len(set(ran)) == 4


def test_a_line_cut_by_an_interruption_is_run_again(counted: Path) -> None:
    run(counted, quick=True)
    ledger = counted.parent / "evidence" / "runs.jsonl"
    lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join(lines)[:-20])
    run(counted, quick=True)
    assert len(counted.read_text().splitlines()) == 5
    assert sorted(ledger.read_text().splitlines()) == sorted(lines)
    ledger.write_text("\n".join(["{", *lines]) + "\n")
    with pytest.raises(RunError, match="damaged line 1"):
        run(counted, quick=True)


def test_a_far_claim_stands_at_the_rim_and_the_legend_below_the_curves() -> None:
    """One claim 1e9 half-widths from its bound must not make the others unreadable, nor 12 names hide a curve."""
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    curves, claims = figure.subplots(1, 2)
    arms = {f"arm {i}": {"spent": [0, 10], "accuracy": [[0.5, 0.0], [0.5, 0.0]]} for i in range(12)}
    picture._curves(curves, arms)
    bound = {"claim": "a", "verdict": "reproduced", "low": 0.0, "high": math.inf, "factor": False}
    picture._claims(
        claims,
        [
            bound | {"value": 1.0, "interval": (1 - 1e-9, 1 + 1e-9)},
            bound | {"value": 0.5, "interval": (0.2, 0.8)},
        ],
    )
    figure.draw_without_rendering()
    assert curves.get_legend().get_window_extent().y1 < curves.get_window_extent().y0
    assert max(abs(end) for end in claims.get_xlim()) < 1.2 * picture.FARTHEST


def test_the_table_has_a_line_for_every_claim(counted: Path) -> None:
    run(counted)
    page = (counted.parent / "evidence.md").read_text()
    assert "| [counted](#counted) | a beats b. | us | > 0.1 | +0.400 " in page
    assert "**reproduced** | 3 |" in page
    assert "0.7 (0.5: 0.50" in page
    assert (counted.parent / "evidence" / "counted.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ((3,), "seeds: got 3, expected 1000 or more"),
        ((900,), "got 900"),
        ((1000, 1000), "expected different ones"),
    ],
)
def test_seeds_that_are_no_evidence_are_refused(counted: Path, seeds: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(counted, seeds=seeds)
    assert not counted.read_text()


def test_own_seeds(counted: Path) -> None:
    assert run(counted, quick=True, seeds=(1005, 1010))["arms"]["b"]["seeds"] == [1005, 1010]


# ---- the command


def test_the_command_names_the_nearest_claim(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["reproduce", "basline", "--output", str(tmp_path / "out")]) == 2
    assert "did you mean 'baseline'?" in capsys.readouterr().err
    assert main(["reproduce", "--model", "tyni", "--output", str(tmp_path / "out")]) == 2
    assert "did you mean 'tiny'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_list_has_every_claim_with_its_acceptance(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    shown = capsys.readouterr().out
    for experiment in room.EXPERIMENTS.values():
        assert f"\n{experiment.name}: " in "\n" + shown
        for claim in experiment.claims:
            assert f"{claim.text} (from: {claim.source}; accepted: {claim.acceptance})" in shown


def test_every_claim_measures_arms_of_its_experiment() -> None:
    """A misspelt arm would give no numbers and hence no verdict, for ever."""
    curve = {"spent": [0, 320, 640, 1920], "accuracy": [0.0, 0.4, 0.7, 1.0]}
    curve |= {"reward": [0.5] * 4 + [0.0] * 20, "size": [0.9] * 96, "grad_norm": [1.0] * 96}
    watched = {belief.name: [0.1] * 4 for belief in WATCHED}
    for experiment in room.EXPERIMENTS.values():
        numbers: dict[str, Any] = dict.fromkeys(
            ("mean", "final", "held_out", "kept", "calibration", "worth", "residual"), 1.0
        )
        numbers |= dict.fromkeys(("gain", "over_constant", "coverage", "contrast"), 1.0) | curve
        held = numbers | {"reward": [0.5] * 24}
        hold = ("1e-4", "grpo, 2e-4", "grpo, 3e-4")
        records: Any = {
            arm: dict.fromkeys((1000, 1001), held if any(name in arm for name in hold) else numbers)
            for arm in experiment.arms
        }
        for arm, trial in experiment.arms.items():
            if isinstance(trial, Training) and trial.setting.watched:
                records[arm] = dict.fromkeys((1000, 1001), numbers | {"watched": watched})
        for claim in experiment.claims:
            assert len(claim.measure(records)) == 2, (experiment.name, claim.text)


# ---- parts


def test_a_stream_without_a_belief_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="draw: got 'stream' with advantage 'grpo'"):
        Training(Setting(mix=(0.1, 0.8, 0.1), size=20), Arm(advantage="grpo", draw="stream")).run(
            lambda: world, 1000
        )


def test_draws_are_different_and_follow_the_weights() -> None:
    variance = torch.tensor([0.0, 0.0, 0.1, 0.3], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    assert sorted(drawn(variance, 4, generator)) == [0, 1, 2, 3]
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[drawn(variance, 1, generator)] += 1
    assert (counts / 4000).tolist() == pytest.approx([0.025, 0.025, 0.25, 0.70], abs=0.025)
    assert sorted(drawn(torch.zeros(3, dtype=torch.float64), 3, generator)) == [0, 1, 2]


def test_coarse_weights_have_few_levels_and_stay_near() -> None:
    weight = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    state = {"matrix": weight, "norm": weight[0]}
    coarse = rounded(state, 4)
    assert torch.equal(coarse["norm"], weight[0])
    assert all(len(row.unique()) <= 15 for row in coarse["matrix"])
    assert ((coarse["matrix"] - weight).abs() <= weight.abs().amax(1, keepdim=True) / 14 + 1e-6).all()


def test_a_filter_that_passes_everything_is_the_plain_correction() -> None:
    g = torch.Generator().manual_seed(0)
    old, behaviour = (-torch.rand(3, 6, generator=g) for _ in range(2))
    rollouts = Rollouts(old, torch.ones(3, 6), logp_behaviour=behaviour)
    assert torch.allclose(FilteredTruncated(noise_ratio=1e9)(rollouts), Truncated(2.0)(rollouts), atol=1e-5)
    assert not torch.allclose(FilteredTruncated()(rollouts), Truncated(2.0)(rollouts), atol=1e-2)


def test_collapse_and_alarm_of_known_rewards() -> None:
    fall = [0.3, 0.5, 0.5, 0.4, 0.2, 0.1, *[0.05] * 8]
    assert collapse_of(fall) == 4
    assert fallen_mean(fall) == 5  # (0.2 + 0.1) / 2 < 0.6 * 0.5; (0.4 + 0.2) / 2 is not
    assert collapse_of([0.3, 0.4] * 10) is None and fallen_mean([0.3, 0.4] * 10) is None


def test_an_alarm_is_beyond_the_worst_of_the_other_seeds_that_held() -> None:
    """Two held runs whose effective sample sizes fall to 0.8 and 0.7, and a collapse that falls to 0.5 at batch 4."""
    hold, fall = [0.5] * 14, [0.5] * 8 + [0.05] * 10
    size = {"a": [0.8] * 56, "b": [0.7] * 56, "c": [0.9] * 16 + [0.5] * 56}

    def run(name: str, reward: list[float]) -> dict[str, Any]:
        return {"reward": reward, "size": size[name], "grad_norm": [1.0] * 72}

    records = {"slow": {1: run("a", hold), 2: run("b", hold)}, "wild": {1: run("c", fall), 2: run("c", fall)}}
    assert [limit_of(records, lost_size, ["slow"], without=seed) for seed in (1, 2)] == pytest.approx(
        [0.3, 0.2]
    )
    assert alarm(records["wild"][1], lost_size, 0.2) == 4 and alarm(records["wild"][1], lost_size, 0.35) == 5
    assert alarm(records["slow"][1], lost_size, 0.2 + 1e-9) is None
    both = ["slow", "wild"]
    assert share(lost_size, ["slow"], both, ahead)(records) == [
        1.0,
        1.0,
    ]  # batch 5, and the reward falls at 8
    assert share(lost_size, ["slow"], both, false_alarm)(records) == [0.0, 1.0]  # 0.7 is worse than 0.8
    assert share(gradient_norm, ["slow"], both, ahead)(records) == [0.0, 0.0]


@pytest.mark.parametrize(("advantage", "right"), [("k_grpo", True), ("batch_mean", True), ("grpo", False)])
def test_enumerated_gradients(advantage: str, right: bool) -> None:
    found = Enumeration(advantage).run(lambda: pytest.fail("no world is needed"), 1000)
    assert (found["residual"] < 1e-9) is right


# ---- one tiny experiment, with a model that was never taught


@pytest.fixture(scope="module")
def world() -> World:
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    policy = CausalPolicy(
        _model(tokenizer).eval(), tokenizer, end=tokenizer.eos_token_id, longest=LENGTHS[-1] + 1
    )
    bank = questions(400, "test", lambda digits: 1.0)
    claimed = torch.linspace(0, 1, 400, dtype=torch.float64)[torch.randperm(400)]
    return World(policy, policy.state(), bank, claimed)


def test_log_probabilities_are_those_of_one_row_without_padding(world: World) -> None:
    rows = [world.bank[i] for i in (0, 1, 2, 3)]
    replies = world.policy.answers(rows)
    found = world.policy.logp(replies)
    for row, got, kept in zip(rows, found, replies.mask):
        model, tokenizer = world.policy.model, world.policy.tokenizer
        prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
        answer = [*tokenizer.encode(row["answer"], add_special_tokens=False), tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert torch.allclose(got[kept], expected, atol=1e-5)
        assert world.policy.success([row]).item() == pytest.approx(
            expected.double().sum().exp().item(), rel=1e-4
        )


def test_samples_carry_their_own_log_probabilities(world: World) -> None:
    rows = world.bank[:6]
    replies = world.policy.sample(rows, torch.Generator().manual_seed(0))
    assert torch.allclose(world.policy.logp(replies)[replies.mask], replies.logp[replies.mask], atol=1e-4)
    assert torch.equal(replies.ids, world.policy.sample(rows, torch.Generator().manual_seed(0)).ids)
    both = joined([replies, world.policy.answers(rows[:2])])
    assert torch.allclose(world.policy.logp(both)[:6][both.mask[:6]], replies.logp[replies.mask], atol=1e-4)
    assert both.right.tolist()[6:] == [1.0, 1.0]


def test_pools_have_the_kinds_asked_for_and_nothing_held_out_is_trained_on(world: World) -> None:
    known = {row["prompt_id"]: p for row, p in zip(world.bank, world.success.tolist())}
    limits = (lambda p: p < 0.01, lambda p: 0.03 <= p <= 0.95, lambda p: p > 0.97)
    pool = draw_pool(world, (0.1, 0.8, 0.1), 20, 1000)
    assert torch.bincount(pool.kind).tolist() == [2, 16, 2]
    for kind, row, held in zip(pool.kind.tolist(), pool.rows, pool.held_out):
        assert limits[kind](known[row["prompt_id"]]) and limits[kind](known[held["prompt_id"]])
    assert not {row["prompt_id"] for row in pool.rows} & {row["prompt_id"] for row in pool.held_out}
    between = sorted(
        p for kind, row in zip(pool.kind, pool.rows) if kind == 1 for p in [known[row["prompt_id"]]]
    )
    assert between[4] < 0.4 and between[-5] > 0.6  # spread evenly
    with pytest.raises(ConfigError, match="hopeless, expected at least"):
        draw_pool(world, (1.0, 0.0, 0.0), 20, 1000)


def test_a_training_experiment_end_to_end(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(mix=(0.1, 0.8, 0.1), size=20, budget=64, updates=2)
    arms = {
        "grpo": Arm(group=4, batch=16),
        "tracked": Arm(advantage="k_grpo", group=1, batch=16),
        "stream": Arm(advantage="k_grpo", group=1, batch=16, draw="stream"),
        "true": Arm(advantage="true", group=2, batch=16, draw="true"),
        "predictive": Arm(advantage="k_grpo", batch=16, allocation="predictive", candidates=16),
        "late": Arm(group=4, batch=16, old="trainer", correction=Truncated()),
    }
    late = replace(setting, lag=2, bits=4, mix=(0.0, 1.0, 0.0))
    experiment = Experiment(
        "tiny",
        "Does it run?",
        "a tiny pool",
        {name: Training(late if name == "late" else setting, arm) for name, arm in arms.items()},
        (Claim("tracked beats grpo.", "us", difference("tracked", "grpo"), low=0.1),),
    )
    monkeypatch.setattr(room, "EXPERIMENTS", {"tiny": experiment})
    monkeypatch.setattr(room, "MODELS", {"tiny": lambda cache, progress: world})
    page = reproduce(output=tmp_path / "out", quick=True, jobs=1, say=lambda line: None)
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert page == tmp_path / "out.md"
    assert (
        found["claims"][0]["verdict"] == "refuted"
    )  # who has learned nothing is right with probability 1e-10
    for arm in found["arms"].values():
        assert arm["spent"][-1] == 64 and len(arm["accuracy"]) == 2
        assert all(0 <= p < 1e-3 for curve in arm["accuracy"] for p in curve)
    told = Signalled(setting, arms["grpo"]).run(lambda: world, 1000)
    assert told["accuracy"] == pytest.approx(found["arms"]["grpo"]["accuracy"][0], rel=1e-5)
    assert len(told["size"]) == len(told["grad_norm"]) == 8 and min(told["grad_norm"]) >= 0
    assert told["size"][0] == pytest.approx(1.0) and 0 < told["size"][1] < 1
    again = Training(setting, arms["stream"]).run(lambda: world, 1000)
    assert again["accuracy"] == pytest.approx(found["arms"]["stream"]["accuracy"][0], rel=1e-5)
    assert found["arms"]["late"]["numbers"]["apart"][0] > 0.001
    row = next(line for line in page.read_text().splitlines() if line.startswith("| late |")).split("|")
    head = next(line for line in page.read_text().splitlines() if line.startswith("| arm |")).split("|")
    kinds = dict(zip(map(str.strip, head), map(str.strip, row)))
    assert (kinds["hopeless"], kinds["solved"]) == ("", "") != (kinds["between"], kinds["mean"])


def test_training_follows_the_reward(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every reply that starts with a 0 called right, the first token becomes a 0."""
    zero = world.policy.tokenizer.get_vocab()["0"]
    sample = CausalPolicy.sample

    def called(self: CausalPolicy, rows: Any, generator: torch.Generator) -> Any:
        replies = sample(self, rows, generator)
        first: Tensor = replies.ids[:, -replies.mask.shape[1]]
        return replies._replace(right=(first == zero).float())

    monkeypatch.setattr(CausalPolicy, "sample", called)
    setting = Setting(mix=(0.1, 0.8, 0.1), size=20, budget=1024)
    found = Training(setting, Arm(advantage="batch_mean", group=1, batch=32, rate=2e-3)).run(
        lambda: world, 1000
    )
    assert sum(found["reward"][:4]) / 4 < 0.2 and sum(found["reward"][-4:]) / 4 > 0.6


# ---- what was measured and is kept in docs/evidence

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"


def test_the_page_is_what_its_numbers_give(tmp_path: Path) -> None:
    copy = tmp_path / "evidence"
    shutil.copytree(EVIDENCE, copy)
    room.table(copy, list(room.EXPERIMENTS))
    assert copy.with_suffix(".md").read_text() == EVIDENCE.with_suffix(".md").read_text()


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("*.json")), ids=lambda path: path.stem)
def test_no_acceptance_was_moved_after_the_run(path: Path) -> None:
    """Claims, bounds and verdicts of the numbers that are kept are those of the code."""
    kept, experiment = json.loads(path.read_text()), room.EXPERIMENTS[path.stem.partition("-")[0]]
    assert (path.with_suffix(".png")).exists()
    assert [claim["claim"] for claim in kept["claims"]] == [claim.text for claim in experiment.claims]
    for found, claim in zip(kept["claims"], experiment.claims):
        assert found["accepted"] == claim.acceptance
        interval = found["interval"]
        assert found["verdict"] == ("not decided" if interval is None else verdict(tuple(interval), claim))
    assert {seed for arm in kept["arms"].values() for seed in arm["seeds"] if seed < 1000} == set()


@pytest.mark.parametrize(("name", "claim"), [("baseline", 0), ("stream", 0)])
def test_the_readme_has_the_factors_that_were_measured(name: str, claim: int) -> None:
    found = json.loads((EVIDENCE / f"{name}.json").read_text())["claims"][claim]
    low, high = found["interval"]
    readme = (EVIDENCE.parents[1] / "README.md").read_text()
    assert f"**{found['value']:.1f} times** ({low:.1f} to {high:.1f})" in readme


def test_trials_that_differ_late_have_keys_of_their_own(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "results.jsonl", "tiny")
    keys = {ledger.key("x" * 300 + end, 1) for end in "ab"}  # type: ignore[arg-type]
    assert len(keys) == 2
