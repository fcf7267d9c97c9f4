"""Methods that need more than TRL gives, inside the trainer; and every method on the embedded tiny model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
from datasets import Dataset
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from kalman_rl import METHODS, make_method
from kalman_rl.engine.models.load import load_model
from kalman_rl.engine.tasks import load_task
from kalman_rl.errors import ConfigError, RunError
from kalman_rl.hosts.state import STATE_FILE, load_state, save_state
from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer, TokenBatch
from kalman_rl.hosts.trl.config import check_combination
from kalman_rl.hosts.trl.forward import head_moments, next_tokens
from kalman_rl.objectives.inputs import inputs_of
from kalman_rl.objectives.learning import LearnedState, step_statistics
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.objectives.trust.clip import Clip
from kalman_rl.objectives.trust.curvature import CurvatureMask
from tests.hosts.test_trl import (
    assert_same_training,
    model_path,
    ours,
    run,
    settings,
    two_ranks,
)

__all__ = ["model_path"]  # a fixture


def seen_by(output: Path, model_path: str, method: Any, **changes: Any) -> list[TokenBatch]:
    seen: list[TokenBatch] = []
    config = KalmanGRPOConfig(**settings(output, **changes))
    run(KalmanGRPOTrainer, config, model_path, method=method, observers=[seen.append])
    return seen


# ---- batch-wide clip bounds


@pytest.mark.parametrize("name", ["bapo", "bapo_published"])
def test_bapo_does_not_depend_on_micro_batches(name: str, model_path: str, tmp_path: Path) -> None:
    """The same optimizer steps in one, two and four pieces: same bounds, same gradients."""
    method = make_method(name, target=0.95 if name == "bapo" else 5.0)
    runs = []
    for pieces in (1, 2, 4):
        changes = {
            "per_device_train_batch_size": 8 // pieces,
            "gradient_accumulation_steps": pieces,
            "steps_per_generation": 2 * pieces,
        }
        runs.append(ours(tmp_path / str(pieces), model_path, method, **changes)[1])
    bounds = [(log["trust/bound_low"], log["trust/bound_high"]) for log in runs[0].logs]
    assert any(pair != (0.6, 1.2) for pair in bounds), "the case needs a search that moves"
    for other in runs[1:]:
        assert_same_training(runs[0], other)
        for log, pair in zip(other.logs, bounds, strict=True):
            assert (log["trust/bound_low"], log["trust/bound_high"]) == pytest.approx(pair)


@dataclass(frozen=True)
class MeanBand:
    """A trust region that no host knows: the band is as wide as the tokens have moved on average in the step."""

    memory: ClassVar[float] = 0.0
    learned: ClassVar[tuple[str, ...]] = ("low", "high")

    def initial(self) -> Tensor:
        return torch.zeros(2, dtype=torch.float64)

    def statistics(self, ratio: Any, advantage: Tensor, current: Any, rollouts: Rollouts) -> Tensor:
        moved = (ratio.log_weight.double().abs() * rollouts.mask).sum()
        return torch.stack((moved, rollouts.mask.sum().double()))

    def fitted(self, state: Tensor) -> Clip:
        moved, tokens = state.tolist()
        return Clip(moved / tokens, moved / tokens)

    def __call__(self, ratio: Any, advantage: Tensor, current: Any, rollouts: Rollouts) -> Any:
        raise AssertionError("a host that forgot to choose the bounds of the step")


def test_a_trust_region_with_bounds_of_its_own_needs_no_host(model_path: str, tmp_path: Path) -> None:
    """Bounds come from all micro-batches of an optimizer step, as the pieces that an observer saw say."""
    seen: list[TokenBatch] = []
    method = dataclasses.replace(make_method("grpo"), name="mine", trust=MeanBand())
    changes = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
    }
    config = KalmanGRPOConfig(**settings(tmp_path, **changes))
    _, history = run(KalmanGRPOTrainer, config, model_path, method=method, observers=[seen.append])
    assert any(log["trust/bound_high"] > 1 for log in history.logs), "the case needs tokens that move"
    for step, log in enumerate(history.logs):
        pieces = [piece for piece in seen if piece.step == step]
        assert len(pieces) == 2
        parts = [(piece.loss.tokens.log_ratio.abs(), piece.rollouts.mask) for piece in pieces]
        moved = sum(float(change[mask].sum()) for change, mask in parts) / sum(int(m.sum()) for _, m in parts)
        assert log["trust/bound_high"] == pytest.approx(1 + moved, rel=1e-6)
        assert log["trust/bound_low"] == pytest.approx(1 - moved, rel=1e-6)


TO_BEHAVIOUR = [
    name
    for name in METHODS
    if "logp_behaviour" in inputs_of(make_method(name).ratio) and "top_logp" not in make_method(name).inputs
]


def test_vllm_passes_no_distributions_on(tmp_path: Path) -> None:
    config = KalmanGRPOConfig(**settings(tmp_path))
    check_combination(make_method("dppo_topk_tv"), config)
    config.use_vllm = True
    with pytest.raises(ConfigError, match=r"'dppo_topk_tv' for .* with vLLM, .* without top_behaviour \("):
        check_combination(make_method("dppo_topk_tv"), config)
    config.vllm_importance_sampling_correction = False
    check_combination(make_method("dppo_tv"), config)


@pytest.mark.parametrize("name", TO_BEHAVIOUR)
def test_trls_correction_is_not_applied_on_top_of_a_ratio_to_vllm(name: str, tmp_path: Path) -> None:
    """TRL corrects by default: what used to weigh the mismatch twice is refused, with both names."""
    config = KalmanGRPOConfig(**settings(tmp_path))
    config.use_vllm = True
    message = rf"^vllm_importance_sampling_correction: got True beside the ratio .* for method '{name}'"
    with pytest.raises(ConfigError, match=message):
        check_combination(make_method(name), config)


def test_bapo_refuses_steps_that_straddle_generations(model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gradient_accumulation_steps: got 4, expected a divisor"):
        ours(tmp_path, model_path, "bapo", gradient_accumulation_steps=4, steps_per_generation=2)


@pytest.mark.timeout(300)
def test_bapo_bounds_are_those_of_all_ranks(model_path: str, tmp_path: Path) -> None:
    """Two ranks, two micro-batches a step: both ranks use the bounds that all four pieces lead to."""
    body = """
    from kalman_rl import make_method
    seen = []
    pieces = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=4)
    config = t.KalmanGRPOConfig(**t.settings(out / "a", max_steps=2, **pieces))
    method = make_method("bapo", target=0.95)
    trainer, history = t.run(t.KalmanGRPOTrainer, config, model_path, method=method, observers=[seen.append])
    results["bounds"] = [(h["trust/bound_low"], h["trust/bound_high"]) for h in history.logs]
    results["pieces"] = [
        {
            "step": batch.step,
            "old": batch.rollouts.logp_old.tolist(),
            "logp": batch.logp.tolist(),
            "mask": batch.rollouts.mask.tolist(),
            "advantage": batch.inputs["advantages"].tolist(),
        }
        for batch in seen
    ]
    """
    ranks = two_ranks(body, model_path, tmp_path)
    assert ranks[0]["bounds"] == ranks[1]["bounds"]
    method = make_method("bapo", target=0.95)
    for step, (low, high) in enumerate(ranks[0]["bounds"]):
        pieces = [piece for rank in ranks for piece in rank["pieces"] if piece["step"] == step]
        assert len(pieces) == 4
        total = torch.zeros(0)
        for piece in pieces:
            rollouts = Rollouts(torch.tensor(piece["old"]), torch.tensor(piece["mask"]), allow_empty=True)
            advantage = torch.tensor(piece["advantage"])
            part = step_statistics(method, rollouts, torch.tensor(piece["logp"]), advantage=advantage)
            assert part is not None
            total = part if not len(total) else total + part
        found = method.trust.fitted(total)
        assert (1 - found.low, 1 + found.high) == pytest.approx((low, high))
    assert any(pair != [0.6, 1.2] for pair in ranks[0]["bounds"]), "the case needs a search that moves"


# ---- distributions


def test_next_tokens_are_the_models_softmax(model_path: str) -> None:
    model = LlamaForCausalLM.from_pretrained(model_path).eval()
    ids = torch.randint(3, 14, (5, 9))
    ids[0, :2] = 0  # left padding
    inputs = {
        "prompt_ids": ids[:, :4],
        "prompt_mask": (ids[:, :4] != 0).long(),
        "completion_ids": ids[:, 4:],
        "completion_mask": torch.ones(5, 5, dtype=torch.long),
    }
    found = next_tokens(model, inputs, top_k=3, temperature=0.7, hidden=True, rows=2)
    with torch.no_grad():
        logits = model(ids, attention_mask=(ids != 0).long()).logits[:, 3:-1] / 0.7
    probability = torch.softmax(logits.double(), -1)
    sampled = probability.gather(-1, ids[:, 4:, None])[..., 0]
    torch.testing.assert_close(found.logp.double().exp(), sampled, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum_pi_squared.double(), (probability**2).sum(-1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        found.top_logp.double().exp(), probability.gather(-1, found.top_ids), rtol=1e-5, atol=1e-7
    )
    assert (found.top_ids == ids[:, 4:, None]).sum(-1).eq(1).all(), "the sampled token, exactly once"
    assert found.hidden is not None
    head = model.get_output_embeddings().weight
    torch.testing.assert_close((found.hidden @ head.T).double(), logits.double(), rtol=1e-4, atol=1e-5)
    again = next_tokens(model, inputs, top_k=9, temperature=0.7, top_ids=found.top_ids)
    torch.testing.assert_close(again.top_logp, found.top_logp)


@pytest.mark.parametrize("name", ["dppo_topk_tv", "dppo_topk_kl"])
def test_whole_vocabulary_is_never_stricter_than_binary(name: str, model_path: str, tmp_path: Path) -> None:
    """binary <= top-k: with one threshold, whatever the binary divergence drops, the top-k one drops too."""
    options = {"low": 0.002, "high": 0.002}
    fine = seen_by(
        tmp_path / "a", model_path, make_method(name, **options), top_k_distribution=14, max_steps=2
    )
    coarse = seen_by(
        tmp_path / "b", model_path, make_method(name.replace("_topk", ""), **options), max_steps=2
    )
    first, second = fine[1], coarse[1]
    assert torch.equal(first.rollouts.logp_old, second.rollouts.logp_old), "the first step differs already"
    assert not (first.loss.tokens.kept & ~second.loss.tokens.kept).any()
    assert 0 < first.loss.metrics["trust/kept"] < 1
    assert first.rollouts.logp_behaviour is not None
    assert torch.equal(first.rollouts.logp_behaviour, first.rollouts.logp_old)  # no engine but the trainer's


def test_otb_needs_no_more_than_the_trainer_makes(model_path: str, tmp_path: Path) -> None:
    batch = seen_by(tmp_path, model_path, "otb", max_steps=1)[0]
    advantage = batch.inputs["advantages"]
    assert advantage.shape == batch.rollouts.mask.shape
    rows = batch.rollouts.mask.sum(1) > 1
    assert (advantage[rows, 0] != advantage[rows, 1]).any(), "one baseline per position"


# ---- curvature


def test_capo_with_infinite_bounds_is_grpo(model_path: str, tmp_path: Path) -> None:
    _, free = ours(tmp_path / "a", model_path, make_method("capo", objective=math.inf, policy=math.inf))
    _, grpo = ours(tmp_path / "b", model_path, "grpo")
    assert_same_training(free, grpo)


def test_capo_reads_adams_moments_and_drops_more_at_a_higher_rate(model_path: str, tmp_path: Path) -> None:
    kept = []
    for rate in (1e-3, 1e-1):
        method = make_method("capo", objective=1.0, policy=0.01)
        trainer, history = ours(
            tmp_path / str(rate), model_path, method, learning_rate=rate, lr_scheduler_type="constant"
        )
        kept.append(history.logs[0]["trust/kept"])
        moments = head_moments(trainer.model, trainer.optimizer)
        assert moments is not None and moments.steps == 4
    assert kept[1] < kept[0]
    assert isinstance(method.trust, CurvatureMask)


# ---- corrections


def test_correction_by_name_reaches_the_method(model_path: str, tmp_path: Path) -> None:
    """Without an engine of its own the behaviour policy is the old policy: every factor is 1 and nothing changes."""
    settled = {"correction": "truncated", "correction_options": {"cap": 1.5, "level": "sequence"}}
    trainer, corrected = ours(tmp_path / "a", model_path, "grpo", **settled)
    assert trainer.method.correction.cap == 1.5
    assert corrected.logs[-1]["correction/mean"] == 1
    _, plain = ours(tmp_path / "b", model_path, "grpo")
    assert_same_training(corrected, plain)
    with pytest.raises(ConfigError, match="correction: got 'trunkated', .*did you mean 'truncated'"):
        ours(tmp_path / "c", model_path, "grpo", correction="trunkated")
    with pytest.raises(ConfigError, match="mismatch would count twice"):
        ours(tmp_path / "d", model_path, "dppo_tv", correction="truncated")


# ---- what is learned, and what a checkpoint holds


def test_learning_is_the_same_however_a_step_is_cut() -> None:
    clip = make_method("bapo", target=0.9)
    learning = LearnedState(clip, lambda total: 2 * total)  # two ranks that saw the same
    statistics = torch.rand(37 + 16, dtype=torch.float64)
    found = learning.with_bounds(statistics).trust
    assert isinstance(found, Clip) and found == learning.with_bounds(2 * statistics).trust
    assert learning.with_bounds(None) is clip and learning.state_dict() == {}


def test_state_file_round_trip(tmp_path: Path) -> None:
    state = {
        "a": torch.arange(3.0),
        "nested": {"b": [1, 2.5, "x", None, True], ("tuple", 1): torch.zeros(2, dtype=torch.float64)},
        "ids": [("p", 1), "q", 7],
        7: "seven",
    }
    save_state(tmp_path, state)
    back = load_state(tmp_path)
    assert back is not None
    assert torch.equal(back["a"], state["a"]) and back["ids"] == state["ids"] and back[7] == "seven"
    assert back["nested"]["b"] == state["nested"]["b"]
    assert back["nested"][("tuple", 1)].dtype == torch.float64
    assert load_state(tmp_path / "nowhere") is None
    (tmp_path / STATE_FILE).write_bytes(b"\x07" * 40)
    with pytest.raises(RunError, match="cannot be read"):
        load_state(tmp_path)
    save_file({"x": torch.zeros(1)}, str(tmp_path / STATE_FILE), metadata={"kalman_rl": '{"format": 99}'})
    with pytest.raises(RunError, match="got format 99, expected 1"):
        load_state(tmp_path)


LEARNERS = [name for name in METHODS if "ratio" in make_method(name).learns]


@pytest.mark.parametrize("name", LEARNERS)
def test_learned_state_survives_a_resume(name: str, model_path: str, tmp_path: Path) -> None:
    whole, _ = ours(tmp_path / "a", model_path, name, max_steps=6)
    ours(tmp_path / "b", model_path, name, max_steps=6, save_strategy="steps", save_steps=4)
    point = tmp_path / "b" / "checkpoint-4"
    resumed, _ = ours(tmp_path / "b", model_path, name, checkpoint=point, max_steps=6)
    assert whole.learning.state is not None and resumed.learning.state is not None
    assert torch.equal(whole.learning.state, resumed.learning.state)
    assert whole.learning.now == resumed.learning.now
    # kpo_noise has nothing to learn where trainer and behaviour policy are one; kpo_robust waits for more tokens.
    assert bool(whole.learning.state.abs().sum() > 0) == (name != "kpo_noise")
    assert (whole.learning.now != whole.method) == (name == "kpo_auto")
    for (key, left), right in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), key


# ---- the embedded model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny model of ``kalman-rl train --model tiny``, warm-started once for these tests."""
    task = load_task("sort12", train_size=512, test_size=8, seed=0)
    cache = tmp_path_factory.mktemp("cache")
    loaded = load_model("tiny", cache=cache, dtype="float32", task=task, seed=0, progress=lambda text: None)
    weights = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    return task, loaded, weights


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_the_tiny_model_for_20_steps(name: str, tiny: Any, tmp_path: Path) -> None:
    task, loaded, weights = tiny
    loaded.model.load_state_dict(weights)
    config = KalmanGRPOConfig(
        **settings(
            tmp_path,
            max_steps=20,
            per_device_train_batch_size=16,
            steps_per_generation=4,
            max_completion_length=task.max_completion_tokens,
            learning_rate=1e-4,
            method=name,
        )
    )
    metrics: list[dict[str, torch.Tensor]] = []
    trainer = KalmanGRPOTrainer(
        model=loaded.model,
        reward_funcs=task.reward,
        args=config,
        train_dataset=Dataset.from_list(task.train),
        processing_class=loaded.tokenizer,
        observers=[lambda batch: metrics.append(batch.loss.metrics)],
    )
    trainer.train()
    assert trainer.state.global_step == len(metrics) == 20
    for step in metrics:
        for key, value in step.items():
            assert torch.isfinite(value), key
    moved = [not torch.equal(value, weights[key]) for key, value in loaded.model.state_dict().items()]
    assert any(moved), "20 steps changed nothing"
    assert all(torch.isfinite(value).all() for value in loaded.model.state_dict().values())
