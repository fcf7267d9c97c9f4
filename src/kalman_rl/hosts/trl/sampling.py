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
    found = biased({name: getattr(args, name, None) for name in OF_TRL})
    given = getattr(args, "generation_kwargs", None) or {}
    _judge(refusals(found | biased(given), "", method), args, named)
    if not has_ratio(method):
        return
    wanted = {"temperature": args.temperature, "do_sample": True}  # as the loss has it
    other = {
        f"generation_kwargs {name}": (given[name], wanted[name]) for name in wanted.keys() & given.keys()
    }
    if getattr(args, "use_vllm", False):
        other[REGEX] = getattr(args, REGEX, None), None
    texts = [
        f"{name}: got {quote(value)} with method {quote(method.name)}, expected {right} {WHY}"
        for name, (value, right) in other.items()
        if value != right
    ]
    _judge(texts, args, named)


def check_own_sampling(method: Method, args: Any, model: Any, *, named: bool = True) -> None:
    """The same for what the model's ``generation_config`` brings along, where TRL leaves a setting open."""
    if getattr(args, "use_vllm", False):  # TRL sends it all settings, the model's do not count
        return
    given = getattr(args, "generation_kwargs", None) or {}
    shut = {name for name in OF_TRL if getattr(args, name, None) is not None} | given.keys()
    own = {name: value for name, value in own_sampling(model).items() if name not in shut}
    _judge(refusals(own, "the model's generation_config.", method), args, named)


def _judge(texts: Iterable[str], args: Any, named: bool) -> None:
    if getattr(args, "allow_biased_sampling", False):
        return
    for text in texts:
        if named:
            raise ConfigError(f"{text}; leave it out, or set allow_biased_sampling=True")
        logger.warning("%s", text)
