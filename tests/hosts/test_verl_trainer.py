"""Beliefs about prompts on verl: names, counts and advantages by themselves, then the trainer inside verl.

The second half reads what ``verl_driver.py`` did in a process of its own: it is run once, with the package's metadata
as a wheel would install it, so that verl finds the entry point.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", exc_type=ImportError)
pytest.importorskip("transfer_queue", exc_type=ImportError)
from kalman_rl.beliefs import BELIEFS, make_belief
from kalman_rl.errors import ConfigError, RunError
from kalman_rl.hosts import state as state_file
from kalman_rl.hosts.state import STATE_FILE, load_state, save_state
from kalman_rl.hosts.verl.estimators import TRACKED, TRACKER, make_estimator
from kalman_rl.hosts.verl.tracker import (
    PromptNames,
    candidates_of,
    chosen_counts,
    make_tracking,
    planned_counts,
    read_settings,
    rows_of,
    tracked_advantages,
)
from kalman_rl.methods import METHODS
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.stream import PromptStream

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def tracking(**settings: Any) -> Any:
    """Beliefs of prompts whose source nobody noted."""
    return make_tracking("tracked", read_settings({"source_key": None} | settings))


# ---- by themselves


@pytest.mark.parametrize("settings, message", [
    ({"alocation": "fixed"}, "got 'alocation', .*did you mean 'allocation'"),
    (None, "got None, expected settings by name"),
    ({"completions_min": "1"}, "completions_min, completions_max: got '1', 32"),
    ({"completions_max": "32"}, "completions_min, completions_max: got 0, '32'"),
    ({"aim": "x"}, "aim: got 'x'"),
    ({"reward_range": "x"}, "reward_range: got 'x'"),
    ({"aim": "mixed_groups", "reward_range": "real"}, "aim: got 'mixed_groups' with real-valued"),
    ({"reward_noise_variance": -1.0}, "reward_noise_variance: got -1.0"),
    ({"budget": 4.0}, "budget: got 4.0, expected None because verl samples rollout.n"),
    ({"rounds": (1,)}, "rounds: got"),
    ({"coverage_steps": 0}, "coverage_steps: got 0"),
    ({"belief_options": ["rho"]}, "belief_options: got"),
    ({"source_key": ["data_source"]}, "source_key: got .*, expected a column, or null"),
])  # fmt: skip
def test_settings_are_checked_before_anything_is_sampled(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^algorithm.kalman_rl(: |\.){message}"):
        read_settings(settings)


def test_names_come_from_columns() -> None:
    names = PromptNames(("data_source", "index"))
    found = names.of({"data_source": ["gsm8k", "math"], "index": [7, 7]})
    assert found == ["gsm8k/7", "math/7"]
    picture = {"type": "image", "image": object()}

    def prompt(text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]

    names.check(found, [prompt("a"), prompt("b")])
    picture = {"type": "image", "image": object()}  # the same picture, read again
    names.check(found, [prompt("a"), prompt("b")])
    with pytest.raises(ConfigError, match="got 'math/7' for two different prompts"):
        names.check(found, [prompt("a"), prompt("c")])


def test_counts_keep_their_sum() -> None:
    books = tracking(allocation="predictive")
    for step in range(4):
        rewards = torch.tensor([1.0] * 4 + [0.0] * 4 + [0.0, 1.0] * 2, dtype=torch.float64)
        books.belief.update(["easy"] * 4 + ["hard"] * 4 + ["mixed"] * 4, rewards, step=step)
    names = ["easy", "mixed", "hard", "new"]
    counts = dict(zip(names, planned_counts(books, names, step=4, n=6), strict=True))
    assert sum(counts.values()) == 24 and min(counts.values()) >= 1
    assert min(counts["mixed"], counts["new"]) > max(counts["easy"], counts["hard"])
    twice = planned_counts(books, ["easy", "mixed", "easy", "hard"], step=4, n=6)
    assert twice[0] == twice[2] == 6 and sum(twice) == 24
    assert planned_counts(tracking(), names, step=4, n=6) == [6, 6, 6, 6]
    assert planned_counts(books, ["hard"], step=5, n=6) == [6]  # a refill of one prompt
    assert planned_counts(tracking(allocation="predictive", completions_min=4), names, step=0, n=2) == [2] * 4


def test_candidates_may_go_without() -> None:
    books = tracking(allocation="predictive")
    for step in range(4):
        rewards = torch.tensor([1.0] * 4 + [0.0] * 4 + [0.0, 1.0] * 2, dtype=torch.float64)
        books.belief.update(["easy"] * 4 + ["hard"] * 4 + ["mixed"] * 4, rewards, step=step)
        books.coverage.visit(["easy", "hard", "mixed"], step=step)
    names = ["easy", "mixed", "hard", "mixed", "easy"]
    assert chosen_counts(books, names, step=4, total=3) == [0, 3, 0, 0, 0]
    assert chosen_counts(books, names, step=70, total=3) == [1, 2, 0, 0, 0], (
        "easy was not visited for 64 steps"
    )
    assert chosen_counts(books, names, step=71, total=3) == [0, 2, 1, 0, 0], "hard has waited longer now"


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [(None, 96), (96, 96), (32, 32), (31, "31, expected at least 32"), (120, "120, expected at most 100"),
     (40, "40, expected a multiple of 32")],
)  # fmt: skip
def test_how_many_candidates(candidates: int | None, expected: Any) -> None:
    sizes = {"prompts": 32, "n": 4, "fetch": 32, "pool": 100}
    budget = Budget(allocation="predictive", candidates=candidates)
    if isinstance(expected, int):
        assert candidates_of(budget, **sizes) == expected
    else:
        with pytest.raises(ConfigError, match=rf"^algorithm\.kalman_rl\.candidates: got {expected}"):
            candidates_of(budget, **sizes)
    assert candidates_of(Budget(), **sizes) is None
    assert candidates_of(Budget(allocation="predictive", completions_min=1), **sizes) is None


def test_single_completions() -> None:
    """rollout.n = 1: no reward moves its own baseline, the second visit remembers the first."""
    rows = rows_of(["u_0_0", "v_0_0", "w_0_0"], [{}] * 3, ["p", "q", "r"])
    books, belief = tracking(), make_belief("auto")
    for step, reward in enumerate(torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])):
        expected = belief.advantages(["p", "q", "r"], reward.double(), step=step).advantage
        belief.update(["p", "q", "r"], reward.double(), step=step)
        found, metrics = tracked_advantages(books, rows, reward, global_step=step, n=1)
        assert found.tolist() == expected.tolist() and found.all()
        assert (metrics["budget/used"], metrics["budget/largest"]) == (3.0, 1.0)
        assert "groups/informative" not in metrics, "a group of one has no reward to differ from"
    books = tracking(allocation="predictive")
    assert planned_counts(books, ["p", "q", "r"], step=0, n=1) == [1, 1, 1]


def test_single_completions_need_a_baseline_from_elsewhere() -> None:
    scores, mask = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2)
    with pytest.raises(
        ConfigError, match=r"rollout\.n: got 1 for method 'grpo', .*adv_estimator=kalman_rl/tracked"
    ):
        make_estimator("grpo")(scores, mask, index=["u", "v"])
    found, _ = make_estimator("batch_mean")(scores, mask, index=["u", "v"])
    assert found.tolist() == [[1.0, 1.0], [-1.0, -1.0]]


def test_only_the_last_output_of_a_session_counts() -> None:
    """Agent loops may return several outputs; all of them are trained on the session's advantage."""
    keys = ["u_0_0", "u_0_1", "u_1_0", "v_0_0", "pad_0_0"]
    tags: list[dict[str, Any]] = [{}, {}, {}, {}, {"is_padding": True}]
    rows = rows_of(keys, tags, ["p", "p", "p", "q", "p"])
    assert rows.counted == [False, True, True, True, False] and rows.prompts == 2
    reward = torch.tensor([9.0, 1.0, 0.0, 1.0, 5.0])
    books = tracking()
    found, metrics = tracked_advantages(books, rows, reward, global_step=3, n=2)
    belief = make_belief("auto")
    names, known = ["p", "p", "q"], torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    expected = belief.advantages(names, known, step=3).advantage
    assert found.tolist() == [*expected[[0, 0, 1, 2]].tolist(), 0.0]
    assert (metrics["budget/used"], metrics["budget/saved"]) == (3.0, 1.0)
    assert len(books.belief) == 2 and books.last_step == 3


def test_an_empty_response_is_missing_whatever_its_reward() -> None:
    """Rejected by rollout correction, say: its 10 would move the belief and the others' baselines."""
    rows = rows_of(["u_0_0", "u_1_0", "u_2_0"], [{}] * 3, ["p"] * 3)
    books = tracking(belief="gaussian")
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    scores = torch.tensor([[0.0, 1.0], [0.0, 0.0], [10.0, 0.0]])

    def answer(reward: torch.Tensor) -> torch.Tensor:
        return tracked_advantages(books, rows, reward, global_step=1, n=3)[0]

    token = TRACKER.set(answer)
    try:
        found, _ = make_estimator(TRACKED)(scores, mask)
    finally:
        TRACKER.reset(token)
    # A prior of mean 1/2 as wide as a reward's noise: the other's reward moves each baseline half of the way to it.
    assert found.tolist() == [[0.75, 0.75], [-0.75, 0.0], [0.0, 0.0]]
    assert books.belief.predict(["p"], step=1).mean.tolist() == [0.5]


def test_a_batch_of_padding_only() -> None:
    rows = rows_of(["pad_0_0"], [{"is_padding": True}], ["p"])
    found, metrics = tracked_advantages(tracking(), rows, torch.zeros(1), global_step=1, n=2)
    assert found.tolist() == [0.0] and not metrics


def test_prompts_of_unequal_groups_count_the_same() -> None:
    keys, names = ["u_0_0", *(f"v_{i}_0" for i in range(3))], ["p", "q", "q", "q"]
    rows = rows_of(keys, [{}] * 4, names)
    reward = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    weighted, _ = tracked_advantages(tracking(allocation="predictive"), rows, reward, global_step=1, n=2)
    plain, _ = tracked_advantages(tracking(), rows, reward, global_step=1, n=2)
    torch.testing.assert_close(weighted, plain * torch.tensor([2.0, 2 / 3, 2 / 3, 2 / 3]).double())


def test_each_source_learns_its_own_noise() -> None:
    """Two sources in every batch, noise 0.1 and 2: what is learned of each is its own, after a resume too."""
    names = [f"{source}/{i}" for i in range(8) for source in ("maths", "code") for _ in range(4)]
    sources = [name.partition("/")[0] for name in names]
    rows = rows_of([f"{name}_{i % 4}_0" for i, name in enumerate(names)], [{}] * len(names), names)
    sd = torch.tensor([{"maths": 0.1, "code": 2.0}[source] for source in sources])
    generator = torch.Generator().manual_seed(0)
    books, again = (make_tracking("tracked", read_settings({})) for _ in range(2))
    for step in range(8):
        reward = torch.randn(len(names), generator=generator) * sd
        books.sources.note(names, sources)
        found, _ = tracked_advantages(books, rows, reward, global_step=step, n=4)
        if step > 4:
            again.sources.note(names, sources)
            same, _ = tracked_advantages(again, rows, reward, global_step=step, n=4)
            assert torch.equal(found, same)
        if step == 4:
            again.load_state_dict(books.state_dict())
    ids = ["maths/0", "code/0"]
    noise = books.belief.predictive(ids, step=8).variance - books.belief.predict(ids, step=8).variance
    torch.testing.assert_close(noise.sqrt(), torch.tensor([0.1, 2.0], dtype=torch.float64), rtol=0.25, atol=0)
    with pytest.raises(
        ConfigError, match="source_key: got 'code' for prompt 'maths/0', which was of 'maths' before"
    ):
        again.sources.note(["maths/0"], ["code"])


def test_a_belief_that_cannot_be_divided_by_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is left out; a column that was named is refused."""

    class Own:
        predict = predictive = advantages = update = state_dict = load_state_dict = None

    monkeypatch.setitem(BELIEFS.table, "own", Own)
    assert tracking(belief="own", source_key="data_source").sources is None
    with pytest.raises(
        ConfigError, match="^source: got one with belief 'own', a Own; expected a TableBelief"
    ):
        tracking(belief="own", source_key="topic")


def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "global_step_7"
    books = tracking()
    books.belief.update(["p"], torch.tensor([1.0]), step=1)
    save_state(folder, {"tracking": books.state_dict()})

    def dies(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(state_file, "save_file", dies)
    with pytest.raises(RunError, match="no space"):
        save_state(folder, {"tracking": {}})
    assert [path.name for path in folder.iterdir()] == [STATE_FILE]
    state = load_state(folder)
    assert state is not None
    again = tracking()
    again.load_state_dict(state["tracking"])
    assert again.belief.predict(["p"], step=2).mean == books.belief.predict(["p"], step=2).mean
    (folder / STATE_FILE).write_bytes(b"half")
    with pytest.raises(RunError, match="cannot be read"):
        load_state(folder)
    assert load_state(tmp_path) is None


def test_beliefs_by_the_name_of_the_estimator() -> None:
    one = {"source_key": None}
    assert type(make_tracking("k_grpo", read_settings(one)).belief) is type(make_belief("auto"))
    spo = make_tracking("spo", read_settings(one | {"belief_options": {"rho": 0.9}})).belief
    assert type(spo) is type(make_belief("spo"))
    assert type(tracking(belief="beta").belief) is type(make_belief("beta"))
    for settings, message in (
        ({"belief": "betta"}, "did you mean 'beta'"),
        ({"belief_options": {"q": 1}}, "belief option: got 'q' for auto"),
        ({"prompt_key": "index"}, "expected a list of columns"),
    ):
        with pytest.raises(ConfigError, match=message):
            tracking(**settings)


def test_weighted_metrics_are_divided_after_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo.v1 import PPOTrainerSync

    from kalman_rl.hosts.verl.trainer import KalmanPPOTrainer

    def update(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        metrics |= {"actor/weighted/trust/kept": 0.2, "actor/weighted/tokens": 0.25, "actor/lr": 0.1}
        return batch

    monkeypatch.setattr(PPOTrainerSync, "_update_actor", update)
    metrics = {"timing": 1.0}
    trainer = KalmanPPOTrainer.__new__(KalmanPPOTrainer)
    assert trainer._update_actor("batch", metrics) == "batch"
    assert metrics == {"timing": 1.0, "actor/lr": 0.1, "actor/trust/kept": 0.8}


# ---- inside verl


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the driver wrote."""
    build = pytest.importorskip("hatchling.build")
    folder = tmp_path_factory.mktemp("verl")
    here = Path.cwd()
    try:
        os.chdir(ROOT)
        wheel = folder / build.build_wheel(str(folder))
    finally:
        os.chdir(here)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if ".dist-info/" in name])
    path = os.pathsep.join([str(folder), str(ROOT / "src"), str(ROOT)])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # Ray starts many processes
    env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("VERL_USE_EXTERNAL_PLUGINS", None)
    command = [sys.executable, "-W", "ignore", str(HERE / "verl_driver.py"), str(folder / "out.json")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert (folder / "out.json").is_file(), run.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return found


def part(driven: dict[str, Any], name: str) -> Any:
    found = driven.get(name, {"ray": "did not start"})
    if isinstance(found, dict) and found.get("ray"):
        pytest.skip("Ray did not start on this machine")
    assert not (isinstance(found, dict) and "error" in found), found["error"]
    return found


pytestmark = pytest.mark.timeout(600)


@pytest.mark.slow
def test_verl_finds_the_plugin_in_a_ray_worker(driven: dict[str, Any]) -> None:
    """The worker does nothing but ``import verl``; our trainer is not loaded there."""
    found = part(driven, "plugin")
    names = {f"kalman_rl/{name}" for name in METHODS}
    assert set(found["losses"]) == names
    assert set(found["estimators"]) == names | {"kalman_rl/tracked"}
    assert not found["trainer"]


@pytest.mark.slow
def test_verl_takes_the_trainer_for_its_synchronous_one(driven: dict[str, Any]) -> None:
    for step in part(driven, "steps"):
        assert step["mode"] == ["sync", "ReplayBuffer"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "equal"), [("steps", True), ("fixed", False)])
def test_advantages_are_the_beliefs(driven: dict[str, Any], name: str, equal: bool) -> None:
    """What verl's actor would read from the queue, recomputed from the rewards alone."""
    belief = make_belief("auto")
    for number, step in enumerate(part(driven, name), start=1):
        rows = [i for i, padding in enumerate(step["padding"]) if not padding]
        names = [step["name"][i] for i in rows]
        reward = torch.tensor([step["reward"][i] for i in rows], dtype=torch.float64)
        expected = belief.advantages(names, reward, step=number).advantage
        belief.update(names, reward, step=number)
        if equal:
            size = Counter(names)
            expected = expected * torch.tensor([len(names) / len(size) / size[name] for name in names])
        found = [step["advantage"][i] for i in rows]
        assert all(len(values) == 1 for values in found), "one advantage for all tokens of a completion"
        torch.testing.assert_close(torch.tensor(found)[:, 0], expected.float(), rtol=1e-6, atol=1e-7)
        assert expected.abs().max() > 0.1


@pytest.mark.slow
def test_prompts_are_drawn_from_the_belief_after_the_last_step(driven: dict[str, Any]) -> None:
    """Replayed by hand, with unbiased weights; the last two steps are those of a run and of its resumed checkpoint."""
    steps = part(driven, "drawn")
    belief = make_belief("auto")
    names, prompts = ["toy/0", "toy/1", "toy/2"], ["easy", "hard", "mixed"]
    stream = PromptStream(belief, names, 3, most=8, weights="unbiased", seed=5)
    for number, step in enumerate(steps[:-1], start=1):
        batch = stream.draw(step=number)
        drawn = [prompts[i] for i in batch.place.tolist()]
        assert Counter(name for name, _ in step["sessions"]) == Counter(drawn * 4)
        told = [f"toy/{prompts.index(name)}" for name in step["name"]]
        reward = torch.tensor(step["reward"], dtype=torch.float64)
        weight = dict(zip(drawn, batch.weight.tolist(), strict=True))
        expected = belief.advantages(told, reward, step=number).advantage
        expected *= torch.tensor([weight[name] for name in step["name"]], dtype=torch.float64)
        belief.update(told, reward, step=number)
        found = torch.tensor([values[0] for values in step["advantage"]])
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-7)
    assert Counter(steps[5]["name"])["mixed"] > 6  # of 12: the one prompt that teaches is drawn twice or more
    assert sorted(steps[-1]["name"]) == sorted(steps[-2]["name"])


@pytest.mark.slow
def test_priors_decide_the_first_batch(driven: dict[str, Any]) -> None:
    assert Counter(part(driven, "prior")[0]["name"])["mixed"] > 6


@pytest.mark.slow
def test_padding_gets_no_advantage(driven: dict[str, Any]) -> None:
    for step in part(driven, "steps"):
        padding = [values for values, yes in zip(step["advantage"], step["padding"], strict=True) if yes]
        assert len(padding) == 4 and all(values == [0.0] for values in padding)


@pytest.mark.slow
def test_counts_reach_verls_rollout_worker(driven: dict[str, Any]) -> None:
    """verl's own worker runs as many sessions as the belief asks for, twelve in all; most go to the mixed prompt."""
    counts = [Counter(name for name, _ in step["sessions"]) for step in part(driven, "steps")]
    assert [sum(count.values()) for count in counts] == [12] * len(counts)
    assert set(counts[0].values()) == {4}, "nothing is known at first"
    assert counts[-1]["mixed"] > 2 * max(counts[-1]["easy"], counts[-1]["hard"]) > 0
    for step, count in zip(part(driven, "steps"), counts, strict=True):
        assert set(map(tuple, step["sessions"])) == {(name, i) for name in count for i in range(count[name])}
        assert step["metrics"]["budget/used"] == 12 and step["metrics"]["budget/largest"] == max(
            count.values()
        )
    for step in part(driven, "fixed"):
        assert set(Counter(name for name, _ in step["sessions"]).values()) == {4}


@pytest.mark.slow
def test_a_batch_is_chosen_among_candidates(driven: dict[str, Any]) -> None:
    """verl's loader brings three prompts, its worker samples two completions of one or two of them, and the replay
    buffer waits for those alone. Who was passed over comes back."""
    steps = part(driven, "candidates")
    counts = [Counter(name for name, _ in step["sessions"]) for step in steps]
    assert [sum(count.values()) for count in counts] == [2] * 8
    assert set(counts[0]) | set(counts[1]) == {"easy", "hard", "mixed"}, "who was never visited comes first"
    for step, count in zip(steps, counts, strict=True):
        assert Counter(step["name"]) == count
        used = {name: step["metrics"][f"budget/{name}"] for name in ("used", "saved", "prompts")}
        assert used == {"used": 2, "saved": 0, "prompts": len(count)}


@pytest.mark.slow
def test_metrics_have_trls_names(driven: dict[str, Any]) -> None:
    names = {"budget/used", "budget/saved", "budget/prompts", "budget/largest", "groups/informative"}
    names |= {
        "belief/coverage_90",
        "belief/retired",
        "belief/returned",
        "belief/noise_factor",
        "belief/informative",
    }
    assert set(part(driven, "steps")[0]["metrics"]) >= names


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one(driven: dict[str, Any]) -> None:
    found = part(driven, "checkpoints")
    assert found["files"] == ["actor", "data.pt", STATE_FILE] and found["loaded_step"] == 2
    assert found["resumed"][0] == found["resumed"][1]
    assert found["counts"][0] == found["counts"][1] and len(set(found["counts"][0].values())) > 1


@pytest.mark.slow
def test_a_crash_between_the_two_writes(driven: dict[str, Any]) -> None:
    """verl's workers die while step 4 is saved: the run goes on from step 2 with step 2's belief."""
    found = part(driven, "checkpoints")
    assert found["crash"] == "the machine went away" and found["after_crash"]
    assert found["resumed_at"] == 2 and found["known"] == 3 and not found["warned"]
    assert found["fresh"] == 0
    (warning,) = found["warned_fresh"]
    assert "got a checkpoint without beliefs" in warning


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("estimator", "got 'grpo' with trainer_mode=kalman_rl, expected one of kalman_rl/tracked"),
        ("filter", "algorithm.filter_groups.enable: got true"),
        ("unknown", "did you mean 'allocation'"),
        ("rounds", "expected fixed or predictive"),
        ("belief", "expected 'spo'"),
        ("kl", "reward_range=real"),
        ("clip", "policy_loss.options.clip_ratio_low=0.1"),
        ("norm", "algorithm.norm_adv_by_std_in_grpo: got False"),
        ("bypass", "algorithm.rollout_correction.rollout_is: got 'token' in bypass mode"),
        ("same index", "got 'toy/0' for two different prompts"),
        ("no column", "which has no question_id"),
    ],
)
def test_settings_that_do_not_go_together(driven: dict[str, Any], case: str, message: str) -> None:
    found = part(driven, "refusals")[case]
    assert found.startswith("ConfigError") and message in found
