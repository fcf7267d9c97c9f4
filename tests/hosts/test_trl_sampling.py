"""What is sampled from is what the ratio divides by: temperature on both sides, nothing cut off unless asked for."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from transformers import GenerationConfig

from kalman_rl import make_method
from kalman_rl.errors import ConfigError
from kalman_rl.hosts.sampling import NEUTRAL, drop_own_sampling, own_sampling
from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer, TokenBatch
from kalman_rl.hosts.trl import trainer as module
from kalman_rl.hosts.trl.retention import keep_newest
from kalman_rl.hosts.trl.sampling import check_own_sampling, check_sampling
from tests.hosts.test_trl import ROWS, digit_sum, settings
from tests.hosts.tiny_llama import model, tokenizer

BIASING = {
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "top_h": 0.5,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]],
    "bad_words": ["no"],
    "sequence_bias": [[[3], -1.0]],
    "logit_bias": {3: 1.0},
    "allowed_token_ids": [3, 4],
    "exponential_decay_length_penalty": (2, 1.5),
    "min_length": 2,
    "min_new_tokens": 2,
    "min_tokens": 2,
    "num_beams": 2,
    "guidance_scale": 1.5,
    "suppress_tokens": [3],
    "begin_suppress_tokens": [3],
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 3,
    "encoder_repetition_penalty": 1.1,
    "encoder_no_repeat_ngram_size": 2,
    "token_healing": True,
    "watermarking_config": {"greenlist_ratio": 0.25},
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": ["a constraint"],
    "force_words_ids": [[3]],
    "structured_outputs": {"regex": "[0-9]+"},
    "guided_decoding": {"regex": "[0-9]+"},
    "logits_processors": ["a processor"],
    "use_beam_search": True,
    "best_of": 2,
}
UNBIASED = {
    *(
        "max_length",
        "max_new_tokens",
        "max_time",
        "stop_strings",
        "num_return_sequences",
        "length_penalty",
        "early_stopping",
    ),
    *(
        "use_cache",
        "cache_implementation",
        "cache_config",
        "prefill_chunk_size",
        "compile_config",
        "disable_compile",
    ),
    *("low_memory", "continuous_batching_config", "remove_invalid_values", "renormalize_logits"),
    *(
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
    ),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit"),
    *(
        "assistant_lookbehind",
        "target_lookbehind",
    ),  # drafts are accepted without a bias
    *(
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
    ),
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("do_sample", "temperature"),  # the trainer sets them, see the test of generation_kwargs
    *("_commit_hash", "_from_model_config", "transformers_version", "_original_object_hash"),
}


def config(output: Path, **changes: Any) -> KalmanGRPOConfig:
    return KalmanGRPOConfig(**settings(output, **changes))


def trainer(args: KalmanGRPOConfig, policy: Any = None, **options: Any) -> KalmanGRPOTrainer:
    return KalmanGRPOTrainer(
        model=policy or model(),
        reward_funcs=digit_sum,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
        **options,
    )


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_biases_a_ratio_is_refused(tmp_path: Path, name: str) -> None:
    """As a field of the settings where TRL has one, else among its generation_kwargs."""
    field = hasattr(config(tmp_path), name)
    args = config(
        tmp_path, **{name: BIASING[name]} if field else {"generation_kwargs": {name: BIASING[name]}}
    )
    for method in ("grpo", "gspo", "kpo_diffuse", "cispo"):
        with pytest.raises(ConfigError, match=rf"^{name}: got .* with method '{method}', expected .* biases"):
            check_sampling(make_method(method), args)
    check_sampling(make_method("reinforce"), args)  # no ratio
    args.allow_biased_sampling = True
    check_sampling(make_method("grpo"), args)


def test_every_neutral_value_is_accepted(tmp_path: Path) -> None:
    for name, values in NEUTRAL.items():
        for value in values:
            args = config(tmp_path, generation_kwargs={name: value})
            args.use_vllm = (name, value) == ("top_k", None)  # transformers makes 50 of it
            check_sampling(make_method("grpo"), args)


def test_generation_kwargs_lie_over_the_trainers_own_settings(tmp_path: Path) -> None:
    check_sampling(make_method("grpo"), config(tmp_path, top_p=0.9, generation_kwargs={"top_p": 1.0}))
    with pytest.raises(ConfigError, match=r"^top_k: got None .* expected 0 "):
        check_sampling(make_method("grpo"), config(tmp_path, generation_kwargs={"top_k": None}))
    policy = model()
    policy.generation_config.repetition_penalty = 1.3
    args = config(tmp_path, generation_kwargs={"repetition_penalty": None})  # which leaves it to the model
    with pytest.raises(ConfigError, match=r"^the model's generation_config.repetition_penalty: got 1.3"):
        check_own_sampling(make_method("grpo"), args, policy)


def test_every_setting_of_transformers_is_known() -> None:
    """A new one is looked at: does it change what is sampled from?"""
    assert set(vars(GenerationConfig())) - set(NEUTRAL) - UNBIASED == set()


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.3), ("do_sample", False)])
def test_generation_kwargs_do_not_sample_from_something_else_than_the_loss(
    tmp_path: Path, name: str, value: Any
) -> None:
    """They are laid over the trainer's own settings, of which the loss knows the temperature."""
    args = config(tmp_path, temperature=0.7, generation_kwargs={name: value})
    with pytest.raises(ConfigError, match=rf"^{name}: got {value} .* biases"):
        check_sampling(make_method("grpo"), args)
    check_sampling(make_method("reinforce"), args)
    check_sampling(
        make_method("grpo"),
        config(tmp_path, temperature=0.7, generation_kwargs={"temperature": 0.7, "do_sample": True}),
    )
    args.allow_biased_sampling = True
    check_sampling(make_method("grpo"), args)


def test_a_regex_of_vllm_is_refused(tmp_path: Path) -> None:
    args = config(tmp_path, vllm_structured_outputs_regex="[0-9]+")
    check_sampling(make_method("grpo"), args)  # it is vLLM's alone
    args.use_vllm = True
    with pytest.raises(ConfigError, match=r"^vllm_structured_outputs_regex: got '\[0-9\]\+' .* biases"):
        check_sampling(make_method("grpo"), args)


def test_the_trainer_refuses_and_trls_own_settings_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"^top_p: got 0.9 .* set allow_biased_sampling=True"):
        trainer(config(tmp_path, method="grpo", top_p=0.9))
    with caplog.at_level(logging.WARNING):
        trainer(config(tmp_path, top_p=0.9))  # TRL's trainer trains like this
    assert "top_p: got 0.9" in caplog.text
    trainer(config(tmp_path, method="grpo", top_p=0.9, allow_biased_sampling=True))


def test_what_the_model_brings_along_is_refused_too(tmp_path: Path) -> None:
    """transformers takes what TRL leaves unset from the model's own generation_config."""
    policy = model()
    policy.generation_config.min_p = 0.2
    policy.generation_config.repetition_penalty = 1.3  # TRL sets this one
    with pytest.raises(ConfigError, match=r"^the model's generation_config.min_p: got 0.2"):
        trainer(config(tmp_path, method="grpo"), policy)
    trainer(config(tmp_path, method="grpo", min_p=0.0), policy)
    assert own_sampling(policy) == {"min_p": 0.2, "repetition_penalty": 1.3}
    assert drop_own_sampling(policy) == {"min_p": 0.2, "repetition_penalty": 1.3}
    assert own_sampling(policy) == {}
    trainer(config(tmp_path, method="grpo"), policy)


def test_on_policy_the_ratio_is_one_at_temperature_07(tmp_path: Path) -> None:
    """The sampler's own probabilities, the old policy's and the loss's agree to a ratio of 1 +- 1e-6."""
    policy, sampled, seen = model().double(), [], []
    generate = policy.generate

    def noted(**options: Any) -> torch.Tensor:
        found = generate(**options, output_scores=True, return_dict_in_generate=True)
        logp = torch.stack(found.scores, dim=1).log_softmax(-1)
        tokens = found.sequences[:, -logp.shape[1] :]
        sampled.append((found.sequences, logp.gather(-1, tokens[..., None]).squeeze(-1)))
        return found.sequences

    def observe(batch: TokenBatch) -> None:
        ids = torch.cat([batch.inputs["prompt_ids"], batch.inputs["completion_ids"]], dim=1)
        seen.append((ids, batch.rollouts, batch.logp, batch.loss.tokens.log_ratio))

    policy.generate = noted
    args = config(tmp_path, method="grpo", temperature=0.7, max_steps=1)
    trainer(args, policy, observers=[observe]).train()
    ((sequences, behaviour),), ((ids, rollouts, logp, log_ratio), *_) = sampled, seen
    place = {tuple(row.tolist()): i for i, row in enumerate(sequences)}
    rows = [place[tuple(row.tolist())] for row in ids]
    assert len(ids) == 8 and rollouts.mask.any(dim=1).all()
    for ours in (rollouts.logp_old, logp):
        ratio = (ours.double() - behaviour[rows]).exp()[rollouts.mask]
        assert (ratio - 1).abs().max() < 1e-6
    assert (log_ratio.exp() - 1).abs().max() < 1e-6
    assert behaviour[rows][rollouts.mask].mean() < -1, (
        "far from certain, so that another temperature would show"
    )


# Retention of TRL's trainer


def folders(place: Path, *steps: int) -> None:
    for step in steps:
        (place / f"checkpoint-{step}").mkdir(parents=True)
        (place / f"checkpoint-{step}" / "x").write_text("x")


def left(place: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in place.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("limit", "best", "stay"),
    [
        (None, None, [2, 4, 6, 8, 20]),
        (3, None, [4, 6, 8, 20]),
        (1, None, [8, 20]),
        (2, 2, [2, 8, 20]),
        (1, 2, [2, 8, 20]),
        (2, 8, [6, 8, 20]),
    ],
)
def test_retention_goes_by_step(tmp_path: Path, limit: int | None, best: int | None, stay: list[int]) -> None:
    """Made in reverse order, so that by modification time the newest would go first; 20 is of a longer run."""
    folders(tmp_path, 20, 8, 6, 4, 2)
    keep_newest(
        tmp_path / "checkpoint-8", limit, None if best is None else str(tmp_path / f"checkpoint-{best}")
    )
    assert left(tmp_path) == stay


def test_the_trainer_keeps_the_newest_with_the_clock_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, ages = module.save_state, []

    def dated(folder: Path, state: Any) -> None:
        save(folder, state)
        ages.append(folder)
        os.utime(folder, (1_000_000_000 - len(ages),) * 2)

    monkeypatch.setattr(module, "save_state", dated)
    args = config(tmp_path, method="grpo", save_strategy="steps", save_steps=1, save_total_limit=2)
    made = trainer(args)
    made.train()
    assert left(tmp_path) == [3, 4] and len(ages) == 4 and made.args.save_total_limit == 2
