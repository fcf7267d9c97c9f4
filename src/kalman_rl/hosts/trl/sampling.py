"""What the trainer's settings and the model say about sampling, beside a method with a ratio."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kalman_rl.errors import ConfigError, quote
from kalman_rl.hosts.sampling import WHY, biased, has_ratio, own_sampling, refusals
from kalman_rl.objectives.loss import Method
from kalman_rl.terminal import logger

OF_TRL = ("top_p", "top_k", "min_p", "repetition_penalty")
"""Those that GRPOConfig has as fields; the others may stand in its ``generation_kwargs``."""
REGEX = "vllm_structured_outputs_regex"


def check_sampling(method: Method, args: Any, *, named: bool = True) -> None:
    """Refuse settings of the trainer that sample from a part of the distribution beside a method with a ratio.

    Args:
        named: the method was named. TRL's own settings train as TRL would, with a warning.

    Raises: ConfigError, unless ``args.allow_biased_sampling``.
    """
    asked = _asked(args)
    texts = list(refusals(biased(asked), "", method))
    wanted: dict[str, Any] = {"temperature": args.temperature, "do_sample": True}  # as the loss has it
    if getattr(args, "use_vllm", False):
        asked[REGEX], wanted[REGEX] = getattr(args, REGEX, None), None
    elif asked["top_k"] is None:
        wanted["top_k"] = 0  # transformers makes 50 of None
    if has_ratio(method):
        texts += [
            f"{name}: got {quote(asked[name])} with method {quote(method.name)}, expected {value} {WHY}"
            for name, value in wanted.items()
            if asked[name] != value
        ]
    _judge(texts, args, named)


def check_own_sampling(method: Method, args: Any, model: Any, *, named: bool = True) -> None:
    """The same for what the model's ``generation_config`` brings along, where TRL leaves a setting open."""
    if getattr(args, "use_vllm", False):  # TRL sends it all settings, the model's do not count
        return
    asked = _asked(args)
    own = {name: value for name, value in own_sampling(model).items() if asked.get(name) is None}
    _judge(refusals(own, "the model's generation_config.", method), args, named)


def _asked(args: Any) -> dict[str, Any]:
    """What TRL hands on to the sampler: its own settings, and ``generation_kwargs`` over them."""
    own = {name: getattr(args, name, None) for name in (*OF_TRL, "temperature")}
    return own | {"do_sample": True} | (getattr(args, "generation_kwargs", None) or {})


def _judge(texts: Iterable[str], args: Any, named: bool) -> None:
    if getattr(args, "allow_biased_sampling", False):
        return
    for text in texts:
        if named:
            raise ConfigError(f"{text}; leave it out, or set allow_biased_sampling=True")
        logger.warning("%s", text)
