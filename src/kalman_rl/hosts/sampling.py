"""Sampling from a part of the distribution: a ratio divides probabilities of the whole one.

Temperature is no such setting, because it is applied to the log-probabilities of the loss too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kalman_rl.errors import quote
from kalman_rl.objectives import ratio
from kalman_rl.objectives.loss import Method

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (None, 1.0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "frequency_penalty": (None, 0.0),
    "presence_penalty": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "bad_words": (None, []),
    "sequence_bias": (None,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "exponential_decay_length_penalty": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "min_tokens": (None, 0),
    "num_beams": (None, 1),
    "guidance_scale": (None, 1),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "token_healing": (None, False),
    "watermarking_config": (None,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "constraints": (None, []),
    "force_words_ids": (None, []),
    "structured_outputs": (None,),
    "guided_decoding": (None,),
    "logits_processors": (None, []),
    "use_beam_search": (None, False),
    "best_of": (None, 1),
}
"""Settings of transformers and vLLM that change what is sampled from, and their values that do not."""
WHY = (
    "because completions then come from another distribution than the one whose probabilities the ratio divides, which "
    "biases every weight"
)


def biased(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change what is sampled from.

    >>> biased({"top_p": 0.9, "top_k": 0, "temperature": 0.7})
    {'top_p': 0.9}
    """
    return {name: settings[name] for name in NEUTRAL if settings.get(name) not in NEUTRAL[name]}


def own_sampling(model: Any) -> dict[str, Any]:
    """What a model's ``generation_config`` changes about the distribution that is sampled from."""
    config = getattr(model, "generation_config", None)
    return {} if config is None else biased({name: getattr(config, name, None) for name in NEUTRAL})


def drop_own_sampling(model: Any) -> dict[str, Any]:
    """Unset every setting of :func:`own_sampling`, in place; returns what they were."""
    found = own_sampling(model)
    for name in found:
        setattr(model.generation_config, name, None)
    return found


def has_ratio(method: Method) -> bool:
    """Whether a method weights tokens by a ratio.

    >>> from kalman_rl import make_method
    >>> has_ratio(make_method("grpo")), has_ratio(make_method("reinforce"))
    (True, False)
    """
    return method.ratio is not ratio.one or method.correction is not None


def refusals(found: Mapping[str, Any], place: str, method: Method) -> Iterator[str]:
    """One sentence for each of the settings ``found``, which stand at ``place``, beside a method with a ratio."""
    if not has_ratio(method):
        return
    for name, value in found.items():
        wanted = next((neutral for neutral in NEUTRAL[name] if neutral is not None), None)
        yield f"{place}{name}: got {quote(value)} with method {quote(method.name)}, expected {wanted} {WHY}"
